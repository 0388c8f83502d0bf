"""conv_transpose2d against torch: values, gradients, layouts, dtypes, on every backend that claims it."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import CONV_TRANSPOSE2D, LAYOUTS, VIEWS, ConvTranspose2dCase, find, of_suite, pairwise
from helpers import Backend, on, over
from test_determinism import same_for_any_thread_count
from tolerance import assert_same_bits
from torch import nn

import cnnops
import cnnops.functional as CF
from cnnops import nn as cnn

NAMES = ("x", "weight", "bias")
CORNERS = of_suite(CONV_TRANSPOSE2D, "corner")
NONEMPTY = tuple(case for case in CORNERS if case.N)
KINDS = tuple(
    find(CONV_TRANSPOSE2D, id)
    for id in ("4x4-s2-pad", "1x1-s2-unreached", "5x2-uneven-everything", "depthwise-4x4-s2-more")
)


def ours(case: ConvTranspose2dCase) -> helpers.Function:
    return lambda x, weight, bias: CF.conv_transpose2d(x, weight, bias, **case.arguments())


def torchs(case: ConvTranspose2dCase) -> helpers.Function:
    return lambda x, weight, bias: F.conv_transpose2d(x, weight, bias, **case.arguments())


def check(
    case: ConvTranspose2dCase, inputs: helpers.Tensors, dy: torch.Tensor | None = None, in_tf32: bool = False
) -> None:
    dy = helpers.gradient_for(torchs(case), inputs) if dy is None else dy
    names = helpers.result_names(NAMES, inputs)
    helpers.check_multilinear(ours(case), torchs(case), names, inputs, dy, in_tf32=in_tf32)


def check_twice(case: ConvTranspose2dCase, inputs: helpers.Tensors) -> None:
    helpers.check_multilinear_twice(ours(case), torchs(case), NAMES, inputs)


def test_the_cases_have_the_shapes_of_torch() -> None:
    for case in CORNERS:
        x, weight, bias = helpers.conv2d_inputs(case, torch.float32, "nchw", "cpu")
        assert torchs(case)(x, weight, bias).shape == case.output_shape, case.id


@over("conv_transpose2d_forward", CORNERS)
def test_forward_and_gradients(backend: Backend, case: ConvTranspose2dCase, dtype: torch.dtype, layout: str) -> None:
    check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@over("conv_transpose2d_forward", CORNERS, dtypes=[torch.float32], backends=helpers.WITH_TF32)
def test_in_tf32(backend: Backend, case: ConvTranspose2dCase, dtype: torch.dtype, layout: str) -> None:
    with helpers.tf32():
        check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device), in_tf32=True)


@over("conv_transpose2d_forward", KINDS, VIEWS, [torch.float32])
def test_views(backend: Backend, case: ConvTranspose2dCase, dtype: torch.dtype, layout: str) -> None:
    check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@over("conv_transpose2d_forward", KINDS, (*LAYOUTS, *VIEWS), [torch.float32])
def test_layouts_of_dy(backend: Backend, case: ConvTranspose2dCase, dtype: torch.dtype, layout: str) -> None:
    inputs = helpers.conv2d_inputs(case, dtype, "channels_last", backend.device)
    check(case, inputs, helpers.laid_out(helpers.gradient_for(torchs(case), inputs), layout))


@on("conv_transpose2d_forward", "conv_transpose2d_backward")
def test_dy_of_one_number(backend: Backend) -> None:
    case = KINDS[0]
    inputs = helpers.conv2d_inputs(case, torch.float32, "channels_last", backend.device)
    check(case, inputs, torch.full((1,), 0.75, device=backend.device).expand(case.output_shape))


@on("conv_transpose2d_forward")
@pytest.mark.parametrize("weight_layout", [*LAYOUTS, *VIEWS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weight(backend: Backend, layout: str, weight_layout: str) -> None:
    """The output is channels_last if x or the weight is."""
    for case in KINDS[:1] if backend.name == "triton" else KINDS:
        x, weight, bias = helpers.conv2d_inputs(case, torch.float32, layout, backend.device)
        check(case, (x, helpers.laid_out(weight.contiguous(), weight_layout), bias))


@over("conv_transpose2d_forward", NONEMPTY)
def test_integers_are_exact(backend: Backend, case: ConvTranspose2dCase, dtype: torch.dtype, layout: str) -> None:
    most = 3 if torch.finfo(dtype).bits > 16 else 1

    def make(shape: Any, dtype: torch.dtype, device: str, random: torch.Generator) -> torch.Tensor:
        return helpers.integers(shape, dtype, device, random, most)

    random = helpers.generator(case.id)
    x, weight = (
        helpers.laid_out(make(shape, dtype, backend.device, random), layout)
        for shape in (case.x_shape, case.weight_shape)
    )
    inputs = (x, weight, make((case.K,), dtype, backend.device, random) if case.bias else None)
    dy = make(case.output_shape, dtype, backend.device, random)
    helpers.check_exact(ours(case), torchs(case), NAMES, inputs, dy)


@over("conv_transpose2d_forward", KINDS, LAYOUTS)
def test_non_finite_inputs_land_where_torch_puts_them(
    backend: Backend, case: ConvTranspose2dCase, dtype: torch.dtype, layout: str
) -> None:
    x, weight, bias = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, -1, 2, 1] = torch.inf, torch.nan, -torch.inf
    dy = helpers.gradient_for(torchs(case), (x, weight, bias))
    dy[0, 0, 0, 0], dy[-1, -1, -1, -1] = torch.nan, torch.inf
    helpers.check_non_finite(ours(case), torchs(case), (x, weight, bias), dy)


@on("conv_transpose2d_forward")
def test_what_no_tap_reaches_is_the_bias(backend: Backend) -> None:
    """Even where the weight and the input are NaN."""
    x, weight = torch.full((1, 2, 3, 3), torch.nan), torch.full((2, 5, 1, 1), torch.nan)
    bias = torch.arange(5.0)
    x, weight, bias = (t.to(backend.device) for t in (x, weight, bias))
    y = CF.conv_transpose2d(x, weight, bias, stride=3, output_padding=2).cpu()
    reached = torch.zeros(9, 9, dtype=torch.bool)
    reached[::3, ::3] = True
    assert y[:, :, reached].isnan().all()
    assert torch.equal(y[0][:, ~reached], bias.cpu()[:, None].expand(5, 72))


@on("conv_transpose2d_forward")
def test_unbatched(backend: Backend) -> None:
    for case in KINDS:
        x, weight, bias = helpers.conv2d_inputs(case.with_batch(1), torch.float32, "nchw", backend.device)
        check(case, (x[0], weight, bias))


@on("conv_transpose2d_forward")
@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": [3], "output_padding": (2,), "dilation": [2]}])
def test_numbers_and_short_lists_stand_for_pairs(backend: Backend, arguments: dict[str, Any]) -> None:
    inputs = helpers.conv2d_inputs(KINDS[0], torch.float32, "nchw", backend.device)
    dy = helpers.gradient_for(lambda *t: F.conv_transpose2d(*t, **arguments), inputs)
    helpers.check_multilinear(
        lambda *t: CF.conv_transpose2d(*t, **arguments),
        lambda *t: F.conv_transpose2d(*t, **arguments),
        helpers.result_names(NAMES, inputs),
        inputs,
        dy,
    )


@on("conv_transpose2d_forward")
def test_positions_of_arguments_are_torchs(backend: Backend) -> None:
    """groups comes before dilation, other than in conv2d."""
    inputs = helpers.conv2d_inputs(find(CONV_TRANSPOSE2D, "grouped-2"), torch.float32, "nchw", backend.device)
    positional = ((2, 3), (1, 0), (1, 2), 2, (3, 1))
    ours, torchs = (lambda *t, library=library: library.conv_transpose2d(*t, *positional) for library in (CF, F))
    names = helpers.result_names(NAMES, inputs)
    helpers.check_multilinear(ours, torchs, names, inputs, helpers.gradient_for(torchs, inputs))


@over("conv_transpose2d_backward", KINDS, ["channels_last"], [torch.float32])
def test_each_gradient_alone(backend: Backend, case: ConvTranspose2dCase, dtype: torch.dtype, layout: str) -> None:
    """What is computed beside a gradient does not change it."""
    inputs = [t for t in helpers.conv2d_inputs(case, dtype, layout, backend.device) if t is not None]
    dy = helpers.gradient_for(torchs(case), inputs)
    together = helpers.evaluate(ours(case), inputs, dy)[1:]
    for wanted in itertools.product([False, True], repeat=3):
        if any(wanted):
            leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
            alone = torch.autograd.grad(ours(case)(*leaves), [t for t in leaves if t.requires_grad], dy)
            for a, b in zip(alone, itertools.compress(together, wanted), strict=True):
                assert_same_bits(a, b, f"gradient with only {wanted} wanted")


@on("conv_transpose2d_forward", "conv_transpose2d_backward")
def test_an_output_without_pixels(backend: Backend) -> None:
    """All of it is taken by the padding: the gradients are zeros."""
    shapes = ((2, 4, 2, 2), (4, 3, 3, 3), (3,))
    leaves = [torch.randn(shape, device=backend.device, requires_grad=True) for shape in shapes]
    y = CF.conv_transpose2d(*leaves, padding=2)
    assert y.shape == (2, 3, 0, 0)
    for gradient in torch.autograd.grad(y.sum(), leaves):
        assert not gradient.any()


SMALL = pairwise([case for case in NONEMPTY if case.flops <= 30_000], lambda case: case.features())


@on("conv_transpose2d_forward", "conv_transpose2d_backward", dtype=torch.float64)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_gradcheck(backend: Backend, case: ConvTranspose2dCase) -> None:
    inputs = [t for t in helpers.conv2d_inputs(case, torch.float64, "channels_last", backend.device) if t is not None]
    leaves = [t.detach().requires_grad_() for t in inputs]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return ours(case)(*tensors, *[None] * (3 - len(tensors)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@over("conv_transpose2d_backward", SMALL[::2], ["channels_last"], [torch.float32])
def test_double_backward(backend: Backend, case: ConvTranspose2dCase, dtype: torch.dtype, layout: str) -> None:
    check_twice(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


def test_it_is_the_gradient_of_a_convolution() -> None:
    """The same kernel, so the same bits."""
    x, weight = torch.randn(2, 8, 9, 11), torch.randn(6, 8, 3, 3)
    with cnnops.use_backend("cpu"):
        leaf = x.clone().requires_grad_()
        y = CF.conv2d(leaf, weight, stride=2, padding=1)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert_same_bits(CF.conv_transpose2d(dy, weight, stride=2, padding=1), dx)


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "arguments"),
    [
        ((2, 64, 16, 16), (64, 64, 4, 4), {"stride": 2, "padding": 1}),
        ((2, 48, 17, 13), (48, 24, 3, 3), {"padding": 1, "groups": 2}),
        ((2, 144, 14, 14), (144, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 144}),
        ((2, 96, 15, 15), (96, 70, 1, 1), {"stride": 3}),
    ],
)
def test_any_number_of_threads_gives_the_same_bits(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    random = helpers.generator(str(x_shape))
    filters = weight_shape[1] * arguments.get("groups", 1)
    inputs = [helpers.randn(shape, dtype, "cpu", random, 0.1) for shape in (x_shape, weight_shape, (filters,))]
    before = torch.get_num_threads()
    try:
        with cnnops.use_backend("cpu"):
            same_for_any_thread_count(lambda *t: CF.conv_transpose2d(*t, **arguments), inputs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function", [CF.conv_transpose2d, cnn.ConvTranspose2d(6, 8, 3).requires_grad_(True)])
def test_explained(function: Any) -> None:
    x, weight = torch.randn(2, 6, 5, 5), torch.randn(6, 8, 3, 3)
    arguments = (x,) if isinstance(function, nn.Module) else (x, weight)
    explained = cnnops.explain(function, *arguments)
    assert explained.backends == {"conv_transpose2d_forward": "cpu", "conv_transpose2d_backward": "cpu"}
    assert all(name not in explained.backends.values() for name in ("simt", "triton", "cuda"))


def test_flops_are_counted() -> None:
    """A pass costs what torch says of the forward; of groups' gradients it counts more than there is."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(function: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return int(counter.get_total_flops())

    x, weight = torch.randn(2, 6, 5, 7, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    forward = count(lambda: F.conv_transpose2d(x, weight, stride=2, groups=3))
    assert count(lambda: CF.conv_transpose2d(x, weight, stride=2, groups=3)) == forward == 2 * 70 * 6 * 4 * 9
    assert count(lambda: CF.conv_transpose2d(x, weight, stride=2, groups=3).sum().backward()) == 3 * forward
