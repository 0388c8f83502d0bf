"""`python -m cnnops`."""

import sys

from cnnops.cli import main

sys.exit(main())
