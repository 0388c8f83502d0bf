"""Whole configurations of every op, drawn at random, every pass compared with float64 torch on the CPU backend.

A failure prints its draw, shrunk, and a line @reproduce_failure(...): put that above the test to run the draw again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import helpers
import pytest
import test_batch_norm
import test_bn_act_max_pool2d
import test_conv2d
import test_conv2d_act
import test_conv2d_bn_act
import test_conv_transpose2d
import test_max_unpool2d
import test_pool2d
import test_squeeze_excite
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, GATES, KINKS
from cases import (
    LAYOUTS,
    VIEWS,
    Conv2dCase,
    ConvTranspose2dCase,
    NormCase,
    Pool2dCase,
    SqueezeExciteCase,
    Unpool2dCase,
    window_positions,
    with_padding_mode,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cnnops
import cnnops.functional as CF
from cnnops.geometry import PADDING_MODES

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # said by mkldnn.flags

# The same examples in every run of `make test`; `make test-slow` looks further, and elsewhere each time.
SHARED = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
USUAL = settings(SHARED, max_examples=200, derandomize=True)
SEARCH = settings(SHARED, max_examples=1600, print_blob=True)

NORMAL = ("normal",)
ANY_VALUES = ("normal", "normal", "integers", "special")


@dataclass(frozen=True)
class Draw:
    case: Any
    dtype: torch.dtype
    layout: str
    values: str
    """normal, integers (whose sums are exact, and which tie), or special: NaN, infinities and zeros among the normal."""
    twice: bool
    """Whether to differentiate twice."""
    options: dict[str, Any]

    def filled(self, x: torch.Tensor) -> torch.Tensor:
        """x with the values that this draw wants, in its layout."""
        random = helpers.generator(f"values of {self.case.id}")
        if self.values == "integers":
            x = helpers.integers(x.shape, x.dtype, "cpu", random)
        elif self.values == "special":
            special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=x.dtype)
            chosen = special[torch.randint(len(special), x.shape, generator=random)]
            x = torch.where(torch.rand(x.shape, generator=random) < 0.1, chosen, x)
        return helpers.laid_out(x, self.layout)


def draws(cases: Any, values: tuple[str, ...] = NORMAL, **options: Any) -> Any:
    layouts = st.sampled_from((*LAYOUTS, *VIEWS))
    made = st.builds(
        Draw,
        cases,
        st.sampled_from(helpers.DTYPES),
        layouts,
        st.sampled_from(values),
        st.booleans(),
        st.fixed_dictionaries(options),
    )
    # An empty batch has no first image to expand.
    return made.filter(lambda draw: draw.layout != "expanded" or draw.case.N)


ids = st.integers(0, 99).map("drawn {}".format)  # which numbers the tensors hold
channels = st.sampled_from((1, 2, 3, 8, 16, 17, 35))
images = st.sampled_from((1, 0, 1, 2, 3))
activations = st.sampled_from(tuple(ACTIVATIONS))


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
    case = Conv2dCase(
        draw(ids), draw(images), C, H, W, K, *kernel, stride, padding, dilation, groups, draw(st.booleans())
    )
    mode = draw(st.sampled_from(PADDING_MODES))
    if mode != "zeros":
        case = with_padding_mode(case, mode) or case
    assume(case.flops < 1_000_000)
    return case


@st.composite
def conv_transpose2d_cases(draw: Any) -> ConvTranspose2dCase:
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 8)))
    C, K = (groups * draw(st.sampled_from((1, 1, 2, 3, 7, 16, 17) if groups < 8 else (1, 2))) for _ in range(2))
    stride, dilation = draw(pairs(1, 4)), draw(pairs(1, 3))
    more = tuple(draw(st.integers(0, max(sides) - 1)) for sides in zip(stride, dilation, strict=True))
    case = ConvTranspose2dCase(
        draw(ids),
        draw(images),
        C,
        *draw(pairs(1, 7)),
        K,
        *draw(pairs(1, 5)),
        stride,
        draw(pairs(0, 5)),
        (more[0], more[1]),
        dilation,
        groups,
        draw(st.booleans()),
    )
    assume(min(case.output_shape[2:]) > 0 and case.flops < 1_000_000)
    return case


@st.composite
def pool2d_cases(draw: Any, op: str) -> Pool2dCase:
    id, N, C = draw(ids), draw(images), draw(channels)
    if op.startswith("adaptive"):
        H, W = draw(pairs(1, 13))
        output = draw(st.tuples(*[st.one_of(st.none(), st.integers(1, 15))] * 2))
        return Pool2dCase(id, op, N, C, H, W, output_size=output)
    kernel, stride = draw(pairs(1, 5)), draw(st.one_of(st.none(), pairs(1, 6)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    dilation = draw(pairs(1, 3)) if op == "max_pool2d" else (1, 1)
    H, W = (draw(extents(*side)) for side in zip(kernel, stride or kernel, padding, dilation, strict=True))
    ceil_mode = draw(st.booleans())
    rest = {}
    if op == "avg_pool2d":
        rest["count_include_pad"] = draw(st.booleans())
        rest["divisor_override"] = draw(st.sampled_from((None, None, 1, 7, -3)))
    return Pool2dCase(id, op, N, C, H, W, kernel, stride, padding, dilation, ceil_mode, **rest)


def has_taps(case: Pool2dCase) -> bool:
    """Whether every window has a tap inside the input."""
    return all(
        any(0 <= position * step - pad + r * spread < size for r in range(taps))
        for size, taps, step, pad, spread in zip(
            (case.H, case.W), case.kernel, case.stride or case.kernel, case.padding, case.dilation, strict=True
        )
        for position in range(window_positions(size, taps, step, pad, spread, case.ceil_mode))
    )


@st.composite
def unpool2d_cases(draw: Any) -> Unpool2dCase:
    kernel, stride = draw(pairs(1, 5)), draw(st.one_of(st.none(), pairs(1, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    case = Unpool2dCase(draw(ids), draw(images), draw(channels), *draw(pairs(1, 7)), kernel, stride, padding)
    *_, P, Q = case.output_shape
    if draw(st.booleans()):
        steps = stride or kernel
        P, Q = (size + draw(st.integers(1 - step, step - 1)) for size, step in zip((P, Q), steps, strict=True))
        case = replace(case, output_size=(P, Q))
    assume(P > 0 and Q > 0)
    return case


@st.composite
def norm_cases(draw: Any) -> NormCase:
    training = draw(st.booleans())
    case = NormCase(
        draw(ids),
        draw(st.integers(0, 5)),
        draw(channels),
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


squeeze_excite_cases = st.builds(
    lambda id, N, C, sides, M: SqueezeExciteCase(id, N, C, *sides, M), ids, images, channels, pairs(1, 12), channels
)


def reaches_inside(case: Conv2dCase | ConvTranspose2dCase) -> bool:
    """Whether any tap of any window lies inside the input; of a transposed convolution, inside the output."""
    if isinstance(case, ConvTranspose2dCase):
        extents, positions, pads = case.output_shape[2:], (case.H, case.W), case.padding
    elif case.padding_mode == "zeros":
        extents, positions = (case.H, case.W), case.output_shape[2:]
        pads = case.padding if isinstance(case.padding, tuple) else (0, 0)
    else:
        return True
    sides = zip(extents, (case.R, case.S), positions, case.stride, pads, case.dilation, strict=True)
    return all(
        any(0 <= p * step - pad + r * spread < size for p in range(count) for r in range(taps))
        for size, taps, count, step, pad, spread in sides
    )


def torchs_kernels(draw: Draw) -> Any:
    """The context in which torch convolves: its oneDNN, release 2.13, crashes on half and bfloat16 where nothing but
    padding is seen, but it has kernels beside it."""
    crashes = torch.finfo(draw.dtype).bits == 16 and not reaches_inside(draw.case)
    # Beside oneDNN torch takes a single pixel of a channels_last image for NCHW.
    assume(not crashes or draw.layout != "channels_last_sliced")
    return torch.backends.mkldnn.flags(enabled=not crashes)


def convolution(module: Any, draw: Draw, ours: helpers.Function, theirs: helpers.Function) -> None:
    make = helpers.integers if draw.values == "integers" else helpers.randn
    x, weight, bias = helpers.conv2d_inputs(draw.case, draw.dtype, draw.layout, "cpu", make)
    if draw.values == "integers":
        dy = helpers.integers(draw.case.output_shape, draw.dtype, "cpu", helpers.generator("dy"))
        helpers.check_exact(ours, theirs, module.NAMES, (x, weight, bias), dy)
    elif draw.values == "special":
        x = draw.filled(x)
        helpers.check_non_finite(ours, theirs, (x, weight, bias), helpers.gradient_for(theirs, (x, weight, bias)))
    else:
        module.check(draw.case, (x, weight, bias))
        if draw.twice:
            module.check_twice(draw.case, (x, weight, bias))


def conv2d(draw: Draw) -> None:
    with torchs_kernels(draw):
        convolution(test_conv2d, draw, test_conv2d.our_conv2d(draw.case), helpers.torch_conv2d(draw.case))


def conv_transpose2d(draw: Draw) -> None:
    module = test_conv_transpose2d
    with torchs_kernels(draw):
        convolution(module, draw, module.ours(draw.case), module.torchs(draw.case))


def conv2d_act(draw: Draw) -> None:
    activation = draw.options["activation"]
    with torchs_kernels(draw):
        inputs = test_conv2d_act.inputs_of(draw.case, draw.dtype, draw.layout, "cpu", draw.options["residual"])
        test_conv2d_act.check(draw.case, inputs, activation)
        if draw.twice and draw.dtype == torch.float64:
            test_conv2d_act.check_twice(draw.case, inputs, activation)


def conv2d_bn_act(draw: Draw) -> None:
    """Its gradients are those of two other ops, bit for bit."""
    options = dict(draw.options)
    activation, params = options.pop("activation"), draw.dtype if options.pop("short") else None
    with torchs_kernels(draw):
        inputs, statistics = test_conv2d_bn_act.inputs_of(
            draw.case, draw.dtype, draw.layout, "cpu", params=params, **options
        )
        test_conv2d_bn_act.check(draw.case, inputs, statistics, activation)
        test_conv2d_bn_act.check_gradients(draw.case, inputs, statistics, activation)


def pool2d(draw: Draw) -> None:
    x = draw.filled(test_pool2d.input_of(draw.case, draw.dtype, "nchw", "cpu"))
    if draw.case.op == "max_pool2d" and not has_taps(draw.case):
        test_pool2d.check_max_by_definition(draw.case, x)
        return
    test_pool2d.check(draw.case, x)
    if draw.twice:
        test_pool2d.check_twice(draw.case, x)


def max_unpool2d(draw: Draw) -> None:
    case, kind = draw.case, draw.options["indices"]
    x = draw.filled(test_max_unpool2d.input_of(case, draw.dtype, "nchw", "cpu"))
    *_, P, Q = case.output_shape
    random = helpers.generator(f"indices of {case.id}")
    indices = torch.randint(P * Q, case.x_shape, generator=random)
    fits = all(size + 2 * pad >= k for size, pad, k in zip((P, Q), case.padding, case.kernel, strict=True))
    if kind == "pool" and fits:
        taken = torch.rand(case.N, case.C, P, Q, generator=random)
        pooled = F.max_pool2d(taken, case.kernel, case.stride, case.padding, return_indices=True)[1]
        indices[:, :, : pooled.shape[2], : pooled.shape[3]] = pooled[:, :, : case.H, : case.W]
    elif kind == "permutation":
        order = torch.rand(case.N, case.C, max(P * Q, case.H * case.W), generator=random).argsort(2)
        indices = order[..., : case.H * case.W].remainder(P * Q).view(case.x_shape)
    indices = helpers.laid_out(indices, draw.options["layout_of_indices"])
    test_max_unpool2d.check(case, x, indices)
    if draw.twice:
        test_max_unpool2d.check_twice(case, x, indices)


def batch_norm(draw: Draw) -> None:
    """batch_norm_act where there is an activation."""
    options = dict(draw.options)
    activation, params = options.pop("activation", None), draw.dtype if options.pop("short") else None
    inputs, state = test_batch_norm.inputs_of(draw.case, draw.dtype, draw.layout, "cpu", params=params, **options)
    if activation is None:
        test_batch_norm.check_batch_norm(draw.case, inputs, state)
    else:
        test_batch_norm.check_batch_norm_act(draw.case, inputs, state, activation)
    if draw.twice and draw.case.count and steady(draw.dtype, activation or "none"):
        test_batch_norm.check_twice(draw.case, inputs, state, activation or "none")


def steady(dtype: torch.dtype, activation: str) -> bool:
    """Whether no rounding comes near a kink, where second derivatives jump."""
    return dtype == torch.float64 or (dtype == torch.float32 and activation not in KINKS)


def bn_act_max_pool2d(draw: Draw) -> None:
    case, activation, training = draw.case, draw.options["activation"], draw.options["training"]
    inputs, state = test_bn_act_max_pool2d.inputs_of(case, draw.dtype, draw.layout, "cpu")
    test_bn_act_max_pool2d.check_separate(case, inputs, state, training, activation)
    if not has_taps(case):
        return
    if activation in ("none", "relu"):  # the others turn values apart into ties
        test_bn_act_max_pool2d.check(case, inputs, state, training, activation)
    if draw.twice and draw.dtype == torch.float64 and case.N:
        test_bn_act_max_pool2d.check_twice(case, inputs, state, training, activation)


def squeeze_excite(draw: Draw) -> None:
    x, weight1, bias1, weight2, bias2 = test_squeeze_excite.inputs_of(draw.case, draw.dtype, draw.layout, "cpu")
    inputs = [x, weight1, bias1 if draw.options["bias1"] else None, weight2, bias2 if draw.options["bias2"] else None]
    kinds = draw.options["activation"], draw.options["gate"]
    test_squeeze_excite.check(inputs, *kinds)
    if draw.twice and steady(draw.dtype, kinds[0]):
        test_squeeze_excite.check_twice(inputs, *kinds)


pooled_after_norm = pool2d_cases("max_pool2d").filter(lambda case: case.N * case.H * case.W != 1)

OPS: dict[str, tuple[Any, Callable[[Draw], None]]] = {
    "conv2d": (draws(conv2d_cases(), ANY_VALUES), conv2d),
    "conv2d_act": (draws(conv2d_cases(), residual=st.booleans(), activation=activations), conv2d_act),
    "conv2d_bn_act": (
        draws(
            conv2d_cases(),
            residual=st.booleans(),
            affine=st.booleans(),
            short=st.booleans(),
            activation=activations,
        ),
        conv2d_bn_act,
    ),
    "conv_transpose2d": (draws(conv_transpose2d_cases(), ANY_VALUES), conv_transpose2d),
    **{op: (draws(pool2d_cases(op), ANY_VALUES), pool2d) for op in test_pool2d.OPS},
    "max_unpool2d": (
        draws(
            unpool2d_cases(),
            ANY_VALUES,
            indices=st.sampled_from(("pool", "permutation", "duplicates")),
            layout_of_indices=st.sampled_from((*LAYOUTS, "offset", "sliced", "transposed", "channels_last_sliced")),
        ),
        max_unpool2d,
    ),
    "batch_norm": (draws(norm_cases(), short=st.booleans()), batch_norm),
    "batch_norm_act": (
        draws(norm_cases(), short=st.booleans(), residual=st.booleans(), activation=activations),
        batch_norm,
    ),
    "bn_act_max_pool2d": (draws(pooled_after_norm, training=st.booleans(), activation=activations), bn_act_max_pool2d),
    "squeeze_excite": (
        draws(
            squeeze_excite_cases,
            bias1=st.booleans(),
            bias2=st.booleans(),
            activation=activations,
            gate=st.sampled_from(tuple(GATES)),
        ),
        squeeze_excite,
    ),
}
"""What is drawn for each op, and the check of it."""


def run(op: str, data: Any) -> None:
    strategy, check = OPS[op]
    with cnnops.use_backend("cpu"):
        check(data.draw(strategy, label=op))


def test_every_op_is_searched_widely() -> None:
    assert set(OPS) == set(CF.__all__)
    assert len(OPS) * SEARCH.max_examples >= 20_000


@pytest.mark.parametrize("op", OPS)
@USUAL
@given(st.data())
def test_any_configuration(op: str, data: Any) -> None:
    run(op, data)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@SEARCH
@given(st.data())
def test_further(op: str, data: Any) -> None:
    run(op, data)
