"""What running under Triton's interpreter takes, in Triton 3.6 and 3.9. Imported only there.

Uses names that Triton does not promise: `interpreter_builder`, its `options` and `_patch_lang` of
`triton.runtime.interpreter`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# Every 32-bit sum and product is computed again in 64 bits, for an assertion that only a debug build evaluates. Half of
# the interpreter's time goes there.
_builder = interpreter.interpreter_builder
if not _builder.options.debug:
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)

# A launch puts the interpreter's functions in the place of the language's, and every call of a function from a kernel
# does so again, which takes longer than most functions do. Once for each module and launch is enough.
_patch_lang = interpreter._patch_lang
_patched: set[int] = set()


def _patch_once(function: Any) -> Any:
    module = id(function.__globals__)
    if module in _patched:
        return None  # only a launch restores what it has changed
    _patched.add(module)
    scope = _patch_lang(function)
    restore = scope.restore

    def restore_at_the_end() -> None:
        _patched.clear()
        restore()

    scope.restore = restore_at_the_end
    return scope


interpreter._patch_lang = _patch_once


def loop_counts(scalars: dict[str, int | float]) -> dict[str, object]:
    """`scalars` with `steps` that ``range`` takes: Triton 3.6 has none at run time under NumPy 2.4."""
    return {name: tl.constexpr(value) if name.endswith("steps") else value for name, value in scalars.items()}
