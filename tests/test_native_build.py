"""What was compiled, read back from the libraries. Nothing here needs the device that it was compiled for."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sass
import setuptools
import torch

import cnnops
from cnnops import resources
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
    assert not [name for name in needed if name.startswith(("libcuda.", "libcudart", "libnv"))], (
        "not there without a GPU"
    )


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


@cuda_built
def test_cuda_library_knows_its_sources() -> None:
    assert cuda_build_info()["sources"] == setup_script()["cuda_sources_hash"]()


@cache
def cuobjdump(*flags: str) -> str:
    if resources.find_cuobjdump() is None:
        pytest.skip("no cuobjdump: it comes with Triton and with the CUDA toolkit")
    return resources.cuobjdump(CUDA, *flags)


@cache
def machine_code() -> dict[tuple[str, str], str]:
    """What is listed of each kernel, by (image, kernel)."""
    return resources.by_kernel(cuobjdump("-sass"))


def emulated_kernels() -> set[str]:
    assert simt.usable().ok, simt.usable().reason
    return set(json.loads(simt.library.build_info())["kernels"])


@cache
def hopper_kernels() -> set[str]:
    """The kernels of the sources that are for sm_90a alone."""
    sources = [path.read_text() for path in sorted((ROOT / "csrc/cuda").glob("*_sm90.cu"))]
    return {re.search(r"\b(\w+_kernel)\(", part)[1] for text in sources for part in text.split("__global__")[1:]}


def is_hopper(kernel: str) -> bool:
    return kernel.split("<")[0] in hopper_kernels()


@cuda_built
def test_holds_every_kernel_for_exactly_the_claimed_architectures() -> None:
    info = cuda_build_info()
    images = set(re.findall(r"ELF file.*\.(sm_\w+)\.cubin", cuobjdump("-lelf")))
    ptx = set(re.findall(r"PTX file.*\.sm_(\w+)\.ptx", cuobjdump("-lptx")))
    claimed = {image for _, image in setup_script()["images"]()}
    assert claimed >= {"compute_80"}, "PTX for architectures to come"
    assert images | {f"compute_{number}" for number in ptx} == set(info["arches"]) == claimed
    expected = {
        (image, kernel) for image in images for kernel in info["kernels"] if image == "sm_90a" or not is_hopper(kernel)
    }
    assert set(resources.by_kernel(cuobjdump("-res-usage"))) == expected
    assert set(info["kernels"]) == emulated_kernels()


BUDGETS = {
    # csrc/cuda/conv2d.cuh counts them.
    "conv2d_(?!toeplitz)|add_slabs|finish_moments": 70,
    # 2 dtypes: 2 tiles, of which both passes are one kernel; both gradients by 3 sizes of filters; slabs.
    "conv2d_toeplitz": 4 + 6 + 2,
    # 3 sizes, 2 strides, 3 dtypes: forward with and without statistics, backward. Of any size: 3 tiles forward, 2 widths
    # of backward, in 3 dtypes. Slabs in 3, pooled results of all layouts.
    "depthwise_(?!nchw)|finish_pooled": 54 + 15 + 4,
    # 3 sizes, 2 strides and one of any size, 3 dtypes: forward and backward. Slabs and bias in 3.
    "depthwise_nchw": 42 + 6,
    # 3 dtypes. NHWC: max with 2 kinds of offsets and average, each by vectors and by elements, 2 forms unrolled for small
    # windows; backward as many. NCHW and split, indices, unpooling.
    "pool2d|max_pool2d|max_unpool2d": 106,
    # 3 dtypes, by vectors, by elements and in planes: statistics, sums, both directions, and both in one launch; what
    # finishes them.
    "batch_|finish_(statistics|gradients)|running_statistics|clear_count_kernel|fold": 9 * 6 + 5,
    # 3 dtypes, by vectors and by elements, with 2 kinds of offsets: sums and both directions.
    "bn_act_max_pool2d": 3 * 6 * 2,
    # 3 dtypes: sums and products, by position (in vectors, folded, by elements) and by plane; layers.
    "squeeze_excite": 53,
    # 4 by 4 dtypes, transposed in 3; 3 of each direction.
    "copy|transposed_copy|activation": 16 + 3 + 6,
}
"""The most kernels of each family, by what their names begin with."""


def test_instantiations_stay_in_their_budget() -> None:
    kernels = emulated_kernels()
    hopper = {kernel for kernel in kernels if is_hopper(kernel)}
    assert len(hopper) <= 23, (
        "3 widths and the halo form, 2 passes, 2 dtypes; 3 forms of backward_weight; 1 that clears"
    )
    families = {names: {each for each in kernels - hopper if re.match(names, each)} for names in BUDGETS}
    assert kernels - hopper == set().union(*families.values()), "every kernel has a budget"
    over = {names: len(family) for names, family in families.items() if len(family) > BUDGETS[names]}
    assert over == {}


@cuda_built
def test_no_kernel_spills() -> None:
    cuobjdump("-lelf")  # or skip
    used = resources.usage(CUDA)
    assert {key: each for key, each in used.items() if each.stack_bytes or each.local_bytes} == {}
    assert max(each.registers for each in used.values()) > 32, "the convolutions keep their sums in registers"
    assert [key for key, text in machine_code().items() if "LDL" in text or "STL" in text] == []


def test_without_hopper_nothing_is_missing() -> None:
    """What other sources take of those for sm_90a, conv2d.cu has null where they are left out."""
    objects = sorted((ROOT / "build/_native_cuda").rglob("*.o"))
    of_hopper = [path for path in objects if "_sm90" in path.name]
    if not of_hopper:
        pytest.skip("the CUDA library was built elsewhere, or without them")

    def symbols(which: str, paths: list[Path]) -> set[str]:
        return set(re.findall(r"^\w+$", output("nm", "--format=just-symbols", which, *paths), re.M))

    others = sorted(set(objects) - set(of_hopper))
    taken = symbols("--undefined-only", others) & symbols("--defined-only", of_hopper)
    missing = taken - symbols("--defined-only", others)
    assert {resources.kernel_name(name) for name in missing} <= {"kWgmmaConv2d", "kHaloConv2d"}


PASSES = ("forward", "backward_input", "backward_weight")
PRODUCTS = {"float": set(), "Tf32": {"1688"}, "Half": {"16816"}, "BFloat16": {"16816"}}  # shapes of HMMA, by number
MEMORY = ("LD", "LDG", "LDS", "LDSM", "LDL", "ST", "STG", "STS", "STSM", "STL")


def not_fed_by_tma(code: list[sass.Instruction]) -> list[str]:
    """What keeps a kernel from being one whose warpgroups multiply what TMA brings, and nothing else in between."""
    faults = [] if sass.opcodes(code, "UTMALDG") else ["no copy by TMA"]
    loops = sass.innermost(code, "HGMMA")
    if not loops:
        faults.append("no HGMMA in a loop")
    for loop in loops:
        if moved := sass.opcodes(loop, *MEMORY):
            faults.append(f"{', '.join(moved)} in the loop of HGMMA")
    return faults


def code_of(pattern: str) -> Iterator[tuple[tuple[str, str], list[sass.Instruction]]]:
    """((image, kernel), instructions) of the kernels whose names begin so."""
    return ((key, sass.instructions(text)) for key, text in machine_code().items() if re.match(pattern, key[1]))


@cuda_built
def test_hopper_kernels_multiply_what_tma_brings() -> None:
    found = {key: code for key, code in code_of("conv2d_") if is_hopper(key[1])}
    assert {key: faults for key, code in found.items() if (faults := not_fed_by_tma(code))} == {}
    names = {re.search("|".join(PASSES), kernel)[0] for _, kernel in found}
    assert names == set(PASSES)


@cuda_built
def test_portable_kernels_multiply_on_tensor_cores_what_comes_asynchronously() -> None:
    """In a 16-bit format or in TF32; float32 is exact, on CUDA cores."""
    found = defaultdict(set)
    for (image, kernel), code in code_of(r"conv2d_(packed_|stem_)?(forward|backward_input|backward_weight)_kernel<"):
        if is_hopper(kernel):
            continue
        number = re.search(r"_kernel<(\w+)", kernel)[1]
        products = {opcode for loop in sass.loops(code) for opcode in sass.opcodes(loop, "HMMA")}
        assert {opcode.split(".")[1] for opcode in products} == PRODUCTS[number], (image, kernel, products)
        assert sass.opcodes(code, "HMMA") == [] or products, (image, kernel)
        for loop in sass.innermost(code, "HMMA"):
            copying = code if "_stem_" in kernel else loop  # the stem rearranges in shared memory what has come
            assert sass.opcodes(copying, "LDGSTS") and sass.opcodes(loop, "LDSM", "LDS"), (image, kernel)
        found[image, number].add(re.search("|".join(PASSES), kernel)[0])
    assert found == {(image, number): set(PASSES) for image in ("sm_80", "sm_90a") for number in PRODUCTS}


@cuda_built
def test_bands_multiply_on_tensor_cores_what_lies_in_shared_memory() -> None:
    """x comes and y goes 16 bytes at a time; of both gradients, dy comes and dx goes."""
    found = set()
    for (image, kernel), code in code_of("conv2d_toeplitz_(backward_)?kernel<"):
        number = re.search(r"_kernel<(\w+)", kernel)[1]
        loops = sass.innermost(code, "HMMA")
        assert loops and {opcode.split(".")[1] for opcode in sass.opcodes(code, "HMMA")} == PRODUCTS[number]
        assert all(sass.opcodes(loop, "LDSM") and not sass.opcodes(loop, "LDG", "STG") for loop in loops)
        assert {"LDG.E.128", "STG.E.128"} <= set(sass.opcodes(code, "LDG", "STG")), (image, kernel)
        found.add((image, number))
    assert found == {(image, number) for image in ("sm_80", "sm_90a") for number in ("Half", "BFloat16")}


def listing(*lines: str) -> list[sass.Instruction]:
    """Machine code, of which each line is 16 bytes."""
    text = "\n".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0000000000007918 */" for i, line in enumerate(lines))
    code = sass.instructions(text)
    assert len(code) == len(lines)
    return code


WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3"
PRODUCER = ("UTMALDG.4D [UR8], [UR4]", "@P2 EXIT")
HGMMA = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"


@pytest.mark.parametrize(
    ("lines", "faults"),
    [
        ((*PRODUCER, WAIT, HGMMA, "@P1 BRA 0x20", "EXIT"), []),
        # A wait that failed tries again behind the loop, and comes back into its middle; sums are stored behind it.
        (
            (
                *PRODUCER,
                "@!P0 BRA 0x70",
                HGMMA,
                "@P1 BRA 0x20",
                "STG.E [R2], R24",
                "EXIT",
                WAIT,
                "@!P0 BRA 0x70",
                "BRA 0x30",
            ),
            [],
        ),
        # Tiles one after another: what a tile ends with is in the outer loop alone.
        ((*PRODUCER, "MOV R1, R2", HGMMA, "@P1 BRA 0x30", "STS [R2], R24", "@P3 BRA 0x20", "EXIT"), []),
        ((*PRODUCER, HGMMA, "IADD3 R1, R1, 0x1, RZ", "@P1 BRA 0x30", "EXIT"), ["no HGMMA in a loop"]),
        ((*PRODUCER, HGMMA, "BRA 0x40", "EXIT"), ["no HGMMA in a loop"]),
        ((HGMMA, "@P1 BRA 0x0", "EXIT"), ["no copy by TMA"]),
        ((*PRODUCER, "LDS R4, [R2]", HGMMA, "@P1 BRA 0x20", "EXIT"), ["LDS in the loop of HGMMA"]),
        (
            (*PRODUCER, "@P4 BRA 0x60", HGMMA, "@P1 BRA 0x20", "EXIT", "LDL R4, [R2]", "STS.128 [R2], R4", "BRA 0x30"),
            ["LDL, STS.128 in the loop of HGMMA"],
        ),
        # A loop that is left by a call which does not return.
        (
            (*PRODUCER, "LDG.E R4, [R2.64]", HGMMA, "@P1 CALL.REL.NOINC 0x60", "BRA 0x20", "EXIT"),
            ["LDG.E in the loop of HGMMA"],
        ),
        # A jump through a table, from behind the loop.
        ((*PRODUCER, HGMMA, "@P1 BRA 0x20", "BRX R2 -0x40", "STG.E [R2], R24", "EXIT", "STG.E [R2], R25", "EXIT"), []),
    ],
)
def test_a_loop_that_is_not_fed_by_tma_is_noticed(lines: tuple[str, ...], faults: list[str]) -> None:
    assert not_fed_by_tma(listing(*lines)) == faults


@cuda_built
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("sums[0] += 1;  // between products", "wgmma.mma_async instructions are serialized"),
        ("sums[threadIdx.x] += 1;  // registers have no index", "Local memory used"),
    ],
)
def test_the_build_refuses(fault: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ptxas mentions in passing, and what does not fit the registers."""
    script = setup_script()
    if script["find_cuda"]() is None:
        pytest.skip("no nvcc on this machine")
    source = tmp_path / "kernel_sm90.cu"
    program = """
#include "SOURCES/ptx_sm90.cuh"
using namespace cnnops::cuda;
__global__ void kernel(uint64_t a, uint64_t b, int steps, float* out) {
  float sums[32];
  for (int i = 0; i < 32; ++i) sums[i] = out[i];
  wgmma_fence();
  for (int step = 0; step < steps; ++step) {
    wgmma<BFloat16, 64, false, false>(sums, a + step, b + step, true);
    FAULT
    wgmma_commit();
  }
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) out[i * 128 + threadIdx.x] = sums[i];
}
"""
    source.write_text(program.replace("SOURCES", str(ROOT / "csrc/cuda")).replace("FAULT", fault))
    target = script["Target"](tmp_path / "library.so")
    target.objects.append((source, "nvcc", "-gencode=arch=compute_90a,code=sm_90a", "kernel.o"))
    with monkeypatch.context() as patch:
        patch.setitem(script["write_ninja"].__globals__, "BUILD", tmp_path)
        path = script["write_ninja"]([target], script["find_cuda"]())
    ninja = shutil.which("ninja") or Path(sys.executable).with_name("ninja")
    done = subprocess.run([ninja, "-f", path, tmp_path / "kernel.o"], capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stdout


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
