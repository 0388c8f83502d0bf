"""The emulator itself: it notices faults, refuses what a device refuses, and no order of threads changes a result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cnnops.backends import simt

pytestmark = pytest.mark.quick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEDULES = (("forward", 0), ("reversed", 0), ("random", 1), ("random", 2))

# What the emulator says of each fault; None where it lets the kernel finish with a wrong result.
FAULTS = {
    "missing_barrier": None,
    "early_refill": None,
    "missing_async_wait": None,
    "uninitialised_read": None,
    "misaligned_async_copy": "not aligned to 16",
    "dynamic_shared_overrun": "beyond the 512 bytes of dynamic shared memory",
    "shared_variable_overrun": "outside a shared variable",
    "divergent_barrier": "divergent barrier: __syncthreads at selftest.cu",
    "exit_before_barrier": r"deadlock.*waiting in __syncthreads at .*: thread 0\.\.126\n  exited: thread 127",
    "lane_outside_mask": "is not in its own mask",
    "shuffle_from_outside_mask": "outside its mask",
    "lane_missing_from_collective": "deadlock.*waiting in __shfl_xor_sync with mask 0xffffffff",
    "missing_barrier_sync": None,
    "barrier_count_mismatch": "barrier [12] is for (96|64) threads here and for (64|96) elsewhere",
    "barrier_number_too_large": "barrier 1[67] is none of 1 to 15",
    "missing_threadfence": "without a __threadfence before it",
    "missing_full_wait": "no thread of the block has waited for|still reads",
    "wrong_parity": "no thread of the block has waited for|still reads|deadlock",
    "missing_expect": "no thread of the block has waited for|still reads",
    "missing_product_wait": "the wgmma at .* still reads the shared memory",
    "missing_product_fence": "no wgmma_fence since the warpgroup's last wait",
    "missing_commit": "the wgmma at .* still reads the shared memory",
    "early_release": "the wgmma at .* still reads the shared memory",
    "wrong_descriptor_stride": None,
    "wrong_descriptor_swizzle": "the descriptor's swizzle is not 128 bytes",
    "misaligned_tile": "not aligned to 1024 bytes",
    "too_little_shared": "not an aligned word of this block's shared memory",
    "missing_mbarrier_init": "the barrier was never initialised",
    "missing_arrival": r"deadlock.*waiting in mbarrier_wait of parity 0 .*, phase 0, 1 of 32 arrivals",
    "missing_handover_wait": "deadlock.*waiting in mbarrier_wait",
    "arrival_beyond_count": "more arrivals than the barrier's count of 1",
    "missing_init_fence": "no fence_mbarrier_init follows",
    "missing_first_cluster_sync": "no fence_mbarrier_init and cluster_sync lie between|was never initialised",
    "missing_last_cluster_sync": "the block exits while another may still arrive|block [01] of the cluster has exited",
    "wrong_multicast_mask": r"deadlock.*waiting in mbarrier_wait of parity 0 \(barrier at offset \d+, phase 0, 0 of 1 "
    r"arrivals and 8192 bytes still to come\) at selftest_sm90.cu:\d+: thread 0\.\.127",
    "mask_beyond_cluster": "the mask names blocks beyond the cluster's 2",
    "missing_release": "deadlock.*2 of 2 arrivals and 0 bytes still to come",
    "extra_arrival": "more arrivals than|has not been waited for|still reads|deadlock",
    "divergent_warpgroup": "others of its warpgroup execute wgmma_(commit|wait) at selftest_sm90.cu",
    "wrong_register_count": "100 is no multiple of 8 from 24 to 256",
    "swapped_strides": None,
    "wrong_major": None,
    "operand_beyond_shared": "an operand reaches beyond dynamic shared memory",
    "missing_proxy_fence": r"thread \d+ has written an operand, and executed no fence_proxy_async since",
    "missing_named_barrier": r"thread \d+ has written an operand, and passed no barrier after its fence_proxy_async",
    "swapped_fragment": None,
    "halo_off_by_one": None,
    "corner_off_by_one": None,
    "wrong_tap": None,
    "base_pixel_outside": "is beside the map's bounding box",
    "missing_element_stride": None,
    "shifted_box": None,
    "box_beyond_shared": "a tile of 4096 bytes at offset 0 reaches beyond the 4080 bytes of dynamic shared memory",
}


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    module = simt.module()
    yield module
    module.set_schedule("forward")


def test_the_list_of_faults_is_whole(emulator: ModuleType) -> None:
    assert set(emulator.fault_names()) == set(FAULTS)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed(emulator: ModuleType, fault: str, order: str, seed: int) -> None:
    emulator.set_schedule(order, seed)
    message = FAULTS[fault]
    if message is None:
        assert not emulator.run_fault(fault)
    else:
        with pytest.raises(RuntimeError, match=f"(?s)simt: {fault}, block .*({message})"):
            emulator.run_fault(fault)
    assert emulator.run_fault(fault, faulty=False), "the sound kernel after the faulty one"


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "reason"),
    [
        ((1, 65536, 1), (32, 1, 1), 0, "65535"),
        ((1, 1, 65536), (32, 1, 1), 0, "65535"),
        ((2**31, 1, 1), (32, 1, 1), 0, "2\\^31 - 1"),
        ((1, 1, 1), (1025, 1, 1), 0, "1024 threads"),
        ((1, 1, 1), (1, 1, 65), 0, "64 in z"),
        ((1, 1, 1), (32, 1, 1), 227 * 1024 + 1, "227 KB"),
        ((0, 1, 1), (32, 1, 1), 0, "zero"),
        ((1, 1, 1), (32, 0, 1), 0, "zero"),
    ],
)
def test_invalid_launch_is_refused(
    emulator: ModuleType, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=f"invalid launch.*{reason}"):
        emulator.launch_empty(grid, block, shared_bytes)


def test_largest_launch_is_taken(emulator: ModuleType) -> None:
    emulator.reset_counters()
    emulator.launch_empty((2, 3, 4), (16, 1, 64), 227 * 1024)
    assert emulator.counters()["blocks"] == 24


def test_unknown_order_and_fault_are_refused(emulator: ModuleType) -> None:
    with pytest.raises(ValueError, match="order='sideways'"):
        emulator.set_schedule("sideways")
    with pytest.raises(ValueError, match="no such fault: none"):
        emulator.run_fault("none")


def conv2d(dtype: torch.dtype, groups: int = 1) -> tuple[Tensor, ...]:
    """y, dx, dweight and dbias of a convolution of several tiles each way, with tails, split over pixels."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((2, 16 * groups, 13, 15), (72 * groups, 16, 3, 2), (72 * groups,))
    )
    geometry = (2, 1, 1, 1, 1, 2, groups, 0)
    y = simt.function("conv2d_forward")(x, weight, bias, *geometry)
    dy = torch.randn(*y.shape, generator=generator).to(dtype)
    return (y, *simt.function("conv2d_backward")(dy, x, weight, *geometry, True, True, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_schedule_gives_the_same_bits(emulator: ModuleType, dtype: torch.dtype) -> None:
    expected = conv2d(dtype)
    assert not any(torch.isnan(t).any() for t in expected)
    for order, seed in SCHEDULES[1:]:
        emulator.set_schedule(order, seed)
        for result, first in zip(conv2d(dtype), expected, strict=True):
            assert torch.equal(result, first), (order, seed)


def test_every_conv2d_kernel_runs_and_is_counted(emulator: ModuleType) -> None:
    emulator.reset_counters()
    assert emulator.counters()["kernels"] == {}
    for dtype in DTYPES:
        conv2d(dtype, groups=2)
    counters = emulator.counters()
    built = {name for name in json.loads(simt.library.build_info())["kernels"] if not name.startswith("copy_kernel")}
    ran = {name for name in counters["kernels"] if not name.startswith("copy_kernel")}
    assert ran == built
    assert {"conv2d_forward_kernel<float>", "conv2d_backward_weight_kernel<BFloat16>"} <= built
    assert counters["launches"] == sum(counters["kernels"].values())
    assert all(counters[each] > 0 for each in ("blocks", "switches", "block_barriers", "warp_collectives"))
