"""Compiles the Triton kernels ahead of time, which needs no GPU, and says what came out.

    python -m cnnops.backends.triton.aot [--json] [--all] [--arch 90]

runs the backend's functions on fake CUDA tensors (calls.py), records what they launch, and compiles that as Triton
itself would on a device: the same specialisation, the same constants, for a driver that is not there. It lists
registers, stack and local memory (spills), shared memory, tensor-core instructions and asynchronous copies, and holds
the parameters of the compiled kernel against what Triton's launcher packs for them. Of the recorded launches it compiles
so few that between them they have every kernel on each architecture, every kernel in each dtype, and every row of the
tuning tables; with --all, each. `--arch 942` compiles them for AMD's gfx942. Run it without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cnnops.backends.triton import calls
from cnnops.backends.triton.launch import INTERPRETING, Descriptor, Device, Launch, Recorded, recording

ARCHES = (80, 90, 100)

GFX942 = 942
"""AMD's MI300, for which the kernels compile too, as they are for sm_80. Nobody has run them there."""

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, GFX942: 64 * 1024}
"""Bytes of shared memory that one block may use (CUDA C++ Programming Guide, technical specifications; CDNA3 ISA)."""

# Any count does: it only decides how many slabs the second passes add.
_PROCESSORS = 132

# Instructions counted in the PTX, or in the AMD assembly.
_COUNTED = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "async_copies": r"\bcp\.async\.c[ag]\.shared",
    "tma_loads": r"\bcp\.async\.bulk\.tensor\.\dd\.shared",
    "mfma": r"\bv_mfma",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor argument: all that specialisation reads of one on a 16-byte boundary. With a block, a descriptor."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    block: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    call: str
    kernel: str
    """Name within its module."""
    module: str
    dtype: str
    precision: str
    arch: int
    tensors: tuple[Tensor | None, ...]
    launch: Launch

    def config(self) -> tuple[Any, ...]:
        """What a tuning row sets: blocks, warps, stages, registers."""
        how = self.launch
        blocks = {name: value for name, value in how.constants.items() if name.startswith("BLOCK")}
        return (*sorted(blocks.items()), how.num_warps, how.num_stages, how.max_registers)


@dataclasses.dataclass(frozen=True)
class Compiled:
    call: str
    kernel: str
    module: str
    dtype: str
    precision: str
    arch: int
    blocks: dict[str, int]
    """The kernel's BLOCK_ constants."""
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    local: int
    shared: int
    mma: int
    wgmma: int
    tcgen05: int
    async_copies: int
    tma_loads: int
    mfma: int
    parameters: list[int]
    """Bytes of each parameter of the compiled kernel, in order; nothing on AMD."""
    arguments: list[int]
    """Bytes of each argument that Triton's launcher packs, in order; nothing on AMD."""


def _spec(t: torch.Tensor | Descriptor | None) -> Tensor | None:
    if t is None:
        return None
    return Tensor(t.base.dtype, t.shape, t.strides, t.block) if isinstance(t, Descriptor) else Tensor(t.dtype)


def jobs(arches: Iterable[int] = ARCHES) -> Iterator[Job]:
    """Every launch of every call, recorded."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    cudnn: Any = torch.backends.cudnn
    switch = cudnn.conv
    before = switch.fp32_precision
    recorded: list[Recorded] = []
    try:
        for arch in arches:
            for call in calls.every_call():
                switch.fp32_precision = "tf32" if call.tf32 else "ieee"
                for dtype in call.dtypes:
                    recorded.clear()
                    device = Device(80 if arch == GFX942 else arch, _PROCESSORS)
                    with recording(recorded.append, device), FakeTensorMode():
                        call.run(dtype)
                    for each in recorded:
                        yield Job(
                            call.name, each.kernel.__name__, each.kernel.__module__, short[dtype],
                            "tf32" if call.tf32 else "ieee", arch, tuple(map(_spec, each.tensors)), each.launch,
                        )  # fmt: skip
    finally:
        switch.fp32_precision = before


def covering(every: Iterable[Job]) -> list[Job]:
    """A few of the jobs that have all kernels on all architectures, in all dtypes, and all configurations."""
    left = list(every)
    wanted = {feature for job in left for feature in _features(job)}
    chosen = []
    while wanted:
        best = max(left, key=lambda job: len(wanted & _features(job)))  # the first of the best
        chosen.append(best)
        wanted -= _features(best)
    return chosen


def _features(job: Job) -> set[tuple[Any, ...]]:
    kernel = f"{job.module}.{job.kernel}"
    return {
        (kernel, "on", job.arch),
        (kernel, "in", job.dtype, job.precision),
        (kernel, "as", job.config()),
        (kernel, "of", tuple(t is None for t in job.tensors)),
        ("activation", job.launch.constants.get("ACTIVATION")),
    }


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and of local memory of a thread."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: expected REG, STACK, SHARED and LOCAL, but got {listing!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def _amd_resources(assembly: str) -> tuple[int, int, int]:
    """Vector registers, bytes of scratch and spilled registers of a thread, as the assembly's metadata has them."""
    found = [
        re.search(rf"\.{name}: +(\d+)", assembly)
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    ]
    if None in found:
        raise RuntimeError("expected the registers, scratch and spills of a kernel in its assembly's metadata")
    registers, scratch, spilled = (int(each[1]) for each in found if each)
    return registers, scratch, spilled


def _parameters(ptx: str) -> list[int]:
    """Bytes of each parameter of a PTX kernel."""
    found = re.search(r"\.entry \w+\(([^)]*)\)", ptx)
    if found is None:
        raise RuntimeError("expected one .entry in the PTX")
    sizes = []
    for parameter in found[1].split(","):
        kind, array = re.search(r"\.[a-z](\d+)\b", parameter), re.search(r"\[(\d+)\]", parameter)
        if kind is None:
            raise RuntimeError(f"expected a type in the PTX parameter {parameter!r}")
        sizes.append(int(kind[1]) // 8 * int(array[1] if array else 1))
    return sizes


def _arguments(compiled: Any) -> list[int]:
    """Bytes of each argument that Triton's launcher packs for a kernel, with the two scratch pointers that it adds."""
    from triton.backends.nvidia import driver

    signature, meta = compiled.src.signature, compiled.metadata.tensordesc_meta
    if hasattr(driver, "make_launcher"):  # Triton 3.6 writes a launcher in C for each kernel
        source = driver.make_launcher({}, signature, meta)
        types = {name: kind for kind, name in re.findall(r"\b(\w+) (arg\d+|\w+_scratch)\b", source)}
        packed = source.partition("void *params[] = {")[2].partition("}")[0].replace("&", "").split(",")
        c_sizes = {"CUdeviceptr": 8, "CUtensorMap": 128, "int32_t": 4, "uint32_t": 4, "int64_t": 8, "int8_t": 1}
        return [c_sizes[types[name.strip()]] for name in packed]
    flat = driver.expand_signature(signature.values(), meta, "nvTmaDesc")
    sizes = {"nvTmaDesc": 128, "i1": 1, "i32": 4, "fp32": 4, "i64": 8}
    return [8 if kind[0] == "*" else sizes[kind] for kind in flat if kind != "constexpr"] + [8, 8]


class _Driver:
    """What Triton asks of a driver before it compiles. The number of the device is its architecture, because Triton
    keeps what it compiled by that number."""

    arch = 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("hip", "gfx942", 64) if self.arch == GFX942 else GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_job(job: Job) -> Compiled:
    """Compile one recorded launch."""
    import triton
    from triton.runtime.jit import MockTensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    def mock(t: Tensor | None) -> Any:
        if t is None:
            return None
        base = MockTensor(t.dtype)
        return TensorDescriptor(base, list(t.shape), list(t.strides), list(t.block)) if t.block else base

    driver = _Driver()
    driver.arch = job.arch
    triton.runtime.driver.set_active(driver)
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    how = job.launch
    amd = job.arch == GFX942
    compiled = kernel.warmup(
        *map(mock, job.tensors), **how.scalars, **how.constants, **how.options(amd), grid=(how.programs,)
    )
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    registers, stack, local = _amd_resources(assembly) if amd else _resources(compiled.asm["cubin"])
    return Compiled(
        job.call, job.kernel, job.module.rpartition(".")[2], job.dtype, job.precision, job.arch,
        {name: value for name, value in how.constants.items() if name.startswith("BLOCK")},
        how.num_warps, how.num_stages,
        registers, stack, local, compiled.metadata.shared,
        **{name: len(re.findall(pattern, assembly)) for name, pattern in _COUNTED.items()},
        parameters=[] if amd else _parameters(assembly), arguments=[] if amd else _arguments(compiled),
    )  # fmt: skip


def compile_all(every: list[Job]) -> list[Compiled]:
    """Compile jobs, on two processes where there are two cores."""
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_job, every))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cnnops.backends.triton.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--all", action="store_true", help="compile every recorded launch, not a covering few")
    parser.add_argument("--arch", type=int, action="append", choices=(*ARCHES, GFX942), help="only this architecture")
    parser.add_argument("--kernel", help="only kernels whose module or name contains this")
    arguments = parser.parse_args()
    if INTERPRETING:
        parser.error("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled")
    chosen = [job for job in jobs(arguments.arch or ARCHES) if (arguments.kernel or "") in f"{job.module}.{job.kernel}"]
    results = compile_all(chosen if arguments.all else covering(chosen))
    if arguments.json:
        json.dump([dataclasses.asdict(c) for c in results], sys.stdout)
        return 0
    for c in results:
        counted = " ".join(f"{name} {getattr(c, name)}" for name in _COUNTED if getattr(c, name))
        print(
            f"{c.arch:<4} {c.module}.{c.kernel:30} {c.call:36} {c.dtype} {c.precision} "
            f"{'x'.join(map(str, c.blocks.values())):12} {c.num_warps}w {c.num_stages}s {c.registers:3} registers "
            f"{c.stack:3} stack {c.local:3} local {c.shared:6} shared  {counted}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
