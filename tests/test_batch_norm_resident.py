"""Batch norm in one launch, for tensors that L2 holds, beside its separate launches: chosen by size, with the same bits."""

from __future__ import annotations

from math import prod
from types import ModuleType

import helpers
import pytest
import torch
from cases import LAYOUTS
from tolerance import assert_same_bits

from cnnops.backends import simt

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCHEDULES = (("forward", 0), ("reversed", 0), ("random", 1), ("random", 2))
SEPARATE = {
    "forward": {"batch_moments_kernel", "finish_statistics_kernel", "batch_norm_forward_kernel"},
    "backward": {"batch_norm_sums_kernel", "finish_gradients_kernel", "batch_norm_backward_kernel"},
}
RESIDENT = {name: {"clear_count_kernel", f"batch_norm_{name}_resident_kernel"} for name in SEPARATE}
Shape = tuple[int, int, int, int]
Passes = dict[str, list[torch.Tensor]]


def run(
    emulator: ModuleType, shape: Shape, dtype: torch.dtype, layout: str, residual: bool, training: bool, l2_bytes: int
) -> tuple[Passes, dict[str, set[str]]]:
    """What the passes and the running statistics come to, and the kernels of either pass."""
    emulator.set_device(l2_bytes=l2_bytes)
    random = helpers.generator(str(shape))
    x, dy, other = (helpers.laid_out(helpers.randn(shape, dtype, "cpu", random), layout) for _ in range(3))
    weight, bias, mean, var = (helpers.randn(shape[1:2], torch.float32, "cpu", random) for _ in range(4))
    var = var.square()
    forward, backward = (simt.library.function(f"batch_norm_act_{name}") for name in SEPARATE)
    kernels = {}

    def counted(name: str, results: list[torch.Tensor]) -> list[torch.Tensor]:
        kernels[name] = {kernel.split("<")[0] for kernel in emulator.counters()["kernels"]} - {"copy_kernel"}
        emulator.reset_counters()
        return results

    emulator.reset_counters()
    added = other if residual else None
    y, used, rstd = forward(x, weight, bias, added, mean, var, training, 0.1, 1e-5, "silu")
    passes = {"forward": counted("forward", [y, used, rstd, mean, var])}
    gradients = backward(dy, x, weight, bias, added, None, used, rstd, training, 1e-5, "silu", *[True] * 3, residual)
    passes["backward"] = counted("backward", [each for each in gradients if each is not None])
    return passes, kernels


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 272, 9, 8), (2, 24, 40, 33), (5, 3, 31, 17), (600, 40, 1, 1), (1, 1, 2, 1), (9, 83, 3, 1)], ids=str
)
def test_one_launch_has_the_bits_of_three(
    emulator: ModuleType, shape: Shape, dtype: torch.dtype, layout: str, residual: bool, training: bool
) -> None:
    separate, kernels = run(emulator, shape, dtype, layout, residual, training, 0)
    assert kernels["backward"] == SEPARATE["backward"]
    for order, seed in SCHEDULES:
        emulator.set_schedule(order, seed)
        resident, kernels = run(emulator, shape, dtype, layout, residual, training, 1 << 30)
        assert kernels["backward"] == RESIDENT["backward"]
        assert kernels["forward"] == RESIDENT["forward"] if training else not kernels["forward"] & RESIDENT["forward"]
        for name in SEPARATE:
            for ours, theirs in zip(resident[name], separate[name], strict=True):
                assert_same_bits(ours, theirs, name)


@pytest.mark.parametrize(
    ("name", "residual", "tensors"), [("forward", True, 1), ("backward", False, 2), ("backward", True, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_read_twice_may_fill_half_of_l2(
    emulator: ModuleType, dtype: torch.dtype, name: str, residual: bool, tensors: int
) -> None:
    shape = (2, 24, 9, 8)
    enough = 2 * tensors * prod(shape) * dtype.itemsize
    for l2_bytes, expected in ((enough, RESIDENT), (enough - 1, SEPARATE)):
        _, kernels = run(emulator, shape, dtype, "channels_last", residual, True, l2_bytes)
        assert kernels[name] == expected[name]


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 132])
def test_any_grid_is_right(emulator: ModuleType, multiprocessors: int) -> None:
    """Whole numbers: the sums, and so the results, are the same however the slices are cut."""
    random = helpers.generator("grid")
    x, dy = (helpers.integers((4, 16, 16, 16), torch.float32, "cpu", random) for _ in range(2))
    zeros, ones = torch.zeros(16), torch.ones(16)
    emulator.set_device(multiprocessors=multiprocessors, l2_bytes=1 << 30)
    backward = simt.library.function("batch_norm_act_backward")
    for layout in LAYOUTS:
        dx, dweight, dbias, *_ = backward(
            *(helpers.laid_out(each, layout) for each in (dy, x)),
            *(ones, zeros, None, None, zeros, ones, False, 0.0, "none", True, True, True, False),
        )
        assert torch.equal(dx, dy)
        assert torch.equal(dweight, (dy * x).sum((0, 2, 3)))
        assert torch.equal(dbias, dy.sum((0, 2, 3)))


def test_statistics_of_any_alignment_and_stride() -> None:
    """They were saved for the backward pass, and may come back in other memory."""
    random = helpers.generator("statistics")
    x, dy = (helpers.randn((4, 16, 6, 5), torch.float32, "cpu", random) for _ in range(2))
    mean, rstd = helpers.randn((16,), torch.float32, "cpu", random), torch.rand(16) + 0.5
    backward = simt.library.function("batch_norm_act_backward")

    def gradients(mean: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return backward(
            *(helpers.laid_out(each, "channels_last") for each in (dy, x)),
            *(torch.ones(16), None, None, None, mean, rstd, True, 0.0, "none", True, True, True, False),
        )

    moved = torch.cat([torch.full((1,), torch.nan), mean])[1:]
    spread = torch.stack([rstd, torch.full((16,), torch.nan)], 1)[:, 0]
    for got, expected in zip(gradients(moved, spread), gradients(mean, rstd), strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)


@pytest.mark.parametrize("name", ["grid_barrier", "__syncthreads"])
def test_without_its_barriers_it_goes_wrong(emulator: ModuleType, name: str) -> None:
    what = (2, 24, 40, 33), torch.float32, "channels_last", True, True, 1 << 30
    expected, _ = run(emulator, *what)
    emulator.disable_sync(name)
    for order, seed in SCHEDULES:
        emulator.set_schedule(order, seed)
        got, _ = run(emulator, *what)
        for each in SEPARATE:
            assert any(not torch.equal(a, b) for a, b in zip(got[each], expected[each], strict=True)), (
                each,
                order,
                seed,
            )
