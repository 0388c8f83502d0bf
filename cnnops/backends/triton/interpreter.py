"""What running under Triton's interpreter takes, in Triton 3.6 and 3.9. Imported only there.

Uses names that Triton does not promise: `triton.runtime.interpreter.interpreter_builder` and its `options`.
"""

from __future__ import annotations

import dataclasses

import triton.language as tl
from triton.runtime import interpreter

# Every 32-bit sum and product is computed again in 64 bits, for an assertion that only a debug build evaluates. Half of
# the interpreter's time goes there.
_builder = interpreter.interpreter_builder
if not _builder.options.debug:
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)


def loop_counts(scalars: dict[str, int | float]) -> dict[str, object]:
    """`scalars` with `steps` that ``range`` takes: Triton 3.6 has none at run time under NumPy 2.4."""
    return {name: tl.constexpr(value) if name.endswith("steps") else value for name, value in scalars.items()}
