"""CUDA C++ kernels, for the architectures they were compiled for."""

from __future__ import annotations

import functools
import json

import torch

from ..geometry import Conv2dProblem
from . import YES, Support, no
from .native import INT_MAX, Library, Problem, within_limits

NAME = "cuda"
devices = ("cuda",)
named_only = False
FUNCTIONS = ("conv2d_forward", "conv2d_backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

library = Library(NAME, "install with nvcc 13 on the PATH, and CNNOPS_BUILD=cuda")
function = library.function


@functools.cache
def usable() -> Support:
    """Whether there is a device and the library has an image for it."""
    if not torch.cuda.is_available():
        return no("torch sees no CUDA device")
    status = library.status()
    if not status.ok:
        return status
    arches = json.loads(library.build_info())["arches"]
    major, minor = torch.cuda.get_device_capability()
    if any(runs_on(image, major, minor) for image in arches):
        return YES
    return no(f"the library holds {', '.join(arches)}, but the device is sm_{major}{minor}")


def runs_on(image: str, major: int, minor: int) -> bool:
    """Whether a device of this compute capability can run an image that nvcc was told to make.

    sm_80 runs on 8.0 and later 8.x; sm_90a on 9.0 alone; compute_80 is PTX, which the driver compiles for 8.0 and all
    later ones. Source: CUDA's programming guide, "Binary Compatibility" and "PTX Compatibility".
    """
    kind, number = image.split("_")
    made_for = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
    if number.endswith("a"):
        return made_for == (major, minor)
    if kind == "compute" and not number.endswith("f"):
        return made_for <= (major, minor)
    return made_for[0] == major and made_for[1] <= minor


def supports(function: str, problem: Problem) -> Support:
    """Two-dimensional convolutions in float32, bfloat16 and float16."""
    if function not in FUNCTIONS or not isinstance(problem, Conv2dProblem):
        return no(f"has no {function} kernel")
    if problem.dtype not in DTYPES:
        return no(f"{problem.dtype} is not one of float32, bfloat16, float16")
    if problem.pad_mode != "zeros":
        return no(f"pads with zeros alone, not by {problem.pad_mode}")
    if problem.C == 0:
        return no("a convolution without input channels has nothing to sum")
    if problem.R * problem.S * max(problem.C, problem.K) // problem.groups > INT_MAX - 2**16:
        return no(f"a sum of {problem.R * problem.S * max(problem.C, problem.K) // problem.groups} terms")
    return within_limits(problem)
