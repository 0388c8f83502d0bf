"""How fast is each kernel, beside its peers and the machine's own limit?

`timing.compare` is the one timing function, `results` the one file format, `report` the tables made of it,
`models.compare_models` a whole network's training step and inference beside its twin on torch.nn.
"""

from __future__ import annotations

from cnnops.bench.timing import Comparison, Spread, compare
from cnnops.bench.verify import Mismatch, agree

__all__ = ["Comparison", "Mismatch", "Spread", "agree", "compare"]
