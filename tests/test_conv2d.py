"""conv2d against torch: values, gradients, layouts, dtypes, on every backend that claims it."""

from __future__ import annotations

import itertools

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import CONV2D, LAYOUTS, VIEWS, Conv2dCase, find, networks, of_suite, pairwise
from helpers import Backend, emulated, on, over, torch_conv2d
from tolerance import assert_same_bits

import cnnops.functional as CF

NAMES = ("x", "weight", "bias")
CORNERS = of_suite(CONV2D, "corner")
NONEMPTY = tuple(case for case in CORNERS if case.N and case.C)

# One of each kind, for what does not depend on every detail of the geometry.
KINDS = tuple(
    find(CONV2D, id) for id in ("3x3-pad-bias", "1x1-s2-uneven", "5x2-uneven-everything", "depthwise-3x3-ragged")
)


def our_conv2d(case: Conv2dCase) -> helpers.Function:
    return lambda x, weight, bias: CF.conv2d(x, weight, bias, **case.arguments())


def check(case: Conv2dCase, inputs: helpers.Tensors, dy: torch.Tensor | None = None, in_tf32: bool = False) -> None:
    dy = helpers.gradient_for(torch_conv2d(case), inputs) if dy is None else dy
    names = helpers.result_names(NAMES, inputs)
    helpers.check_multilinear(our_conv2d(case), torch_conv2d(case), names, inputs, dy, in_tf32=in_tf32)


def check_twice(case: Conv2dCase, inputs: helpers.Tensors) -> None:
    helpers.check_multilinear_twice(our_conv2d(case), torch_conv2d(case), NAMES, inputs)


@over("conv2d_forward", CORNERS)
def test_forward_and_gradients(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@over("conv2d_forward", CORNERS, dtypes=[torch.float32], backends=helpers.WITH_TF32)
def test_in_tf32(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    with helpers.tf32():
        check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device), in_tf32=True)


# 1 + 2^-12 takes 12 bits of fraction. TF32, which has 10, takes it for 1, whether it rounds or cuts off.
JUST_ABOVE_ONE = 1 + 2**-12


@pytest.mark.parametrize("backend", helpers.WITH_TF32, indirect=True)
def test_products_are_tf32s_where_torch_allows_it(backend: Backend) -> None:
    x = torch.full((2, 16, 4, 4), JUST_ABOVE_ONE, device=backend.device).contiguous(memory_format=torch.channels_last)
    weight = torch.full((16, 16, 1, 1), 1 / 16, device=backend.device)
    for allowed in (False, True, False):
        torch.backends.cudnn.allow_tf32 = allowed
        try:
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            y = CF.conv2d(*leaves)
            dx, dweight = torch.autograd.grad(y, leaves, x)
        finally:
            torch.backends.cudnn.allow_tf32 = False
        one = 1 if allowed else JUST_ABOVE_ONE
        assert (y == one).all() and (dx == one).all()
        assert (dweight == 32 * one**2).all()


@pytest.mark.parametrize("backend", helpers.WITH_TF32, indirect=True)
def test_a_bias_that_is_not_aligned(backend: Backend) -> None:
    """Kernels take aligned operands for granted; views of x and weight are in the other tests."""
    x, weight, bias = helpers.conv2d_inputs(KINDS[0], torch.float32, "channels_last", backend.device)
    apart = torch.cat([bias[:1], bias])[1:]
    assert apart.data_ptr() % 16
    assert_same_bits(our_conv2d(KINDS[0])(x, weight, apart), our_conv2d(KINDS[0])(x, weight, bias))


LAYERS = [case.with_batch(1) for case in networks(CONV2D)]


@over("conv2d_forward", LAYERS, ["channels_last"], [torch.float32])
def test_layers_of_networks(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@over("conv2d_forward", LAYERS, ["channels_last"], [torch.bfloat16], backends=helpers.WITH_TF32)
def test_layers_of_networks_on_tensor_cores(
    backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str
) -> None:
    check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@over("conv2d_forward", KINDS, VIEWS, [torch.float32])
def test_views(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@over("conv2d_forward", KINDS, (*LAYOUTS, *VIEWS), [torch.float32])
def test_layouts_of_dy(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    inputs = helpers.conv2d_inputs(case, dtype, "channels_last", backend.device)
    dy = helpers.laid_out(helpers.gradient_for(torch_conv2d(case), inputs), layout)
    check(case, inputs, dy)


@on("conv2d_forward", "conv2d_backward")
def test_dy_of_one_number(backend: Backend) -> None:
    """A sum's gradient is a scalar expanded to every element: all strides are zero."""
    case = KINDS[0]
    inputs = helpers.conv2d_inputs(case, torch.float32, "channels_last", backend.device)
    check(case, inputs, torch.full((1,), 0.75, device=backend.device).expand(case.output_shape))


@on("conv2d_forward")
@pytest.mark.parametrize("weight_layout", [*LAYOUTS, *VIEWS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weight(backend: Backend, layout: str, weight_layout: str) -> None:
    """The output is channels_last if x or the weight is."""
    for case in KINDS[:1] if emulated(backend.name) else KINDS:
        x, weight, bias = helpers.conv2d_inputs(case, torch.float32, layout, backend.device)
        check(case, (x, helpers.laid_out(weight.contiguous(), weight_layout), bias))


@over("conv2d_forward", NONEMPTY)
def test_integers_are_exact(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    """Sums of small integers have no rounding, in whatever order they are made."""
    most = 3 if torch.finfo(dtype).bits > 16 else 1

    def make(shape, dtype, device, random):
        return helpers.integers(shape, dtype, device, random, most)

    random = helpers.generator(case.id)
    x, weight = (
        helpers.laid_out(make(shape, dtype, backend.device, random), layout)
        for shape in (case.x_shape, case.weight_shape)
    )
    inputs = (x, weight, make((case.K,), dtype, backend.device, random) if case.bias else None)
    dy = make(case.output_shape, dtype, backend.device, random)
    helpers.check_exact(our_conv2d(case), torch_conv2d(case), NAMES, inputs, dy)
    if dtype == torch.float32 and backend.name in helpers.WITH_TF32:
        with helpers.tf32():
            helpers.check_exact(our_conv2d(case), torch_conv2d(case), NAMES, inputs, dy)


@over("conv2d_forward", KINDS, LAYOUTS)
def test_non_finite_inputs_land_where_torch_puts_them(
    backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str
) -> None:
    x, weight, bias = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, -1, 2, 1] = torch.inf, torch.nan, -torch.inf
    dy = helpers.gradient_for(torch_conv2d(case), (x, weight, bias))
    helpers.check_non_finite(our_conv2d(case), torch_conv2d(case), (x, weight, bias), dy)


@over("conv2d_forward", KINDS, LAYOUTS, [torch.float32])
def test_non_finite_weights_and_gradients(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    """Whether padding times inf is NaN or nothing, torch's own kernels disagree about; ours may take either side."""
    x, weight, bias = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    weight[0, 0, 0, 0], weight[-1, -1, -1, -1] = torch.inf, torch.nan
    dy = helpers.gradient_for(torch_conv2d(case), (x, weight, bias))
    dy[0, 0, 0, 0], dy[-1, -1, -1, -1] = -torch.inf, torch.nan
    got = helpers.evaluate(our_conv2d(case), (x, weight, bias), dy)
    for what, a, (least, most) in zip(
        helpers.result_names(NAMES, (x, weight, bias)), got, broken_terms(case, (x, weight, bias), dy), strict=True
    ):
        broken = ~a.cpu().isfinite()
        assert not (~broken & least).any(), f"{what} is finite where a term inside the input is not"
        assert not (broken & ~most).any(), f"{what} is not finite where every term is, padding included"


def broken_terms(
    case: Conv2dCase, inputs: helpers.Tensors, dy: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where y, dx, dweight and dbias have a term that is not finite: padding left out, and padding counted.

    A filter tap that is not finite may meet padding anywhere in its channel, and so may a dy anywhere in its filter.
    """
    inputs, dy = helpers.mapped(lambda t: (~t.isfinite()).double(), (inputs, dy))
    x, weight, bias = inputs
    one_x, one_weight, one_dy = (torch.ones_like(t) for t in (x, weight, dy))
    conv2d = torch_conv2d(case)
    by_x = helpers.evaluate(conv2d, (x, one_weight, None), one_dy)
    by_weight = helpers.evaluate(conv2d, (one_x, weight, None), one_dy)
    by_dy = helpers.evaluate(conv2d, (one_x, one_weight, None), dy)
    found = []
    for sure, padded, axes in (
        (by_x[0], by_weight[0], (0, 2, 3)),
        (by_dy[1], by_weight[1], (0, 2, 3)),
        (by_x[2], by_dy[2], (1, 2, 3)),
    ):
        reach = padded.amax(axes, keepdim=True).expand_as(padded)
        found.append((sure + padded > 0, sure + reach > 0))
    if bias is not None:
        found.append((dy.sum((0, 2, 3)) > 0,) * 2)
    return found


@on("conv2d_forward")
def test_unbatched(backend: Backend) -> None:
    for case in KINDS[:1] if emulated(backend.name) else KINDS:
        x, weight, bias = helpers.conv2d_inputs(case.with_batch(1), torch.float32, "nchw", backend.device)
        check(case, (x[0], weight, bias))


@on("conv2d_forward")
@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": [2], "padding": (1,), "dilation": [2]}])
def test_numbers_and_short_lists_stand_for_pairs(backend: Backend, arguments: dict[str, object]) -> None:
    inputs = helpers.conv2d_inputs(KINDS[0], torch.float32, "nchw", backend.device)
    dy = helpers.gradient_for(lambda *t: F.conv2d(*t, **arguments), inputs)
    helpers.check_multilinear(
        lambda *t: CF.conv2d(*t, **arguments),
        lambda *t: F.conv2d(*t, **arguments),
        helpers.result_names(NAMES, inputs),
        inputs,
        dy,
    )


@over("conv2d_backward", KINDS, ["channels_last"], [torch.float32])
def test_each_gradient_alone(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    """What is computed beside a gradient does not change it."""
    inputs = [t for t in helpers.conv2d_inputs(case, dtype, layout, backend.device) if t is not None]
    dy = helpers.gradient_for(lambda *t: torch_conv2d(case)(*t, *[None] * (3 - len(t))), inputs)
    together = helpers.evaluate(lambda *t: our_conv2d(case)(*t, *[None] * (3 - len(t))), inputs, dy)[1:]
    for wanted in itertools.product([False, True], repeat=len(inputs)):
        if any(wanted) and (sum(wanted) == 1 or not emulated(backend.name)):
            leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
            y = our_conv2d(case)(*leaves, *[None] * (3 - len(leaves)))
            alone = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)
            for a, b in zip(alone, itertools.compress(together, wanted), strict=True):
                assert_same_bits(a, b, f"gradient with only {wanted} wanted")


def test_no_input_channels_fall_back() -> None:
    """torch answers with no output channels either, so there is nothing for a kernel to do."""
    case = find(CONV2D, "empty-channels")
    x, weight, bias = helpers.conv2d_inputs(case, torch.float32, "nchw", "cpu")
    assert CF.conv2d(x, weight, bias, **case.arguments()).shape == case.output_shape


SMALL = pairwise([case for case in NONEMPTY if case.flops <= 30_000], lambda case: case.features())


@on("conv2d_forward", "conv2d_backward", dtype=torch.float64)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_gradcheck(backend: Backend, case: Conv2dCase) -> None:
    inputs = [t for t in helpers.conv2d_inputs(case, torch.float64, "channels_last", backend.device) if t is not None]
    leaves = [t.detach().requires_grad_() for t in inputs]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return our_conv2d(case)(*tensors, *[None] * (3 - len(tensors)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@over("conv2d_backward", SMALL[::3], ["channels_last"], [torch.float32])
def test_double_backward(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    check_twice(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))
