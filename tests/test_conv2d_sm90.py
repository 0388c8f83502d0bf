"""forward and backward_input by TMA and wgmma, under the emulator: every path of the plan, and what its tiles could get
wrong.

A path is the tile's width (0: the halo form), the blocks of a cluster, and whether the last wave's sums are divided.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import helpers
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, of_activated
from cases import Conv2dCase
from tolerance import assert_close, assert_exact, assert_same_bits, assert_same_non_finite
from torch import Tensor

from cnnops.backends import simt

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("emulator")]

KERNEL = {torch.bfloat16: "BFloat16", torch.float16: "Half"}
SCHEDULES = (("reversed", 0), ("random", 1), ("random", 2))

Path = tuple[int, int, bool]
HALO: Path = (0, 1, False)

FORWARD = (
    ((64, 1, True), Conv2dCase("one-tile-for-all", 1, 128, 9, 9, 64, 3, 3, padding=(1, 1))),
    ((64, 2, False), Conv2dCase("1x1-odd-tiles", 2, 64, 9, 15, 64, 1, 1)),
    ((64, 2, False), Conv2dCase("1x1-several-tiles-each", 4, 64, 15, 15, 40, 1, 1)),
    ((64, 2, True), Conv2dCase("odd-filters", 1, 64, 10, 13, 37, 3, 3, padding=(1, 1))),
    ((64, 2, False), Conv2dCase("groups-of-64", 2, 128, 9, 12, 128, 1, 3, padding=(0, 1), groups=2)),
    ((64, 2, True), Conv2dCase("three-groups", 1, 192, 12, 12, 192, 3, 3, padding=(1, 1), groups=3)),
    ((128, 1, False), Conv2dCase("1x1-filters-with-tail", 1, 64, 9, 9, 192, 1, 1)),
    ((128, 1, True), Conv2dCase("channels-and-filters-with-tails", 1, 72, 9, 13, 136, 3, 3, padding=(1, 1))),
    ((128, 2, False), Conv2dCase("1x1-fit-filters", 1, 64, 13, 15, 128, 1, 1)),
    ((128, 2, True), Conv2dCase("whole-tiles-and-a-divided-one", 3, 64, 15, 14, 128, 3, 3, padding=(1, 1))),
    ((128, 2, True), Conv2dCase("few-channels", 1, 8, 15, 17, 104, 3, 3, padding=(1, 1))),
    ((128, 2, False), Conv2dCase("images-in-a-tile", 9, 64, 5, 7, 80, 3, 3, padding=(1, 1))),
    ((128, 2, False), Conv2dCase("strided", 4, 64, 15, 17, 96, 3, 3, stride=(2, 2), padding=(1, 1))),
    ((128, 2, True), Conv2dCase("strides-of-three-and-one", 3, 64, 22, 9, 96, 3, 3, stride=(3, 1), padding=(0, 2))),
    ((64, 1, True), Conv2dCase("padded-by-three", 2, 64, 3, 2, 96, 3, 3, padding=(3, 3))),
    ((128, 2, True), Conv2dCase("dilated", 1, 64, 14, 13, 96, 3, 3, padding=(2, 2), dilation=(2, 2))),
    ((128, 2, False), Conv2dCase("dilations-of-three-and-one", 1, 64, 19, 13, 96, 2, 5, (1, 1), (3, 2), (3, 1))),
    ((128, 2, False), Conv2dCase("1x1-strided-padded", 1, 64, 25, 25, 128, 1, 1, stride=(2, 2), padding=(1, 0))),
    ((256, 1, True), Conv2dCase("1x1-long-sums", 1, 456, 9, 9, 512, 1, 1)),
    ((256, 2, False), Conv2dCase("1x1-wide", 1, 64, 11, 13, 256, 1, 1)),
    ((256, 2, True), Conv2dCase("wide-with-tail", 1, 64, 11, 13, 200, 3, 3, padding=(1, 1))),
    ((256, 2, True), Conv2dCase("7x7-images", 3, 72, 7, 7, 256, 3, 3, padding=(1, 1))),
    (HALO, Conv2dCase("halo-17x17", 1, 64, 17, 17, 64, 3, 3, padding=(1, 1))),
    (HALO, Conv2dCase("halo-several-tiles-each", 5, 64, 10, 33, 64, 3, 3, padding=(1, 1))),
    (HALO, Conv2dCase("halo-unpadded", 2, 64, 9, 18, 64, 3, 3)),
    (HALO, Conv2dCase("halo-padded-by-three", 2, 64, 5, 9, 64, 3, 3, padding=(3, 2))),
    (HALO, Conv2dCase("halo-1x3", 2, 64, 6, 35, 64, 1, 3, padding=(0, 1))),
    (HALO, Conv2dCase("halo-5x1", 2, 64, 33, 7, 64, 5, 1, padding=(2, 0))),
    (HALO, Conv2dCase("halo-2x2", 2, 64, 8, 9, 64, 2, 2, padding=(1, 0))),
)
# dx's columns are channels, and its sums run over filters.
BACKWARD = (
    ((64, 1, True), Conv2dCase("dx-one-tile-for-all", 1, 64, 9, 9, 128, 3, 3, padding=(1, 1))),
    ((64, 2, False), Conv2dCase("dx-1x1-odd-tiles", 2, 40, 9, 15, 64, 1, 1)),
    ((64, 2, False), Conv2dCase("dx-all-four-classes", 2, 64, 23, 25, 72, 3, 3, stride=(2, 2), padding=(1, 1))),
    ((64, 2, True), Conv2dCase("dx-groups-of-64", 1, 192, 12, 12, 192, 3, 3, padding=(1, 1), groups=3)),
    ((128, 1, False), Conv2dCase("dx-1x1-with-tail", 1, 192, 9, 9, 64, 1, 1)),
    ((128, 1, True), Conv2dCase("dx-tails", 1, 136, 9, 13, 72, 3, 3, padding=(1, 1))),
    ((128, 1, False), Conv2dCase("dx-1x1-strided", 2, 128, 15, 15, 64, 1, 1, stride=(2, 2))),
    ((128, 1, False), Conv2dCase("dx-1x1-strided-padded", 2, 128, 14, 15, 64, 1, 1, stride=(2, 2), padding=(1, 1))),
    ((128, 1, False), Conv2dCase("dx-dilated-by-its-stride", 1, 128, 13, 16, 64, 3, 3, (2, 2), (2, 2), (2, 2))),
    ((128, 1, True), Conv2dCase("dx-empty-class-divided", 1, 96, 15, 15, 768, 1, 1, stride=(2, 1))),
    ((64, 2, True), Conv2dCase("dx-least-class-divided", 1, 64, 33, 31, 512, 3, 3, stride=(2, 2), padding=(1, 1))),
    ((128, 2, True), Conv2dCase("dx-few-filters", 1, 104, 15, 17, 8, 3, 3, padding=(1, 1))),
    (
        (128, 1, True),
        Conv2dCase("dx-classes-divided-together", 1, 96, 15, 15, 128, 3, 2, stride=(2, 1), padding=(1, 1)),
    ),
    ((128, 2, False), Conv2dCase("dx-strides-of-one-and-four", 1, 96, 15, 41, 64, 3, 7, stride=(1, 4), padding=(0, 3))),
    ((128, 2, True), Conv2dCase("dx-dilated", 1, 96, 14, 13, 64, 3, 3, padding=(2, 1), dilation=(2, 3))),
    ((128, 1, False), Conv2dCase("dx-rows-that-no-tap-reaches", 1, 96, 14, 13, 64, 3, 3, stride=(1, 3))),
    ((256, 1, True), Conv2dCase("dx-1x1-long-sums", 1, 512, 9, 9, 456, 1, 1)),
    ((256, 2, False), Conv2dCase("dx-1x1-wide", 1, 256, 11, 13, 64, 1, 1)),
    ((256, 2, True), Conv2dCase("dx-wide-with-tail", 1, 200, 11, 13, 64, 3, 3, padding=(1, 1))),
    ((256, 2, True), Conv2dCase("dx-7x7-images", 3, 256, 7, 7, 72, 3, 3, padding=(1, 1))),
    (HALO, Conv2dCase("dx-halo-17x17", 1, 64, 17, 17, 64, 3, 3, padding=(1, 1))),
    (HALO, Conv2dCase("dx-halo-several-tiles-each", 5, 64, 10, 33, 64, 3, 3, padding=(1, 1))),
    (HALO, Conv2dCase("dx-halo-padded-by-three", 2, 64, 5, 9, 64, 3, 3, padding=(3, 2))),
    (HALO, Conv2dCase("dx-halo-1x3", 2, 64, 6, 35, 64, 1, 3, padding=(0, 1))),
)
PATHS = [("forward", *row) for row in FORWARD] + [("backward_input", *row) for row in BACKWARD]
EVERY_PATH = pytest.mark.parametrize(("direction", "path", "case"), [pytest.param(*p, id=p[2].id) for p in PATHS])
EVERY_DTYPE = pytest.mark.parametrize("dtype", KERNEL, ids=str)


def one_of_each(paths: tuple[tuple[Path, Conv2dCase], ...]) -> list[Conv2dCase]:
    first: dict[Path, Conv2dCase] = {}
    for path, case in paths:
        first.setdefault(path, case)
    return list(first.values())


EACH_FORWARD = pytest.mark.parametrize("case", one_of_each(FORWARD), ids=lambda case: case.id)


def geometry(case: Conv2dCase) -> tuple[int, ...]:
    assert not isinstance(case.padding, str)
    return (*case.stride, *case.padding, *case.dilation, case.groups, 0)


def inputs(
    direction: str, case: Conv2dCase, dtype: torch.dtype, make: Callable[..., Tensor] = helpers.randn
) -> list[Tensor]:
    """x or dy, and the weight."""
    random = helpers.generator(case.id)
    shapes = case.x_shape if direction == "forward" else case.output_shape, case.weight_shape
    return [helpers.laid_out(make(shape, dtype, "cpu", random), "channels_last") for shape in shapes]


def ours(direction: str, case: Conv2dCase, a: Tensor, weight: Tensor) -> Tensor:
    if direction == "forward":
        result: Tensor = simt.function("conv2d_forward")(a, weight, None, *geometry(case))
    else:
        x = helpers.laid_out(a.new_empty(case.x_shape), "channels_last")
        result = simt.function("conv2d_backward")(a, x, weight, *geometry(case), True, False, False)[0]
    return result


def theirs(direction: str, case: Conv2dCase, a: Tensor, weight: Tensor) -> Tensor:
    arguments = case.stride, case.padding, case.dilation, case.groups
    if direction == "forward":
        return F.conv2d(a, weight, None, *arguments)
    return torch.nn.grad.conv2d_input(case.x_shape, weight, a, *arguments)  # type: ignore[arg-type]


def planned(direction: str, case: Conv2dCase, dtype: torch.dtype, *device: int) -> str:
    extents = *case.x_shape, case.K, case.R, case.S
    plan: str = simt.function("conv2d_plan")(
        direction, *extents, *geometry(case), dtype, True, False, *(device or (0, 0, 0))
    )
    return plan


def cluster_of(plan: str) -> int:
    found = re.search(r"cluster(?:s of)? (\d+)", plan)
    assert found, plan
    return int(found[1])


def assert_path(emulator: ModuleType, direction: str, path: Path, case: Conv2dCase, dtype: torch.dtype) -> None:
    """That since reset_counters() the case took its path, and no other kernel had a part in it."""
    columns, cluster, divided = path
    form = f"sm90_kernel<{KERNEL[dtype]}, {columns}>" if columns else f"halo_sm90_kernel<{KERNEL[dtype]}>"
    ran = set(emulator.counters()["kernels"])
    assert {name for name in ran if name.startswith("conv2d")} == {f"conv2d_{direction}_{form}"}
    assert ("clear_counters_kernel" in ran) == divided
    assert cluster_of(planned(direction, case, dtype)) == cluster


@EVERY_DTYPE
@EVERY_PATH
def test_result(emulator: ModuleType, direction: str, path: Path, case: Conv2dCase, dtype: torch.dtype) -> None:
    operands = inputs(direction, case, dtype)
    emulator.reset_counters()
    got = ours(direction, case, *operands)
    assert_path(emulator, direction, path, case, dtype)
    exact = [t.double() for t in operands]
    magnitude, terms = (theirs(direction, case, *map(f, exact)) for f in (torch.abs, torch.ones_like))
    assert_close(got, theirs(direction, case, *operands), theirs(direction, case, *exact), magnitude, terms)


@EVERY_PATH
def test_integers_are_exact(direction: str, path: Path, case: Conv2dCase) -> None:
    """Every product is counted once: sums of small integers do not round, until they are stored."""
    operands = inputs(direction, case, torch.bfloat16, helpers.integers)
    exact = theirs(direction, case, *(t.double() for t in operands))
    assert_exact(ours(direction, case, *operands), exact.bfloat16().double())


@EVERY_PATH
def test_schedules_give_the_same_bits(emulator: ModuleType, direction: str, path: Path, case: Conv2dCase) -> None:
    operands = inputs(direction, case, torch.float16)
    expected = ours(direction, case, *operands)
    for order, seed in SCHEDULES:
        emulator.set_schedule(order, seed)
        assert_same_bits(ours(direction, case, *operands), expected, f"{order} {seed}")


@EVERY_PATH
def test_non_finite_numbers_land_where_torch_has_them(direction: str, path: Path, case: Conv2dCase) -> None:
    """And nowhere else: a tile's tails, paddings and neighbouring groups are multiplied with zeros at most."""
    a, weight = inputs(direction, case, torch.bfloat16)
    pixels = a.permute(0, 2, 3, 1).flatten(0, 2)
    assert pixels.data_ptr() == a.data_ptr()
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        pixels[i * (len(pixels) - 1) // 2, i * (pixels.shape[1] - 1) // 2] = value
    weight[weight.shape[0] // 2] = 0
    got = ours(direction, case, a, weight)
    assert_same_non_finite(got, theirs(direction, case, a.double(), weight.double()))


def test_the_paths_are_all_there() -> None:
    """Each width with and without a cluster, and with and without divided sums; and the halo form."""
    for paths in (FORWARD, BACKWARD):
        found = {path for path, _ in paths}
        for columns in (64, 128, 256):
            of_width = {path for path in found if path[0] == columns}
            assert {cluster for _, cluster, _ in of_width} == {1, 2}
            assert {divided for *_, divided in of_width} == {False, True}
        assert HALO in found


@EVERY_PATH
def test_any_number_of_multiprocessors(emulator: ModuleType, direction: str, path: Path, case: Conv2dCase) -> None:
    operands = inputs(direction, case, torch.bfloat16, helpers.integers)
    exact = theirs(direction, case, *(t.double() for t in operands)).bfloat16().double()
    for multiprocessors in (1, 4, 7, 132):
        emulator.set_device(multiprocessors=multiprocessors)
        assert_exact(ours(direction, case, *operands), exact, f"{multiprocessors} multiprocessors")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@EACH_FORWARD
def test_bias_residual_and_activation(case: Conv2dCase, activation: str) -> None:
    dtype = torch.bfloat16
    x, weight = inputs("forward", case, dtype)
    random = helpers.generator("epilogue")
    bias = helpers.randn((case.K,), dtype, "cpu", random)
    residual = helpers.laid_out(helpers.randn(case.output_shape, dtype, "cpu", random), "channels_last")
    weight *= (weight[0].numel()) ** -0.5

    def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return ACTIVATIONS[activation](F.conv2d(x, weight, bias, **case.arguments()) + residual)

    got, _ = simt.function("conv2d_act_forward")(x, weight, bias, residual, *geometry(case), activation, False)
    operands = x, weight, bias, residual
    reference = composed(*(t.double() for t in operands))
    magnitude = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), **case.arguments())
    magnitude = of_activated(magnitude + residual.double().abs(), reference)
    assert_close(got, composed(*operands), reference, magnitude, case.flops, "y")


@EACH_FORWARD
def test_scale_and_shift(case: Conv2dCase) -> None:
    """Batch norm with running statistics whose scale is a power of two: integers stay exact."""
    x, weight = inputs("forward", case, torch.bfloat16, helpers.integers)
    random = helpers.generator("batch norm")
    shift = torch.randint(-3, 4, (case.K,), generator=random).float()
    scale = 2.0 ** torch.randint(-2, 3, (case.K,), generator=random)
    statistics = torch.zeros(case.K), torch.ones(case.K)
    got = simt.function("conv2d_bn_act_forward")(
        x, weight, None, None, *statistics, scale, shift, *geometry(case), 0.0, "relu"
    )
    z = F.conv2d(x.double(), weight.double(), **case.arguments())
    exact = F.relu(z * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1))
    assert_exact(got, exact.bfloat16().double())


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
@EACH_FORWARD
def test_statistics(emulator: ModuleType, case: Conv2dCase, order: str) -> None:
    """The moments of the rounded results, in float; far from zero, where raw sums of squares would cancel."""
    emulator.set_schedule(order, 1)
    x, weight = inputs("forward", case, torch.bfloat16)
    weight *= (weight[0].numel()) ** -0.5
    bias = torch.full((case.K,), 30.0, dtype=torch.bfloat16)
    y, mean, m2 = simt.function("conv2d_statistics_forward")(x, weight, bias, *geometry(case))
    assert_same_bits(y, simt.function("conv2d_forward")(x, weight, bias, *geometry(case)))
    helpers.check_moments(y, mean, m2)


def test_transposed_convolution_adds_its_bias() -> None:
    random = helpers.generator("transposed")
    x, weight = (
        helpers.laid_out(helpers.integers(shape, torch.bfloat16, "cpu", random), "channels_last")
        for shape in ((2, 64, 9, 11), (64, 96, 3, 3))
    )
    bias = helpers.integers((96,), torch.bfloat16, "cpu", random)
    got = simt.function("conv_transpose2d_forward")(x, weight, bias, 2, 2, 1, 1, 1, 0, 1, 1, 1)
    exact = F.conv_transpose2d(x.double(), weight.double(), bias.double(), (2, 2), (1, 1), (1, 0))
    assert_exact(got, exact.bfloat16().double())


@pytest.mark.parametrize("case", [FORWARD[0][1], FORWARD[-1][1]], ids=lambda case: case.id)
def test_tensors_are_described_to_tma_once_for_each_problem(emulator: ModuleType, case: Conv2dCase) -> None:
    """And not again for other addresses, which the results show to be the ones that were read."""
    made, kept = emulator.tensor_maps_made, []
    arguments = case.N + 6, *case.x_shape[1:], case.K, case.R, case.S  # a problem of this test's own
    case = Conv2dCase("own", *arguments, padding=case.padding)
    for i in range(3):
        before = made()
        for direction in ("forward", "backward_input", "backward_weight"):
            random = helpers.generator(f"{direction} {i}")
            x, dy, weight = (
                helpers.laid_out(helpers.integers(shape, torch.bfloat16, "cpu", random, 1), "channels_last")
                for shape in (case.x_shape, case.output_shape, case.weight_shape)
            )
            kept.append((x, dy, weight))  # so that the next ones lie elsewhere
            if direction == "backward_weight":
                function = simt.function("conv2d_backward")
                got = function(dy, x, weight, *geometry(case), False, True, False)[1]
                exact = torch.nn.grad.conv2d_weight(x.double(), case.weight_shape, dy.double(), padding=case.padding)
            else:
                operands = (x if direction == "forward" else dy), weight
                got, exact = ours(direction, case, *operands), theirs(direction, case, *(t.double() for t in operands))
            assert_exact(got, exact.bfloat16().double())
        assert made() > before if i == 0 else made() == before


H200 = (90, 132, 227 << 10)


@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize(
    ("shape", "tile", "cluster"),
    [
        ((256, 64, 56, 56, 64, 3, 3), "halo 256x64", 1),
        ((256, 128, 28, 28, 128, 3, 3), "wgmma 128x128", 2),
        ((256, 256, 14, 14, 256, 3, 3), "wgmma 128x256", 2),
        ((256, 512, 7, 7, 512, 3, 3), "wgmma 128x256", 2),
        ((1, 512, 7, 7, 512, 3, 3), "wgmma 128x64", 1),
        ((1, 256, 14, 14, 64, 1, 1), "portable", 1),
    ],
)
def test_plans_of_real_layers(direction: str, shape: tuple[int, ...], tile: str, cluster: int) -> None:
    N, C, H, W, K, R, S = shape
    case = Conv2dCase("layer", N, C, H, W, K, R, S, padding=(R // 2, S // 2))
    plan = planned(direction, case, torch.bfloat16, *H200)
    assert plan.startswith(tile)
    assert cluster_of(plan) == cluster


@pytest.mark.parametrize(
    ("change", "direction"),
    [
        ({"dtype": torch.float32}, "forward"),
        ({"device": (80, 108, 163 << 10)}, "forward"),
        ({"device": (100, 148, 227 << 10)}, "forward"),
        ({"C": 60}, "forward"),
        ({"K": 60}, "backward_input"),
        ({"groups": 8}, "forward"),
        ({"stride": (9, 1)}, "forward"),
        ({"stride": (3, 2)}, "backward_input"),
        ({"padding": (129, 1)}, "forward"),
        ({"dilation": (128, 1), "padding": (127, 1)}, "forward"),
    ],
    ids=str,
)
def test_what_stays_portable(change: dict[str, object], direction: str) -> None:
    """The problem itself is taken; changed so, it is not, and is refused or computed by kernels that take anything."""
    arguments = {"N": 64, "C": 128, "H": 300, "W": 56, "K": 128, "R": 3, "S": 3, "padding": (1, 1)}
    assert planned(direction, Conv2dCase("plain", **arguments), torch.bfloat16, *H200).startswith("wgmma")  # type: ignore[arg-type]
    dtype, device = change.pop("dtype", torch.bfloat16), change.pop("device", H200)
    case = Conv2dCase("changed", **{**arguments, **change})  # type: ignore[arg-type]
    assert not re.match("wgmma|halo", planned(direction, case, dtype, *device))  # type: ignore[arg-type,misc]
