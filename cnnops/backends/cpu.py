"""C++ SIMD kernels for the CPU: baseline x86-64, AVX2 + FMA and AVX-512, chosen at run time.

CNNOPS_CPU_LIBRARY=address, read on import, takes the library that CNNOPS_SANITIZE made of setup.py build_native in place
of the plain one. The sanitizer's runtime has to be in the process first: .ci/slow-parts has the recipe.
"""

from __future__ import annotations

import os

import torch

from ..geometry import Conv2dProblem, Pool2dProblem
from . import Support, no
from .native import INT_MAX, Library, Problem, within_limits

NAME = "cpu"
devices = ("cpu",)
named_only = False

library = Library(
    NAME,
    "run `make build` in a checkout, or `pip install --no-build-isolation .` with a C++ compiler",
    variant=os.environ.get("CNNOPS_CPU_LIBRARY", ""),
)
usable = library.status
function = library.function

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


LACKS = ("conv2d_statistics_forward", "conv2d_bn_act_pooled_forward")
"""What only kernels for GPUs fuse with a convolution."""


def supports(function: str, problem: Problem) -> Support:
    """Every function but those of `LACKS`, in every floating dtype; convolutions need an input channel."""
    if function in LACKS:
        return no(f"has no {function} kernel")
    if problem.dtype not in DTYPES:
        return no(f"{problem.dtype} is not one of float32, float64, bfloat16, float16")
    if isinstance(problem, Conv2dProblem) and problem.C == 0:
        return no("a convolution without input channels has nothing to sum")
    if isinstance(problem, Pool2dProblem) and "max_pool2d" in function:
        window = problem.R * problem.S or problem.H * problem.W  # an adaptive window has no more taps than the input
        if window > INT_MAX:
            return no(f"a window of {window} taps is beyond 32-bit offsets")
    return within_limits(problem)
