"""backward_weight by TMA and wgmma, under the emulator: every path of the plan, and what its tiles could get wrong.

Paths are named by the kernel that must have run, without its dtype: "taps" (all taps in one block) or "columns, N".
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import helpers
import pytest
import torch
from cases import Conv2dCase
from tolerance import assert_close, assert_exact, assert_same_bits, assert_same_non_finite
from torch import Tensor
from torch.nn.grad import conv2d_weight

from cnnops.backends import simt

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("emulator")]

KERNEL = {torch.bfloat16: "BFloat16", torch.float16: "Half"}
SCHEDULES = (("reversed", 0), ("random", 1), ("random", 2))

TAPS, WIDE, NARROW = "taps", "columns, 256", "columns, 128"
PATHS = (
    (TAPS, Conv2dCase("boxes-below-each-other", 1, 64, 56, 8, 64, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("7x7-images-in-pairs", 4, 64, 7, 7, 64, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("7x7-odd-batch", 3, 64, 7, 7, 64, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("14x14-rows-in-pairs", 2, 64, 14, 14, 128, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("9x11", 2, 64, 9, 11, 64, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("10x9-no-padding", 2, 64, 10, 9, 64, 3, 3)),
    (TAPS, Conv2dCase("22-rows-in-boxes-of-12-and-10", 1, 64, 22, 8, 64, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("20x10-padded-by-two-and-none", 1, 64, 20, 10, 64, 3, 3, padding=(2, 0))),
    (TAPS, Conv2dCase("6x5-padded-by-none-and-two", 1, 64, 6, 5, 64, 3, 3, padding=(0, 2))),
    (TAPS, Conv2dCase("several-images-in-a-box", 7, 64, 4, 8, 64, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("filters-and-channels-with-tails", 2, 72, 6, 8, 136, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("128-to-192", 1, 128, 8, 8, 192, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("few-channels", 2, 8, 8, 8, 64, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("few-filters", 2, 64, 8, 8, 8, 3, 3, padding=(1, 1))),
    (TAPS, Conv2dCase("groups-of-64", 2, 128, 8, 8, 256, 3, 3, padding=(1, 1), groups=2)),
    (TAPS, Conv2dCase("strided", 2, 64, 15, 16, 64, 3, 3, stride=(2, 2), padding=(1, 1))),
    (TAPS, Conv2dCase("strides-of-one-and-three", 2, 64, 8, 23, 64, 3, 3, stride=(1, 3), padding=(1, 1))),
    (TAPS, Conv2dCase("dilated", 2, 64, 8, 8, 64, 3, 3, padding=(2, 2), dilation=(2, 2))),
    (TAPS, Conv2dCase("dilations-of-three-and-one", 2, 64, 11, 8, 64, 3, 3, padding=(2, 1), dilation=(3, 1))),
    (WIDE, Conv2dCase("3x3-of-a-narrow-map", 3, 64, 4, 4, 72, 3, 3, padding=(1, 1))),
    (WIDE, Conv2dCase("3x3-odd-single-image", 1, 72, 9, 9, 136, 3, 3, padding=(1, 1))),
    (WIDE, Conv2dCase("1x1", 2, 200, 7, 9, 136, 1, 1)),
    (WIDE, Conv2dCase("1x1-strided", 2, 256, 13, 15, 128, 1, 1, stride=(2, 2))),
    (WIDE, Conv2dCase("5x5-strided", 2, 64, 9, 11, 72, 5, 5, stride=(2, 1), padding=(2, 1))),
    (WIDE, Conv2dCase("1x7-dilated", 2, 64, 5, 21, 72, 1, 7, padding=(0, 3), dilation=(1, 2))),
    (WIDE, Conv2dCase("groups-of-192", 1, 128, 8, 8, 384, 1, 5, padding=(0, 2), groups=2)),
    (WIDE, Conv2dCase("filter-larger-than-the-map", 6, 64, 2, 2, 72, 3, 3, padding=(2, 2))),
    (NARROW, Conv2dCase("1x1-few-columns", 2, 64, 9, 9, 192, 1, 1)),
    (NARROW, Conv2dCase("1x1-few-columns-with-a-tail", 3, 72, 5, 9, 72, 1, 1)),
    (NARROW, Conv2dCase("1x1-few-filters", 2, 256, 9, 9, 64, 1, 1)),
    (NARROW, Conv2dCase("5x5-few-filters", 2, 16, 8, 8, 32, 5, 5, padding=(2, 2))),
    (NARROW, Conv2dCase("1x1-strided-padded", 2, 64, 6, 7, 64, 1, 1, stride=(3, 2), padding=(1, 0))),
    (NARROW, Conv2dCase("groups-of-64-apart", 2, 128, 6, 6, 128, 2, 2, groups=2)),
)  # fmt: skip
EVERY_PATH = pytest.mark.parametrize(("path", "case"), [pytest.param(*row, id=row[1].id) for row in PATHS])
EVERY_DTYPE = pytest.mark.parametrize("dtype", KERNEL, ids=str)
ONE_OF_EACH = pytest.mark.parametrize(
    "case", [next(case for path, case in PATHS if path == each) for each in (TAPS, WIDE, NARROW)], ids=lambda c: c.id
)


def inputs(case: Conv2dCase, dtype: torch.dtype, make: Callable[..., Tensor] = helpers.randn) -> tuple[Tensor, Tensor]:
    """x and dy."""
    random = helpers.generator(case.id)
    x, dy = (
        helpers.laid_out(make(shape, dtype, "cpu", random), "channels_last")
        for shape in (case.x_shape, case.output_shape)
    )
    return x, dy


def ours(case: Conv2dCase, x: Tensor, dy: Tensor) -> Tensor:
    weight = helpers.laid_out(x.new_empty(case.weight_shape), "channels_last")
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    return simt.function("conv2d_backward")(dy, x, weight, *geometry, False, True, False)[1]


def theirs(case: Conv2dCase, x: Tensor, dy: Tensor) -> Tensor:
    return conv2d_weight(x, case.weight_shape, dy, case.stride, case.padding, case.dilation, case.groups)


def kernels_of(emulator: ModuleType) -> set[str]:
    return {name for name in emulator.counters()["kernels"] if name.startswith("conv2d_backward_weight")}


def kernel(path: str, dtype: torch.dtype) -> str:
    name, _, columns = path.partition(", ")
    return f"conv2d_backward_weight_{name}_kernel<{KERNEL[dtype]}{columns and ', ' + columns}>"


@EVERY_DTYPE
@EVERY_PATH
def test_gradient(emulator: ModuleType, path: str, case: Conv2dCase, dtype: torch.dtype) -> None:
    x, dy = inputs(case, dtype)
    emulator.reset_counters()
    got = ours(case, x, dy)
    assert kernels_of(emulator) == {kernel(path, dtype)}
    x64, dy64 = x.double(), dy.double()
    magnitude, terms = (theirs(case, *(f(t) for t in (x64, dy64))) for f in (torch.abs, torch.ones_like))
    assert_close(got, theirs(case, x, dy), theirs(case, x64, dy64), magnitude, terms, "dweight")


@EVERY_PATH
def test_integers_are_exact(path: str, case: Conv2dCase) -> None:
    """Every product is counted once: sums of small integers do not round, until they are stored."""
    x, dy = inputs(case, torch.bfloat16, helpers.integers)
    assert_exact(ours(case, x, dy), theirs(case, x.double(), dy.double()).bfloat16().double())


@EVERY_PATH
def test_non_finite_inputs_reach_their_own_taps_alone(path: str, case: Conv2dCase) -> None:
    """At the map's corners and edges: tiles reach beyond them, and zero times NaN is NaN."""
    N, _, H, W = case.x_shape
    for n, h, w in {(0, 0, 0), (N - 1, H - 1, W - 1), (0, H - 1, 0), (N // 2, H // 2, W - 1), (N - 1, 0, W // 2)}:
        for value in (torch.nan, torch.inf):
            x, dy = inputs(case, torch.bfloat16)
            x[n, -1, h, w] = value
            assert_same_non_finite(
                ours(case, x, dy), theirs(case, x.double(), dy.double()), f"dweight, ({n}, {h}, {w})"
            )


@EVERY_PATH
def test_non_finite_gradients_stay_with_their_filter(path: str, case: Conv2dCase) -> None:
    """Of a filter, a tap that meets padding alone may be NaN: torch's kernels disagree about zero times NaN."""
    N, _, P, Q = case.output_shape
    for n, p, q in {(0, 0, 0), (N - 1, P - 1, Q - 1), (N // 2, P - 1, 0)}:
        x, dy = inputs(case, torch.bfloat16)
        dy[n, -1, p, q] = torch.nan
        broken = ours(case, x, dy).isnan()
        meets = theirs(case, torch.ones_like(x).double(), dy.isnan().double()) > 0
        assert broken[meets].all(), f"a term of NaN is missing, ({n}, {p}, {q})"
        assert not broken[:-1].any(), f"NaN in another filter, ({n}, {p}, {q})"


@ONE_OF_EACH
@EVERY_DTYPE
def test_every_schedule_gives_the_same_bits(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype) -> None:
    x, dy = inputs(case, dtype)
    expected = ours(case, x, dy)
    for order, seed in SCHEDULES:
        emulator.set_schedule(order, seed)
        assert_same_bits(ours(case, x, dy), expected, f"dweight, {order} {seed}")


@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        (Conv2dCase("taps", 16, 64, 14, 16, 64, 3, 3, padding=(1, 1)), 1),
        (Conv2dCase("columns", 16, 64, 16, 16, 72, 1, 1), 1),
    ],
    ids=lambda each: each.id if isinstance(each, Conv2dCase) else "",
)
def test_sums_are_cut_to_fill_the_device(emulator: ModuleType, case: Conv2dCase, tiles: int) -> None:
    """And by nothing else: one multiprocessor sums in one slab, and how many there are may change rounding alone."""
    x, dy = inputs(case, torch.bfloat16, helpers.integers)
    expected = theirs(case, x.double(), dy.double()).bfloat16().double()
    K, C, R, S = case.weight_shape
    adding = -(-K * C * R * S // 256)
    for multiprocessors in (1, 2, 3):
        emulator.set_device(multiprocessors=multiprocessors)
        emulator.reset_counters()
        assert_exact(ours(case, x, dy), expected)
        assert emulator.counters()["blocks"] - adding == tiles * multiprocessors


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Conv2dCase("float32", 1, 64, 8, 8, 64, 3, 3), torch.float32),
        (Conv2dCase("12-channels", 1, 12, 8, 8, 64, 3, 3), torch.bfloat16),
        (Conv2dCase("12-filters", 1, 64, 8, 8, 12, 3, 3), torch.bfloat16),
        (Conv2dCase("groups-of-32", 1, 64, 8, 8, 64, 3, 3, groups=2), torch.bfloat16),
        (Conv2dCase("stride-beyond-the-hardware", 1, 64, 20, 20, 64, 3, 3, stride=(1, 9)), torch.bfloat16),
        (
            Conv2dCase("tap-beyond-the-hardware", 1, 64, 1, 4, 64, 1, 3, padding=(0, 128), dilation=(1, 128)),
            torch.bfloat16,
        ),
        (Conv2dCase("a-tile-next-to-empty", 1, 16, 8, 8, 16, 1, 1), torch.bfloat16),
    ],
    ids=lambda each: each.id if isinstance(each, Conv2dCase) else "",
)
def test_what_it_does_not_take_goes_elsewhere(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype) -> None:
    x, dy = inputs(case, dtype, helpers.integers)
    emulator.reset_counters()
    assert_exact(ours(case, x, dy), theirs(case, x.double(), dy.double()).to(dtype).double())
    assert not [name for name in kernels_of(emulator) if "taps" in name or "columns" in name]


def test_an_older_device_does_without(emulator: ModuleType) -> None:
    emulator.set_device(architecture=80)
    case = PATHS[0][1]
    x, dy = inputs(case, torch.bfloat16, helpers.integers)
    emulator.reset_counters()
    assert_exact(ours(case, x, dy), theirs(case, x.double(), dy.double()).bfloat16().double())
    (name,) = kernels_of(emulator)
    assert name.startswith("conv2d_backward_weight_kernel<BFloat16")
