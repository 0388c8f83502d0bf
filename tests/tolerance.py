"""How wrong a result may be: the only place that knows.

The reference is torch in float64 on the same inputs, upcast. An element may be off by

    2 max|torch - reference|  +  u |reference|  +  u_acc (2 + log2 length) magnitude  +  least subnormal

torch: torch's own result in the dtype under test; its largest error over the tensor is the scale of what that dtype
can do. The other terms are the floor below which no demand makes sense: the rounding of the result itself, half a
unit in the last place (u), and the rounding of a sum of `length` products made in the accumulation type (u_acc), whose
worst case for a pairwise sum is log2(length) times the sum of the products' magnitudes.

Where a convolution of float32 may be one of TF32, torch's own result is in its place that of exact arithmetic on
operands rounded to TF32, which has the error of that format and no other.

Fused ops store an intermediate in the activations' dtype, and may store another one than torch does. Its roundings,
half a unit each and independent, add 4 u magnitude / sqrt(length): four standard deviations of their sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over `dtype` are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_tf32(t: Tensor) -> Tensor:
    """t, of float32 values, with the 10 bits of fraction that TF32 has: the nearest, of two as near the larger one.

    What the conversion that CUDA calls cvt.rna.tf32 does, in t's own dtype.
    """
    bits = t.float().view(torch.int32)
    return torch.where(t.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), t.float()).to(t.dtype)


def bound(
    torch_result: Tensor,
    reference: Tensor,
    magnitude: Tensor,
    length: Tensor | float,
    intermediate: torch.dtype | None = None,
) -> Tensor:
    """The largest allowed |ours - reference|, elementwise, in float64; meaningless where the reference is not finite.

    magnitude: the sum of |products| that make each element (float64, like reference).
    length: how many there are, for each element or for all.
    intermediate: the dtype that one is stored in on the way, if any.
    """
    dtype = torch_result.dtype
    unit, unit_acc = torch.finfo(dtype).eps / 2, torch.finfo(accumulation_dtype(dtype)).eps / 2
    rounded = reference.to(dtype)
    finite = reference.isfinite() & rounded.isfinite() & torch_result.isfinite()
    theirs = (torch_result.double() - reference).abs()[finite]
    scale = theirs.max().item() if theirs.numel() else 0.0
    terms = torch.as_tensor(length, dtype=torch.float64).clamp_min(1)
    floor = (
        unit * reference.abs()
        + unit_acc * (2 + terms.log2()) * magnitude
        + torch.finfo(dtype).smallest_normal * unit * 2
    )
    if intermediate is not None:
        floor = floor + 4 * (torch.finfo(intermediate).eps / 2) * magnitude / terms.sqrt()
    return 2 * scale + floor


def assert_close(
    ours: Tensor,
    torch_result: Tensor,
    reference: Tensor,
    magnitude: Tensor,
    length: Tensor | float,
    what: str = "result",
    intermediate: torch.dtype | None = None,
) -> None:
    """Assert that `ours` has torch's shape and dtype, NaN and inf exactly where they belong, no error over `bound`."""
    assert_same_kind(ours, torch_result, what)
    assert_same_non_finite(ours, reference, what)
    ours, reference = ours.detach().cpu(), reference.detach().cpu()
    allowed = bound(torch_result.detach().cpu(), reference, magnitude.detach().cpu(), length, intermediate)
    error = (ours.double() - reference).abs()
    wrong = (reference.to(ours.dtype).isfinite()) & ~(error <= allowed)
    if wrong.any():
        worst = torch.where(wrong, error / allowed, 0.0).argmax().item()
        at = [int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape)]
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; the worst at {at}: "
            f"{ours.flatten()[worst].item()!r} where {reference.flatten()[worst].item()!r} was expected "
            f"within {allowed.flatten()[worst].item():.3g} ({_where(wrong)})"
        )


def assert_close_in_double(ours: Sequence[Tensor], theirs: Sequence[Tensor], in_float: Sequence[Tensor]) -> None:
    """Assert that ours is torch's where both computed in float64 and no formula gives the error: a network, a training
    run.

    in_float: torch's own float32 results, whose worst error over all tensors shows how rounding grows on the way; a unit
    of float64 grows as much. torch may be off by one such error and we by two.
    """
    units = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    allowed = 3 * units * max((a.double() - b).abs().max() for a, b in zip(in_float, theirs, strict=True))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (a - b).abs().max()
        assert error <= allowed, f"result {i} of shape {tuple(a.shape)}: off by {error:.3g}, beyond {allowed:.3g}"


def assert_exact(ours: Tensor, reference: Tensor, what: str = "result", signed_zeros: bool = False) -> None:
    """Assert that `ours` holds the very numbers of `reference`, which its dtype must be able to represent.

    Any NaN equals any other; signed_zeros tells -0.0 from 0.0, which a sum need not and a selection must.
    """
    expected = reference.to(ours.dtype)
    assert torch.equal(expected.double().nan_to_num(), reference.double().nan_to_num()), (
        f"{what}: the reference has values that {ours.dtype} cannot represent, so the test is wrong"
    )
    assert ours.shape == expected.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    same = (ours == expected) | (ours.isnan() & expected.isnan())
    if signed_zeros:
        same &= (ours.signbit() == expected.signbit()) | ours.isnan()
    if not same.all():
        first = [int(i) for i in (~same).nonzero()[0]]
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} elements differ; the first at {first}: "
            f"{ours[tuple(first)].item()!r}, expected {expected[tuple(first)].item()!r} ({_where(~same)})"
        )


def assert_same_bits(a: Tensor, b: Tensor, what: str = "result") -> None:
    """Assert that two results of ours are the same number for number, NaN included, and laid out alike."""
    assert_same_kind(a, b, what)
    assert a.stride() == b.stride(), f"{what}: strides {a.stride()} and {b.stride()}"
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = a.contiguous().view(integers) != b.contiguous().view(integers)
    assert not differ.any(), (
        f"{what}: {int(differ.sum())} of {differ.numel()} elements have other bits ({_where(differ)})"
    )


def assert_same_kind(ours: Tensor, theirs: Tensor, what: str = "result") -> None:
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, expected {theirs.dtype}"


def assert_same_layout(ours: Tensor, theirs: Tensor, what: str = "result") -> None:
    """Assert equal strides wherever they mean something: along extents above 1, in tensors that hold anything."""
    if ours.numel():
        strides = [
            [stride for stride, extent in zip(t.stride(), t.shape, strict=True) if extent > 1] for t in (ours, theirs)
        ]
        assert strides[0] == strides[1], (
            f"{what} of shape {tuple(ours.shape)}: strides {ours.stride()}, expected {theirs.stride()}"
        )


def assert_same_non_finite(ours: Tensor, reference: Tensor, what: str = "result") -> None:
    """Assert NaN, inf and -inf exactly where the reference, rounded to our dtype, has them."""
    expected = reference.to(ours.dtype)
    for name, has in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        missing, surplus = has(expected) & ~has(ours), has(ours) & ~has(expected)
        assert not missing.any(), f"{what}: {name} missing in {int(missing.sum())} elements ({_where(missing)})"
        assert not surplus.any(), f"{what}: {name} in {int(surplus.sum())} elements too many ({_where(surplus)})"


def _where(mask: Tensor) -> str:
    """Which part of a tensor is concerned, to tell a border from a channel at a glance."""
    places = mask.nonzero()
    if not len(places):
        return "nowhere"
    spans = [f"{int(c.min())}..{int(c.max())} of {n}" for c, n in zip(places.T, mask.shape, strict=True)]
    return "within " + ", ".join(spans) if spans else "a single number"
