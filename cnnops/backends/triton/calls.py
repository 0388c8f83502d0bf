"""Calls of the backend's functions that between them meet every row of the tuning tables: what `aot` compiles.

Tensors are made on "cuda"; under torch's FakeTensorMode that needs no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from cnnops.backends import triton as backend
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
    yield from _depthwise()
    yield from _activation()
    yield from _squeeze_excite()


def _layer(N: int, C: int, H: int, K: int, R: int, stride: int, groups: int = 1) -> Conv2dProblem:
    return Conv2dProblem(
        N, C, H, H, K, R, R, stride, stride, R // 2, R // 2, 1, 1, groups, "zeros", torch.bfloat16, "cuda", True
    )  # fmt: skip


CONVOLUTIONS = {
    "3x3 64->64": _layer(32, 64, 56, 64, 3, 1),
    "3x3 s2 128->256": _layer(32, 128, 28, 256, 3, 2),
    "7x7 s2 3->64": _layer(32, 3, 224, 64, 7, 2),
    "1x1 64->32": _layer(32, 64, 56, 32, 1, 1),
    "grouped 3x3 32": _layer(32, 32, 112, 32, 3, 1, 16),
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

        for tf32 in (False, True):
            dtypes = (torch.float32,) if tf32 else ALL
            yield Call(f"conv2d_forward {name}", forward, dtypes, tf32)
            yield Call(f"conv2d_backward {name}", backward, dtypes, tf32)


DEPTHWISE = {
    "3x3 144": _layer(32, 144, 56, 144, 3, 1, 144),
    "3x3 s2 96": _layer(32, 96, 112, 96, 3, 2, 96),
    "3x3 960 @7": _layer(32, 960, 7, 960, 3, 1, 960),
    "3x3 d2 64": replace(_layer(32, 64, 28, 64, 3, 1, 64), pad_h=2, pad_w=2, dilation_h=2, dilation_w=2),
    "5x5 240": _layer(32, 240, 28, 240, 5, 1, 240),
    "5x5 s2 144": _layer(32, 144, 56, 144, 5, 2, 144),
    "7x7 96": _layer(32, 96, 56, 96, 7, 1, 96),
    "13x13 64": _layer(32, 64, 28, 64, 13, 1, 64),
    "3x3 64->128": _layer(32, 64, 28, 128, 3, 1, 64),
    "3x3 144 nchw": replace(_layer(32, 144, 56, 144, 3, 1, 144), channels_last=False),
    "5x5 s2 144 nchw": replace(_layer(32, 144, 56, 144, 5, 2, 144), channels_last=False),
}


def _depthwise() -> Iterator[Call]:
    from cnnops.backends.triton import depthwise_conv2d

    for name, p in DEPTHWISE.items():
        geometry = (p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, p.groups, 0)

        def image(dtype: torch.dtype, channels: int, H: int, W: int, p: Conv2dProblem = p) -> torch.Tensor:
            layout = torch.channels_last if p.channels_last else torch.contiguous_format
            return torch.empty(p.N, channels, H, W, dtype=dtype, device="cuda").to(memory_format=layout)

        def x_and_weight(dtype: torch.dtype, p: Conv2dProblem = p, image=image) -> tuple[torch.Tensor, torch.Tensor]:
            return image(dtype, p.C, p.H, p.W), torch.empty(p.K, 1, p.R, p.S, dtype=dtype, device="cuda")

        def forward(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p, geometry=geometry) -> None:
            x, weight = inputs(dtype)
            backend.function("conv2d_forward")(x, weight, x.new_empty(p.K), *geometry)

        def fused(dtype: torch.dtype, inputs=x_and_weight, image=image, p: Conv2dProblem = p) -> None:
            x, weight = inputs(dtype)
            of_this = replace(p, dtype=dtype)
            residual = image(dtype, p.K, p.P, p.Q)
            depthwise_conv2d.forward(of_this, x, weight, residual=residual, activation="silu", need_z=True)
            depthwise_conv2d.forward(of_this, x, weight, statistics=True)

        def pooled(dtype: torch.dtype, inputs=x_and_weight, p: Conv2dProblem = p, geometry=geometry) -> None:
            x, weight = inputs(dtype)
            statistics = [torch.empty(p.K, device="cuda") for _ in range(4)]
            arguments = (x, weight, None, None, *statistics, *geometry, 1e-5, "relu6")
            backend.function("conv2d_bn_act_pooled_forward")(*arguments)

        def backward(
            dtype: torch.dtype, inputs=x_and_weight, image=image, p: Conv2dProblem = p, geometry=geometry
        ) -> None:
            for needs in ((True, True, False), (True, False, False), (False, True, False)):
                backend.function("conv2d_backward")(image(dtype, p.K, p.P, p.Q), *inputs(dtype), *geometry, *needs)

        yield Call(f"conv2d_forward depthwise {name}", forward)
        yield Call(f"conv2d_backward depthwise {name}", backward)
        if name.startswith("3x3 144"):
            yield Call(f"depthwise forward with all that is fused {name}", fused)
            yield Call(f"conv2d_bn_act_pooled_forward {name}", pooled)


def _activation() -> Iterator[Call]:
    for activation in ACTIVATIONS[1:]:

        def backward(dtype: torch.dtype, activation: str = activation) -> None:
            y = nhwc(32, 64, 56, 56, dtype)
            backend.function("activation_backward")(torch.empty_like(y), y, activation)

        yield Call(f"activation_backward {activation}", backward)


SQUEEZE_EXCITE = {
    "96@56": (32, 96, 56, 4, "silu", "sigmoid", torch.channels_last),
    "1152@7": (32, 1152, 7, 48, "relu", "hardsigmoid", torch.channels_last),
    "2048@7 nchw": (32, 2048, 7, 128, "relu", "sigmoid", torch.contiguous_format),
    "256@56 nchw": (32, 256, 56, 16, "hardswish", "hardsigmoid", torch.contiguous_format),
}
"""N, C, H, M, activation, gate, layout."""


def _squeeze_excite() -> Iterator[Call]:
    for name, (N, C, H, M, activation, gate, layout) in SQUEEZE_EXCITE.items():
        sizes = (N, C, H, M)
        how = (activation, gate)

        def image(dtype: torch.dtype, sizes=sizes, layout=layout) -> torch.Tensor:
            N, C, H, _ = sizes
            return torch.empty(N, C, H, H, dtype=dtype, device="cuda").to(memory_format=layout)

        def layers(dtype: torch.dtype, bias: bool, sizes=sizes) -> list[torch.Tensor | None]:
            _, C, _, M = sizes
            shapes = ((M, C), (M,), (C, M), (C,))
            return [torch.empty(s, dtype=dtype, device="cuda") if bias or len(s) > 1 else None for s in shapes]

        def forward(dtype: torch.dtype, image=image, layers=layers, how=how) -> None:
            for bias in (True, False):
                backend.function("squeeze_excite_forward")(image(dtype), *layers(dtype, bias), *how)

        def backward(dtype: torch.dtype, image=image, layers=layers, how=how, sizes=sizes) -> None:
            N, C, _, M = sizes
            small = [torch.empty(N, size, device="cuda") for size in (C, M, C)]
            for need_dx in (True, False):
                needs = (need_dx, True, True, True, True)
                arguments = (image(dtype), image(dtype), *layers(dtype, True), *small, *how, *needs)
                backend.function("squeeze_excite_backward")(*arguments)

        yield Call(f"squeeze_excite_forward {name}", forward)
        yield Call(f"squeeze_excite_backward {name}", backward)
