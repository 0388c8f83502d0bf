"""Builds the native libraries with ninja, then packages them: one wheel for every Python >= 3.10 and torch >= 2.11.

    python setup.py build_native           # cnnops/_native_cpu.so, and _native_cuda.so where nvcc is found
    python setup.py build_native --simt    # also cnnops/_native_simt.so, the CUDA sources on a CPU, for the tests

Environment: CNNOPS_BUILD=auto|cpu|cuda|none (auto: CUDA where nvcc is found), FORCE_CUDA=1 (no nvcc is an error),
TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0a", "8.0 9.0"; kernels of Hopper's own need 9.0a), MAX_JOBS, NVCC_THREADS,
CNNOPS_SANITIZE=address,undefined|thread (not for CUDA): the CPU's or the emulator's library with these sanitizers, beside
the plain one, as _native_<backend>_address.so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"

CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Werror"
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
# gcc's own AVX-512 headers read deliberately undefined registers, which it then warns about.
CPU_FLAGS = "-ffp-contract=fast -Wno-uninitialized -Wno-maybe-uninitialized"
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
ISA_SOURCES = (
    "kernels",
    "conv2d",
    "depthwise_conv2d",
    "pool2d",
    "max_unpool2d",
    "batch_norm",
    "bn_act_max_pool2d",
    "squeeze_excite",
    "activation",
    "copy",
)
DEFAULT_ARCHES = "8.0+PTX;9.0a"
# Spills and local memory are warnings, and so errors.
NVCC_FLAGS = (
    "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Werror all-warnings -Xptxas -warn-spills,-warn-lmem-usage"
)
HOPPER = ("compute_90a", "sm_90a")
# Kernels report their accesses to csrc/simt/trace.cpp, which stands for ThreadSanitizer's runtime, as the source has them:
# neighbours are not merged into a vector, nor loops into a call of memcpy.
TRACE_FLAGS = (
    "-fsanitize=thread --param tsan-instrument-func-entry-exit=0 "
    "-fno-tree-slp-vectorize -fno-tree-loop-distribute-patterns"
)


@dataclass
class Target:
    """A shared library: its objects as (source, rule, flags, object name), and how it is linked."""

    output: Path
    link_flags: str = ""
    objects: list[tuple[Path, str, str, str]] = field(default_factory=list)

    def add(self, source: Path, flags: str = "", rule: str = "cxx", suffix: str = "") -> None:
        name = f"{self.output.stem}/{source.relative_to(CSRC)}{suffix}.o".replace("..", "")
        self.objects.append((source, rule, flags, name))


def torch_paths() -> tuple[Path, Path]:
    """The include and library folders of the torch that will run, without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("setup.py: building cnnops needs torch: install it, then use --no-build-isolation")
    home = Path(spec.origin).parent
    return home / "include", home / "lib"


def bind_flags(backend: str, key: str) -> str:
    include, _ = torch_paths()
    return f"-DCNNOPS_NS=cnnops_{backend} -DCNNOPS_KEY={key} {TORCH_FLAGS} -isystem {include}"


def link_torch(library: str = "torch_cpu") -> str:
    _, lib = torch_paths()
    return f"-L{lib} -Wl,--no-as-needed -l{library}"


def sanitizing(sanitize: str) -> tuple[str, str, str]:
    """What the sanitizers add to a library's name, to its compiler's flags and to its linker's."""
    if not sanitize:
        return "", "", ""
    return f"_{sanitize.split(',')[0]}", f" -g -fsanitize={sanitize} -fno-omit-frame-pointer", f" -fsanitize={sanitize}"


def cpu_target(sanitize: str) -> Target:
    suffix, extra, link = sanitizing(sanitize)
    if sanitize:
        # Checks by calls: written out in every unrolled loop they take twice as long to compile.
        extra += " -O1 --param asan-instrumentation-with-call-threshold=0"
    target = Target(ROOT / f"cnnops/_native_cpu{suffix}.so", link_torch() + link)
    include, _ = torch_paths()
    target.add(CSRC / "bind.cpp", bind_flags("cpu", "CPU") + extra)
    target.add(CSRC / "cpu/parallel.cpp", f"{TORCH_FLAGS} -isystem {include}{extra}")
    target.add(CSRC / "cpu/isa.cpp", f"'-DCNNOPS_FLAGS=\"{CXX_FLAGS} {CPU_FLAGS}{extra}\"'{extra}")
    for isa, flags in ISA_FLAGS.items():
        for stem in ISA_SOURCES:
            target.add(CSRC / f"cpu/{stem}.cpp", f"{CPU_FLAGS} {flags} -DCNNOPS_ISA={isa}{extra}", suffix=f".{isa}")
    return target


def simt_target(sanitize: str) -> Target:
    import pybind11

    python = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    suffix, extra, link = sanitizing(sanitize)
    traced = "" if sanitize else "-DCNNOPS_TRACED"
    level = "-O1" if sanitize else "-O2 -g"  # the sanitizers' checks, optimised, take minutes for each file
    flags = f"{level} -DCNNOPS_SIMT -DCNNOPS_SM90 {traced} -ffp-contract=off{extra}"
    name = f"_native_simt{suffix}"
    target = Target(ROOT / f"cnnops/{name}.so", link_torch() + link)
    target.add(CSRC / "bind.cpp", f"{flags} {bind_flags('simt', 'CPU')}")
    for source in sorted(CSRC.glob("simt/*.cpp")):
        target.add(source, f"{flags} -DCNNOPS_MODULE={name} {python if source.stem == 'module' else ''}")
    traced = "" if sanitize else TRACE_FLAGS
    for source in sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("simt/*.cu")]):
        target.add(source, f"{flags} {traced} -x c++")
    return target


def find_cuda() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, that of the nvcc on the PATH, or the registry's nvidia-cuda-nvcc package."""
    homes = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    if shutil.which("nvcc"):  # perhaps a wrapper script, so ask it where its toolkit is
        dryrun = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        homes += [Path(line.split("=", 1)[1]) for line in dryrun.splitlines() if line.startswith("#$ TOP=")]
    homes += [Path(p) / "nvidia/cu13" for p in sys.path if p]
    return next((home.resolve() for home in homes if (home / "bin/nvcc").exists()), None)


def images() -> list[tuple[str, str]]:
    """(virtual architecture, image) for each part of TORCH_CUDA_ARCH_LIST: ("compute_80", "sm_80"), and for "8.0+PTX"
    also ("compute_80", "compute_80"). Containers list what their torch has; the kernels need 8.0."""
    found = []
    for part in os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHES).replace(" ", ";").split(";"):
        number, _, ptx = part.partition("+")
        if not number or float(number.rstrip("af")) < 8:
            continue
        virtual = f"compute_{number.replace('.', '')}"
        found += [(virtual, virtual.replace("compute", "sm"))] + [(virtual, virtual)] * (ptx == "PTX")
    if not found:
        sys.exit("setup.py: TORCH_CUDA_ARCH_LIST must have an architecture of 8.0 or later, like 8.0;9.0a+PTX")
    return found


def cuda_sources_hash() -> str:
    """Of everything that the CUDA library is made of: build_info has it, so that a library can be told from another."""
    sources = sorted([*CSRC.glob("*.h"), CSRC / "bind.cpp", *CSRC.glob("cuda/*")])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def is_hopper_source(source: Path) -> bool:
    """Whether a source is for sm_90a alone. CNNOPS_SM90 tells the others that its kernels are in the library."""
    return source.stem.endswith("_sm90")


def cuda_target(home: Path) -> Target:
    # A library for a CUDA torch can be linked without one: an empty stub with the right soname stands in.
    stub = BUILD / "stub/libtorch_cuda.so"
    _, lib = torch_paths()
    folders = [home / p for p in ("lib64", "lib", "targets/x86_64-linux/lib")]
    cuda_lib = next((p for p in folders if (p / "libcudart_static.a").exists()), None)
    if cuda_lib is None:
        sys.exit(f"setup.py: libcudart_static.a is in none of {', '.join(map(str, folders))}; use CNNOPS_BUILD=cpu")
    libraries = f"-L{cuda_lib} -lcudart_static -lrt -lpthread -ldl"
    torch_cuda = f"-L{lib} -ltorch_cuda" if (lib / "libtorch_cuda.so").exists() else f"{stub}"
    target = Target(ROOT / "cnnops/_native_cuda.so", f"{link_torch()} {torch_cuda} {libraries}")
    includes = f"-isystem {home}/include"
    target.add(CSRC / "bind.cpp", f"{bind_flags('cuda', 'CUDA')} -DUSE_CUDA {includes}")
    names = ",".join(image for _, image in images())
    hopper = " -DCNNOPS_SM90" if HOPPER in images() else ""
    threads = os.environ.get("NVCC_THREADS", "2")
    for source in sorted(CSRC.glob("cuda/*.cu")):
        made_for = [pair for pair in images() if pair == HOPPER or not is_hopper_source(source)]
        if made_for:
            gencode = " ".join(f"-gencode=arch={virtual},code={image}" for virtual, image in made_for)
            flags = f"{gencode} --threads {threads}{hopper}"
            if source.stem == "kernels":  # which says what was built
                flags += f" '-DCNNOPS_ARCHES=\"{names}\"' '-DCNNOPS_SOURCES=\"{cuda_sources_hash()}\"'"
            target.add(source, flags, rule="nvcc")
    return target


def write_ninja(targets: list[Target], cuda: Path | None) -> Path:
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {BUILD}",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule cxx",
        f"  command = $cxx {CXX_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        # That products of warpgroups run one by one, ptxas mentions and calls no warning.
        f"  command = {cuda}/bin/nvcc {NVCC_FLAGS} $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1; status=$$?; "
        "cat $out.log; test $$status = 0 && ! grep -q 'wgmma.mma_async instructions are serialized' $out.log",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -Wl,-soname,$soname $in $flags -o $out",
        "rule stub",
        "  command = echo | $cxx -shared -x c++ - -Wl,-soname,libtorch_cuda.so -o $out",
        f"build {BUILD}/stub/libtorch_cuda.so: stub",
    ]
    for target in targets:
        for source, rule, flags, name in target.objects:
            lines += [f"build {BUILD / name}: {rule} {source}", f"  flags = {flags}"]
        objects = " ".join(str(BUILD / name) for *_, name in target.objects)
        lines += [
            f"build {target.output}: link {objects} | {BUILD}/stub/libtorch_cuda.so",
            f"  flags = {target.link_flags}",
            f"  soname = {target.output.name}",
        ]
    BUILD.mkdir(exist_ok=True)
    path = BUILD / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


class build_native(Command):
    description = "compile the native libraries into cnnops/"
    user_options = [("simt", None, "also the emulator's library, for the tests")]

    def initialize_options(self) -> None:
        self.simt = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        wanted = os.environ.get("CNNOPS_BUILD", "auto")
        if wanted not in ("auto", "cpu", "cuda", "none"):
            sys.exit(f"setup.py: CNNOPS_BUILD must be auto, cpu, cuda or none, but is {wanted!r}")
        targets = []
        sanitize = os.environ.get("CNNOPS_SANITIZE", "")
        cuda = find_cuda() if wanted in ("auto", "cuda") else None
        if cuda is None and (wanted == "cuda" or os.environ.get("FORCE_CUDA") == "1"):
            sys.exit("setup.py: CUDA was asked for, but no nvcc is found (on the PATH, in CUDA_HOME, or as a package)")
        if wanted != "none":
            targets.append(cpu_target(sanitize))
        if cuda is not None:
            targets.append(cuda_target(cuda))
        if self.simt:
            targets.append(simt_target(sanitize))
        if not targets:
            return
        path = write_ninja(targets, cuda)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        ninja = shutil.which("ninja") or shutil.which(Path(sys.executable).with_name("ninja"))
        if ninja is None:
            sys.exit("setup.py: building cnnops needs ninja: pip install ninja")
        command = [ninja, "-f", str(path), *jobs, *[str(t.output) for t in targets]]
        if subprocess.run(command).returncode:
            sys.exit("setup.py: the native build failed; the compiler's message is above")


class build_py_with_native(build_py):
    def run(self) -> None:
        self.run_command("build_native")
        super().run()


class any_python_wheel(bdist_wheel):
    """The native code uses torch's stable ABI and no Python: one wheel serves every Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_native": build_native, "build_py": build_py_with_native, "bdist_wheel": any_python_wheel})
