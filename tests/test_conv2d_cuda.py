"""Each family of the CUDA convolution's portable kernels, on problems chosen so that the plan takes it.

The device claims to be of sm_80: elsewhere Hopper's kernels are chosen, which have tests of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import helpers
import pytest
import torch
from cases import Conv2dCase
from helpers import Backend, torch_conv2d
from tolerance import assert_exact, assert_same_bits

import cnnops.functional as CF
from cnnops.backends import simt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PASSES = ("forward", "backward_input", "backward_weight")
NAMES = ("x", "weight", "bias")

pytestmark = pytest.mark.parametrize("backend", ["simt-sm80"], indirect=True)


@dataclass(frozen=True)
class Planned:
    """A problem, and of each pass what the names of its kernels have in common: 16-bit numbers, then float."""

    case: Conv2dCase
    half: tuple[str, str, str]
    single: tuple[str, str, str]

    def kernels(self, dtype: torch.dtype) -> list[str]:
        tiles = self.single if dtype == torch.float32 else self.half
        return [tile.replace("*", name) for tile, name in zip(tiles, PASSES, strict=True)]


SMALL, TALL, LARGE, WIDE = (
    f"conv2d_*_kernel<{{T}}, Shape<{tile}," for tile in ("64, 64", "128, 64", "128, 128", "64, 256")
)
STEM, STEM_SHORT, STEM_LONG = (
    "conv2d_stem_*_kernel<{T}",
    "conv2d_stem_*_kernel<{T}, Shape<64, 32,",
    "conv2d_stem_*_kernel<{T}, Shape<64, 160,",
)
PACKED = ("conv2d_packed_*_kernel<{T}",) * 3
DEPTHWISE = ("depthwise_any_forward_kernel<{T}", *("depthwise_any_backward_kernel<{T}",) * 2)  # one for both gradients
BANDS_SMALL, BANDS_LARGE = (  # both gradients from one kernel
    (f"conv2d_toeplitz_kernel<{{T}}, {side}>", *(f"conv2d_toeplitz_backward_kernel<{{T}}, {taps}>",) * 2)
    for side, taps in ((16, "2, 4"), (32, "1, 2"))
)

PLANNED = (
    # Tails along both sides of a tile, taps that channels of 24 cut across steps.
    Planned(
        Conv2dCase("large", 3, 24, 12, 11, 120, 3, 2, stride=(1, 1), padding=(1, 1), bias=True),
        (LARGE, TALL, LARGE),
        (TALL, TALL, TALL),
    ),
    Planned(Conv2dCase("large-1x1", 2, 120, 16, 13, 72, 1, 1, bias=True), (LARGE, LARGE, LARGE), (TALL, TALL, TALL)),
    Planned(
        Conv2dCase("wide", 2, 40, 15, 14, 48, 3, 3, padding=(1, 1), dilation=(1, 2)),
        (TALL, TALL, WIDE),
        (TALL, TALL, SMALL),
    ),
    Planned(
        Conv2dCase("strided", 2, 40, 23, 21, 24, 3, 3, stride=(2, 3), padding=(1, 2), bias=True),
        (SMALL, TALL, WIDE),
        (SMALL, TALL, SMALL),
    ),
    Planned(Conv2dCase("tall", 2, 40, 15, 14, 72, 1, 1), (LARGE, TALL, TALL), (TALL, TALL, TALL)),
    Planned(Conv2dCase("small", 1, 72, 9, 7, 40, 1, 2), (SMALL, SMALL, WIDE), (SMALL, SMALL, SMALL)),
    Planned(Conv2dCase("unaligned", 2, 13, 9, 8, 70, 3, 3, padding=(1, 1), bias=True), (SMALL,) * 3, (SMALL,) * 3),
    Planned(
        Conv2dCase("wide-groups", 2, 80, 9, 7, 96, 3, 3, padding=(1, 1), groups=2), (SMALL, SMALL, WIDE), (SMALL,) * 3
    ),
    Planned(Conv2dCase("packed", 2, 40, 9, 11, 40, 3, 3, padding=(1, 1), groups=10, bias=True), PACKED, PACKED),
    Planned(Conv2dCase("depthwise", 2, 37, 9, 11, 74, 5, 3, padding=(2, 1), groups=37), DEPTHWISE, DEPTHWISE),
    Planned(
        Conv2dCase("packed-strided", 3, 48, 11, 9, 96, 3, 3, stride=(2, 2), padding=(1, 1), dilation=(1, 2), groups=6),
        PACKED,
        PACKED,
    ),
    Planned(Conv2dCase("packed-uneven", 2, 30, 9, 11, 42, 2, 3, padding=(1, 1), groups=6), PACKED, PACKED),
    # 16 and 48 columns of a band; tails along both sides of a tile, and of its channels.
    Planned(
        Conv2dCase("bands-small", 2, 24, 9, 18, 24, 7, 31, padding=(3, 15), groups=24, bias=True),
        BANDS_SMALL,
        DEPTHWISE,
    ),
    Planned(Conv2dCase("bands-large", 1, 40, 22, 19, 40, 9, 7, padding=(4, 3), groups=40), BANDS_LARGE, DEPTHWISE),
    # Rows of x that begin at the same place within 16 bytes, and rows that do not.
    Planned(
        Conv2dCase("stem-3x3", 2, 3, 17, 24, 72, 3, 3, padding=(1, 1), bias=True),
        (STEM, SMALL, STEM_SHORT),
        (STEM, SMALL, STEM_SHORT),
    ),
    Planned(
        Conv2dCase("stem-7x7", 2, 3, 21, 19, 40, 7, 7, stride=(2, 2), padding=(3, 3)),
        (STEM, SMALL, STEM_LONG),
        (STEM, SMALL, STEM_LONG),
    ),
    Planned(
        Conv2dCase("stem-uneven", 1, 4, 19, 26, 13, 5, 3, stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
        (STEM, SMALL, STEM_LONG),
        (STEM, SMALL, STEM_LONG),
    ),
)


def ours(case: Conv2dCase) -> helpers.Function:
    return lambda x, weight, bias: CF.conv2d(x, weight, bias, **case.arguments())


def stored(dtype: torch.dtype) -> str:
    return {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}[dtype]


def ran() -> set[str]:
    """The names of the kernels since the emulator's counters were reset, one space after each comma and no other."""
    return {name.replace(" >", ">") for name in simt.module().counters()["kernels"]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("planned", PLANNED, ids=lambda planned: planned.case.id)
def test_planned_kernels_agree_with_torch(backend: Backend, planned: Planned, dtype: torch.dtype) -> None:
    simt.module().reset_counters()
    inputs = helpers.conv2d_inputs(planned.case, dtype, "channels_last", backend.device)
    torch_function = torch_conv2d(planned.case)
    names = helpers.result_names(NAMES, inputs)
    helpers.check_multilinear(
        ours(planned.case), torch_function, names, inputs, helpers.gradient_for(torch_function, inputs)
    )
    for expected in planned.kernels(dtype):
        name = expected.format(T=stored(dtype))
        assert any(each.startswith(name) for each in ran()), f"{name} is not among {sorted(ran())}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("planned", PLANNED, ids=lambda planned: planned.case.id)
def test_integers_are_exact(backend: Backend, planned: Planned, dtype: torch.dtype) -> None:
    most = 3 if dtype == torch.float32 else 1

    def make(shape: Sequence[int], random: torch.Generator) -> torch.Tensor:
        return helpers.integers(shape, dtype, backend.device, random, most)

    case, random = planned.case, helpers.generator(planned.case.id)
    x, weight = (helpers.laid_out(make(shape, random), "channels_last") for shape in (case.x_shape, case.weight_shape))
    inputs = (x, weight, make((case.K,), random) if case.bias else None)
    dy = make(case.output_shape, random)
    helpers.check_exact(ours(case), torch_conv2d(case), NAMES, inputs, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tiles_of_long_sums_are_cut_into_slabs(backend: Backend, dtype: torch.dtype) -> None:
    case = Conv2dCase("slabs", 1, 72, 5, 5, 56, 3, 3, padding=(1, 1), bias=True)
    simt.module().reset_counters()
    inputs = helpers.conv2d_inputs(case, dtype, "channels_last", backend.device)
    helpers.check_multilinear(
        ours(case),
        torch_conv2d(case),
        helpers.result_names(NAMES, inputs),
        inputs,
        helpers.gradient_for(torch_conv2d(case), inputs),
    )
    assert f"conv2d_add_slabs_kernel<{stored(dtype)}>" in ran()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("taps", [(7, 7), (9, 11), (8, 25)], ids=str)
def test_what_is_not_finite_stays_with_the_taps_of_bands(
    backend: Backend, taps: tuple[int, int], dtype: torch.dtype
) -> None:
    """The zeros of bands, and those beside dy and x, would be NaN times infinity."""
    (R, S), C, random = taps, 9, helpers.generator(str(taps))
    geometry = ((1, 1), (R // 2, S // 2), (1, 1))
    x, weight, dy = (
        helpers.laid_out(helpers.integers(shape, dtype, backend.device, random, 1), "channels_last")
        for shape in ((2, C, 20, 33), (C, 1, R, S), (2, C, 21 - R % 2, 33))
    )
    x[0, 1, 0, 0], x[1, 2, -1, -1], x[0, 4, 7, 9] = torch.inf, torch.nan, -torch.inf
    dy[0, 3, 0, -1], dy[1, 0, -1, 0], dy[1, 4, 11, 17] = -torch.inf, torch.nan, torch.inf

    def gradients(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wanted = [True, True, False]
        operands = (t.double().cpu() for t in (dy, x, weight))
        return torch.ops.aten.convolution_backward(*operands, None, *geometry, False, [0, 0], C, wanted)[:2]

    simt.module().reset_counters()
    flat = tuple(itertools.chain(*geometry))
    got = simt.function("conv2d_backward")(dy, x, weight, *flat, C, 0, True, True, False)[:2]
    assert any(name.startswith(f"conv2d_toeplitz_backward_kernel<{stored(dtype)},") for name in ran())
    ones = [torch.ones_like(t) for t in (dy, x, weight)]
    of_dy, of_x = gradients(~dy.isfinite(), *ones[1:]), gradients(ones[0], ~x.isfinite(), ones[2])
    expected = gradients(*(t.nan_to_num(0, 0, 0) for t in (dy, x, weight)))
    for name, ours, theirs, broken in zip(
        ("dx", "dweight"), got, expected, (of_dy[0] > 0, of_dy[1] + of_x[1] > 0), strict=True
    ):
        assert torch.equal(~ours.cpu().isfinite(), broken) and broken.any() and not broken.all(), name
        finite = theirs.to(dtype).double().where(~broken, 0)
        assert_exact(ours.cpu().where(~broken, 0), finite, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_group(backend: Backend, dtype: torch.dtype) -> None:
    """A pack's product has zeros between its groups, which times infinity would be NaN."""
    case = Conv2dCase("groups", 2, 40, 6, 5, 40, 3, 3, padding=(1, 1), groups=10)
    inputs = helpers.conv2d_inputs(case, dtype, "channels_last", backend.device)
    dy = helpers.gradient_for(torch_conv2d(case), inputs)
    sound = helpers.evaluate(ours(case), inputs, dy)
    x, weight, _ = (None if t is None else t.clone() for t in inputs)
    broken_dy, group = dy.clone(), slice(8, 12)
    x[1, 8, 2, 2], weight[9, 1, 1, 1], broken_dy[0, 11, 3, 3] = torch.nan, torch.inf, -torch.inf
    broken = helpers.evaluate(ours(case), (x, weight, None), broken_dy)
    for what, a, b, axis in zip(("y", "dx", "dweight"), sound, broken, (1, 1, 0), strict=True):
        assert not b.transpose(0, axis)[group].isfinite().all(), what
        others = [t.transpose(0, axis).index_fill(0, torch.arange(8, 12), 0) for t in (a, b)]
        assert_same_bits(others[0], others[1], what)
    helpers.check_non_finite(ours(case), torch_conv2d(case), (x, inputs[1], None), dy)
