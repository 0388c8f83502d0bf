"""Triton kernels: on CUDA, or interpreted on the CPU where ``TRITON_INTERPRET=1`` is in the environment.

Triton decides when a kernel is defined whether it will be interpreted, so the variable must be set before the process
imports triton. Nothing here imports triton before a kernel is wanted.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch

from cnnops.backends import YES, Support, no
from cnnops.backends.native import Problem
from cnnops.backends.triton import (
    batch_norm_plan,
    bn_act_max_pool2d_plan,
    conv2d_plan,
    depthwise_conv2d_plan,
    pool2d_plan,
)
from cnnops.backends.triton.launch import INTERPRETING
from cnnops.geometry import (
    Conv2dProblem,
    ConvTranspose2dProblem,
    NormPool2dProblem,
    NormProblem,
    Pool2dProblem,
    SqueezeExciteProblem,
)

NAME = "triton"

devices: tuple[str, ...] = ("cpu",) if INTERPRETING else ("cuda",)

named_only: bool = INTERPRETING
"""The interpreter is for tests: it is never chosen unasked."""

LEAST_CAPABILITY = (8, 0)

FUNCTIONS: dict[str, tuple[str, type[Problem]]] = {
    "conv2d_forward": ("conv2d", Conv2dProblem),
    "conv2d_backward": ("conv2d", Conv2dProblem),
    "conv2d_act_forward": ("conv2d", Conv2dProblem),
    "conv2d_bn_act_forward": ("conv2d", Conv2dProblem),
    "conv2d_statistics_forward": ("conv2d", Conv2dProblem),
    "conv2d_bn_act_pooled_forward": ("depthwise_conv2d", Conv2dProblem),
    "conv_transpose2d_forward": ("conv_transpose2d", ConvTranspose2dProblem),
    "conv_transpose2d_backward": ("conv_transpose2d", ConvTranspose2dProblem),
    "activation_backward": ("activation", NormProblem),
    "max_pool2d_forward": ("pool2d", Pool2dProblem),
    "max_pool2d_backward": ("pool2d", Pool2dProblem),
    "max_pool2d_indices": ("pool2d", Pool2dProblem),
    "avg_pool2d_forward": ("pool2d", Pool2dProblem),
    "avg_pool2d_backward": ("pool2d", Pool2dProblem),
    "adaptive_avg_pool2d_forward": ("pool2d", Pool2dProblem),
    "adaptive_avg_pool2d_backward": ("pool2d", Pool2dProblem),
    "adaptive_max_pool2d_forward": ("pool2d", Pool2dProblem),
    "adaptive_max_pool2d_backward": ("pool2d", Pool2dProblem),
    "adaptive_max_pool2d_indices": ("pool2d", Pool2dProblem),
    "max_unpool2d_forward": ("max_unpool2d", Pool2dProblem),
    "max_unpool2d_backward": ("max_unpool2d", Pool2dProblem),
    "batch_norm_act_forward": ("batch_norm", NormProblem),
    "batch_norm_act_backward": ("batch_norm", NormProblem),
    "bn_act_max_pool2d_forward": ("bn_act_max_pool2d", NormPool2dProblem),
    "bn_act_max_pool2d_backward": ("bn_act_max_pool2d", NormPool2dProblem),
    "squeeze_excite_forward": ("squeeze_excite", SqueezeExciteProblem),
    "squeeze_excite_backward": ("squeeze_excite", SqueezeExciteProblem),
}
"""What there are kernels for: the module that has the function, and what its calls are described as."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Kernels count pixels and programs in 32 bits, and the last block may reach beyond the last pixel.
_LIMIT = 2**31 - 2**16


def usable() -> Support:
    """Whether this backend can run anything here; the reason says how to get it."""
    if importlib.util.find_spec("triton") is None:
        return no("triton is not installed: pip install triton")
    if INTERPRETING:
        return YES
    if not torch.cuda.is_available():
        return no("no CUDA device; set TRITON_INTERPRET=1 to interpret on the CPU")
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return no(f"needs compute capability 8.0 or later, but the device has {capability[0]}.{capability[1]}")
    return YES


def supports(function: str, problem: Any) -> Support:
    """Whether `function` can do `problem` here, and why not."""
    if function not in FUNCTIONS:
        return no(f"has no kernel for {function}")
    kind = FUNCTIONS[function][1]
    if not isinstance(problem, kind):
        return no(f"{function} takes a {kind.__name__}, not a {type(problem).__name__}")
    if problem.dtype not in DTYPES:
        return no(f"takes float32, float16 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    if INTERPRETING and problem.dtype == torch.bfloat16:
        return no("bfloat16 is wrong in Triton's interpreter")
    depthwise = isinstance(problem, Conv2dProblem) and depthwise_conv2d_plan.takes(problem)
    if function == "conv2d_bn_act_pooled_forward" and not depthwise:
        return no("pools the results of depthwise convolutions alone")
    limits = _LIMITS.get(kind)
    return limits(problem) if limits else YES


def _conv2d_limits(p: Conv2dProblem) -> Support:
    if p.pad_mode != "zeros":
        return no(f"pads with zeros alone, not by {p.pad_mode}")
    if p.C == 0:
        return no("the input has no channels")
    for name, extent in (
        ("padded rows", p.H + 2 * p.pad_h),
        ("padded columns", p.W + 2 * p.pad_w),
        ("input pixels", p.N * p.H * p.W),
        ("output pixels", p.N * p.P * p.Q),
        ("weight elements per filter", p.R * p.S * p.C),
        ("weight elements per channel", p.R * p.S * p.K),
    ):
        if extent >= _LIMIT:
            return no(f"kernels count {name} in 32 bits, but there are {extent}")
    return _grid(conv2d_plan.most_programs(p))


def _conv_transpose2d_limits(p: ConvTranspose2dProblem) -> Support:
    return _conv2d_limits(conv2d_plan.Adjoint.to(p))


def _pool2d_limits(p: Pool2dProblem) -> Support:
    for name, extent in (
        ("input pixels", p.N * p.H * p.W),
        ("output pixels", p.N * p.P * p.Q),
        ("taps of a window", p.R * p.S),
        ("rows that a window may reach", p.H + max(p.R - 1, 0) * p.dilation_h),
        ("columns that a window may reach", p.W + max(p.S - 1, 0) * p.dilation_w),
    ):
        if extent >= _LIMIT:
            return no(f"kernels count {name} in 32 bits, but there are {extent}")
    return _grid(pool2d_plan.most_programs(p))


def _norm_limits(p: NormProblem) -> Support:
    return _grid(batch_norm_plan.most_programs(p))


def _norm_pool2d_limits(p: NormPool2dProblem) -> Support:
    support = _pool2d_limits(p.pool)
    return _grid(bn_act_max_pool2d_plan.most_programs(p)) if support.ok else support


def _grid(programs: int) -> Support:
    if programs >= _LIMIT:
        return no(f"a grid has at most 2^31 programs, but this takes about 2^{math.log2(programs):.0f}")
    return YES


_MOST_HIDDEN = 2048


def _squeeze_excite_limits(p: SqueezeExciteProblem) -> Support:
    if p.M > _MOST_HIDDEN:
        return no(f"one program holds all hidden channels, which may be {_MOST_HIDDEN}, but there are {p.M}")
    if p.L >= _LIMIT:
        return no(f"kernels count positions in 32 bits, but there are {p.L}")
    return YES


_LIMITS: dict[type[Problem], Callable[[Any], Support]] = {
    Conv2dProblem: _conv2d_limits,
    ConvTranspose2dProblem: _conv_transpose2d_limits,
    Pool2dProblem: _pool2d_limits,
    NormProblem: _norm_limits,
    NormPool2dProblem: _norm_pool2d_limits,
    SqueezeExciteProblem: _squeeze_excite_limits,
}
"""What kernels cannot count, for each kind of problem; of one that is not here they take every size."""


def function(name: str) -> Callable[..., Any]:
    """The Python function `name`, its arguments as in DESIGN's table of backends."""
    module = importlib.import_module(f"{__name__}.{FUNCTIONS[name][0]}")
    found: Callable[..., Any] = getattr(module, name)
    return found
