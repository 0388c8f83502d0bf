"""What a CUDA kernel takes of a multiprocessor, read out of a built library, and how many of its blocks fit on one."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCHES = Path(__file__).with_name("launches.json")
"""How each kernel is launched: {kernel: {"threads": of a block, "shared_bytes": dynamic, at most}}."""


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on a multiprocessor share. Source: CUDA's programming guide, "Technical Specifications per
    Compute Capability"; each has 65,536 registers in four partitions."""

    threads: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS = {
    "8.0": Multiprocessor(2048, 32, 164 << 10),
    "8.6": Multiprocessor(1536, 16, 100 << 10),
    "8.9": Multiprocessor(1536, 24, 100 << 10),
    "9.0": Multiprocessor(2048, 32, 228 << 10),
}
"""By compute capability."""

SYSTEM_SHARED_BYTES = 1024
"""What the system takes for itself beside each block's own."""

DEVICES = {"sm_80": ("8.0", "8.6", "8.9"), "sm_90a": ("9.0",)}
"""Which of them an image is the best choice for."""


def blocks_per_multiprocessor(device: str, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks of this size run on one multiprocessor at a time.

    device: a key of MULTIPROCESSORS. threads: of a block. registers: of a thread. shared_bytes: of a block, static and
    dynamic. Source: the rules of CUDA's cuda_occupancy.h.
    """
    partitions, registers_of_partition = 4, 16384
    of = MULTIPROCESSORS[device]
    warps = -(-threads // 32)
    for_warp = -(-registers * 32 // 256) * 256
    by_registers = registers_of_partition // for_warp * partitions // warps
    by_shared = of.shared_bytes // (-(-(shared_bytes + SYSTEM_SHARED_BYTES) // 128) * 128)
    return min(of.blocks, of.threads // 32 // warps, by_registers, by_shared)


def occupancy(device: str, threads: int, blocks: int) -> float:
    """The share of a multiprocessor's warps that this many blocks fill."""
    return blocks * -(-threads // 32) / (MULTIPROCESSORS[device].threads // 32)


def find_cuobjdump() -> Path | None:
    """The toolkit's, from the PATH, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return path if path.exists() else None


def cuobjdump(library: Path, *flags: str) -> str:
    """What cuobjdump lists of a library. Raises FileNotFoundError where there is no cuobjdump, and RuntimeError where
    it fails: an older one does not know the library's images."""
    program = find_cuobjdump()
    if program is None:
        raise FileNotFoundError("cuobjdump is not found: it comes with the CUDA toolkit and with Triton")
    done = subprocess.run([program, *flags, library], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} does not read {library.name}: {done.stderr.strip()}")
    return done.stdout


def compiler(library: Path) -> str:
    """The compiler that made a CUDA library, as build_info has it: "nvcc 13.0.88"."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", library.read_bytes())
    return f"nvcc {found[1].decode()}" if found else "an unknown compiler"


@functools.cache
def _demangle() -> Any:
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_void_p
    return function


def kernel_name(symbol: str) -> str:
    """A kernel's name as the library's build_info has it, without scopes: "copy_kernel<float, Half>"."""
    demangled = _demangle()(symbol.encode(), None, None, None)
    if demangled is None:
        return symbol
    name = ctypes.string_at(demangled).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(demangled))
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\([\w:]+\)(?=-?\d)", "", name)  # the type of an enumerator
    name = re.sub(r"\b(\d+)u?l?\b", r"\1", name.split("(")[0])
    return re.sub(r"\w+::", "", name)


def by_kernel(listing: str) -> dict[tuple[str, str], str]:
    """A listing of cuobjdump cut into (image, kernel): text."""
    parts: dict[tuple[str, str], str] = {}
    image = ""
    for part in re.split(r"^(?=Fatbin |\s*Function )", listing, flags=re.M):
        if found := re.search(r"^arch = (\w+)", part, re.M):
            image = found[1]
        elif found := re.match(r"\s*Function(?: :)? (\w+)", part):
            parts[image, kernel_name(found[1])] = part
    return parts


@dataclass(frozen=True)
class Usage:
    """What the compiler gave a kernel: registers of a thread, static shared bytes of a block, stack and local bytes."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int


def usage(library: Path) -> dict[tuple[str, str], Usage]:
    """By (image, kernel). Raises as `cuobjdump` does."""
    found = {}
    for key, text in by_kernel(cuobjdump(library, "-res-usage")).items():
        numbers = {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", text)}
        shared = numbers["SHARED"]
        if shared and int(re.sub(r"\D", "", key[0])) >= 90:
            shared -= SYSTEM_SHARED_BYTES  # which is listed from sm_90 on
        found[key] = Usage(numbers["REG"], shared, numbers["STACK"], numbers["LOCAL"])
    return found


@dataclass(frozen=True)
class Row:
    """One kernel in one image of a library. `threads` of a block, `dynamic_shared_bytes` (at most) and `blocks` by
    device are None or empty for a kernel that launches.json does not know."""

    kernel: str
    image: str
    registers: int
    static_shared_bytes: int
    threads: int | None
    dynamic_shared_bytes: int | None
    blocks: dict[str, int]
    occupancy: dict[str, float]


def table(library: Path) -> list[Row]:
    """What a CUDA library's kernels take. Raises as `cuobjdump` does."""
    launches = json.loads(LAUNCHES.read_text())
    rows = []
    for (image, kernel), used in sorted(usage(library).items(), key=lambda item: item[0][::-1]):
        launch = launches.get(kernel)
        blocks: dict[str, int] = {}
        if launch:
            shared = used.shared_bytes + launch["shared_bytes"]
            blocks = {
                device: blocks_per_multiprocessor(device, launch["threads"], used.registers, shared)
                for device in DEVICES.get(image, ())
            }
        rows.append(
            Row(
                kernel,
                image,
                used.registers,
                used.shared_bytes,
                launch and launch["threads"],
                launch and launch["shared_bytes"],
                blocks,
                {device: occupancy(device, launch["threads"], count) for device, count in blocks.items()},
            )
        )
    return rows


HEADINGS = ("kernel", "image", "registers", "shared bytes", "threads", *(f"on {device}" for device in MULTIPROCESSORS))
"""Of `cells`. Shared bytes are static + dynamic; "on 8.0" has the blocks on a multiprocessor of it, and occupancy."""


def cells(row: Row) -> tuple[str, ...]:
    """One row under `HEADINGS`."""
    shared, threads = str(row.static_shared_bytes), ""
    if row.threads is not None:
        shared, threads = f"{row.static_shared_bytes} + {row.dynamic_shared_bytes}", str(row.threads)
    devices = (
        f"{row.blocks[device]} ({row.occupancy[device]:.0%})" if device in row.blocks else ""
        for device in MULTIPROCESSORS
    )
    return (row.kernel, row.image, str(row.registers), shared, threads, *devices)
