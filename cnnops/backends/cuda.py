"""CUDA C++ kernels, for the architectures they were compiled for.

CNNOPS_CUDA_ARCH=80, read with the first launch, has them chosen as for a device of no higher architecture.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..geometry import (
    Conv2dProblem,
    ConvTranspose2dProblem,
    NormPool2dProblem,
    NormProblem,
    Pool2dProblem,
    SqueezeExciteProblem,
)
from ..torch_private import tf32_allowed
from . import YES, Support, no
from .native import INT_MAX, Library, Problem, within_limits

NAME = "cuda"
devices = ("cuda",)
named_only = False
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CONVOLUTIONS = {
    "conv2d_forward": ("forward",),
    "conv2d_backward": ("backward_input", "backward_weight"),
    "conv2d_act_forward": ("forward",),
    "conv2d_bn_act_forward": ("forward",),
    "conv2d_statistics_forward": ("forward",),
    "conv2d_bn_act_pooled_forward": ("forward",),
    "conv_transpose2d_forward": ("backward_input",),
    "conv_transpose2d_backward": ("forward", "backward_weight"),
}
"""The functions that have a variant in TF32, and the passes of a convolution that each is made of."""

FUNCTIONS = {
    **dict.fromkeys(CONVOLUTIONS, Conv2dProblem),
    "conv_transpose2d_forward": ConvTranspose2dProblem,
    "conv_transpose2d_backward": ConvTranspose2dProblem,
    "activation_backward": NormProblem,
    "bn_act_max_pool2d_forward": NormPool2dProblem,
    "bn_act_max_pool2d_backward": NormPool2dProblem,
    "squeeze_excite_forward": SqueezeExciteProblem,
    "squeeze_excite_backward": SqueezeExciteProblem,
    "batch_norm_act_forward": NormProblem,
    "batch_norm_act_backward": NormProblem,
    "max_pool2d_forward": Pool2dProblem,
    "max_pool2d_backward": Pool2dProblem,
    "max_pool2d_indices": Pool2dProblem,
    "avg_pool2d_forward": Pool2dProblem,
    "avg_pool2d_backward": Pool2dProblem,
    "adaptive_max_pool2d_forward": Pool2dProblem,
    "adaptive_max_pool2d_backward": Pool2dProblem,
    "adaptive_max_pool2d_indices": Pool2dProblem,
    "adaptive_avg_pool2d_forward": Pool2dProblem,
    "adaptive_avg_pool2d_backward": Pool2dProblem,
    "max_unpool2d_forward": Pool2dProblem,
    "max_unpool2d_backward": Pool2dProblem,
}

LARGEST_SUM = INT_MAX - 1024
"""Kernels count taps and channels together in 32 bits, and a last tile reaches beyond them."""

library = Library(NAME, "install with nvcc 13 on the PATH, and CNNOPS_BUILD=cuda")


def function(name: str) -> Callable[..., Any]:
    """The native op of this name. Convolutions of float32 follow torch's TF32 switch, which each call reads."""
    return switched(library, name)


def switched(library: Library, name: str) -> Callable[..., Any]:
    """The op of this name in `library`; of a convolution, on each call, that in the precision which torch would use."""
    exact = library.function(name)
    if name not in CONVOLUTIONS:
        return exact
    tf32 = library.function(name + "_tf32")

    def run(first: Tensor, *rest: Any) -> Any:
        return (tf32 if first.dtype == torch.float32 and tf32_allowed() else exact)(first, *rest)

    return run


def plan(function: str, problem: Problem) -> tuple[str, ...]:
    """Which kernels would compute a convolution's function on the current device, and why: a line for each pass."""
    return planned(library, function, problem)


def planned(
    library: Library, function: str, problem: Problem, device: tuple[int, int, int] = (0, 0, 0)
) -> tuple[str, ...]:
    """What `library` plans for a device, given as (architecture, multiprocessors, shared bytes a block may have); zeros
    stand for the device there is. Nothing is planned for an empty output or a function that is no convolution."""
    if isinstance(problem, Conv2dProblem):
        extents = problem.C, problem.H, problem.W, problem.K
    elif isinstance(problem, ConvTranspose2dProblem):  # of the convolution whose gradient it is
        extents = problem.K, problem.P, problem.Q, problem.C
    else:
        return ()
    if min(problem.N, problem.P, problem.Q, *extents) == 0:
        return ()
    geometry = (
        *(problem.stride_h, problem.stride_w, problem.pad_h, problem.pad_w),
        *(problem.dilation_h, problem.dilation_w, problem.groups, 0),
    )
    tf32 = problem.dtype == torch.float32 and tf32_allowed()
    precision = "tf32" if tf32 else str(problem.dtype).removeprefix("torch.")
    ask = library.function("conv2d_plan")
    return tuple(
        f"{each} in {precision}: "
        + ask(
            each,
            problem.N,
            *extents,
            problem.R,
            problem.S,
            *geometry,
            problem.dtype,
            problem.channels_last,
            tf32,
            *device,
        )
        for each in CONVOLUTIONS[function]
    )


@functools.cache
def usable() -> Support:
    """Whether there is a device, a driver for it that knows the library's CUDA, and an image that it runs."""
    if not torch.cuda.is_available():
        return no("torch sees no CUDA device")
    status = library.status()
    if not status.ok:
        return status
    info = json.loads(library.build_info())
    knows = driver_knows(info["driver"], info["cuda"])
    if not knows.ok:
        return knows
    arches = info["arches"]
    major, minor = torch.cuda.get_device_capability()
    compiles = info["driver"] >= info["cuda"]  # PTX of a later CUDA than its own a driver does not know
    if any(runs_on(image, major, minor) for image in arches if compiles or not image.startswith("compute_")):
        return YES
    but = "" if compiles else " (of which its driver, for an earlier CUDA, compiles none)"
    return no(f"the library holds {', '.join(arches)}{but}, but the device is sm_{major}{minor}")


_LEAST_DRIVER = {12: "r525", 13: "r580"}
"""The first driver of each CUDA. Source: CUDA's release notes, "CUDA Toolkit and Minimum Required Driver Version"."""


def driver_knows(driver: int, cuda: int) -> Support:
    """Whether a driver that supports one CUDA version runs programs made for another (13000 is 13.0).

    Within a major version any does. Source: CUDA's compatibility guide, "Minor Version Compatibility".
    """
    if driver // 1000 >= cuda // 1000:
        return YES
    needed = _LEAST_DRIVER.get(cuda // 1000, "a later one")
    return no(
        f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, but the library was built with "
        f"{cuda // 1000}.{cuda % 1000 // 10}, which needs {needed} or later"
    )


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


def _depthwise(problem: Conv2dProblem | ConvTranspose2dProblem) -> bool:
    """Whether the depthwise kernels take a convolution: csrc/cuda/depthwise_conv2d_cut.cu."""
    small = max(problem.R, problem.S) <= 31 and problem.K <= 16 * problem.C
    return problem.groups == problem.C > 1 and small


def supports(function: str, problem: Problem) -> Support:
    """Two-dimensional convolutions, transposed ones too, with what their epilogues fuse, pools, batch norm also before a
    pool, and squeeze_excite, in float32, bfloat16 and float16."""
    if not isinstance(problem, FUNCTIONS.get(function, ())):
        return no(f"has no {function} kernel")
    if problem.dtype not in DTYPES:
        return no(f"{problem.dtype} is not one of float32, bfloat16, float16")
    pool = problem.pool if isinstance(problem, NormPool2dProblem) else problem
    if isinstance(pool, Pool2dProblem) and "max_pool2d" in function:
        window = pool.R * pool.S or pool.H * pool.W  # an adaptive window has no more taps than the input
        if window > INT_MAX:
            return no(f"a window of {window} taps is beyond 32-bit offsets")
    if isinstance(problem, Pool2dProblem) and "max_unpool2d" in function and problem.H * problem.W > INT_MAX:
        return no(f"a plane of {problem.H * problem.W} values is beyond 32-bit numbers")
    if not isinstance(problem, (Conv2dProblem, ConvTranspose2dProblem)):
        return within_limits(problem)
    if isinstance(problem, Conv2dProblem) and problem.pad_mode != "zeros":
        return no(f"pads with zeros alone, not by {problem.pad_mode}")
    if problem.C == 0:
        return no("a convolution without input channels has nothing to sum")
    if function == "conv2d_bn_act_pooled_forward" and not _depthwise(problem):
        return no("pools the results of depthwise convolutions alone")
    terms = problem.R * problem.S * max(problem.C, problem.K) // problem.groups
    if terms > LARGEST_SUM:
        return no(f"a sum of {terms} terms is beyond {LARGEST_SUM}")
    return within_limits(problem)
