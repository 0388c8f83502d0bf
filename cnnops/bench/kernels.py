"""The page of CUDA kernels: what each takes of a multiprocessor, and how many of its blocks fit on one.

``python -m cnnops.bench.kernels docs/kernels.md`` runs every kernel once under the emulator, to see how it is launched,
writes that to cnnops/launches.json, and makes the page of it and of the built CUDA library. ``--check`` changes nothing
and fails where either says something else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnnops import resources
from cnnops.backends import cuda, simt

HALVES = (torch.bfloat16, torch.float16)
ALL = (torch.float32, *HALVES)


@dataclass(frozen=True)
class Reach:
    """A convolution whose three passes run kernels that no other one of `REACH` runs."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: int = 1
    pad: int = 1
    dilation: int = 1
    groups: int = 1
    dtypes: tuple[torch.dtype, ...] = ALL

    def geometry(self) -> tuple[int, ...]:
        """As the native ops take it."""
        return (*[self.stride] * 2, *[self.pad] * 2, *[self.dilation] * 2, self.groups, 0)


REACH = (Reach((1, 16, 6, 6), (24, 16, 3, 3)),)


def run(case: Reach, dtype: torch.dtype) -> None:
    """The forward pass and all gradients, under the emulator."""
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in (case.x, case.weight, case.weight[:1]))
    y = simt.function("conv2d_forward")(x, weight, bias, *case.geometry())
    simt.function("conv2d_backward")(torch.ones_like(y), x, weight, *case.geometry(), True, True, True)


def convert() -> None:
    """Every conversion between dtypes: of filters to the input's. A convolution in double there is not."""
    for dtype in (*ALL, torch.float64):
        x = torch.ones(1, 2, 2, 3, dtype=dtype)
        for other in (*ALL, torch.float64):
            weight = torch.ones(3, 2, 2, 1, dtype=other)
            with contextlib.nullcontext() if dtype in ALL else contextlib.suppress(RuntimeError):
                simt.function("conv2d_forward")(x, weight, None, *Reach((), ()).geometry())


def launches() -> dict[str, dict[str, int]]:
    """How each kernel is launched: its block's threads and dynamic shared bytes, at most. Runs all of them."""
    emulator = simt.module()
    emulator.reset_counters()
    for case in REACH:
        for dtype in case.dtypes:
            run(case, dtype)
    convert()
    return dict(sorted(emulator.counters()["configurations"].items()))
