"""Calls of the backend's functions that between them meet every row of the tuning tables: what `aot` compiles.

Tensors are made on "cuda"; under torch's FakeTensorMode that needs no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from cnnops.backends import triton as backend
from cnnops.backends.triton import conv2d_plan
from cnnops.geometry import ACTIVATIONS, Conv2dProblem

ALL = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Call:
    """run(dtype) calls one function, in each of `dtypes`; with tf32 where torch may multiply float32 so."""

    name: str
    run: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = ALL
    tf32: bool = False


def nhwc(N: int, C: int, H: int, W: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(N, C, H, W, dtype=dtype, device="cuda").to(memory_format=torch.channels_last)


def every_call() -> Iterator[Call]:
    """All of them, in the order of the backend's functions."""
    yield from _conv2d()
    yield from _activation()


def _layer(N: int, C: int, H: int, K: int, R: int, stride: int, groups: int = 1) -> Conv2dProblem:
    return Conv2dProblem(
        N, C, H, H, K, R, R, stride, stride, R // 2, R // 2, 1, 1, groups, "zeros", torch.bfloat16, "cuda", True
    )  # fmt: skip


def _transposed(p: Conv2dProblem) -> tuple[int, ...]:
    """The geometry of the transposed convolution that makes x's extents of y's."""
    output_pad = (p.H + 2 * p.pad_h - p.R) % p.stride_h
    return (p.stride_h, p.stride_w, p.pad_h, p.pad_w, output_pad, output_pad, p.dilation_h, p.dilation_w, p.groups)


CONVOLUTIONS = {
    "3x3 64->64": _layer(32, 64, 56, 64, 3, 1),
    "3x3 s2 128->256": _layer(32, 128, 28, 256, 3, 2),
    "7x7 s2 3->64": _layer(32, 3, 224, 64, 7, 2),
    "1x1 64->32": _layer(32, 64, 56, 32, 1, 1),
    "1x1 96->576": _layer(32, 96, 14, 576, 1, 1),
    "3x3 512->512": _layer(32, 512, 7, 512, 3, 1),
    "3x3 256->256": _layer(256, 256, 14, 256, 3, 1),
    "grouped 3x3 32": _layer(32, 32, 112, 32, 3, 1, 32),
}


def _conv2d() -> Iterator[Call]:
    for name, p in CONVOLUTIONS.items():
        geometry = (p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, p.groups, 0)

        def x_and_weight(dtype: torch.dtype, p: Conv2dProblem = p) -> tuple[torch.Tensor, torch.Tensor]:
            return nhwc(p.N, p.C, p.H, p.W, dtype), nhwc(p.K, p.C // p.groups, p.R, p.S, dtype)

        def forward(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p, geometry=geometry) -> None:
            x, weight = inputs(dtype)
            backend.function("conv2d_forward")(x, weight, x.new_empty(p.K), *geometry)

        def backward(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p, geometry=geometry) -> None:
            dy = nhwc(p.N, p.K, p.P, p.Q, dtype)
            backend.function("conv2d_backward")(dy, *inputs(dtype), *geometry, True, True, True)

        def forward_act(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p, geometry=geometry) -> None:
            y = nhwc(p.N, p.K, p.P, p.Q, dtype)
            backend.function("conv2d_act_forward")(*inputs(dtype), y.new_empty(p.K), y, *geometry, "silu", True)

        def forward_bn(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p, geometry=geometry) -> None:
            y = nhwc(p.N, p.K, p.P, p.Q, dtype)
            norm = [y.new_empty(p.K, dtype=torch.float32) for _ in range(4)]
            backend.function("conv2d_bn_act_forward")(*inputs(dtype), None, y, *norm, *geometry, 1e-5, "relu")

        def statistics(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p, geometry=geometry) -> None:
            backend.function("conv2d_statistics_forward")(*inputs(dtype), None, *geometry)

        def transposed(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p) -> None:
            x, weight = inputs(dtype)
            dy = nhwc(p.N, p.K, p.P, p.Q, dtype)
            backend.function("conv_transpose2d_forward")(dy, weight, x.new_empty(p.C), *_transposed(p))

        def nchw(dtype: torch.dtype, p: Conv2dProblem = p, geometry=geometry) -> None:
            shapes = (p.N, p.C, p.H, p.W), (p.K, p.C // p.groups, p.R, p.S), (p.N, p.K, p.P, p.Q)
            x, weight, y = (torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)
            norm = [y.new_empty(p.K, dtype=torch.float32) for _ in range(4)]
            backend.function("conv2d_statistics_forward")(x, weight, None, *geometry)
            backend.function("conv2d_bn_act_forward")(x, weight, None, y, *norm, *geometry, 1e-5, "relu")

        def normalised(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p) -> None:
            from cnnops.backends.triton.conv2d import Epilogue, Prologue, convolve

            x, weight = inputs(dtype)
            scale, shift = (x.new_empty(p.C, dtype=torch.float32) for _ in range(2))
            problem = replace(p, dtype=dtype)
            convolve(problem, x, weight, Epilogue(statistics=True), Prologue(scale, shift, "relu"))

        for tf32 in (False, True):
            dtypes = (torch.float32,) if tf32 else ALL
            if p.R * p.S == 1:
                yield Call(f"conv2d_forward normalised {name}", normalised, dtypes, tf32)
            if conv2d_plan.reads_nchw(replace(p, channels_last=False)):
                yield Call(f"conv2d_forward NCHW {name}", nchw, dtypes, tf32)
            yield Call(f"conv2d_forward {name}", forward, dtypes, tf32)
            yield Call(f"conv2d_backward {name}", backward, dtypes, tf32)
            yield Call(f"conv2d_act_forward {name}", forward_act, dtypes, tf32)
            yield Call(f"conv2d_bn_act_forward {name}", forward_bn, dtypes, tf32)
            yield Call(f"conv2d_statistics_forward {name}", statistics, dtypes, tf32)
            yield Call(f"conv_transpose2d_forward {name}", transposed, dtypes, tf32)


def _activation() -> Iterator[Call]:
    for activation in ACTIVATIONS[1:]:

        def backward(dtype: torch.dtype, activation: str = activation) -> None:
            y = nhwc(32, 64, 56, 56, dtype)
            backend.function("activation_backward")(torch.empty_like(y), y, activation)

        yield Call(f"activation_backward {activation}", backward)
