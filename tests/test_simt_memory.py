"""The emulator sees every access to memory: it refuses those beside what a kernel was given, and counts the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from cnnops.backends import simt

pytestmark = pytest.mark.quick

# What the emulator says of each fault; None where the result is wrong. A row has 74 bytes, shared memory 256.
BEYOND, BEFORE = r"beyond the end of {} \(74 bytes\)", r"before the start of {} \(74 bytes\)"
FAULTS = {
    "read_beyond_the_end": "thread 0: reads 2 bytes of global memory, up to 2 bytes " + BEYOND.format("x"),
    "read_before_the_start": "thread 0: reads 2 bytes of global memory, from 2 bytes " + BEFORE.format("x"),
    "read_far_beyond_the_end": r"reads 2 bytes of global memory, up to \d+ bytes " + BEYOND.format("[xy]"),
    "write_beyond_the_end": "writes 2 bytes of global memory, up to 2 bytes " + BEYOND.format("y"),
    "write_before_the_start": "writes 2 bytes of global memory, from 2 bytes " + BEFORE.format("y"),
    "write_to_an_input": "writes 2 bytes to x, an input",
    "vector_read_across_the_end": "thread 4: reads 16 bytes of global memory, up to 6 bytes " + BEYOND.format("x"),
    "async_copy_across_the_end": "thread 4: reads 16 bytes of global memory, up to 6 bytes " + BEYOND.format("x"),
    "async_copy_beyond_shared_memory": "writes 16 bytes beyond the 256 bytes of dynamic shared memory",
    "shared_read_before_the_start": "reads 2 bytes before the start of dynamic shared memory",
    "shared_read_beyond_the_end": "reads 2 bytes beyond the 256 bytes of dynamic shared memory",
    "read_beyond_a_shared_variable": "reads 2 bytes outside a shared variable",
    "ldmatrix_beyond_shared_memory": "thread 31: reads 16 bytes beyond the 256 bytes of dynamic shared memory",
    "unseen_write_beyond_the_end": "a write beyond the end of y, at distance 1",
    "unseen_write_before_the_start": "a write before the start of y, at distance 1",
    "element_left_out": None,
    "tma_load_beyond_the_end": "reads 76 bytes of global memory, up to 2 bytes " + BEYOND.format("x"),
    "read_of_another_blocks_memory": "reads 2 bytes of another block's shared memory",
}

# The accesses that nothing reports, in the direction in which the page follows at once.
FATAL = {("unseen_write_before_the_start", "start")}

SECTOR, WARP = 32, 32


def reads(floats: int, sectors: int, distinct: int | None = None) -> dict[str, int]:
    """Traffic of global reads: elements asked for, sectors fetched, and of these the distinct ones."""
    dram = SECTOR * (sectors if distinct is None else distinct)
    return {"global_read_bytes": 4 * floats, "global_read_sectors": sectors, "dram_read_bytes": dram}


def writes(floats: int, sectors: int) -> dict[str, int]:
    return {"global_write_bytes": 4 * floats, "global_write_sectors": sectors, "dram_write_bytes": SECTOR * sectors}


ROW = writes(WARP, 4)
TILE = reads(WARP * WARP, 128) | writes(WARP * WARP, 128) | {"shared_bytes": 2 * 4 * WARP * WARP}
TRAFFIC = {
    "float4_row": reads(4 * WARP, 16) | writes(4 * WARP, 16),
    "float_row": reads(WARP, 4) | ROW,
    "every_second_float": reads(WARP, 8) | ROW,
    "one_float_for_all": reads(WARP, 1) | ROW,
    "row_across_a_sector": reads(WARP, 5) | ROW,
    "row_twice": reads(2 * WARP, 8, distinct=4) | ROW,
    # Request i has lanes i to 31, so that eight requests have four sectors, eight have three, ..
    "triangle": reads(sum(range(WARP + 1)), 8 * (4 + 3 + 2 + 1)) | ROW,
    # 32 columns, each of whose words are all in one bank.
    "column_of_pitch_32": TILE | {"bank_conflicts": 32 * 31},
    "column_of_pitch_33": TILE,
    "shared_float4_row": {"shared_bytes": 16 * WARP},
    # Four passes of eight lanes, all of them at the same four banks.
    "shared_float4_column": {"shared_bytes": 16 * WARP, "bank_conflicts": 4 * 7},
    # Half of the lanes have 16 bytes to read; all of them write.
    "async_row": reads(4 * WARP // 2, 8) | {"shared_bytes": 16 * WARP},
    "ldmatrix_of_pitch_16": {"shared_bytes": 16 * WARP},
    "ldmatrix_of_pitch_128": {"shared_bytes": 16 * WARP, "bank_conflicts": 4 * 7},
    "ldmatrix_of_pitch_144": {"shared_bytes": 16 * WARP},
    "one_mma": {"flops": 2 * 16 * 8 * 16},
    "one_mma_tf32": {"flops": 2 * 16 * 8 * 8},
}


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    module = simt.module()
    yield module
    module.guard_tensors("")
    module.count_accesses(False)
    module.reset_counters()


def test_the_lists_are_whole(emulator: ModuleType) -> None:
    assert set(emulator.memory_fault_names()) == set(FAULTS)
    assert set(emulator.traffic_names()) == set(TRAFFIC)


@pytest.mark.parametrize("where", ["end", "start"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed(emulator: ModuleType, fault: str, where: str) -> None:
    emulator.guard_tensors(where)
    message = FAULTS[fault]
    if (fault, where) in FATAL:
        program = f"emulator.guard_tensors({where!r}); emulator.run_memory_fault({fault!r})"
        assert status_of(program) == -signal.SIGSEGV
    elif message is None:
        assert not emulator.run_memory_fault(fault)
    else:
        with pytest.raises(RuntimeError, match=f"simt: {fault}.*: {message}"):
            emulator.run_memory_fault(fault)
    assert emulator.run_memory_fault(fault, faulty=False), "the sound kernel after the faulty one"


def status_of(program: str) -> int:
    """How a process of its own ends that runs this program."""
    start = "from cnnops.backends import simt\nemulator = simt.module()\n"
    return subprocess.run([sys.executable, "-c", start + program], capture_output=True).returncode


def test_unknown_names_are_refused(emulator: ModuleType) -> None:
    with pytest.raises(ValueError, match="no such fault: none"):
        emulator.run_memory_fault("none")
    with pytest.raises(ValueError, match="no such kernel: none"):
        emulator.run_traffic("none")
    with pytest.raises(ValueError, match="where='middle'"):
        emulator.guard_tensors("middle")


@pytest.mark.parametrize("where", ["end", "start"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_guarded_call_gives_the_same_bits(emulator: ModuleType, where: str, offset: int) -> None:
    """Also of tensors that are not aligned to 16 bytes, and with gaps in the copies' destinations."""
    storage = torch.randn(offset + 2 * 5 * 7 * 9, generator=torch.Generator().manual_seed(0))
    x = storage[offset:].view(2, 5, 7, 9)
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1))

    def results() -> list[torch.Tensor]:
        geometry = (1, 2, 1, 0, 1, 1, 1, 0)
        y = simt.function("conv2d_forward")(x, weight, None, *geometry)
        return [y, *simt.function("conv2d_backward")(y, x, weight, *geometry, True, True, True)]

    plain = results()
    emulator.guard_tensors(where)
    assert all(torch.equal(a, b) for a, b in zip(results(), plain, strict=True))


@pytest.mark.parametrize("kernel", TRAFFIC)
@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
def test_traffic_is_counted_exactly(emulator: ModuleType, kernel: str, order: str) -> None:
    emulator.set_schedule(order, 1)
    emulator.count_accesses(True)
    emulator.run_traffic(kernel)
    emulator.set_schedule("forward")
    counted = emulator.counters()["traffic"]
    assert counted.keys() == {kernel}
    assert {name: count for name, count in counted[kernel].items() if count} == TRAFFIC[kernel]


def test_engines_are_counted(emulator: ModuleType) -> None:
    """y [128, 64] = a [128, 256] * b [64, 256] by two blocks: TMA loads every number once, b for both by multicast."""
    emulator.count_accesses(True)
    assert emulator.run_fault("missing_full_wait", faulty=False)
    moved = emulator.counters()["traffic"]["missing_full_wait"]
    assert moved["flops"] == 2 * 128 * 64 * 256
    assert moved["global_read_bytes"] == 2 * (128 + 64) * 256
    assert moved["global_write_bytes"] == 4 * 128 * 64
    loaded, multiplied = 2 * (128 + 2 * 64) * 256, 2 * (128 + 2 * 64) * 256
    assert moved["shared_bytes"] == loaded + multiplied


def test_traffic_adds_up_over_launches_and_starts_anew(emulator: ModuleType) -> None:
    emulator.count_accesses(True)
    for _ in range(3):
        emulator.run_traffic("row_twice")
    emulator.count_accesses(False)
    emulator.run_traffic("row_twice")
    counted = emulator.counters()["traffic"]["row_twice"]
    assert counted["dram_read_bytes"] == 3 * 4 * SECTOR
    assert emulator.counters()["kernels"] == {"row_twice": 4}
    emulator.reset_counters()
    assert emulator.counters()["traffic"] == {}
