"""Whole configurations drawn at random, every pass compared with float64 torch, on the CPU backend: others are slow."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import test_batch_norm
import test_conv2d
import test_pool2d
import torch
from cases import LAYOUTS, VIEWS, Conv2dCase, NormCase, Pool2dCase, window_positions
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cnnops

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # said by mkldnn.flags

# The same examples in every run of `make test`; `make test-slow` looks further, and prints how to repeat a failure.
USUAL = settings(max_examples=150, derandomize=True, deadline=None, database=None)
SEARCH = settings(max_examples=3000, deadline=None, database=None, print_blob=True)

dtypes = st.sampled_from(helpers.DTYPES)
layouts = st.sampled_from((*LAYOUTS, *VIEWS))


def pairs(least: int, most: int) -> Any:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def extents(draw: Any, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """An input extent that at least one window fits into."""
    least = max(1, dilation * (kernel - 1) + 1 - 2 * pad)
    return draw(st.integers(least, least + 3 * stride + 4))


@st.composite
def conv2d_cases(draw: Any) -> Conv2dCase:
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 5, 8)))
    C = groups * draw(st.sampled_from((1, 1, 2, 3, 5, 9, 16, 17) if groups < 8 else (1, 2)))
    K = groups * draw(st.sampled_from((1, 1, 2, 3, 7, 16, 33) if groups < 8 else (1, 2)))
    kernel, stride, dilation = draw(pairs(1, 5)), draw(pairs(1, 4)), draw(pairs(1, 3))
    padding = draw(st.one_of(pairs(0, 5), st.just("valid"), st.just("same")))
    if padding == "same":
        stride = (1, 1)
    pads = padding if isinstance(padding, tuple) else (0, 0)
    H, W = (draw(extents(*sides)) for sides in zip(kernel, stride, pads, dilation, strict=True))
    N = draw(st.sampled_from((0, 1, 1, 2, 3)))
    case = Conv2dCase("drawn", N, C, H, W, K, *kernel, stride, padding, dilation, groups, draw(st.booleans()))
    assume(case.flops < 2_000_000)
    return case


@st.composite
def pool2d_cases(draw: Any, op: str) -> Pool2dCase:
    N, C = draw(st.sampled_from((0, 1, 2, 3))), draw(st.sampled_from((1, 2, 3, 8, 16, 17, 35)))
    if op.startswith("adaptive"):
        H, W = draw(pairs(1, 13))
        output = draw(st.tuples(*[st.one_of(st.none(), st.integers(1, 15))] * 2))
        return Pool2dCase("drawn", op, N, C, H, W, output_size=output)
    kernel, stride = draw(pairs(1, 5)), draw(st.one_of(st.none(), pairs(1, 6)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    dilation = draw(pairs(1, 3)) if op == "max_pool2d" else (1, 1)
    sides = list(zip(kernel, stride or kernel, padding, dilation, strict=True))
    H, W = (draw(extents(*side)) for side in sides)
    ceil_mode = draw(st.booleans())
    for size, (taps, step, pad, spread) in zip((H, W), sides, strict=True):
        # torch corrupts its heap on a window without a tap inside the input; test_pool2d.py has ours.
        for start in range(-pad, window_positions(size, taps, step, pad, spread, ceil_mode) * step - pad, step):
            assume(any(0 <= start + r * spread < size for r in range(taps)))
    rest = {}
    if op == "avg_pool2d":
        rest["count_include_pad"] = draw(st.booleans())
        rest["divisor_override"] = draw(st.sampled_from((None, None, 1, 7, -3)))
    return Pool2dCase("drawn", op, N, C, H, W, kernel, stride, padding, dilation, ceil_mode, **rest)


@st.composite
def norm_cases(draw: Any) -> NormCase:
    training = draw(st.booleans())
    case = NormCase(
        "drawn",
        draw(st.integers(0, 5)),
        draw(st.sampled_from((1, 2, 3, 8, 16, 17, 35))),
        draw(st.one_of(st.just(()), st.tuples(st.integers(1, 40)), pairs(1, 12))),
        training,
        draw(st.booleans()),
        True if not training else draw(st.booleans()),
        draw(st.sampled_from((0.0, 0.1, 0.7, 1.0))),
        draw(st.sampled_from((1e-5, 1e-3, 0.5))),
        draw(st.sampled_from((0.0, 0.0, -3.0, 50.0))),
    )
    assume(case.count != 1 or not training)
    return case


def reaches_input(case: Conv2dCase) -> bool:
    """Whether any tap of any window lies inside the input."""
    pads = case.padding if isinstance(case.padding, tuple) else (0, 0)
    P, Q = case.output_shape[2:]
    sides = zip((case.H, case.W), (case.R, case.S), (P, Q), case.stride, pads, case.dilation, strict=True)
    return all(
        any(0 <= p * step - pad + r * spread < size for p in range(positions) for r in range(taps))
        for size, taps, positions, step, pad, spread in sides
    )


def conv2d(case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    # torch 2.13's oneDNN crashes on half and bfloat16 where nothing but padding is seen; torch has kernels beside it.
    with cnnops.use_backend("cpu"), torch.backends.mkldnn.flags(enabled=reaches_input(case)):
        test_conv2d.check(case, helpers.conv2d_inputs(case, dtype, _laid(case, layout), "cpu"))


def pool2d(case: Pool2dCase, dtype: torch.dtype, layout: str) -> None:
    with cnnops.use_backend("cpu"):
        test_pool2d.check(case, test_pool2d.input_of(case, dtype, _laid(case, layout), "cpu"))


def norm(case: NormCase, dtype: torch.dtype, layout: str) -> None:
    with cnnops.use_backend("cpu"):
        test_batch_norm.check_batch_norm(case, *test_batch_norm.inputs_of(case, dtype, _laid(case, layout), "cpu"))


def _laid(case: Any, layout: str) -> str:
    """An empty batch has no first image to expand."""
    return "nchw" if case.N == 0 else layout


@USUAL
@given(conv2d_cases(), dtypes, layouts)
def test_conv2d_of_any_shape(case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    conv2d(case, dtype, layout)


@pytest.mark.parametrize("op", test_pool2d.OPS)
@USUAL
@given(st.data())
def test_pool2d_of_any_shape(op: str, data: Any) -> None:
    pool2d(data.draw(pool2d_cases(op)), data.draw(dtypes), data.draw(layouts))


@USUAL
@given(norm_cases(), dtypes, layouts)
def test_batch_norm_of_any_shape(case: NormCase, dtype: torch.dtype, layout: str) -> None:
    norm(case, dtype, layout)


@pytest.mark.slow
@SEARCH
@given(conv2d_cases(), dtypes, layouts)
def test_conv2d_further(case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    conv2d(case, dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize("op", test_pool2d.OPS)
@SEARCH
@given(st.data())
def test_pool2d_further(op: str, data: Any) -> None:
    pool2d(data.draw(pool2d_cases(op)), data.draw(dtypes), data.draw(layouts))


@pytest.mark.slow
@SEARCH
@given(norm_cases(), dtypes, layouts)
def test_batch_norm_further(case: NormCase, dtype: torch.dtype, layout: str) -> None:
    norm(case, dtype, layout)
