"""The page of CUDA kernels: what each takes of a multiprocessor, and how many of its blocks fit on one.

``python -m cnnops.bench.kernels docs/kernels.md`` runs every kernel once under the emulator, to see how it is launched,
writes that to cnnops/launches.json, and writes the page of it and of the built CUDA library. ``--check`` changes nothing
and fails where either file says something else.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnops import resources
from cnnops.backends import cuda, simt
from cnnops.backends.native import Library

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


@dataclass(frozen=True)
class Reach:
    """A convolution, in some dtypes and on a device of some architecture, whose passes run kernels that no other one
    of `REACH` runs. `tf32`: float32 is multiplied in TF32. `channels_last`: the layout of x and y."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: int = 1
    pad: int = 1
    dilation: int = 1
    groups: int = 1
    dtypes: tuple[torch.dtype, ...] = FLOATS
    tf32: bool = False
    architecture: int = 80
    channels_last: bool = True

    @property
    def geometry(self) -> tuple[int, ...]:
        """As the native ops take it."""
        return (*[self.stride] * 2, *[self.pad] * 2, *[self.dilation] * 2, self.groups, 0)

    def laid_out(self, x: Tensor) -> Tensor:
        """x in the layout of this case."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def function(self, name: str, library: Library = simt.library) -> Callable[..., Any]:
        """A convolution of `library` in the precision of this case."""
        return library.function(name + "_tf32" * self.tf32)


def _portable(case: Reach) -> tuple[Reach, Reach]:
    """In every dtype, and once more in TF32."""
    return case, replace(case, dtypes=(torch.float32,), tf32=True)


def _hopper(case: Reach) -> Reach:
    return replace(case, dtypes=HALVES, architecture=90)


REACH = (
    *_portable(Reach((1, 32, 6, 6), (24, 32, 3, 3))),  # small tiles, of sums long enough for slabs
    *_portable(Reach((1, 16, 6, 6), (24, 16, 1, 1))),
    *_portable(Reach((1, 16, 20, 20), (24, 16, 1, 1), pad=0)),  # tall tiles
    *_portable(Reach((1, 72, 20, 20), (72, 72, 1, 1), pad=0)),  # large ones
    *_portable(Reach((1, 32, 10, 10), (72, 32, 1, 1), pad=0)),  # many filters of few taps
    *_portable(Reach((1, 16, 6, 6), (16, 4, 3, 3), groups=4)),  # several groups to a block
    *_portable(Reach((1, 3, 8, 8), (16, 3, 3, 3))),  # few channels, of few taps and of many
    *_portable(Reach((1, 3, 9, 9), (16, 3, 7, 7), stride=2, pad=3)),
    Reach((1, 8, 9, 9), (8, 1, 7, 7), pad=3, groups=8, dtypes=HALVES),  # large depthwise filters
    Reach((1, 40, 17, 17), (40, 1, 7, 7), pad=3, groups=40, dtypes=HALVES),  # large tiles of them
    *(  # a channel to a group, one filter each
        Reach((1, 24, *size), (24, 1, side, side), stride, side // 2, groups=24)
        for side, size in ((3, (11, 10)), (5, (11, 10)), (7, (8, 8)))
        for stride in (1, 2)
    ),
    *(Reach((1, 10, 9, 10), (filters, 1, 4, 4), groups=10) for filters in (10, 20, 40)),  # and several, of any size
    Reach((1, 8, 12, 12), (8, 1, 9, 9), pad=4, groups=8),  # of both gradients' larger tiles of taps
    Reach((1, 8, 12, 12), (8, 1, 31, 31), pad=15, groups=8),
    *(  # the same in planes
        Reach((1, 24, 11, 10), (24, 1, side, side), stride, side // 2, groups=24, channels_last=False)
        for side in (3, 5, 7)
        for stride in (1, 2)
    ),
    Reach((1, 10, 9, 10), (20, 1, 4, 4), groups=10, channels_last=False),
    _hopper(Reach((2, 64, 12, 12), (64, 64, 3, 3))),  # every tap from one tile of x
    _hopper(Reach((1, 64, 24, 24), (64, 64, 5, 5), pad=2)),  # sums of the last wave are divided
    _hopper(Reach((1, 128, 12, 12), (128, 128, 1, 1), pad=0)),
    _hopper(Reach((1, 256, 12, 12), (256, 256, 1, 1), pad=0)),
)
"""Together, every kernel of a convolution."""


def convolve(case: Reach, dtype: torch.dtype) -> None:
    """The forward pass and all gradients."""
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in (case.x, case.weight, case.weight[:1]))
    x = case.laid_out(x)
    y = case.function("conv2d_forward")(x, weight, bias, *case.geometry)
    case.function("conv2d_backward")(torch.ones_like(y), x, weight, *case.geometry, True, True, True)


def fuse(case: Reach, dtype: torch.dtype) -> None:
    """What stands beside a convolution: statistics, folded batch norm, activations and their gradients."""
    x, weight = (torch.ones(shape, dtype=dtype) for shape in (case.x, case.weight))
    x, ones = case.laid_out(x), torch.ones(case.weight[0])
    case.function("conv2d_statistics_forward")(x, weight, None, *case.geometry)
    case.function("conv2d_bn_act_forward")(
        *(x, weight, None, None, ones, ones, ones, ones), *case.geometry, 1e-5, "relu"
    )
    if case.groups == case.x[1]:
        case.function("conv2d_bn_act_pooled_forward")(
            *(x, weight, None, None, ones, ones, ones, ones), *case.geometry, 1e-5, "relu"
        )
    y, z = case.function("conv2d_act_forward")(x, weight, None, None, *case.geometry, "silu", True)
    simt.library.function("activation_backward")(y, z, "silu")


def convert() -> None:
    """Every conversion between dtypes: of filters to the input's. A convolution in double there is not."""
    for dtype in (*FLOATS, torch.float64):
        x = torch.ones(1, 2, 2, 3, dtype=dtype)
        for other in (*FLOATS, torch.float64):
            weight = torch.ones(3, 2, 2, 1, dtype=other)
            with contextlib.nullcontext() if dtype in FLOATS else contextlib.suppress(RuntimeError):
                simt.library.function("conv2d_forward")(x, weight, None, *REACH[0].geometry)


def normalize() -> None:
    """Batch norm in every dtype, its channels in whole vectors and not, in planes of no whole sectors, by either kind of
    statistics, in L2 and not."""
    forward, backward = (simt.library.function(f"batch_norm_act_{each}") for each in ("forward", "backward"))
    for dtype, shape in itertools.product(FLOATS, ((2, 8), (2, 3), (2, 3, 3, 3))):
        x, ones = torch.ones(shape, dtype=dtype), torch.ones(shape[1])
        for training, l2_bytes in itertools.product((True, False), (0, 1 << 20)):
            simt.module().set_device(l2_bytes=l2_bytes)
            state = torch.zeros(shape[1]), torch.ones(shape[1])
            y, mean, rstd = forward(x, ones, ones, None, *state, training, 0.1, 1e-5, "relu")
            backward(y, x, ones, ones, None, None, mean, rstd, training, 1e-5, "relu", *[True] * 4)
    simt.module().set_device()


def pool_normalized() -> None:
    """Batch norm with a max pool, in every dtype, its channels in whole vectors and not, its offsets short and long."""
    forward, backward = (simt.library.function(f"bn_act_max_pool2d_{each}") for each in ("forward", "backward"))
    for dtype in FLOATS:
        for channels, kernel in itertools.product((8, 3), (2, 17)):
            x, ones = torch.ones(1, channels, 18, 18, dtype=dtype), torch.ones(channels)
            window = (kernel, kernel, 2, 2, 0, 0, 1, 1)
            y, mean, rstd, offsets = forward(x, ones, ones, None, None, True, 0.1, 1e-5, "relu", *window, False, True)
            backward(y, offsets, x, ones, ones, mean, rstd, True, 1e-5, "relu", *window, *[True] * 3)


def squeeze_excite() -> None:
    """Channels in vectors, folded and one by one, planes, sums in one slice and in several."""
    forward, backward = (simt.library.function(f"squeeze_excite_{each}") for each in ("forward", "backward"))
    for dtype in FLOATS:
        nhwc, nchw = torch.channels_last, torch.contiguous_format
        for C, size, layout in ((16, 80, nhwc), (3, 80, nhwc), (257, 4, nhwc), (3, 80, nchw)):
            x = torch.ones(1, C, size, size, dtype=dtype).to(memory_format=layout)
            w1, w2 = torch.ones(4, C, dtype=dtype), torch.ones(C, 4, dtype=dtype)
            y, *small = forward(x, w1, None, w2, None, "relu", "sigmoid")
            backward(y, x, w1, None, w2, None, *small, "relu", "sigmoid", *[True] * 5)


def pool() -> None:
    """Every pool, forward and backward: channels (columns of NCHW) in whole vectors and not, windows that are unrolled,
    of any size, with more taps than a byte numbers, and as large as the map; then unpooling."""
    windows = (((2, 2), 2), ((3, 3), 2), ((1, 2), 1), ((17, 17), 1), ((8, 8), 8), ((20, 20), 20))
    for dtype, layout, odd in itertools.product(FLOATS, (torch.channels_last, torch.contiguous_format), (0, 1)):
        x = torch.ones(1, 16 + odd, 24, 24 + odd, dtype=dtype).to(memory_format=layout)
        size = *x.shape[2:], layout == torch.channels_last
        for kernel, stride in windows:
            at = *kernel, stride, stride, 0, 0
            y, offsets = simt.library.function("max_pool2d_forward")(x, *at, 1, 1, False, True)
            simt.library.function("max_pool2d_backward")(y, offsets, *size, *at, 1, 1)
            simt.library.function("max_pool2d_indices")(offsets, *size[:2], *at, 1, 1)
            y = simt.library.function("avg_pool2d_forward")(x, *at, False, True, 0)
            simt.library.function("avg_pool2d_backward")(y, *size, *at, False, True, 0)
        indices = torch.zeros(x.shape, dtype=torch.int64)
        y = simt.library.function("max_unpool2d_forward")(x, indices, 2, 2)
        simt.library.function("max_unpool2d_backward")(y, indices, size[2])


BESIDE: tuple[Callable[[], None], ...] = (convert, normalize, pool, pool_normalized, squeeze_excite)
"""What runs the kernels that belong to no convolution, on a device of any architecture."""


def launches() -> dict[str, dict[str, int]]:
    """How each kernel is launched: its block's threads and dynamic shared bytes, at most. Runs all of them."""
    emulator = simt.module()
    emulator.reset_counters()
    for case in REACH:
        emulator.set_device(case.architecture)
        for dtype in case.dtypes:
            convolve(case, dtype)
            if case is REACH[0] or case.groups == case.x[1]:  # which have kernels of their own for statistics
                fuse(case, dtype)
    emulator.set_device()
    for run in BESIDE:
        run()
    return dict(sorted(emulator.counters()["configurations"].items()))


INTRODUCTION = """# What the CUDA kernels take

Generated by `python -m cnnops.bench.kernels docs/kernels.md` from the machine code in `_native_cuda.so`, built by {compiler},
and from launches under the emulator; no figure here is a measurement on a device.

Registers are those of a thread at launch. Shared bytes are those of a block, static + dynamic, the most that any launch of
the tests asks for. "on 8.6" is how many blocks fit on one multiprocessor of compute capability 8.6, and the share of its
warps that they fill. No kernel spills or uses local memory: either fails the build.

{kernels} kernels, in {images} images of them.
"""


def page() -> str:
    """What docs/kernels.md says, by cnnops/launches.json and the built CUDA library."""
    rows = resources.table(cuda.library.path)
    lines = [resources.HEADINGS, ("---", "---", *["---:"] * (len(resources.HEADINGS) - 2))]
    lines += [(f"`{row.kernel}`", *resources.cells(row)[1:]) for row in rows]
    introduction = INTRODUCTION.format(
        compiler=resources.compiler(cuda.library.path), kernels=len({row.kernel for row in rows}), images=len(rows)
    )
    return introduction + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write launches.json and the page, or with --check compare them; 1 if one differs."""
    parser = argparse.ArgumentParser(prog="python -m cnnops.bench.kernels", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file would change")
    options = parser.parse_args(arguments)
    status = 0
    for path, make in (
        (resources.LAUNCHES, lambda: json.dumps(launches(), indent=1, sort_keys=True) + "\n"),
        (options.page, page),
    ):
        text = make()
        if not options.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path} is not what the built libraries say; run: make docs", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
