"""What kernels take of a multiprocessor: the rules are NVIDIA's, the table is that of the built library."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import pytest

from cnnops import resources
from cnnops.backends import cuda, simt
from cnnops.bench import kernels

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"


@pytest.mark.parametrize(
    ("device", "threads", "registers", "shared_bytes", "blocks"),
    [
        ("8.0", 256, 32, 0, 8),  # every warp
        ("8.0", 1024, 64, 0, 1),  # registers: all 65,536
        ("8.0", 1024, 65, 0, 0),  # one more for each thread, and no block fits
        ("8.0", 128, 255, 0, 2),
        ("8.0", 32, 16, 0, 32),  # blocks
        ("8.6", 32, 16, 0, 16),
        ("8.9", 32, 16, 0, 24),
        ("8.0", 128, 32, 48 << 10, 3),  # shared memory: 49 KB of 164 with the system's
        ("8.0", 128, 32, 163 << 10, 1),
        ("8.6", 128, 32, 99 << 10, 1),
        ("8.6", 128, 32, 100 << 10, 0),
        ("9.0", 384, 168, 227 << 10, 1),  # the most of everything that a block may have
        ("9.0", 384, 168, 113 << 10, 1),
        ("9.0", 256, 128, 113 << 10, 2),
    ],
)
def test_blocks_that_fit(device: str, threads: int, registers: int, shared_bytes: int, blocks: int) -> None:
    assert resources.blocks_per_multiprocessor(device, threads, registers, shared_bytes) == blocks


def test_occupancy_is_counted_in_warps() -> None:
    assert resources.occupancy("8.0", 256, 8) == 1
    assert resources.occupancy("8.6", 128, 3) == 0.25
    assert resources.occupancy("9.0", 33, 1) == 2 / 64


CALCULATOR = """
#include <iostream>
#include "cuda_occupancy.h"
int main() {
  int major, minor, threads_of_all, threads, registers, shared_of_all, shared;
  while (std::cin >> major >> minor >> threads_of_all >> shared_of_all >> threads >> registers >> shared) {
    cudaOccDeviceProp device{};
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = threads_of_all;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = shared_of_all;
    device.numSms = 100;
    device.sharedMemPerBlockOptin = shared_of_all - 1024;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel{};
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared_of_all - 1024;
    cudaOccDeviceState state{};
    cudaOccResult result{};
    const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    std::cout << (error ? -error : result.activeBlocksPerMultiprocessor) << '\\n';
  }
}
"""


def test_rules_are_those_of_nvidias_calculator(tmp_path: Path) -> None:
    """Which is a header, in Triton's wheel and in the toolkit."""
    program = resources.find_cuobjdump()
    headers = [
        folder / "include/cuda_occupancy.h"
        for folder in (program.parents[1] if program else Path("/usr/local/cuda"), Path("/usr/local/cuda"))
    ]
    header = next((path for path in headers if path.exists()), None)
    if header is None:
        pytest.skip("no cuda_occupancy.h: it comes with Triton and with the CUDA toolkit")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    build = ["g++", "-w", "-isystem", header.parent, tmp_path / "calculator.cpp", "-o", tmp_path / "calculator"]
    subprocess.run(build, check=True)
    threads, registers = (32, 64, 96, 128, 160, 256, 384, 512, 640, 1024), (*range(16, 256, 7), 255)
    shared = (0, 1, 127, 1024, 12345, 48 << 10, 99 << 10, 113 << 10, 163 << 10, 227 << 10)
    cases = [
        (device, *case)
        for device, of in resources.MULTIPROCESSORS.items()
        for case in itertools.product(threads, registers, shared)
        if case[2] <= of.shared_bytes - 1024
    ]
    lines = []
    for device, *case in cases:
        of = resources.MULTIPROCESSORS[device]
        lines.append(f"{device.replace('.', ' ')} {of.threads} {of.shared_bytes} {' '.join(map(str, case))}")
    said = subprocess.run(
        [tmp_path / "calculator"], input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout
    expected = [int(line) for line in said.split()]
    ours = [resources.blocks_per_multiprocessor(*case) for case in cases]
    assert len(expected) == len(cases)
    assert [item for item in zip(cases, ours, expected, strict=True) if item[1] != item[2]] == []
    assert {0, 1, 16, 24, 32} <= set(expected)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (
            "_ZN6cnnops4cuda12_GLOBAL__N_111copy_kernelIfNS0_4HalfEEEvNS_11CopyProblemElPKT_PT0_",
            "copy_kernel<float, Half>",
        ),
        ("_ZN6cnnops4cuda21finish_moments_kernelEllPKfPfS3_", "finish_moments_kernel"),
        ("_Z1kIL9Direction1ELj3ELin2ELb1EEvi", "k<1, 3, -2, true>"),
        ("_Z1kI5ShapeILi64ELi128EEEvi", "k<Shape<64, 128> >"),
        ("main", "main"),
    ],
)
def test_kernels_are_named_as_the_library_names_them(symbol: str, name: str) -> None:
    assert resources.kernel_name(symbol) == name


def test_simt_runs_every_built_kernel() -> None:
    """And the file that says how they are launched is up to date."""
    launches = kernels.launches()
    assert set(launches) == set(json.loads(simt.library.build_info())["kernels"])
    assert json.loads(resources.LAUNCHES.read_text()) == launches, "run: make docs"


def test_the_page_is_that_of_the_built_library() -> None:
    """Another compiler gives kernels other registers."""
    library = cuda.library.path
    if not library.exists() or resources.find_cuobjdump() is None:
        pytest.skip("no CUDA library, or no cuobjdump")
    text = PAGE.read_text()
    if resources.compiler(library) not in text:
        pytest.skip(f"the page is not of {resources.compiler(library)}")
    assert text == kernels.page(), "run: make docs"


def test_a_table_without_cuobjdump_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "find_cuobjdump", lambda: None)
    with pytest.raises(FileNotFoundError, match="comes with the CUDA toolkit and with Triton"):
        resources.usage(cuda.library.path)
