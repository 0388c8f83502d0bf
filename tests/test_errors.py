"""What a wrong call raises: torch's exception type, with a message that names the argument, its value and the need.

Each row is run on torch too, so the table stays true. `words` must all be in our message; torch's own is its affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_same_layout
from torch import nn

import cnnops
import cnnops.functional as CF
from cnnops import nn as cnn

OURS, TORCHS = SimpleNamespace(F=CF, nn=cnn), SimpleNamespace(F=F, nn=nn)


@dataclass(frozen=True)
class Wrong:
    id: str
    call: Callable[[Any], Any]
    raises: type[Exception]
    words: tuple[str, ...]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def conv2d(x: Any = (2, 3, 5, 5), weight: Any = (4, 3, 3, 3), bias: Any = None, **arguments: Any) -> Any:
    x, weight, bias = (zeros(*t) if isinstance(t, tuple) else t for t in (x, weight, bias))
    return lambda library: library.F.conv2d(x, weight, bias, **arguments)


def transposed(x: Any = (2, 4, 5, 5), weight: Any = (4, 3, 3, 3), bias: Any = None, **arguments: Any) -> Any:
    x, weight, bias = (zeros(*t) if isinstance(t, tuple) else t for t in (x, weight, bias))
    return lambda library: library.F.conv_transpose2d(x, weight, bias, **arguments)


def padded(mode: str, padding: Any, x: tuple[int, ...] = (2, 3, 5, 4)) -> Any:
    return lambda library: library.nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)(zeros(*x))


def max_pool2d(x: Any = (2, 3, 5, 5), kernel_size: Any = 2, **arguments: Any) -> Any:
    x = zeros(*x) if isinstance(x, tuple) else x
    return lambda library: library.F.max_pool2d(x, kernel_size, **arguments)


def avg_pool2d(x: Any = (2, 3, 5, 5), kernel_size: Any = 2, **arguments: Any) -> Any:
    x = zeros(*x) if isinstance(x, tuple) else x
    return lambda library: library.F.avg_pool2d(x, kernel_size, **arguments)


def adaptive(x: Any = (2, 3, 5, 5), output_size: Any = 2) -> Any:
    x = zeros(*x) if isinstance(x, tuple) else x
    return lambda library: library.F.adaptive_avg_pool2d(x, output_size)


def adaptive_max(x: Any = (2, 3, 5, 5), output_size: Any = 2, **arguments: Any) -> Any:
    x = zeros(*x) if isinstance(x, tuple) else x
    return lambda library: library.F.adaptive_max_pool2d(x, output_size, **arguments)


def unpool(x: Any = (1, 1, 2, 2), indices: Any = (0, 2, 8, 10), kernel_size: Any = 2, **arguments: Any) -> Any:
    x = zeros(*x) if isinstance(x, tuple) else x
    if isinstance(indices, tuple):
        indices = torch.tensor(indices, dtype=torch.int64).view(x.shape)
    return lambda library: library.F.max_unpool2d(x, indices, kernel_size, **arguments)


def batch_norm(
    x: Any = (2, 3, 4, 4), mean: Any = 3, var: Any = 3, weight: Any = None, bias: Any = None, **arguments: Any
) -> Any:
    x = zeros(*x) if isinstance(x, tuple) else x
    vectors = [torch.ones(t) if isinstance(t, int) else t for t in (mean, var, weight, bias)]
    return lambda library: library.F.batch_norm(x, *vectors, **arguments)


DOUBLE, BFLOAT = torch.float64, torch.bfloat16

WRONG = (
    Wrong("conv2d-bias-type", conv2d(bias=5), TypeError, ("bias", "int")),
    Wrong("conv2d-stride-bool", conv2d(stride=True), TypeError, ("stride", "True")),
    Wrong("max-ceil-mode-type", max_pool2d(ceil_mode=1), TypeError, ("ceil_mode", "1")),
    Wrong("avg-count-type", avg_pool2d(count_include_pad=0), TypeError, ("count_include_pad", "0")),
    Wrong("avg-divisor-type", avg_pool2d(divisor_override=2.0), TypeError, ("divisor_override", "2.0")),
    Wrong("bn-weight-type", batch_norm(weight=[1.0]), TypeError, ("weight", "list")),
    Wrong(
        "bn-mixed",
        batch_norm(zeros(2, 3, 2, 2, dtype=BFLOAT), weight=zeros(3, dtype=BFLOAT)),
        RuntimeError,
        ("weight", "running_mean", "float32", "bfloat16"),
    ),
    Wrong("conv2d-no-filters", conv2d(weight=(0, 3, 3, 3)), RuntimeError, ("weight", "[0, 3, 3, 3]")),
    Wrong("conv2d-no-rows", conv2d((2, 3, 0, 5), padding=1), RuntimeError, ("kernel", "3 x 3", "2 x 7")),
    Wrong("conv2d-no-rows-but-padding", conv2d((2, 3, 0, 5), padding=3), RuntimeError, ("input", "[2, 3, 0, 5]")),
    Wrong("conv2d-no-taps", conv2d(weight=(4, 3, 0, 0)), RuntimeError, ("weight", "[4, 3, 0, 0]")),
    Wrong("conv2d-kernel-exceeds-input", conv2d((2, 3, 2, 2)), RuntimeError, ("kernel", "3 x 3", "2 x 2")),
    Wrong("conv2d-kernel-exceeds-empty", conv2d((0, 3, 2, 2)), RuntimeError, ("kernel", "3 x 3", "2 x 2")),
    Wrong("conv2d-dilated-exceeds", conv2d(dilation=3), RuntimeError, ("kernel", "7 x 7", "5 x 5")),
    Wrong("conv2d-2-d-input", conv2d((5, 5)), RuntimeError, ("input", "[5, 5]")),
    Wrong("conv2d-5-d-input", conv2d((1, 1, 3, 5, 5)), RuntimeError, ("input", "[1, 1, 3, 5, 5]")),
    Wrong("conv2d-3-d-weight", conv2d(weight=(4, 3, 3)), RuntimeError, ("weight", "[4, 3, 3]")),
    Wrong("conv2d-channels", conv2d((2, 4, 5, 5)), RuntimeError, ("channels", "4", "3", "groups=1")),
    Wrong("conv2d-bias-length", conv2d(bias=(5,)), RuntimeError, ("bias", "[5]", "[4]")),
    Wrong("conv2d-bias-2-d", conv2d(bias=(4, 1)), RuntimeError, ("bias", "[4, 1]", "[4]")),
    Wrong("conv2d-groups-not-dividing", conv2d((2, 4, 5, 5), (3, 2, 3, 3), groups=2), RuntimeError, ("groups=2", "3")),
    Wrong("conv2d-groups-0", conv2d(groups=0), RuntimeError, ("groups", "0")),
    Wrong("conv2d-groups-negative", conv2d(groups=-1), RuntimeError, ("groups", "-1")),
    Wrong("conv2d-stride-0", conv2d(stride=0), RuntimeError, ("stride", "(0, 0)")),
    Wrong("conv2d-stride-0-one-side", conv2d(stride=(1, 0)), RuntimeError, ("stride", "(1, 0)")),
    Wrong("conv2d-stride-3-tuple", conv2d(stride=(1, 1, 1)), RuntimeError, ("stride", "1, 1, 1")),
    Wrong("conv2d-padding-negative", conv2d(padding=-1), RuntimeError, ("padding", "(-1, -1)")),
    Wrong("conv2d-padding-4-tuple", conv2d(padding=(1, 1, 1, 1)), RuntimeError, ("padding", "1, 1, 1, 1")),
    Wrong("conv2d-same-strided", conv2d(padding="same", stride=2), RuntimeError, ("padding='same'", "stride")),
    Wrong("conv2d-padding-word", conv2d(padding="full"), RuntimeError, ("padding", "'full'", "same", "valid")),
    Wrong("conv2d-padding-float", conv2d(padding=1.5), TypeError, ("padding", "1.5")),
    Wrong("conv2d-stride-float", conv2d(stride=2.0), TypeError, ("stride", "2.0")),
    Wrong("conv2d-groups-float", conv2d(groups=1.0), TypeError, ("groups", "1.0")),
    Wrong("conv2d-dilation-0", conv2d(dilation=0), RuntimeError, ("dilation", "(0, 0)")),
    Wrong(
        "conv2d-weight-float64", conv2d(weight=zeros(4, 3, 3, 3, dtype=DOUBLE)), RuntimeError, ("float32", "float64")
    ),
    Wrong(
        "conv2d-weight-bfloat16", conv2d(weight=zeros(4, 3, 3, 3, dtype=BFLOAT)), RuntimeError, ("float32", "bfloat16")
    ),
    Wrong("conv2d-bias-float64", conv2d(bias=zeros(4, dtype=DOUBLE)), RuntimeError, ("bias", "float32", "float64")),
    Wrong(
        "conv2d-bool",
        conv2d(zeros(2, 3, 5, 5, dtype=torch.bool), zeros(4, 3, 3, 3, dtype=torch.bool)),
        NotImplementedError,
        (),
    ),
    Wrong(
        "conv2d-float8",
        conv2d(zeros(2, 3, 5, 5, dtype=torch.float8_e4m3fn), zeros(4, 3, 3, 3, dtype=torch.float8_e4m3fn)),
        NotImplementedError,
        (),
    ),
    Wrong("conv2d-numpy", conv2d(np.zeros((2, 3, 5, 5), np.float32)), TypeError, ("input", "ndarray")),
    Wrong("conv2d-weight-none", conv2d(weight=None), TypeError, ("weight", "None")),
    Wrong("conv2d-input-none", conv2d(x=None), TypeError, ("input", "None")),
    Wrong(
        "reflect-as-wide-as-input", padded("reflect", (1, 4)), RuntimeError, ("'reflect'", "width of 4", "3", "(1, 4)")
    ),
    Wrong(
        "reflect-as-high-as-input", padded("reflect", (5, 1)), RuntimeError, ("'reflect'", "height of 5", "4", "(5, 1)")
    ),
    Wrong("reflect-empty-batch", padded("reflect", 4, (0, 3, 5, 4)), RuntimeError, ("'reflect'", "width of 4")),
    Wrong(
        "circular-wider-than-input", padded("circular", (1, 5)), RuntimeError, ("'circular'", "width of 4", "(1, 5)")
    ),
    Wrong("circular-unbatched", padded("circular", (6, 1), (3, 5, 4)), RuntimeError, ("'circular'", "height of 5")),
    Wrong("replicate-no-rows", padded("replicate", 2, (2, 3, 0, 4)), RuntimeError, ("input", "[2, 3, 0, 4]")),
    Wrong("reflect-no-rows", padded("reflect", 1, (2, 3, 0, 4)), RuntimeError, ("kernel", "3 x 3", "2 x 6")),
    Wrong("reflect-kernel-exceeds", padded("reflect", 0, (2, 3, 2, 2)), RuntimeError, ("kernel", "3 x 3", "2 x 2")),
    Wrong(
        "convT-output-padding-is-stride",
        transposed(stride=2, output_padding=2),
        RuntimeError,
        ("output_padding=(2, 2)", "stride=(2, 2)", "dilation=(1, 1)"),
    ),
    Wrong(
        "convT-output-padding-one-side",
        transposed(stride=(2, 1), output_padding=1),
        RuntimeError,
        ("output_padding=(1, 1)",),
    ),
    Wrong("convT-output-padding-negative", transposed(output_padding=-1), RuntimeError, ("output_padding", "(-1, -1)")),
    Wrong(
        "convT-output-padding-3-tuple",
        transposed(output_padding=(1, 1, 1)),
        RuntimeError,
        ("output_padding", "1, 1, 1"),
    ),
    Wrong("convT-output-padding-float", transposed(stride=2, output_padding=1.0), TypeError, ("output_padding", "1.0")),
    Wrong("convT-negative-output", transposed((2, 4, 2, 2), padding=3), RuntimeError, ("-2 x -2", "(3, 3)", "2 x 2")),
    Wrong("convT-negative-output-empty", transposed((0, 4, 2, 2), padding=3), RuntimeError, ("-2 x -2", "(3, 3)")),
    Wrong("convT-no-channels", transposed((2, 0, 5, 5), (0, 3, 3, 3)), RuntimeError, ("weight", "[0, 3, 3, 3]")),
    Wrong("convT-no-filters", transposed(weight=(4, 0, 3, 3)), RuntimeError, ("weight", "[4, 0, 3, 3]")),
    Wrong("convT-no-taps", transposed(weight=(4, 3, 0, 3)), RuntimeError, ("weight", "[4, 3, 0, 3]")),
    Wrong("convT-no-rows", transposed((2, 4, 0, 5)), RuntimeError, ("input", "[2, 4, 0, 5]")),
    Wrong("convT-2-d-input", transposed((5, 5)), RuntimeError, ("input", "[5, 5]")),
    Wrong("convT-5-d-input", transposed((1, 1, 4, 5, 5)), RuntimeError, ("input", "[1, 1, 4, 5, 5]")),
    Wrong("convT-3-d-weight", transposed(weight=(4, 3, 3)), RuntimeError, ("weight", "[4, 3, 3]")),
    Wrong("convT-channels", transposed((2, 5, 5, 5)), RuntimeError, ("channels", "4", "5", "[2, 5, 5, 5]")),
    Wrong("convT-bias-length", transposed(bias=(4,)), RuntimeError, ("bias", "[3]", "[4]")),
    Wrong("convT-bias-2-d", transposed(bias=(3, 1)), RuntimeError, ("bias", "[3]", "[3, 1]")),
    Wrong("convT-groups-not-dividing", transposed(groups=3), RuntimeError, ("groups=3", "4")),
    Wrong("convT-groups-0", transposed(groups=0), RuntimeError, ("groups", "0")),
    Wrong("convT-groups-float", transposed(groups=1.0), TypeError, ("groups", "1.0")),
    Wrong("convT-stride-0", transposed(stride=0), RuntimeError, ("stride", "(0, 0)")),
    Wrong("convT-stride-bool", transposed(stride=True), TypeError, ("stride", "True")),
    Wrong("convT-dilation-0", transposed(dilation=0), RuntimeError, ("dilation", "(0, 0)")),
    Wrong("convT-padding-negative", transposed(padding=-1), RuntimeError, ("padding", "(-1, -1)")),
    Wrong("convT-padding-word", transposed(padding="same"), TypeError, ("padding", "'same'")),
    Wrong("convT-padding-float", transposed(padding=1.5), TypeError, ("padding", "1.5")),
    Wrong(
        "convT-weight-float64", transposed(weight=zeros(4, 3, 3, 3, dtype=DOUBLE)), RuntimeError, ("float32", "float64")
    ),
    Wrong("convT-bias-float64", transposed(bias=zeros(3, dtype=DOUBLE)), RuntimeError, ("bias", "float32", "float64")),
    Wrong(
        "convT-bool",
        transposed(zeros(2, 4, 5, 5, dtype=torch.bool), zeros(4, 3, 3, 3, dtype=torch.bool)),
        NotImplementedError,
        (),
    ),
    Wrong(
        "convT-int32",
        transposed(zeros(2, 4, 5, 5, dtype=torch.int32), zeros(4, 3, 3, 3, dtype=torch.int32)),
        NotImplementedError,
        (),
    ),
    Wrong("convT-numpy", transposed(np.zeros((2, 4, 5, 5), np.float32)), TypeError, ("input", "ndarray")),
    Wrong("convT-weight-none", transposed(weight=None), TypeError, ("weight", "None")),
    Wrong("convT-bias-type", transposed(bias=5), TypeError, ("bias", "int")),
    Wrong("max-no-channels", max_pool2d((2, 0, 5, 5)), RuntimeError, ("input", "[2, 0, 5, 5]")),
    Wrong("max-no-channels-unbatched", max_pool2d((0, 5, 5)), RuntimeError, ("input", "0, 5, 5]")),
    Wrong("max-no-rows", max_pool2d((2, 3, 0, 5)), RuntimeError, ("input", "[2, 3, 0, 5]")),
    Wrong("max-kernel-exceeds-input", max_pool2d((2, 3, 2, 2), 3), RuntimeError, ("3 x 3", "2 x 2")),
    Wrong("max-padding-over-half", max_pool2d(kernel_size=2, padding=2), RuntimeError, ("padding", "(2, 2)")),
    Wrong("max-padding-negative", max_pool2d(kernel_size=2, padding=-1), RuntimeError, ("padding", "(-1, -1)")),
    Wrong(
        "max-padding-over-half-dilated",
        max_pool2d((2, 3, 9, 9), 3, padding=2, dilation=2),
        RuntimeError,
        ("padding", "(2, 2)"),
    ),
    Wrong("max-kernel-0", max_pool2d(kernel_size=0), RuntimeError, ("kernel_size", "(0, 0)")),
    Wrong("max-stride-0", max_pool2d(stride=0), RuntimeError, ("stride", "(0, 0)")),
    Wrong("max-dilation-0", max_pool2d(dilation=0), RuntimeError, ("dilation", "(0, 0)")),
    Wrong("max-bool", max_pool2d(zeros(1, 1, 4, 4, dtype=torch.bool)), NotImplementedError, ()),
    Wrong("max-complex", max_pool2d(zeros(1, 1, 4, 4, dtype=torch.complex64)), NotImplementedError, ()),
    Wrong("max-2-d", max_pool2d((5, 5)), RuntimeError, ("input", "[5, 5]")),
    Wrong("max-5-d", max_pool2d((1, 1, 3, 5, 5)), RuntimeError, ("input", "[1, 1, 3, 5, 5]")),
    Wrong("max-kernel-3-tuple", max_pool2d(kernel_size=(2, 2, 2)), RuntimeError, ("kernel_size", "2, 2, 2")),
    Wrong("avg-no-channels", avg_pool2d((2, 0, 5, 5)), RuntimeError, ("input", "[2, 0, 5, 5]")),
    Wrong("avg-kernel-exceeds-input", avg_pool2d((2, 3, 2, 2), 3), RuntimeError, ("3 x 3", "2 x 2")),
    Wrong("avg-padding-over-half", avg_pool2d(kernel_size=2, padding=2), RuntimeError, ("padding", "(2, 2)")),
    Wrong("avg-2-d", avg_pool2d((5, 5)), IndexError, ("input", "[5, 5]")),
    Wrong("avg-5-d", avg_pool2d((1, 1, 3, 5, 5)), RuntimeError, ("input", "[1, 1, 3, 5, 5]")),
    Wrong("avg-stride-float", avg_pool2d(stride=np.float64(2.0)), TypeError, ("stride", "2.0")),
    Wrong("avg-divisor-0", avg_pool2d(divisor_override=0), RuntimeError, ("divisor", "0")),
    Wrong("avg-int32", avg_pool2d(zeros(1, 1, 4, 4, dtype=torch.int32)), NotImplementedError, ()),
    Wrong("adaptive-no-rows", adaptive((2, 3, 0, 5)), RuntimeError, ("input", "[2, 3, 0, 5]")),
    Wrong("adaptive-negative", adaptive(output_size=-1), RuntimeError, ("output_size", "-1")),
    Wrong("adaptive-int", adaptive(zeros(1, 1, 4, 4, dtype=torch.int64)), NotImplementedError, ()),
    Wrong("adaptive-1-tuple", adaptive(output_size=(2,)), RuntimeError, ("output_size", "(2,)")),
    Wrong("adaptive-3-tuple", adaptive(output_size=(2, 2, 2)), RuntimeError, ("output_size", "(2, 2, 2)")),
    Wrong("adaptive-none", adaptive(output_size=None), TypeError, ("output_size", "None")),
    Wrong("adaptive-2-d-tuple", adaptive((5, 5), (1, 1)), ValueError, ("output_size", "(1, 1)", "[5, 5]")),
    Wrong("adaptive-max-no-channels", adaptive_max((2, 0, 5, 5)), RuntimeError, ("input", "[2, 0, 5, 5]")),
    Wrong("adaptive-max-no-channels-nor-batch", adaptive_max((0, 0, 5, 5)), RuntimeError, ("input", "[0, 0, 5, 5]")),
    Wrong("adaptive-max-no-rows", adaptive_max((2, 3, 0, 5)), RuntimeError, ("input", "[2, 3, 0, 5]")),
    Wrong("adaptive-max-no-rows-unbatched", adaptive_max((3, 0, 5)), RuntimeError, ("input", "3, 0, 5]")),
    Wrong("adaptive-max-negative", adaptive_max(output_size=-1), RuntimeError, ("output_size", "-1")),
    Wrong("adaptive-max-negative-and-0", adaptive_max(output_size=(0, -1)), RuntimeError, ("output_size", "(0, -1)")),
    Wrong("adaptive-max-1-tuple", adaptive_max(output_size=(2,)), RuntimeError, ("output_size", "(2,)")),
    Wrong("adaptive-max-3-tuple", adaptive_max(output_size=(2, 2, 2)), RuntimeError, ("output_size", "(2, 2, 2)")),
    Wrong("adaptive-max-none", adaptive_max(output_size=None), TypeError, ("output_size", "None")),
    Wrong("adaptive-max-float", adaptive_max(output_size=2.0), TypeError, ("output_size", "2.0")),
    Wrong("adaptive-max-bool", adaptive_max(output_size=True), TypeError, ("output_size", "True")),
    Wrong("adaptive-max-2-d", adaptive_max((5, 5), 1), RuntimeError, ("input", "[5, 5]")),
    Wrong("adaptive-max-2-d-tuple", adaptive_max((5, 5), (1, 1)), ValueError, ("output_size", "(1, 1)", "[5, 5]")),
    Wrong("adaptive-max-5-d", adaptive_max((1, 1, 3, 5, 5)), RuntimeError, ("input", "[1, 1, 3, 5, 5]")),
    *(
        Wrong(f"adaptive-max-{dtype}", adaptive_max(zeros(1, 1, 4, 4, dtype=dtype)), NotImplementedError, ())
        for dtype in (torch.int64, torch.int32, torch.bool, torch.complex64)
    ),
    Wrong(
        "unpool-indices-shape",
        unpool(indices=zeros(1, 1, 2, 3, dtype=torch.int64)),
        RuntimeError,
        ("indices", "[1, 1, 2, 2]", "[1, 1, 2, 3]"),
    ),
    Wrong(
        "unpool-indices-int32",
        unpool(indices=zeros(1, 1, 2, 2, dtype=torch.int32)),
        RuntimeError,
        ("indices", "int64", "int32"),
    ),
    Wrong("unpool-indices-float", unpool(indices=zeros(1, 1, 2, 2)), RuntimeError, ("indices", "int64", "float32")),
    Wrong("unpool-indices-none", unpool(indices=None), TypeError, ("indices", "None")),
    Wrong("unpool-index-beyond", unpool(indices=(0, 99, 2, 3)), RuntimeError, ("indices", "99", "4x4")),
    Wrong("unpool-index-just-beyond", unpool(indices=(0, 15, 16, 3)), RuntimeError, ("indices", "16", "4x4")),
    Wrong("unpool-index-negative", unpool(indices=(-1, 0, 1, 2)), RuntimeError, ("indices", "-1", "4x4")),
    Wrong("unpool-output-size", unpool(output_size=(9, 9)), ValueError, ("output_size", "(9, 9)", "3", "5")),
    Wrong("unpool-output-size-low", unpool(output_size=(2, 4)), ValueError, ("output_size", "(2, 4)", "height", "3")),
    Wrong("unpool-output-size-wide", unpool(output_size=(4, 6)), ValueError, ("output_size", "(4, 6)", "width", "5")),
    Wrong("unpool-output-size-3-tuple", unpool(output_size=(1, 4, 4)), ValueError, ("output_size", "(1, 4, 4)")),
    Wrong("unpool-output-size-1-tuple", unpool(output_size=(4,)), ValueError, ("output_size", "(4,)")),
    Wrong("unpool-output-size-int", unpool(output_size=4), TypeError, ("output_size", "4")),
    Wrong("unpool-output-size-float", unpool(output_size=(5.0, 5.0)), TypeError, ("output_size", "5.0")),
    Wrong("unpool-output-size-word", unpool(output_size=("a", 4)), TypeError, ("output_size", "a")),
    Wrong("unpool-kernel-1-tuple", unpool(kernel_size=(2,)), RuntimeError, ("kernel_size", "(2,)")),
    Wrong("unpool-kernel-3-tuple", unpool(kernel_size=(2, 2, 2)), IndexError, ("kernel_size", "(2, 2, 2)")),
    Wrong("unpool-kernel-float", unpool(kernel_size=2.0), TypeError, ("kernel_size", "2.0")),
    Wrong("unpool-kernel-word", unpool(kernel_size="2"), TypeError, ("kernel_size", "'2'")),
    Wrong("unpool-kernel-none", unpool(kernel_size=None), TypeError, ("kernel_size", "None")),
    Wrong("unpool-stride-empty", unpool(stride=()), IndexError, ("stride", "()")),
    Wrong("unpool-padding-1-tuple", unpool(padding=(1,)), IndexError, ("padding", "(1,)")),
    Wrong("unpool-padding-float", unpool(padding=0.5), TypeError, ("padding", "0.5")),
    Wrong("unpool-padding-too-large", unpool(padding=9), ValueError, ("-14",)),
    Wrong("unpool-kernel-negative", unpool(kernel_size=-1), ValueError, ("-2",)),
    Wrong("unpool-2-d", unpool((2, 2)), RuntimeError, ("input", "[2, 2]")),
    Wrong("unpool-5-d", unpool((1, 1, 1, 2, 2)), RuntimeError, ("input", "[1, 1, 1, 2, 2]")),
    Wrong("unpool-no-channels", unpool((2, 0, 2, 2), ()), RuntimeError, ("input", "[2, 0, 2, 2]")),
    Wrong("unpool-no-rows", unpool((2, 1, 0, 2), ()), RuntimeError, ("input", "[2, 1, 0, 2]")),
    *(
        Wrong(f"unpool-{dtype}", unpool(zeros(1, 1, 2, 2, dtype=dtype)), NotImplementedError, ())
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
    ),
    Wrong("bn-one-value", batch_norm((1, 3, 1, 1), training=True), ValueError, ("1 value per channel", "[1, 3, 1, 1]")),
    Wrong("bn-eval-without-statistics", batch_norm(mean=None, var=None), RuntimeError, ("running_mean", "None")),
    Wrong("bn-statistics-length", batch_norm(mean=4, var=4), RuntimeError, ("running_mean", "[3]", "[4]")),
    Wrong("bn-weight-length", batch_norm(weight=4, bias=3), RuntimeError, ("weight", "[3]", "[4]")),
    Wrong("bn-bias-length", batch_norm(weight=3, bias=4), RuntimeError, ("bias", "[3]", "[4]")),
    Wrong(
        "bn-bfloat16-statistics",
        batch_norm(mean=torch.zeros(3, dtype=BFLOAT), var=torch.ones(3, dtype=BFLOAT)),
        RuntimeError,
        ("running_mean", "float32", "bfloat16"),
    ),
    Wrong("bn-1-d", batch_norm((3,)), RuntimeError, ("input", "[3]")),
    Wrong("bn-one-statistic", batch_norm(mean=None, training=True), ValueError, ("running_mean", "running_var")),
    Wrong("bn-one-statistic-eval", batch_norm(var=None), RuntimeError, ("running_var", "None")),
    Wrong("bn-eps-complex", batch_norm(eps=1j), TypeError, ("eps", "1j")),
    Wrong("bn-eps-0", batch_norm(training=True, eps=0), ValueError, ("eps", "0")),
    Wrong("bn-eps-negative", batch_norm(training=True, eps=-1), ValueError, ("eps", "-1")),
    Wrong("bn-momentum-none", batch_norm(momentum=None), TypeError, ("momentum", "None")),
    Wrong("Conv2d-channels", lambda library: library.nn.Conv2d(3, 4, 3, groups=2), ValueError, ("in_channels",)),
    Wrong("Conv2d-groups", lambda library: library.nn.Conv2d(4, 4, 3, groups=0), ValueError, ("groups",)),
    Wrong(
        "Conv2d-same-strided", lambda library: library.nn.Conv2d(3, 4, 3, 2, "same"), ValueError, ("padding='same'",)
    ),
    Wrong(
        "Conv2d-padding-mode",
        lambda library: library.nn.Conv2d(3, 4, 3, padding_mode="wrap"),
        ValueError,
        ("padding_mode", "wrap"),
    ),
    Wrong(
        "ConvTranspose2d-padding-mode",
        lambda library: library.nn.ConvTranspose2d(3, 4, 3, padding_mode="reflect"),
        ValueError,
        ("zeros",),
    ),
    Wrong(
        "ConvTranspose2d-output-size",
        lambda library: library.nn.ConvTranspose2d(3, 4, 3, 2)(zeros(1, 3, 5, 5), output_size=(14, 12)),
        ValueError,
        ("14, 12", "[11, 11]", "[12, 12]"),
    ),
    Wrong("BatchNorm2d-3-d", lambda library: library.nn.BatchNorm2d(3)(zeros(2, 3, 4)), ValueError, ("4D", "3D")),
    Wrong(
        "MaxUnpool2d-output-size",
        lambda library: library.nn.MaxUnpool2d(2)(zeros(1, 1, 1, 1), zeros(1, 1, 1, 1, dtype=torch.int64), (9, 9)),
        ValueError,
        ("output_size", "(9, 9)"),
    ),
    Wrong("MaxPool2d-stride", lambda library: library.nn.MaxPool2d(2, 0)(zeros(1, 1, 4, 4)), RuntimeError, ("stride",)),
)


@pytest.mark.quick
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.id)
def test_wrong_call(wrong: Wrong) -> None:
    with pytest.raises(wrong.raises) as theirs:
        wrong.call(TORCHS)
    with pytest.raises(wrong.raises) as ours:
        wrong.call(OURS)
    assert type(ours.value) is type(theirs.value)
    for word in wrong.words:
        assert word in str(ours.value), f"{word!r} is not in: {ours.value}"


def channels_last(*shape: int) -> torch.Tensor:
    return zeros(*shape).contiguous(memory_format=torch.channels_last)


RIGHT: dict[str, Callable[[Any], Any]] = {
    "conv2d-channels-last": conv2d(channels_last(2, 3, 5, 5)),
    "conv2d-channels-last-weight": conv2d(weight=channels_last(4, 3, 3, 3)),
    "convT-channels-last": transposed(channels_last(2, 4, 5, 5)),
    "max-channels-last": max_pool2d(channels_last(2, 3, 5, 5)),
    "max-unbatched": max_pool2d((3, 5, 5)),
    "avg-channels-last": avg_pool2d(channels_last(2, 3, 5, 5)),
    "adaptive-channels-last": adaptive(channels_last(2, 3, 5, 5)),
    "adaptive-max-channels-last": adaptive_max(channels_last(2, 3, 5, 5)),
    "bn-channels-last": batch_norm(channels_last(2, 3, 5, 5)),
    "conv2d-no-batch": conv2d((0, 3, 5, 5)),
    "conv2d-no-channels": conv2d((2, 0, 5, 5), (4, 0, 3, 3)),
    "conv2d-kernel-is-padded-input": conv2d((2, 3, 1, 1), padding=1),
    "conv2d-unbatched": conv2d((3, 5, 5)),
    "conv2d-stride-1-tuple": conv2d(stride=(2,)),
    "conv2d-int64": conv2d(zeros(2, 3, 5, 5, dtype=torch.int64), zeros(4, 3, 3, 3, dtype=torch.int64)),
    "conv2d-int32": conv2d(zeros(2, 3, 5, 5, dtype=torch.int32), zeros(4, 3, 3, 3, dtype=torch.int32)),
    "conv2d-uint8": conv2d(zeros(2, 3, 5, 5, dtype=torch.uint8), zeros(4, 3, 3, 3, dtype=torch.uint8)),
    "conv2d-complex64": conv2d(zeros(2, 3, 5, 5, dtype=torch.complex64), zeros(4, 3, 3, 3, dtype=torch.complex64)),
    "conv2d-numpy-int": conv2d(stride=np.int64(2), padding=(np.int32(1), 0), groups=np.int64(1)),
    "conv2d-same-even-kernel": conv2d(weight=(4, 3, 2, 4), padding="same"),
    "conv2d-denormal": conv2d(torch.full((1, 1, 1, 1), 1e-20), torch.full((1, 1, 1, 1), 1e-20)),
    "conv2d-meta-input": conv2d(zeros(2, 3, 5, 5).to("meta")),
    "conv2d-meta-input-bias": conv2d(zeros(2, 3, 5, 5).to("meta"), zeros(4, 3, 3, 3).to("meta"), (4,)),
    "conv2d-reflect-no-batch": lambda library: library.nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect")(
        zeros(0, 3, 5, 5)
    ),
    "convT-no-batch": transposed((0, 4, 5, 5)),
    "convT-unbatched": transposed((4, 5, 5)),
    "convT-no-output": transposed((2, 4, 2, 2), padding=2),
    "convT-output-padding-within-dilation": transposed(output_padding=1, dilation=2),
    "convT-groups-bias": transposed(bias=(6,), groups=2),
    "convT-int64": transposed(zeros(2, 4, 5, 5, dtype=torch.int64), zeros(4, 3, 3, 3, dtype=torch.int64)),
    "convT-complex64": transposed(zeros(2, 4, 5, 5, dtype=torch.complex64), zeros(4, 3, 3, 3, dtype=torch.complex64)),
    "convT-numpy-int": transposed(stride=np.int64(2), output_padding=(np.int32(1), 0), groups=np.int64(1)),
    "convT-meta-input": transposed(zeros(2, 4, 5, 5).to("meta")),
    "max-numpy-int": max_pool2d(kernel_size=np.int64(2)),
    "max-numpy-stride": max_pool2d(stride=np.int64(1)),
    "max-stride-empty": max_pool2d(stride=[]),
    "max-ceil-last-window-in-padding": max_pool2d((1, 1, 5, 5), stride=3, padding=1, ceil_mode=True),
    "max-ceil-overlapping": max_pool2d((1, 1, 6, 6), 3, stride=2, padding=1, ceil_mode=True),
    "avg-ceil-last-window-in-padding": avg_pool2d((1, 1, 5, 5), stride=3, padding=1, ceil_mode=True),
    "avg-numpy-stride": avg_pool2d(stride=np.int64(1)),
    "max-no-batch": max_pool2d((0, 3, 5, 5)),
    "max-kernel-exceeds-input-ceil": max_pool2d((2, 3, 2, 2), 3, ceil_mode=True),
    "max-int8": max_pool2d(zeros(1, 1, 4, 4, dtype=torch.int8)),
    "avg-no-batch": avg_pool2d((0, 3, 5, 5)),
    "avg-divisor-negative": avg_pool2d(divisor_override=-2),
    "avg-int64": avg_pool2d(zeros(1, 1, 4, 4, dtype=torch.int64)),
    "adaptive-no-batch": adaptive((0, 3, 5, 5)),
    "adaptive-no-channels": adaptive((2, 0, 5, 5)),
    "adaptive-output-0": adaptive(output_size=0),
    "adaptive-output-exceeds-input": adaptive((2, 3, 2, 2), 5),
    "adaptive-2-d": adaptive((5, 5), 1),
    "adaptive-none": adaptive(output_size=(None, 2)),
    "max-return-indices-as-int": lambda library: max_pool2d(return_indices=1)(library)[1],
    "adaptive-max-no-batch": adaptive_max((0, 3, 5, 5)),
    "adaptive-max-no-batch-unbatched": adaptive_max((0, 5, 5)),
    "adaptive-max-output-0": adaptive_max(output_size=0),
    "adaptive-max-output-0-high": adaptive_max(output_size=(0, 3)),
    "adaptive-max-output-exceeds-input": adaptive_max((2, 3, 2, 2), 5),
    "adaptive-max-unbatched": adaptive_max((3, 5, 5)),
    "adaptive-max-none": adaptive_max(output_size=[None, 2]),
    "adaptive-max-indices-as-int": lambda library: adaptive_max(return_indices=1)(library)[1],
    "unpool-unbatched": unpool((1, 2, 2)),
    "unpool-no-batch": unpool((0, 1, 2, 2), ()),
    "unpool-no-batch-unbatched": unpool((0, 2, 2), ()),
    "unpool-output-size": unpool(output_size=[5, 3], indices=(0, 1, 2, 14)),
    "unpool-output-size-whole": unpool(output_size=torch.Size((7, 7, 5, 5))),
    "unpool-kernel-0": unpool(kernel_size=0),
    "unpool-stride-0": unpool(indices=(0, 1, 2, 3), stride=0),
    "unpool-stride-negative": unpool(indices=(0, 0, 0, 0), stride=-1),
    "unpool-stride-3-tuple": unpool(stride=(2, 2, 2)),
    "unpool-padding-negative": unpool(padding=-1),
    "unpool-kernel-exceeds-stride": unpool(kernel_size=5, stride=2),
    "bn-no-batch-train": batch_norm((0, 3, 2, 2), training=True),
    "bn-no-batch-eval": batch_norm((0, 3, 2, 2)),
    "bn-no-channels": batch_norm((2, 0, 2, 2), mean=None, var=None, training=True),
    "bn-bfloat16-with-float32": batch_norm(zeros(2, 3, 2, 2, dtype=BFLOAT), weight=3, bias=3),
    "bn-eps-0-eval": batch_norm(eps=0),
    "bn-numpy-numbers": batch_norm(momentum=np.float32(0.5), eps=np.int64(1), training=True),
    "bn-numbers-in-tensors": batch_norm(momentum=torch.tensor(0.5), eps=torch.tensor(1), training=True),
}


@pytest.mark.quick
@pytest.mark.parametrize("id", RIGHT)
def test_call_at_the_edge(id: str) -> None:
    """Calls that look wrong and are not: same shape, dtype and values as torch's, whoever computes them."""
    ours, theirs = RIGHT[id](OURS), RIGHT[id](TORCHS)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.device == theirs.device
    assert ours.is_meta or torch.equal(ours, theirs)
    assert_same_layout(ours, theirs)


@pytest.mark.parametrize("id", ["residual-shape", "residual-dtype", "activation"])
@pytest.mark.parametrize("op", ["conv2d_act", "conv2d_bn_act", "batch_norm_act"])
def test_wrong_fused_call(op: str, id: str) -> None:
    x, residual, activation = zeros(2, 4, 5, 5), zeros(2, 4, 5, 5), "relu"
    expected: tuple[type[Exception], tuple[str, ...]] = (RuntimeError, ("residual",))
    if id == "residual-shape":
        residual = zeros(2, 4, 5, 4)
        expected = RuntimeError, ("residual", "[2, 4, 5, 4]", "[2, 4, 5, 5]")
    elif id == "residual-dtype":
        residual = residual.double()
        expected = RuntimeError, ("residual", "float64", "float32")
    else:
        activation = "gelu"
        expected = ValueError, ("activation", "gelu", "relu", "silu")
    calls = {
        "conv2d_act": lambda: CF.conv2d_act(x, zeros(4, 4, 1, 1), residual=residual, activation=activation),
        "conv2d_bn_act": lambda: CF.conv2d_bn_act(
            x, zeros(4, 4, 1, 1), None, *[torch.ones(4)] * 4, residual=residual, activation=activation
        ),
        "batch_norm_act": lambda: CF.batch_norm_act(x, *[torch.ones(4)] * 4, False, 0.1, 1e-5, residual, activation),
    }
    with pytest.raises(expected[0]) as raised:
        calls[op]()
    for word in expected[1]:
        assert word in str(raised.value)


def _composed(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    bn_weight: Any,
    bn_bias: Any,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
    **geometry: Any,
) -> torch.Tensor:
    """conv2d_bn_act by torch."""
    z = F.conv2d(x, weight, bias, **geometry)
    return F.relu(F.batch_norm(z, mean, var, bn_weight, bn_bias, training, momentum, eps))


def _differentiable(x: Any, weight: Any, *rest: Any, **arguments: Any) -> torch.Tensor:
    """conv2d_bn_act where it is two ops."""
    weight = weight.detach().requires_grad_() if isinstance(weight, torch.Tensor) else weight
    return CF.conv2d_bn_act(x, weight, *rest, **arguments).detach()


def conv2d_bn_act(
    x: Any = (2, 3, 5, 5), weight: Any = (4, 3, 3, 3), bias: Any = None, mean: Any = 4, var: Any = 4, bn_weight: Any = 4,
    bn_bias: Any = 4, **arguments: Any,
) -> Any:  # fmt: skip
    x, weight = (zeros(*t) if isinstance(t, tuple) else t for t in (x, weight))
    vectors = [torch.ones(t) if isinstance(t, int) else t for t in (mean, var, bn_weight, bn_bias)]
    return lambda function: function(x, weight, bias, *vectors, **arguments)


WRONG_FOLD = (
    Wrong("x-type", conv2d_bn_act(x=None), TypeError, ("x", "None")),
    Wrong("weight-type", conv2d_bn_act(weight=[1.0]), TypeError, ("weight", "list")),
    Wrong("mean-type", conv2d_bn_act(mean=[1.0]), TypeError, ("running_mean", "list")),
    Wrong("training-type", conv2d_bn_act(training=1), TypeError, ("training", "1")),
    Wrong("eps-type", conv2d_bn_act(eps=None), TypeError, ("eps", "None")),
    Wrong("stride-type", conv2d_bn_act(stride=1.5), TypeError, ("stride", "1.5")),
    Wrong("groups-type", conv2d_bn_act(groups=1.0), TypeError, ("groups", "1.0")),
    Wrong("no-statistics", conv2d_bn_act(mean=None, var=None), RuntimeError, ("running_mean", "None")),
    Wrong("mean-length", conv2d_bn_act(mean=3), RuntimeError, ("running_mean", "[4]", "[3]")),
    Wrong("var-length", conv2d_bn_act(var=5), RuntimeError, ("running_var", "[4]", "[5]")),
    Wrong("weight-length", conv2d_bn_act(bn_weight=5), RuntimeError, ("weight", "[4]", "[5]")),
    Wrong("bias-length", conv2d_bn_act(bn_bias=1), RuntimeError, ("bias", "[4]", "[1]")),
    Wrong("conv-bias-length", conv2d_bn_act(bias=zeros(3)), RuntimeError, ("bias", "[4]", "[3]")),
    Wrong("channels", conv2d_bn_act((2, 4, 5, 5)), RuntimeError, ("channels", "4", "3")),
    Wrong("kernel", conv2d_bn_act((2, 3, 2, 2)), RuntimeError, ("kernel", "3 x 3", "2 x 2")),
    Wrong("padding-word", conv2d_bn_act(padding="full"), RuntimeError, ("padding", "'full'")),
    Wrong("dtypes", conv2d_bn_act(zeros(2, 3, 5, 5, dtype=BFLOAT)), RuntimeError, ("bfloat16", "float32")),
    Wrong("one-value", conv2d_bn_act((1, 3, 3, 3), training=True), ValueError, ("1 value per channel",)),
)  # fmt: skip


@pytest.mark.parametrize("ours", [CF.conv2d_bn_act, _differentiable], ids=["one-pass", "two-ops"])
@pytest.mark.parametrize("wrong", WRONG_FOLD, ids=lambda wrong: wrong.id)
def test_wrong_folded_call(wrong: Wrong, ours: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(wrong.raises):
        wrong.call(_composed)
    with pytest.raises(wrong.raises) as raised:
        wrong.call(ours)
    for word in wrong.words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"


@pytest.mark.parametrize("ours", [CF.conv2d_bn_act, _differentiable], ids=["one-pass", "two-ops"])
def test_folded_call_at_the_edge(ours: Callable[..., torch.Tensor]) -> None:
    for call in (conv2d_bn_act((0, 3, 5, 5)), conv2d_bn_act(eps=0), conv2d_bn_act(padding="valid", stride=(2,))):
        assert torch.equal(call(ours), call(_composed))


def test_wrong_gradient_call() -> None:
    """The registered gradients are called by anyone: what a kernel would read beyond its end is refused."""
    ops, x, one = torch.ops.cnnops, zeros(2, 3, 4, 4), zeros(1)
    with pytest.raises(RuntimeError, match=r"mean of shape \[3\].*\[1\]"):
        ops.batch_norm_act_backward(
            x, x, None, None, None, None, one, one, True, 1e-5, "relu", True, False, False, False, ""
        )
    with pytest.raises(RuntimeError, match=r"offsets of dtype torch.uint8.*int64"):
        ops.max_pool2d_backward(x, x.long(), 8, 8, False, 2, 2, 2, 2, 0, 0, 1, 1, "")
    with pytest.raises(RuntimeError, match=r"offsets of dtype torch.int32.*uint8"):
        ops.adaptive_max_pool2d_backward(x, x.byte(), 8, 8, False, "")
    with pytest.raises(RuntimeError, match=r"dy like offsets.*\[2, 3, 4, 3\].*\[2, 3, 4, 4\]"):
        ops.adaptive_max_pool2d_backward(x, x.int()[..., 1:], 8, 8, False, "")
    with pytest.raises(RuntimeError, match=r"dy.*\[2, 3, 4, 4\].*\[2, 2, 2, 2\]"):
        ops.max_unpool2d_backward(x, zeros(2, 2, 2, 2, dtype=torch.int64), False, "")


def test_nothing_runs_before_the_check() -> None:
    """A refused call in training leaves the running statistics alone."""
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="weight"):
        CF.batch_norm(torch.randn(2, 3, 4, 4), mean, var, torch.ones(4), torch.ones(3), training=True)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"cpu.*'cdna'"):
        cnnops.use_backend("cdna")


def test_misspelt_setting() -> None:
    with pytest.raises(AttributeError, match="strickt"):
        cnnops.settings.strickt = True


def test_setting_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="strict"):
        cnnops.settings.strict = "yes"
    assert cnnops.settings.strict is False
