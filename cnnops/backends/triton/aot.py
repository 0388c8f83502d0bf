"""Compiles the Triton kernels ahead of time, which needs no GPU, and says what came out.

    python -m cnnops.backends.triton.aot [--json]

compiles each kernel as `plan` would launch it, for representative layers that between them meet every CUDA row of the
tuning table, and lists registers, stack and local memory (spills), shared memory, tensor-core instructions and
asynchronous copies. Run it without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from cnnops.backends.triton import INTERPRETING, plan
from cnnops.geometry import Conv2dProblem

ARCHES = (80, 90, 100)

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may use (CUDA C++ Programming Guide, technical specifications)."""

# Any count does: it only decides how many slabs the second passes add.
_PROCESSORS = 132

# Instructions counted in the PTX.
_COUNTED = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "async_copies": r"\bcp\.async\.c[ag]\.shared",
}


def _layer(N: int, C: int, H: int, K: int, R: int, stride: int, groups: int = 1) -> Conv2dProblem:
    return Conv2dProblem(
        N, C, H, H, K, R, R, stride, stride, R // 2, R // 2, 1, 1, groups, "zeros", torch.bfloat16, "cuda", True
    )  # fmt: skip


LAYERS = {
    "3x3 64->64": _layer(32, 64, 56, 64, 3, 1),
    "3x3 s2 128->256": _layer(32, 128, 28, 256, 3, 2),
    "7x7 s2 3->64": _layer(32, 3, 224, 64, 7, 2),
    "1x1 64->32": _layer(32, 64, 56, 32, 1, 1),
    "depthwise 3x3 32": _layer(32, 32, 112, 32, 3, 1, 32),
}

# (dtype, precision, layers). The channels that tell rows apart matter to fp32 only at 16.
_RUNS = (
    (torch.bfloat16, "ieee", tuple(LAYERS)),
    (torch.float16, "ieee", ("3x3 64->64", "3x3 s2 128->256")),
    (torch.float32, "ieee", ("3x3 64->64", "depthwise 3x3 32")),
    (torch.float32, "tf32", ("3x3 64->64", "depthwise 3x3 32")),
)


@dataclasses.dataclass(frozen=True)
class Job:
    kernel: str
    """A name in `conv2d`."""
    layer: str
    dtype: str
    precision: str
    arch: int
    pointers: dict[str, str]
    """Triton's element type of each pointer argument."""
    launch: plan.Launch


@dataclasses.dataclass(frozen=True)
class Compiled:
    kernel: str
    layer: str
    dtype: str
    precision: str
    arch: int
    tile: tuple[int, ...] | None
    """BLOCK_M, BLOCK_N and BLOCK_K of a kernel that has them."""
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


def _jobs(arches: tuple[int, ...]) -> Iterator[Job]:
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for arch in arches:
        for dtype, precision, layers in _RUNS:
            t = short[dtype]
            for layer in layers:
                p = dataclasses.replace(LAYERS[layer], dtype=dtype)

                def job(kernel: str, launch: plan.Launch, **pointers: str) -> Job:
                    return Job(kernel, layer, t, precision, arch, pointers, launch)  # noqa: B023

                weight = plan.backward_weight(p, precision, _PROCESSORS)
                yield job("forward_kernel", plan.forward(p, precision), x=t, weight=t, bias=t, y=t)
                yield job("backward_input_kernel", plan.backward_input(p, precision), dy=t, weight=t, dx=t)
                slabs = "fp32" if weight.total else t
                yield job("backward_weight_kernel", weight.partial, dy=t, x=t, slabs=slabs)
            bias = plan.backward_bias(p, _PROCESSORS)
            yield job("backward_bias_kernel", bias.partial, dy=t, slabs="fp32" if bias.total else t)
            if weight.total:
                yield job("slab_sum_kernel", weight.total, slabs="fp32", total=t)


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


def compile_job(job: Job) -> Compiled:
    """Compile one kernel as `conv2d` would launch it: pointers on 16-byte boundaries, integers of a batch unknown."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cnnops.backends.triton import conv2d

    kernel = getattr(conv2d, job.kernel)
    launch = job.launch
    signature = {
        name: "*" + job.pointers[name] if name in job.pointers else "i32" if name in launch.scalars else "constexpr"
        for name in kernel.arg_names
    }
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in job.pointers}
    source = ASTSource(kernel, signature, constexprs=dict(launch.constants), attrs=aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    registers, stack, local = _resources(compiled.asm["cubin"])
    blocks = tuple(int(launch.constants.get(f"BLOCK_{axis}", 0)) for axis in "MNK")
    return Compiled(
        job.kernel, job.layer, job.dtype, job.precision, job.arch,
        blocks if all(blocks) else None, launch.num_warps, launch.num_stages,
        registers, stack, local, compiled.metadata.shared,
        **{name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in _COUNTED.items()},
    )  # fmt: skip


def compile_all(arches: tuple[int, ...] = ARCHES) -> list[Compiled]:
    """Compile every kernel for `arches`, on two processes where there are two cores."""
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_job, _jobs(arches)))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cnnops.backends.triton.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHES, help="only this architecture")
    arguments = parser.parse_args()
    if INTERPRETING:
        parser.error("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled")
    results = [dataclasses.asdict(c) for c in compile_all(tuple(arguments.arch or ARCHES))]
    if arguments.json:
        json.dump(results, sys.stdout)
        return 0
    for c in results:
        tile = "x".join(map(str, c["tile"])) if c["tile"] else "-"
        print(
            f"sm_{c['arch']:<4} {c['kernel']:23} {c['layer']:17} {c['dtype']} {c['precision']} {tile:11} "
            f"{c['num_warps']}w {c['num_stages']}s  {c['registers']:3} registers {c['stack']:3} stack "
            f"{c['local']:3} local {c['shared']:6} shared  mma {c['mma']} wgmma {c['wgmma']} tcgen05 {c['tcgen05']} "
            f"async copies {c['async_copies']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
