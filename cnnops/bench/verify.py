"""Do two results agree as far as their arithmetic allows?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Mismatch(AssertionError):
    """A candidate's result is not its peer's."""


def tensors(result: object) -> list[Tensor]:
    """The tensors of a result: itself, or those of a tuple or list, without None."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors(part)]
    if result is None:
        return []
    raise TypeError(f"expected a result of tensors, but got {type(result).__name__}")


def bound(reference: Tensor, reduction: int) -> float:
    """Largest difference allowed between two correct results like `reference`, sums over `reduction` terms.

    Each side rounds its output once, eps(dtype) of the largest value, and accumulates in fp32 (fp64 for fp64), whose
    error grows with the square root of the terms where signs are random. Four times that for the two sides and their
    tails; a missing tap is off by about max / sqrt(reduction), which is far outside.
    """
    accumulate = torch.float64 if reference.dtype == torch.float64 else torch.float32
    eps = torch.finfo(reference.dtype).eps + torch.finfo(accumulate).eps * math.sqrt(max(reduction, 1))
    return 4 * eps * float(reference.abs().max()) if reference.numel() else 0.0


def agree(peer: str, reduction: int) -> Callable[[Mapping[str, object]], None]:
    """A `verify` for `timing.compare`: every candidate agrees with `peer`, which must be finite and not all zero.

    reduction: terms in the longest sum behind a value. Raises Mismatch with candidate, shapes and largest difference.
    """

    def verify(results: Mapping[str, object]) -> None:
        expected = tensors(results[peer])
        for tensor in expected:
            if not tensor.isfinite().all() or (tensor.numel() and not tensor.any()):
                raise Mismatch(f"{peer}: expected finite, non-zero values to compare with")
        for name, result in results.items():
            actual = tensors(result)
            if [t.shape for t in actual] != [t.shape for t in expected]:
                shapes = [list(t.shape) for t in actual], [list(t.shape) for t in expected]
                raise Mismatch(f"{name}: expected shapes {shapes[1]} as of {peer}, but got {shapes[0]}")
            for a, b in zip(actual, expected, strict=True):
                if a.dtype != b.dtype:
                    raise Mismatch(f"{name}: expected {b.dtype} as of {peer}, but got {a.dtype}")
                if not a.numel():
                    continue
                difference, allowed = float((a.detach() - b.detach()).abs().max()), bound(b.detach(), reduction)
                if not difference <= allowed:
                    raise Mismatch(
                        f"{name} differs from {peer} by {difference:.3g} in a result of {list(b.shape)}, "
                        f"expected at most {allowed:.3g}"
                    )

    return verify
