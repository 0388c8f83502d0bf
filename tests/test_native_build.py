"""What was compiled, read back from the libraries. Nothing here needs the device that it was compiled for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import cnnops
import cnnops.functional as CF
from cnnops.backends import cuda, simt

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(cnnops.__file__).parent
CPU, CUDA = PACKAGE / "_native_cpu.so", PACKAGE / "_native_cuda.so"
TORCH = Path(torch.__file__).parent
HEADERS = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")
SYMBOLS = {
    name: library
    for library, name in (
        line.split()
        for line in (ROOT / "tests/torch_2_11_symbols.txt").read_text().splitlines()
        if not line.startswith("#")
    )
}

cuda_built = pytest.mark.skipif(not CUDA.exists(), reason="no CUDA library: see test_cuda_is_built_where_nvcc_is_found")
both = pytest.mark.parametrize("library", [CPU, pytest.param(CUDA, marks=cuda_built)], ids=["cpu", "cuda"])


@cache
def output(*command: str | Path, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def setup_script() -> dict[str, Any]:
    """setup.py's functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_is_built_where_nvcc_is_found() -> None:
    if setup_script()["find_cuda"]() is None:
        pytest.skip("no nvcc on this machine")
    assert CUDA.exists()


def undefined(library: Path) -> set[str]:
    """The names that a library leaves to others; what the C and C++ runtimes export has a version."""
    lines = (line.split() for line in output("nm", "-D", "--undefined-only", library).splitlines())
    return {name for kind, name in lines if kind == "U" and "@" not in name}


@both
def test_takes_of_torch_what_2_11_exports(library: Path) -> None:
    """And so nothing of ATen, c10 or Python."""
    assert undefined(library) - set(SYMBOLS) == set()
    assert "torch_call_dispatcher" in undefined(library)


def test_listed_symbols_are_declared_for_torch_2_11() -> None:
    flags = ["-E", "-P", "-x", "c++", "-std=c++20", "-DUSE_CUDA", *setup_script()["TORCH_FLAGS"].split()]
    source = "".join(f"#include <{header}>\n" for header in HEADERS)
    declarations = output("g++", *flags, "-isystem", TORCH / "include", "-", stdin=source)
    declared = set(re.findall(r"\b(\w+)\s*\(", declarations))
    assert set(SYMBOLS) - declared == set()
    assert not declared & {"torch_library_def_with_tags", "torch_library_set_python_module"}, "added in 2.12 and 2.13"


@both
def test_names_the_libraries_of_torch_that_it_needs(library: Path) -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library)))
    assert {SYMBOLS[name] for name in undefined(library)} <= needed
    assert {name for name in needed if "torch" in name or "c10" in name or "python" in name} <= set(SYMBOLS.values())


@cache
def cuda_build_info() -> dict[str, Any]:
    """What the CUDA library says of itself, loaded in a process of its own, where a stub stands in for a CUDA torch."""
    stub = TORCH / "lib/libtorch_cuda.so"
    if not stub.exists():
        stub = ROOT / "build/test/libtorch_cuda.so"
        stub.parent.mkdir(parents=True, exist_ok=True)
        absent = [name for name, library in SYMBOLS.items() if library == stub.name]
        source = "".join(f'extern "C" void {name}() {{}}\n' for name in absent)
        output("g++", "-shared", "-fPIC", "-x", "c++", "-", f"-Wl,-soname,{stub.name}", "-o", stub, stdin=source)
    program = (
        "import ctypes, os, sys, torch\n"
        "for library in sys.argv[1:]: ctypes.CDLL(library, os.RTLD_NOW | os.RTLD_GLOBAL)\n"
        "print(torch.ops.cnnops_cuda.build_info())"
    )
    return json.loads(output(sys.executable, "-c", program, stub, CUDA))


@cuda_built
def test_cuda_library_loads_with_every_symbol_bound() -> None:
    assert cuda_build_info()["backend"] == "cuda"


def cuobjdump(*flags: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    return output(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump", *flags, CUDA)


def by_kernel(listing: str) -> dict[tuple[str, str], str]:
    """A listing cut into (architecture, kernel): text. Kernels are named as in build_info, without scopes."""
    parts: dict[tuple[str, str], str] = {}
    arch = ""
    for part in re.split(r"^(?=Fatbin elf code:|\s*Function )", output("c++filt", stdin=listing), flags=re.M):
        if found := re.search(r"^arch = (\w+)", part, re.M):
            arch = found[1]
        elif found := re.match(r"\s*Function(?: :)? void (.+)", part):
            name = found[1].replace("(anonymous namespace)::", "")
            parts[arch, re.sub(r"\w+::", "", name.split("(")[0])] = part
    return parts


def emulated_kernels() -> set[str]:
    assert simt.usable().ok, simt.usable().reason
    return set(json.loads(simt.library.build_info())["kernels"])


@cuda_built
def test_holds_every_kernel_for_exactly_the_claimed_architectures() -> None:
    info = cuda_build_info()
    images = set(re.findall(r"ELF file.*\.(sm_\w+)\.cubin", cuobjdump("-lelf")))
    ptx = set(re.findall(r"PTX file.*\.sm_(\w+)\.ptx", cuobjdump("-lptx")))
    claimed = set(info["arches"])
    assert (
        images | {f"compute_{number}" for number in ptx}
        == claimed
        == {image for _, image in setup_script()["images"]()}
    )
    kernels = set(info["kernels"])
    assert set(by_kernel(cuobjdump("-res-usage"))) == {(arch, kernel) for arch in images for kernel in kernels}
    assert kernels == emulated_kernels()


@cuda_built
def test_no_kernel_spills() -> None:
    bad, most = {}, 0
    for kernel, text in by_kernel(cuobjdump("-res-usage")).items():
        used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        most = max(most, used["REG"])
        if used["REG"] > 255 or used["STACK"] or used["LOCAL"]:
            bad[kernel] = used
    assert bad == {}
    assert most > 32, "the convolutions keep their sums in registers"


@cuda_built
def test_tensor_cores_multiply_half_and_bfloat16_alone() -> None:
    count = {kernel: len(re.findall(r"\bHMMA\.", text)) for kernel, text in by_kernel(cuobjdump("-sass")).items()}
    gemm = re.compile(r"conv2d_(forward|backward_input|backward_weight)_kernel<(\w+)")
    found = defaultdict(set)
    for (arch, kernel), multiplies in count.items():
        if parts := gemm.match(kernel):
            found[arch, parts[2]].add(parts[1])
            assert (multiplies > 0) == (parts[2] != "float"), (arch, kernel, multiplies)
    passes = {"forward", "backward_input", "backward_weight"}
    assert found == {(arch, T): passes for arch, _ in count for T in ("float", "Half", "BFloat16")}


def test_the_emulator_runs_every_kernel() -> None:
    """All but the copies that nothing asks for yet: from one dtype to another, and of float64."""
    emulator = simt.module()
    emulator.reset_counters()
    with cnnops.use_backend("simt"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            shapes = ((1, 4, 6, 6), (5, 4, 3, 3), (5,))
            x, weight, bias = (torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes)
            CF.conv2d(x, weight, bias).sum().backward()
    ran = set(emulator.counters()["kernels"])
    built = emulated_kernels()
    unused = {name for name in built if re.match(r"copy_kernel<(?!(float|Half|BFloat16), \1>)", name)}
    assert ran == built - unused


@pytest.mark.parametrize(
    ("image", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100a", [(10, 0)], [(10, 3), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0), (11, 0)]),
        ("compute_80", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_devices_that_an_image_runs_on(
    image: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert [device for device in [*runs, *does_not] if cuda.runs_on(image, *device)] == runs


def test_drivers_that_know_the_librarys_cuda() -> None:
    assert (
        cuda.driver_knows(13000, 13000).ok and cuda.driver_knows(13010, 13020).ok and cuda.driver_knows(14000, 13020).ok
    )
    refused = cuda.driver_knows(12080, 13000)
    assert not refused.ok
    assert (
        refused.reason
        == "the driver supports CUDA 12.8, but the library was built with 13.0, which needs r580 or later"
    )
    assert not cuda.driver_knows(0, 13000).ok, "there is no driver"


def test_architectures_are_named_as_torch_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    assert [image for _, image in setup_script()["images"]()] == ["sm_80", "sm_90a", "sm_120", "compute_120"]


# A level's own namespace is in the names of its functions. Whatever carries none, runs on every processor: functions of
# the C++ library too, of which the linker keeps one level's copy for all.
LEVELS = {"avx512": "6avx512", "avx2": "4avx2", "baseline": ""}
FORBIDDEN = {
    "baseline": re.compile(r"^v|%[yz]mm"),
    "avx2": re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]"),
}


def test_no_instruction_leaks_into_a_lower_isa_level() -> None:
    leaks: dict[tuple[str, str], str] = {}
    functions, wide = defaultdict(set), 0
    level = name = ""
    for line in output("objdump", "-d", "--no-show-raw-insn", CPU).splitlines():
        if found := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            name = found[1]
            level = next(level for level, mark in LEVELS.items() if mark in name)
            functions[level].add(name)
        elif "\t" in line:
            instruction = line.split("\t", 1)[1]
            wide += "%zmm" in instruction
            if level in FORBIDDEN and FORBIDDEN[level].search(instruction):
                leaks[level, name] = instruction
    assert leaks == {}
    assert set(functions) == set(LEVELS) and wide > 0, "the library is stripped, or a level is not built"


def test_every_isa_level_is_reported() -> None:
    info = cnnops.info()["backends"]["cpu"]["built"]
    assert set(info["isa_levels"]) == set(LEVELS)
    assert info["isa"] in LEVELS


@pytest.mark.parametrize("backend", ["cpu", "simt"])
def test_a_sanitized_library_is_one_of_its_own(backend: str) -> None:
    program = f"from cnnops.backends import {backend}; print({backend}.library.path.name)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), f"CNNOPS_{backend.upper()}_LIBRARY": "thread"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == f"_native_{backend}_thread.so", done.stderr
