"""Triton's dense convolutions: which kernel a device gets, boxes, wide tiles, and statistics of many parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import helpers
import pytest
import torch
from cases import CONV2D, find
from test_conv2d_act import check as check_act
from test_conv2d_act import inputs_of
from test_conv2d_statistics import check as check_statistics
from tolerance import assert_same_bits

import cnnops
import cnnops.functional as CF
from cnnops.backends.triton import conv2d_plan, launch
from cnnops.backends.triton.calls import CONVOLUTIONS
from cnnops.backends.triton.launch import Device
from cnnops.tuning import Rule, Table
from cnnops.tuning.triton.conv2d import TmaTile

pytest.importorskip("triton")

H200 = Device(90, 132)
BACKEND = helpers.Backend("triton", helpers.device_of(helpers.row("triton")))
DENSE = find(CONV2D, "3x3-full-tile")


@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 103, 120])
def test_boxes_are_for_the_devices_that_load_them_best(architecture: int) -> None:
    boxed = architecture in (90, 100, 103)
    device, dense, strided = Device(architecture, 132), CONVOLUTIONS["3x3 64->64"], CONVOLUTIONS["3x3 s2 128->256"]
    for plan in (conv2d_plan.forward_tma, conv2d_plan.backward_input_tma, conv2d_plan.backward_weight_tma):
        assert (plan(dense, "ieee", device) is not None) == boxed
    assert (conv2d_plan.forward_tma(strided, "ieee", device) is not None) == boxed
    assert conv2d_plan.backward_input_tma(strided, "ieee", device) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 2},
        {"C": 60},  # 120 bytes
        {"C": 8},  # 16 bytes, half of the narrowest block
        {"stride_h": 2},
        {"stride_h": 3, "stride_w": 3},
        {"stride_h": 2, "stride_w": 2, "H": 55},
        {"stride_h": 2, "stride_w": 2, "C": 72},  # a block of 32 would reach into the next column's channels
        {"dtype": torch.float32},
    ],
    ids=str,
)
def test_what_is_left_to_the_pointer_kernel(changes: dict[str, Any]) -> None:
    problem = dataclasses.replace(CONVOLUTIONS["3x3 64->64"], **changes)
    assert conv2d_plan.forward_tma(problem, "ieee", H200) is None


@pytest.mark.parametrize(
    ("N", "side", "pixels", "waste"),
    [(256, 56, 128, 1), (256, 14, 128, 1), (256, 7, 128, 1), (16, 7, 128, 1.14286), (1, 14, 128, 1.3062)],
)
def test_boxes_waste_little(N: int, side: int, pixels: int, waste: float) -> None:
    problem = dataclasses.replace(CONVOLUTIONS["3x3 512->512"], N=N, H=side, W=side)
    images = conv2d_plan.forward_tma(problem, "ieee", H200).inputs[0]
    assert math.prod(images.block[:3]) == pixels
    boxes = math.prod(-(-size // block) for size, block in zip(images.shape, images.block[:3], strict=False))
    assert boxes * pixels / (N * side * side) == pytest.approx(waste, rel=1e-3)


@pytest.mark.parametrize(
    "layer", [name for name, p in CONVOLUTIONS.items() if conv2d_plan.forward_tma(p, "ieee", H200)]
)
@pytest.mark.parametrize("processors", [1, 3, 132])
def test_programs_walk_over_all_tiles_in_equal_steps(layer: str, processors: int) -> None:
    problem = CONVOLUTIONS[layer]
    plan = conv2d_plan.forward_tma(problem, "ieee", Device(90, processors))
    how = plan.launch
    tiles = conv2d_plan.parts(how, False) * -(-problem.K // how.constants["BLOCK_N"])
    steps = how.scalars["tile_steps"]
    assert how.programs * (steps - 1) < tiles <= how.programs * steps
    assert how.programs <= 2 * processors


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of a width that devices have, which the interpreter's own row has not."""
    rows = Table("conv2d.wide", (Rule(lambda p: True, TmaTile(32, 128, 16, 4, 1), "as on a device"),))
    plans = conv2d_plan.forward_tma, conv2d_plan.backward_input_tma
    for plan in plans:
        plan.cache_clear()
    monkeypatch.setattr(conv2d_plan, "FORWARD_TMA", rows)
    monkeypatch.setattr(conv2d_plan, "BACKWARD_INPUT_TMA", rows)
    yield
    for plan in plans:
        plan.cache_clear()


@pytest.mark.skipif(not launch.INTERPRETING, reason="the device's own rows are wide")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["quarters", "halves"])
def test_wide_tiles_are_stored_in_parts(wide_tiles: None, dtype: torch.dtype) -> None:
    """The last filters fill no part."""
    case = dataclasses.replace(DENSE, K=116)
    with cnnops.use_backend("triton"):
        check_act(case, inputs_of(case, dtype, "channels_last", BACKEND.device, True), "silu")
        check_statistics(BACKEND, case, helpers.conv2d_inputs(case, dtype, "channels_last", BACKEND.device))


@pytest.mark.parametrize("activation", ["relu", "hardswish"])
def test_epilogues_of_boxes(activation: str) -> None:
    with cnnops.use_backend("triton"):
        check_act(DENSE, inputs_of(DENSE, torch.float32, "channels_last", BACKEND.device, True), activation)


def test_operands_that_begin_between_boundaries() -> None:
    """Descriptors take addresses that 16 divides; a dense view need not have one."""
    x, weight, bias = helpers.conv2d_inputs(DENSE, torch.float32, "channels_last", BACKEND.device)
    beside = [t.new_full((t.numel() + 1,), torch.nan)[1:].as_strided(t.shape, t.stride()) for t in (x, weight)]
    moved = [view.copy_(t) for view, t in zip(beside, (x, weight), strict=True)]
    assert all(t.data_ptr() % 16 for t in moved)
    with cnnops.use_backend("triton"):
        assert_same_bits(CF.conv2d(*moved, bias, padding=1), CF.conv2d(x, weight, bias, padding=1), "y")


def test_what_lies_behind_a_row_of_outputs_is_not_multiplied_by_zero() -> None:
    """x's last column is the last tap's alone, though boxes of a power of two columns of x would have it for all."""
    x, weight = torch.ones(1, 64, 1, 17, device=BACKEND.device), torch.ones(64, 64, 1, 3, device=BACKEND.device)
    x[..., -1] = torch.inf
    with cnnops.use_backend("triton"):
        CF.conv2d(x.contiguous(memory_format=torch.channels_last), weight.requires_grad_()).sum().backward()
    expected = torch.tensor([15, 15, torch.inf], device=BACKEND.device).expand(64, 64, 1, 3)
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("id", ["1x1-full-tile", "1x1-padded", "1x1-grouped", "1x1-s2-uneven"])
def test_a_prologue_is_what_its_own_pass_would_write(id: str, layout: str) -> None:
    """On integers, so that nothing rounds on the way. Padding is zero, whatever the shift."""
    from cnnops.backends.triton.conv2d import Epilogue, Prologue, convolve

    case, random = find(CONV2D, id), helpers.generator(id)
    inputs = helpers.conv2d_inputs(case, torch.float32, layout, BACKEND.device, helpers.integers)
    scale, shift = (helpers.integers((case.C,), torch.float32, BACKEND.device, random) for _ in range(2))
    problem = helpers.problem_of("conv2d_forward", case, torch.float32, layout, BACKEND.device)
    found = convolve(problem, *inputs[:2], Epilogue(inputs[2]), Prologue(scale, shift, "relu"))
    x = (inputs[0] * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).relu()
    assert x.any()
    assert_same_bits(found.y, helpers.torch_conv2d(case)(x, *inputs[1:]), "y")


def test_statistics_of_many_parts() -> None:
    """More than one program merges: shares of the parts, and then the shares. Some parts are empty."""
    from cnnops.backends.triton import epilogue

    random = helpers.generator("parts")
    values = torch.randn(1100, 4, 5, generator=random, dtype=torch.float64) + 100
    counts = torch.randint(0, 5, (1100,), generator=random)
    exists = (torch.arange(4) < counts[:, None])[:, :, None]
    means = (values * exists).sum(1) / counts.clamp_min(1)[:, None]
    m2s = ((values - means[:, None]).square() * exists).sum(1)
    parts = [t.to(BACKEND.device, torch.float32).contiguous() for t in (counts, means, m2s)]
    kept = values.flatten(0, 1)[exists.flatten()]
    helpers.check_moments(kept.t().reshape(1, 5, -1, 1), *epilogue.merge(*parts))

    parts[1][parts[0].nonzero()[0], 2] = torch.inf  # which the other parts are merged into
    mean, _ = epilogue.merge(*parts)
    assert mean[2].isposinf()
