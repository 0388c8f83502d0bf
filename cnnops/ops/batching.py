"""Batching rules for ``torch.func.vmap``: how one call computes all samples.

A rule is ``rule(op, size, dims, *args) -> (results, their mapped axes)``. dims has an argument's mapped axis, of extent
`size`, or None where all samples share the argument. Most rules `fold` the mapped axis into one that the op treats
alike anyway (images, filters, groups, channels), call the op once and `unfold` its results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Dims = Sequence[int | None]
Rule = Callable[..., tuple[Any, Any]]


def fold(t: Tensor | None, dim: int | None, axis: int | None, size: int, groups: int = 1) -> Tensor | None:
    """`t` with its mapped axis merged into `axis`, sample by sample within each of `groups`.

    A tensor that the samples share is repeated; axis None leaves it alone.
    """
    if t is None or axis is None:
        return t
    samples = None if dim is None else t.movedim(dim, axis)
    if samples is not None and samples.stride(axis) == samples.shape[axis + 1] * samples.stride(axis + 1):
        folded = samples.flatten(axis, axis + 1)
    else:  # unlike a flattened copy, a concatenation is channels_last where its parts are
        folded = torch.cat([t] * size if dim is None else t.unbind(dim), axis)
    if groups > 1:
        each = folded.shape[axis] // (size * groups)
        folded = folded.unflatten(axis, (size, groups, each)).transpose(axis, axis + 1).flatten(axis, axis + 2)
    return folded


def unfold(t: Tensor | None, axis: int | None, size: int, groups: int = 1) -> tuple[Tensor | None, int | None]:
    """`fold` undone: a result with an axis of the samples of its own, and which that is."""
    if t is None or axis is None:
        return t, None
    each = t.shape[axis] // (size * groups)
    if groups > 1:
        return t.unflatten(axis, (groups, size, each)).transpose(axis, axis + 1).flatten(axis + 1, axis + 2), axis
    return t.unflatten(axis, (size, each)), axis


def along(axes: Sequence[int | None], results: tuple[int | None, ...] | int) -> Rule:
    """The rule that folds each tensor into its axis and finds the samples of each result along that result's axis."""

    def rule(op: Any, size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
        tensors = zip(args, dims, axes, strict=False)
        found = op(*[fold(t, dim, axis, size) for t, dim, axis in tensors], *args[len(axes) :])
        if isinstance(results, int):
            return unfold(found, results, size)
        y, y_dims = zip(*[unfold(t, axis, size) for t, axis in zip(found, results, strict=True)], strict=True)
        return y, y_dims

    return rule


def for_no_sample(op: Any, dims: Dims, *args: Any) -> tuple[Any, Any]:
    """What a call on no sample results in, by the call on one of zeros: it checks the arguments and knows the shapes."""
    found = op(*[t if dim is None else _zeros(t, dim) for t, dim in zip(args, dims, strict=True)])
    if isinstance(found, Tensor):
        return found[None][:0], 0
    return tuple(t if t is None else t[None][:0] for t in found), tuple(t if t is None else 0 for t in found)


def _zeros(t: Tensor, dim: int) -> Tensor:
    """A sample of zeros that t's gradient and tangent reach: the sum of no sample. Window offsets are channels_last."""
    zeros = t.sum(dim, dtype=t.dtype)
    return zeros if t.is_floating_point() else zeros.movedim(1, -1).contiguous().movedim(-1, 1)


def for_each_sample(op: Any, size: int, dims: Dims, *args: Any) -> tuple[Any, Any]:
    """One call for each sample: for an op whose arguments have no axis that would take the samples."""
    samples = [
        op(*[t if dim is None else t.select(dim, i) for t, dim in zip(args, dims, strict=True)]) for i in range(size)
    ]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    results = [None if each[0] is None else torch.stack(each) for each in zip(*samples, strict=True)]
    return tuple(results), tuple(None if t is None else 0 for t in results)
