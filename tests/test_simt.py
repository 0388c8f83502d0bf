"""The emulator itself: it notices faults, refuses what a device refuses, and no order of threads changes a result."""

from __future__ import annotations

import json
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
    "missing_grid_barrier": None,
    "missing_second_grid_barrier": r"deadlock.*block \(0, 0, 0\):\n  waiting in grid_barrier for 12 blocks at "
    r"selftest.cu:\d+: thread 0\.\.31",
    "exit_before_grid_barrier": r"deadlock.*waiting in grid_barrier for 4 blocks at selftest.cu:\d+: thread 0\.\.31\n"
    r" block \(2, 0, 0\):\n  exited: thread 0\.\.31",
    "uncleared_grid_barrier": None,
    "grid_barrier_in_plain_launch": "the launch is not cooperative",
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
    "missing_tile_wait": "the block exits, and no thread of it has waited for this copy",
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


def test_cooperative_launch_is_resident_at_once(emulator: ModuleType) -> None:
    emulator.launch_empty((2, 3, 1), (256, 1, 1), cooperative=True)
    with pytest.raises(RuntimeError, match=r"invalid launch.*of which 6 blocks are resident at once"):
        emulator.launch_empty((7, 1, 1), (256, 1, 1), cooperative=True)
    emulator.set_device(multiprocessors=132)
    emulator.launch_empty((4, 1, 1), (1024, 1, 1), cooperative=True)
    with pytest.raises(RuntimeError, match=r"invalid launch.*of which 4 blocks are resident at once"):
        emulator.launch_empty((5, 1, 1), (1024, 1, 1), cooperative=True)
    emulator.run_blocks(0, 3)
    with pytest.raises(RuntimeError, match="run_blocks cuts"):
        emulator.launch_empty((4, 1, 1), (32, 1, 1), cooperative=True)


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


def test_kernels_that_run_are_counted_by_name(emulator: ModuleType) -> None:
    emulator.reset_counters()
    assert emulator.counters()["kernels"] == {}
    for dtype in DTYPES:
        conv2d(dtype, groups=2)
    counters = emulator.counters()
    built = {name for name in json.loads(simt.library.build_info())["kernels"] if not name.startswith("copy_kernel")}
    ran = {name for name in counters["kernels"] if not name.startswith("copy_kernel")}
    assert ran <= built
    assert {name.split("<")[0] for name in ran} >= {f"conv2d_{each}_kernel" for each in ("forward", "backward_bias")}
    assert counters["launches"] == sum(counters["kernels"].values())
    assert all(counters[each] > 0 for each in ("blocks", "switches", "block_barriers", "warp_collectives"))


# Each with the sound kernels that it stops, or whose result it spoils, when it does nothing.
SYNC_WRAPPERS = {
    "__syncthreads": {"missing_barrier", "early_refill", "missing_arrival"},
    "__syncwarp": {"shifted_box"},
    "__threadfence": {"missing_threadfence"},
    "commit_async": {"missing_async_wait"},
    "wait_async": {"missing_async_wait"},
    "barrier_sync": {"missing_barrier_sync", "missing_proxy_fence"},
    "barrier_arrive": {"missing_barrier_sync"},
    "mbarrier_init": {"missing_full_wait", "shifted_box", "missing_arrival"},
    "fence_mbarrier_init": {"missing_full_wait", "shifted_box"},
    "mbarrier_arrive": {"missing_arrival"},
    "mbarrier_arrive_remote": {"missing_full_wait"},
    "mbarrier_expect": {"missing_full_wait", "shifted_box"},
    "mbarrier_wait": {"missing_full_wait", "shifted_box", "missing_arrival"},
    "fence_proxy_async": {"missing_proxy_fence"},
    "wgmma_fence": {"missing_full_wait", "missing_proxy_fence", "wrong_tap"},
    "wgmma_commit": {"missing_full_wait", "missing_proxy_fence", "wrong_tap"},
    "wgmma_wait": {"missing_full_wait", "missing_proxy_fence", "wrong_tap"},
    "cluster_sync": {"missing_full_wait"},
    "grid_barrier": {"missing_grid_barrier"},
}


def sound(emulator: ModuleType, name: str) -> bool:
    """Whether the sound kernel of this name still gives the right result."""
    try:
        return bool(emulator.run_fault(name, faulty=False))
    except RuntimeError:
        return False


@pytest.mark.parametrize("order", [order for order, seed in SCHEDULES if seed < 2])
@pytest.mark.parametrize("name", FAULTS)
def test_sound_kernel_is_right(emulator: ModuleType, name: str, order: str) -> None:
    for seed in range(3 if order == "random" else 1):
        emulator.set_schedule(order, seed)
        assert emulator.run_fault(name, faulty=False), seed


def test_the_list_of_wrappers_is_whole(emulator: ModuleType) -> None:
    assert set(emulator.sync_wrappers()) == set(SYNC_WRAPPERS)


@pytest.mark.parametrize("wrapper", SYNC_WRAPPERS)
def test_disabled_wrapper_is_a_fault(emulator: ModuleType, wrapper: str) -> None:
    emulator.set_schedule("reversed")
    assert all(sound(emulator, name) for name in SYNC_WRAPPERS[wrapper])
    emulator.disable_sync(wrapper)
    assert not any(sound(emulator, name) for name in SYNC_WRAPPERS[wrapper])
    emulator.disable_sync()
    assert all(sound(emulator, name) for name in SYNC_WRAPPERS[wrapper])


def test_schedules_are_replayed(emulator: ModuleType) -> None:
    def switches(seed: int) -> int:
        emulator.set_schedule("random", seed)
        emulator.reset_counters()
        assert sound(emulator, "early_release")
        return int(emulator.counters()["switches"])

    counts = [switches(seed) for seed in range(8)]
    assert counts == [switches(seed) for seed in range(8)]
    assert len(set(counts)) > 1


@pytest.mark.parametrize(("architecture", "limit"), [(80, 163), (86, 99), (90, 227)])
def test_device_has_its_architecture(emulator: ModuleType, architecture: int, limit: int) -> None:
    emulator.set_device(architecture, multiprocessors=5)
    emulator.launch_empty((1, 1, 1), (32, 1, 1), limit * 1024)
    with pytest.raises(RuntimeError, match=f"shared memory is limited to {limit} KB"):
        emulator.launch_empty((1, 1, 1), (32, 1, 1), limit * 1024 + 1)
    if architecture < 90:
        with pytest.raises(RuntimeError, match="clusters need sm_90"):
            emulator.run_fault("missing_full_wait", faulty=False)
        with pytest.raises(RuntimeError, match=f"needs sm_90, and the device is sm_{architecture}"):
            emulator.run_fault("swapped_strides", faulty=False)


def test_unknown_device_and_wrapper_are_refused(emulator: ModuleType) -> None:
    with pytest.raises(ValueError, match="80, 86 or 90, not 70"):
        emulator.set_device(70)
    with pytest.raises(ValueError, match="at least one multiprocessor"):
        emulator.set_device(90, multiprocessors=0)
    with pytest.raises(ValueError, match="no less than no L2"):
        emulator.set_device(90, l2_bytes=-1)
    with pytest.raises(ValueError, match="no such wrapper: sleep"):
        emulator.disable_sync("sleep")


def test_only_the_blocks_asked_for_run(emulator: ModuleType) -> None:
    emulator.run_blocks(2**31 - 10, 4)
    emulator.reset_counters()
    emulator.launch_empty((2**31 - 1, 1, 1), (32, 1, 1))
    assert emulator.counters()["blocks"] == 4
    emulator.run_blocks(1, 2)
    with pytest.raises(RuntimeError, match="run_blocks cuts a cluster of missing_full_wait apart"):
        emulator.run_fault("missing_full_wait", faulty=False)


TILED = {
    "dtype": "bfloat16",
    "extent": [64, 9, 7],
    "stride": [1, 64, 576],
    "box": [64, 8, 4],
    "element_stride": [1, 2, 3],
}
IM2COL = {
    "dtype": "float16",
    "cwhn": (40, 13, 15, 2),
    "pitch": 40,
    "lower": (-1, -2),
    "upper": (-1, 0),
    "stride": (2, 1),
    "channels": 64,
    "pixels": 128,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": "float32", "box": [32, 8, 4]}, None),
        ({"extent": [2**32, 1, 1]}, None),
        ({"box": [64, 128, 85]}, None),
        ({"dtype": "float64"}, "float64 is not loaded by TMA"),
        ({"base": 8}, "the base is not aligned to 16 bytes"),
        ({"extent": [64, 0, 7]}, r"extent\[1\]=0 is not from 1 to 2\^32"),
        ({"extent": [64, 9, 2**32 + 1]}, r"extent\[2\]=4294967297 is not"),
        ({"stride": [2, 64, 576]}, r"stride\[0\]=2 is not 1"),
        ({"stride": [1, 60, 576]}, r"stride\[1\]=60 elements are no multiple of 16 bytes"),
        ({"stride": [1, 64, 2**39]}, "less than 2\\^40 bytes"),
        ({"box": [72, 8, 4]}, "144 bytes along axis 0 exceed the swizzle's 128"),
        ({"box": [60, 8, 4]}, "120 bytes along axis 0 are no multiple of 16"),
        ({"box": [64, 129, 4]}, r"box\[1\]=129 elements, element_stride\[1\]=2 apart, are not from 1 to 256"),
        ({"box": [64, 0, 4]}, r"box\[1\]=0"),
        ({"element_stride": [2, 2, 3]}, "TMA takes every element of axis 0"),
        ({"element_stride": [1, 9, 3]}, r"element_stride\[1\]=9 is not from 1 to 8"),
        ({key: [1] * 5 for key in ("extent", "stride", "box", "element_stride")}, "rank 5 is not from 1 to 4"),
    ],
)
def test_tiled_tensor_map(emulator: ModuleType, change: dict[str, object], reason: str | None) -> None:
    if reason is None:
        assert emulator.check_tiled_map(**TILED | change)
    else:
        with pytest.raises(RuntimeError, match=f"tensor map: .*{reason}"):
            emulator.check_tiled_map(**TILED | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"lower": (-128, 127), "upper": (127, 127)}, None),
        ({"channels": 32, "dtype": "float32", "pixels": 1024}, None),
        ({"base": 24}, "the base is not aligned to 16 bytes"),
        ({"lower": (-129, 0)}, "a corner of -129 is not from -128 to 127"),
        ({"upper": (0, 128)}, "a corner of 128 is not"),
        ({"lower": (0, 5), "upper": (0, -10)}, "the bounding box is empty"),
        ({"channels": 72}, "144 bytes along axis 0 exceed"),
        ({"channels": 257}, "257 channels are not from 1 to 256"),
        ({"pixels": 1025}, "1025 pixels are not from 1 to 1024"),
        ({"stride": (9, 1)}, r"element_stride\[1\]=9 is not from 1 to 8"),
        ({"pitch": 36, "cwhn": (36, 13, 15, 2)}, r"stride\[1\]=36 elements are no multiple of 16 bytes"),
        ({"pitch": 32}, "a pitch of 32 elements is less than C"),
        ({"cwhn": (40, 13, 15, 0)}, "an extent of 0 is not"),
        ({"cwhn": (40, 2**20, 2**32, 2)}, "an image exceeds 2\\^40 bytes"),
        ({"cwhn": (40, 2**32, 2**32, 2), "pitch": 2**32}, "an image exceeds 2\\^40 bytes"),
    ],
)
def test_im2col_tensor_map(emulator: ModuleType, change: dict[str, object], reason: str | None) -> None:
    if reason is None:
        assert emulator.check_im2col_map(**IM2COL | change)
    else:
        with pytest.raises(RuntimeError, match=f"tensor map: .*{reason}"):
            emulator.check_im2col_map(**IM2COL | change)
