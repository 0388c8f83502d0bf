"""What the backends made of native code share: loading a library, finding its ops, the limits of its structs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..geometry import (
    Conv2dProblem,
    ConvTranspose2dProblem,
    NormPool2dProblem,
    NormProblem,
    Pool2dProblem,
    SqueezeExciteProblem,
)
from ..torch_private import unwrapped
from . import YES, Support, no

Problem = (
    Conv2dProblem | ConvTranspose2dProblem | Pool2dProblem | NormProblem | NormPool2dProblem | SqueezeExciteProblem
)

INT_MAX = 2**31 - 1
"""Extents cross to native code as 32-bit ints."""


class Library:
    """The native ops of one backend, in cnnops/_native_<backend>.so or a variant of it. Loaded when first asked for."""

    def __init__(self, backend: str, remedy: str, variant: str = "") -> None:
        self.backend = backend
        self.path = Path(__file__).resolve().parents[1] / f"_native_{backend}{variant and '_' + variant}.so"
        self._remedy = remedy
        self._status: Support | None = None

    def status(self) -> Support:
        """Whether the library is there and loads; the reason says how to get it."""
        if self._status is None:
            self._status = self._load()
        return self._status

    def _load(self) -> Support:
        if not self.path.exists():
            return no(f"{self.path.name} is not built: {self._remedy}")
        try:
            torch.ops.load_library(str(self.path))
        except OSError as error:
            return no(f"{self.path.name} does not load: {error}")
        return YES

    def function(self, name: str) -> Callable[..., Any]:
        """The native op of this name."""
        return unwrapped(getattr(getattr(torch.ops, f"cnnops_{self.backend}"), name).default)

    def build_info(self) -> str:
        """What was compiled, as JSON."""
        return str(self.function("build_info")())


def within_limits(problem: Problem) -> Support:
    """Whether every extent and padded extent fits the structs of problem.h."""
    if isinstance(problem, (NormProblem, SqueezeExciteProblem)):
        return YES
    if isinstance(problem, NormPool2dProblem):
        problem = problem.pool
    transposed = isinstance(problem, ConvTranspose2dProblem)
    H, W = (problem.P, problem.Q) if transposed else (problem.H, problem.W)  # of what the kernel pads
    padded = (H + 2 * problem.pad_h, W + 2 * problem.pad_w)
    filters = 0 if isinstance(problem, Pool2dProblem) else problem.K
    steps = (problem.stride_h, problem.stride_w, problem.dilation_h, problem.dilation_w)
    if max(problem.N, problem.C, filters, problem.R, problem.S, *padded, *steps) > INT_MAX:
        return no(f"an extent, padded extent, stride or dilation is beyond {INT_MAX}")
    return YES
