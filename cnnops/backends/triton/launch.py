"""The one way by which a Triton kernel is launched, and by which a launch is recorded instead. Imports no triton."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether kernels run on CPU tensors. Triton reads the variable when it is imported."""

AMD = torch.version.hip is not None

MAX_SPLITS = 256

# Programs that are to be in flight on each multiprocessor; each runs at least so many steps over its share of the sum.
_PROGRAMS_PER_PROCESSOR = 2
_LEAST_STEPS = 4

_SUM_ELEMENTS = 4096
"""fp32 values that one program of a second pass holds at once: 32 a thread."""

INTERPRETED_AS = 90
"""The architecture whose kernels the interpreter runs, unless `as_device` says another."""


@dataclass(frozen=True)
class Device:
    architecture: int
    """80 for compute capability 8.0."""
    processors: int
    """Multiprocessors, by which sums are split and persistent grids sized."""


@dataclass(frozen=True)
class Launch:
    programs: int
    """The grid has one axis, x."""
    scalars: dict[str, int | float]
    """Run-time arguments, after the tensors. One whose name ends in `steps` counts a loop's."""
    constants: dict[str, Any]
    """Compile-time arguments."""
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None
    """What a thread may have at most, so that more than one program fits a multiprocessor."""
    compiled: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What has been launched so, by all that Triton specialises on beside the scalars and constants."""

    def options(self, amd: bool = AMD) -> dict[str, Any]:
        """The launch's options, as Triton calls them. AMD's compiler knows no bound of registers."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None or amd else options | {"maxnreg": self.max_registers}


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor that a kernel takes in place of a pointer: boxes of `block` of a view of `base`'s memory.

    shape, strides and block are in elements; the last stride is 1, and what lies outside `shape` reads as zero.
    """

    base: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclass(frozen=True)
class SplitLaunch:
    """A sum over pixels: `partial` writes one fp32 slab for each split, `total` adds them in a fixed order.

    With one split `partial` writes the result itself and there is no `total`.
    """

    splits: int
    partial: Launch
    total: Launch | None


@dataclass(frozen=True)
class Recorded:
    """A launch as a device would have been asked for it."""

    kernel: Any
    tensors: tuple[torch.Tensor | Descriptor | None, ...]
    launch: Launch


Recorder = Callable[[Recorded], None]
_recorder: Recorder | None = None
_device: Device | None = None


@contextlib.contextmanager
def recording(recorder: Recorder, device: Device) -> Iterator[None]:
    """Hand every launch to `recorder`, as for `device`, so that tensors may be fake. Not for threads."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        with as_device(device):
            yield
    finally:
        _recorder = before


@contextlib.contextmanager
def as_device(device: Device) -> Iterator[None]:
    """Choose kernels as for `device`, whatever the tensors are on. Not for threads."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def device_of(t: torch.Tensor) -> Device:
    """What choosing a kernel for `t` depends on."""
    return _device or _device_of(t.device)


@functools.cache
def _device_of(device: torch.device) -> Device:
    if device.type == "cpu":  # the interpreter; 3 make it split sums unevenly over the programs of small tests
        return Device(INTERPRETED_AS, 3)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if AMD:
        return Device(80, processors)  # the plainest kernels, as aot.py compiles them
    major, minor = torch.cuda.get_device_capability(device)
    return Device(10 * major + minor, processors)


def answers(device: torch.device) -> bool:
    """Whether the host may wait for what kernels found: not while they are recorded, or captured into a CUDA graph."""
    return _recorder is None and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def launch(kernel: Any, how: Launch, *tensors: torch.Tensor | Descriptor | None) -> None:
    """Run `kernel` on the tensors' device. Its parameters are, in order, the tensors, `how`'s scalars and constants.

    Triton looks at every argument of each launch to find the compiled kernel, which costs most of the host's time; here
    a `Launch` remembers what it found.
    """
    if _recorder:
        _recorder(Recorded(kernel, tensors, how))
        return
    first = next(t for t in tensors if isinstance(t, torch.Tensor))
    arguments = [_described(t) if isinstance(t, Descriptor) else t for t in tensors]
    if INTERPRETING:
        from cnnops.backends.triton import interpreter

        kernel[(how.programs,)](*arguments, **interpreter.loop_counts(how.scalars), **how.constants)
        return
    key = (kernel, first.device, *[_specialised(t) for t in tensors])
    found = how.compiled.get(key)
    with torch.cuda.device_of(first):
        if found is None:
            compiled = kernel[(how.programs,)](*arguments, **how.scalars, **how.constants, **how.options())
            given = how.scalars | how.constants
            how.compiled[key] = (
                compiled[(how.programs, 1, 1)],
                [given[name] for name in kernel.arg_names[len(tensors) :]],
            )
            return
        run, rest = found
        run(*arguments, *rest)


def _specialised(t: torch.Tensor | Descriptor | None) -> Any:
    """What Triton compiles for a tensor: its dtype, and whether it is aligned to 16 bytes; for a descriptor, its box."""
    if t is None:
        return None
    if isinstance(t, Descriptor):
        return t.base.dtype, t.block
    return t.dtype, t.data_ptr() % 16 == 0


def _described(d: Descriptor) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    # TMA reads from boundaries of 16 bytes, on which a view need not begin.
    base = d.base if d.base.data_ptr() % 16 == 0 else d.base.clone()
    return TensorDescriptor(base, list(d.shape), list(d.strides), list(d.block))


def launch_split(kernel: Any, how: SplitLaunch, *tensors: torch.Tensor | Descriptor) -> None:
    """Launch `kernel`, whose last tensor is its result, and add its slabs."""
    from cnnops.backends.triton.reduce import slab_sum_kernel

    *inputs, result = tensors
    assert isinstance(result, torch.Tensor)
    if how.total is None:
        launch(kernel, how.partial, *inputs, result)
        return
    slabs = torch.empty(how.splits * result.numel(), dtype=torch.float32, device=result.device)
    launch(kernel, how.partial, *inputs, slabs)
    launch(slab_sum_kernel, how.total, slabs, result)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(a: int) -> int:
    """The greatest power of two that is at most `a`, and at least 1."""
    return 1 << max(a.bit_length() - 1, 0)


def splits_of(tiles: int, steps: int, processors: int) -> int:
    """Shares of a sum of `steps` blocks, given the output tiles: a power of two, from shapes and the device alone."""
    return min(
        MAX_SPLITS,
        power_of_2(cdiv(_PROGRAMS_PER_PROCESSOR * processors, tiles)),
        power_of_2(cdiv(steps, _LEAST_STEPS)),
    )


def total_of(count: int, splits: int) -> Launch | None:
    """The second pass, which adds `splits` slabs of `count` values; None for one slab."""
    if splits == 1:
        return None
    block = _SUM_ELEMENTS // splits
    return Launch(cdiv(count, block), {"count": count}, {"SPLITS": splits, "BLOCK": block})
