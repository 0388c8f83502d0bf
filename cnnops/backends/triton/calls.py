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
    yield from _depthwise()
    yield from _activation()
    yield from _pool2d()
    yield from _max_unpool2d()
    yield from _batch_norm()
    yield from _bn_act_max_pool2d()
    yield from _squeeze_excite()


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


# x's layout, channels and side; kernel, stride, pad and dilation.
SLIDING = {
    "3x3 s2 p1 64@112": (True, 64, 112, 3, 2, 1, 1),
    "2x2 s2 32@32": (True, 32, 32, 2, 2, 0, 1),
    "3x3 s1 p1 3@32": (True, 3, 32, 3, 1, 1, 1),
    "3x3 s2 p1 64@112 nchw": (False, 64, 112, 3, 2, 1, 1),
    "3x3 d2 64@28": (True, 64, 28, 3, 1, 1, 2),
    "17x17 s4 p8 64@64": (True, 64, 64, 17, 4, 8, 1),
}

# x's layout, channels and side; side of the output.
ADAPTIVE = {
    "1 2048@7": (True, 2048, 7, 1),
    "7 512@14": (True, 512, 14, 7),
    "6 32@13": (True, 32, 13, 6),
    "1 2048@7 nchw": (False, 2048, 7, 1),
    "7 512@14 nchw": (False, 512, 14, 7),
}


def _plane(channels_last: bool, C: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(32, C, side, side, dtype=dtype, device="cuda").to(memory_format=layout)


def _pool2d() -> Iterator[Call]:
    for name, (last, C, side, kernel, stride, pad, dilation) in SLIDING.items():
        window = tuple(each for each in (kernel, stride, pad) for _ in "hw")

        def maximum(dtype, last=last, C=C, side=side, window=window, dilations=(dilation, dilation)) -> None:
            x, function = _plane(last, C, side, dtype), backend.function
            y, offsets = function("max_pool2d_forward")(x, *window, *dilations, False, True)
            function("max_pool2d_forward")(x, *window, *dilations, False, False)
            function("max_pool2d_backward")(y, offsets, side, side, last, *window, *dilations)
            function("max_pool2d_indices")(offsets, side, side, *window, *dilations)

        def average(dtype, last=last, C=C, side=side, window=window) -> None:
            for include_pad, divisor in ((True, 0), (False, 0), (True, 5)):
                y = backend.function("avg_pool2d_forward")(
                    _plane(last, C, side, dtype), *window, False, include_pad, divisor
                )
                backend.function("avg_pool2d_backward")(y, side, side, last, *window, False, include_pad, divisor)

        yield Call(f"max_pool2d {name}", maximum)
        if dilation == 1:
            yield Call(f"avg_pool2d {name}", average)
    for name, (last, C, side, out) in ADAPTIVE.items():

        def adaptive(dtype, last=last, C=C, side=side, out=out) -> None:
            x, function = _plane(last, C, side, dtype), backend.function
            y, offsets = function("adaptive_max_pool2d_forward")(x, out, out, True)
            function("adaptive_max_pool2d_forward")(x, out, out, False)
            function("adaptive_max_pool2d_backward")(y, offsets, side, side, last)
            function("adaptive_max_pool2d_indices")(offsets, side, side)
            y = function("adaptive_avg_pool2d_forward")(x, out, out)
            function("adaptive_avg_pool2d_backward")(y, side, side, last)

        yield Call(f"adaptive {name}", adaptive)


def _max_unpool2d() -> Iterator[Call]:
    for name, last, C in (("64@56", True, 64), ("3@56", True, 3), ("64@56 nchw", False, 64)):

        def unpool(dtype, last=last, C=C) -> None:
            x = _plane(last, C, 56, dtype)
            indices = torch.empty_like(x, dtype=torch.int64)
            y = backend.function("max_unpool2d_forward")(x, indices, 112, 112)
            backend.function("max_unpool2d_backward")(y, indices, last)

        yield Call(f"max_unpool2d {name}", unpool)


@dataclass(frozen=True)
class NormCall:
    """One call of batch norm, forward and backward, of x [32, C, side, side]."""

    C: int
    side: int
    channels_last: bool
    activation: str = "none"
    training: bool = True
    affine: bool = True
    running: bool = True
    residual: bool = False
    saves_y: bool = False
    """Whether the activation's gradient is read off y, in place of z computed again."""


NORMS = {
    "64@56": NormCall(64, 56, True),
    "64@56 relu residual": NormCall(64, 56, True, "relu", residual=True, saves_y=True),
    "32@112 silu residual": NormCall(32, 112, True, "silu", residual=True),
    "eval 64@56 relu6": NormCall(64, 56, True, "relu6", training=False),
    "eval 64@56": NormCall(64, 56, True, training=False),
    "bare 64@56 hardswish": NormCall(64, 56, True, "hardswish", affine=False, running=False),
    "NCHW 512@7 relu": NormCall(512, 7, False, "relu"),
    "NCHW 256@14 relu residual": NormCall(256, 14, False, "relu", residual=True, saves_y=True),
    "NCHW 64@56 sigmoid": NormCall(64, 56, False, "sigmoid"),
}


def _batch_norm() -> Iterator[Call]:
    for name, norm in NORMS.items():

        def x_and_vectors(dtype: torch.dtype, norm: NormCall = norm) -> tuple[torch.Tensor, ...]:
            layout = torch.channels_last if norm.channels_last else torch.contiguous_format
            shape = (32, norm.C, norm.side, norm.side)
            x = torch.empty(shape, dtype=dtype, device="cuda", memory_format=layout)
            return (x, *(torch.empty(norm.C, device="cuda") for _ in range(4)))

        def forward(dtype: torch.dtype, inputs=x_and_vectors, norm: NormCall = norm) -> None:
            x, weight, bias, *running = inputs(dtype)
            backend.function("batch_norm_act_forward")(
                x, *((weight, bias) if norm.affine else (None, None)), x if norm.residual else None,
                *(running if norm.running else (None, None)), norm.training, 0.1, 1e-5, norm.activation,
            )  # fmt: skip

        def backward(dtype: torch.dtype, inputs=x_and_vectors, norm: NormCall = norm) -> None:
            x, weight, bias, mean, rstd = inputs(dtype)
            needs = (True, norm.affine, norm.affine, norm.residual)
            backend.function("batch_norm_act_backward")(
                x, x, *((weight, bias) if norm.affine else (None, None)),
                x if norm.residual and not norm.saves_y else None, x if norm.saves_y else None,
                mean, rstd, norm.training, 1e-5, norm.activation, *needs,
            )  # fmt: skip

        yield Call(f"batch_norm_act_forward {name}", forward)
        yield Call(f"batch_norm_act_backward {name}", backward)


# Channels and side; kernel, stride, pad and dilation; activation; whether it trains, and has parameters.
STEMS = {
    "64@112 3x3 s2": (64, 112, (3, 2, 1, 1), "relu", True, True),
    "32@112 3x3 s2 silu": (32, 112, (3, 2, 1, 1), "silu", True, True),
    "eval 64@112 2x2 s2": (64, 112, (2, 2, 0, 1), "none", False, False),
    "64@56 17x17 d2": (64, 56, (17, 1, 8, 2), "relu", True, False),
}


def _bn_act_max_pool2d() -> Iterator[Call]:
    for name, (C, side, axis, activation, training, affine) in STEMS.items():
        window = tuple(each for each in axis for _ in "hw")

        def both(
            dtype: torch.dtype, C=C, side=side, window=window, activation=activation, training=training, affine=affine
        ) -> None:
            x = nhwc(32, C, side, side, dtype)
            weight, bias, *running = (torch.empty(C, device="cuda") for _ in range(4))
            parameters = (weight, bias) if affine else (None, None)
            kept = running if affine or not training else (None, None)
            run = backend.function("bn_act_max_pool2d_forward")
            run(x, *parameters, *kept, training, 0.1, 1e-5, activation, *window, False, False)
            y, mean, rstd, offsets = run(
                x, *parameters, *kept, training, 0.1, 1e-5, activation, *window, False, True
            )  # fmt: skip
            rest = (training, 1e-5, activation, *window, True, affine, affine)
            backend.function("bn_act_max_pool2d_backward")(y, offsets, x, *parameters, mean, rstd, *rest)

        yield Call(f"bn_act_max_pool2d {name}", both)


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
