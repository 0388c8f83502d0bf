"""squeeze_excite against the composition of torch's own ops, on every backend that claims it."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, GATES
from cases import LAYOUTS, SQUEEZE_EXCITE, VIEWS, SqueezeExciteCase, find, networks, of_suite
from helpers import Backend, on, on_dtypes, over
from tolerance import assert_close, assert_exact, assert_same_bits, assert_same_layout
from torch.utils.flop_counter import FlopCounterMode

import cnnops
import cnnops.functional as CF
from cnnops.geometry import is_channels_last

NAMES = ("x", "weight1", "bias1", "weight2", "bias2")
CORNERS = of_suite(SQUEEZE_EXCITE, "corner")
KINDS = tuple(find(SQUEEZE_EXCITE, id) for id in ("ragged", "many-images"))


def inputs_of(case: SqueezeExciteCase, dtype: torch.dtype, layout: str, device: str) -> helpers.Tensors:
    random, C, M = helpers.generator(case.id), case.C, case.M
    shapes = ((M, C, 1, 1), (M,), (C, M, 1, 1), (C,))
    scales = (2 * C**-0.5, 1.0, 2 * M**-0.5, 1.0)
    x = helpers.laid_out(helpers.randn(case.x_shape, dtype, device, random), layout)
    return [
        x,
        *(helpers.randn(shape, dtype, device, random, scale) for shape, scale in zip(shapes, scales, strict=True)),
    ]


def fused(activation: str = "relu", gate: str = "sigmoid") -> helpers.Function:
    return lambda x, *layers: CF.squeeze_excite(x, *layers, activation, gate)


def composed(activation: str = "relu", gate: str = "sigmoid") -> helpers.Function:
    def function(x: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any) -> torch.Tensor:
        hidden = ACTIVATIONS[activation](F.conv2d(F.adaptive_avg_pool2d(x, 1), weight1, bias1))
        return x * GATES[gate](F.conv2d(hidden, weight2, bias2))

    return function


def magnitudes(inputs: helpers.Tensors, dy: torch.Tensor) -> list[torch.Tensor]:
    """The sums of magnitudes behind y and each gradient: the chain rule with every minus made a plus.

    Activations have first derivatives of at most 1.5 (hardswish) and second ones of at most 0.5, gates less than 1; the
    rounding of what they are taken at reaches the gradients through the second.
    """
    x, weight1, bias1, weight2, bias2 = helpers.mapped(torch.abs, inputs)
    dy = dy.detach().cpu().double().abs()
    zero = torch.zeros(())
    matrix1, matrix2 = weight1.flatten(1), weight2.flatten(1)
    pooled = x.mean((2, 3))
    hidden = pooled @ matrix1.T + (zero if bias1 is None else bias1)
    activated = 1.5 * hidden
    scale = 1 + activated @ matrix2.T + (zero if bias2 is None else bias2)
    dgated = (dy * x).sum((2, 3)) * scale
    dhidden = dgated @ matrix2 * 1.5 * (1 + hidden)
    spread = (..., None, None)
    dx = dy * scale[spread] + (dhidden @ matrix1)[spread] / (x.shape[2] * x.shape[3])
    found = [x * scale[spread], dx, (dhidden.T @ pooled).view(weight1.shape)]
    found += [] if bias1 is None else [dhidden.sum(0)]
    found += [(dgated.T @ activated).view(weight2.shape)]
    return found + ([] if bias2 is None else [dgated.sum(0)])


def check(
    inputs: helpers.Tensors, activation: str = "relu", gate: str = "sigmoid", dy: torch.Tensor | None = None
) -> None:
    theirs = composed(activation, gate)
    dy = helpers.gradient_for(theirs, inputs) if dy is None else dy
    got = helpers.evaluate(fused(activation, gate), inputs, dy)
    same_dtype = helpers.evaluate(theirs, inputs, dy)
    reference = helpers.evaluate(theirs, *helpers.mapped(lambda t: t, (inputs, dy)))
    layout = torch.channels_last if is_channels_last(inputs[0]) else torch.contiguous_format
    assert_same_layout(got[0], same_dtype[0].contiguous(memory_format=layout), "y")
    names = helpers.result_names(NAMES, inputs)
    length = max(1, inputs[0].numel())
    for name, a, b, c, d in zip(names, got, same_dtype, reference, magnitudes(inputs, dy), strict=True):
        assert_close(a, b, c, d, length, name)


def check_twice(inputs: helpers.Tensors, activation: str = "relu", gate: str = "sigmoid") -> None:
    """Against float64 torch, whose own second derivative in this dtype sets the scale."""
    dy = helpers.gradient_for(composed(activation, gate), inputs)
    random = helpers.generator("directions")
    directions = [None if t is None else helpers.like(t, random) for t in inputs]
    tensors = [inputs, dy, directions]
    got, same_dtype = (helpers.evaluate_twice(f(activation, gate), *tensors) for f in (fused, composed))
    reference = helpers.evaluate_twice(composed(activation, gate), *helpers.mapped(lambda t: t, tensors))
    most = max((t.max().item() for t in magnitudes(inputs, dy) if t.numel()), default=0.0) ** 2
    names = ["dy", *helpers.result_names(NAMES, inputs)[1:]]
    for name, a, b, c in zip(names, got, same_dtype, reference, strict=True):
        assert_close(a, b, c, c.abs() + most, max(1, inputs[0].numel()), f"d{name}")


@over("squeeze_excite_forward", CORNERS)
def test_forward_and_gradients(backend: Backend, case: SqueezeExciteCase, dtype: torch.dtype, layout: str) -> None:
    check(inputs_of(case, dtype, layout, backend.device))


@over(
    "squeeze_excite_forward",
    [case.with_batch(2) for case in networks(SQUEEZE_EXCITE)],
    ["channels_last"],
    [torch.float32],
)
def test_layers_of_networks(backend: Backend, case: SqueezeExciteCase, dtype: torch.dtype, layout: str) -> None:
    check(inputs_of(case, dtype, layout, backend.device))


@on_dtypes("squeeze_excite_forward")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_gates(backend: Backend, dtype: torch.dtype, activation: str, gate: str) -> None:
    for case, layout in itertools.product(KINDS, LAYOUTS):
        check(inputs_of(case, dtype, layout, backend.device), activation, gate)


@over("squeeze_excite_forward", KINDS, VIEWS, [torch.float32, torch.bfloat16])
def test_views_of_x(backend: Backend, case: SqueezeExciteCase, dtype: torch.dtype, layout: str) -> None:
    check(inputs_of(case, dtype, layout, backend.device))


@over("squeeze_excite_forward", KINDS, (*LAYOUTS, *VIEWS), [torch.float32])
def test_layouts_of_dy(backend: Backend, case: SqueezeExciteCase, dtype: torch.dtype, layout: str) -> None:
    inputs = inputs_of(case, dtype, "channels_last", backend.device)
    dy = helpers.gradient_for(composed(), inputs)
    check(inputs, dy=helpers.laid_out(dy, layout))
    check(inputs, dy=torch.full((1,), 0.75, device=backend.device).expand(dy.shape))


@on("squeeze_excite_forward")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_without_bias(backend: Backend, layout: str) -> None:
    x, weight1, bias1, weight2, bias2 = inputs_of(KINDS[0], torch.float32, layout, backend.device)
    for first, second in ((None, bias2), (bias1, None), (None, None)):
        check([x, weight1, first, weight2, second])


@on("squeeze_excite_forward")
def test_matrices_are_filters_of_one_tap(backend: Backend) -> None:
    inputs = inputs_of(KINDS[0], torch.float32, "channels_last", backend.device)
    dy = helpers.gradient_for(composed(), inputs)
    matrices = [t.flatten(1) if i in (1, 3) else t for i, t in enumerate(inputs)]
    transposed = [t.t().contiguous().t() if i in (1, 3) else t for i, t in enumerate(matrices)]
    for a, b, c in zip(
        *(helpers.evaluate(fused(), given, dy) for given in (inputs, matrices, transposed)), strict=True
    ):
        assert_same_bits(a.reshape(b.shape), b)
        assert torch.equal(b, c)


@on("squeeze_excite_forward")
def test_unbatched(backend: Backend) -> None:
    x, *layers = inputs_of(KINDS[0], torch.float32, "nchw", backend.device)
    assert_same_bits(CF.squeeze_excite(x[0], *layers), CF.squeeze_excite(x[:1], *layers)[0])


@on("squeeze_excite_forward")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_values_stay_in_their_image(backend: Backend, layout: str, gate: str) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        inputs = inputs_of(KINDS[0], torch.float32, layout, backend.device)
        inputs[0][1, 2, 3, 4] = value
        got, expected = (function("none", gate)(*inputs).cpu() for function in (fused, composed))
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())
        assert got[0].isfinite().all()


@on("squeeze_excite_forward")
def test_saturated_gates_are_exact(backend: Backend) -> None:
    """exp overflows on the way to a scale of 0 or 1; the gradient through it is 0, not NaN."""
    x = torch.tensor([2.0, -3.0], device=backend.device).view(1, 2, 1, 1).requires_grad_()
    weight1 = torch.ones(1, 2, device=backend.device)
    weight2 = torch.zeros(2, 1, device=backend.device)
    bias2 = torch.tensor([1e30, -1e30], device=backend.device)
    for gate in GATES:
        y = CF.squeeze_excite(x, weight1, None, weight2, bias2, "none", gate)
        assert_exact(y.detach().cpu().flatten(), torch.tensor([2.0, 0.0], dtype=torch.float64), gate)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert_exact(dx.cpu().flatten(), torch.tensor([1.0, 0.0], dtype=torch.float64), f"{gate} dx")


@on("squeeze_excite_forward")
def test_means_of_halves_do_not_overflow(backend: Backend) -> None:
    x = torch.full((1, 2, 64, 64), 6e4, dtype=torch.float16, device=backend.device)
    weight = torch.zeros(2, 2, dtype=torch.float16, device=backend.device)
    y = CF.squeeze_excite(x, weight, None, weight, None)
    assert_exact(y.cpu(), torch.full(x.shape, 3e4, dtype=torch.float64), "y")


@on("squeeze_excite_forward")
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
def test_every_subset_of_gradients(backend: Backend, case: SqueezeExciteCase) -> None:
    """What is computed beside a gradient does not change it."""
    inputs = inputs_of(case, torch.float32, "channels_last", backend.device)
    dy = helpers.gradient_for(composed(), inputs)
    together = helpers.evaluate(fused("silu"), inputs, dy)[1:]
    for i, expected in enumerate(together):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        (alone,) = torch.autograd.grad(fused("silu")(*leaves), [leaves[i]], dy)
        assert_same_bits(alone, expected, f"d{NAMES[i]} alone")


@on("squeeze_excite_forward", dtype=torch.float64)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend: Backend, activation: str, gate: str) -> None:
    inputs = inputs_of(KINDS[0], torch.float64, "channels_last", backend.device)
    leaves = [t.detach().requires_grad_() for t in inputs]
    function = fused(activation, gate)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    x, weight1, _, weight2, _ = leaves
    assert torch.autograd.gradgradcheck(lambda *t: function(t[0], t[1], None, t[2], None), [x, weight1, weight2])


@on("squeeze_excite_forward")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_double_backward_is_float64s(backend: Backend, layout: str) -> None:
    inputs = inputs_of(KINDS[0], torch.float32, layout, backend.device)
    check_twice(inputs, "silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_it_as_convolutions(dtype: torch.dtype) -> None:
    leaves = [t.requires_grad_() for t in inputs_of(KINDS[0], torch.float32, "channels_last", "cpu")]
    with cnnops.use_backend("cpu"):
        expected = fused()(*[t.to(dtype) for t in leaves])
        with torch.autocast("cpu", dtype):
            y = fused()(*leaves)
    assert_same_bits(y, expected)
    for gradient in torch.autograd.grad(y.float().sum(), leaves):
        assert gradient.dtype == torch.float32


def test_flops_are_those_of_two_layers() -> None:
    leaves = [t.requires_grad_() for t in inputs_of(KINDS[0], torch.float32, "channels_last", "cpu")]
    totals = []
    for function in (fused(), composed()):
        with FlopCounterMode(display=False) as counter, cnnops.use_backend("cpu"):
            function(*leaves).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize(
    ("changed", "raises", "words"),
    [
        ({"x": torch.zeros(6, 5)}, RuntimeError, ("input", "[6, 5]")),
        ({"x": torch.zeros(2, 6, 0, 5)}, RuntimeError, ("input", "[2, 6, 0, 5]")),
        ({"x": torch.zeros(2, 7, 5, 5)}, RuntimeError, ("weight1", "[M, 7]", "[3, 6, 1, 1]")),
        ({"x": None}, TypeError, ("x", "None")),
        ({"weight1": torch.zeros(3, 6, 3, 3)}, RuntimeError, ("weight1", "[M, 6]", "[3, 6, 3, 3]")),
        ({"weight1": torch.zeros(0, 6)}, RuntimeError, ("weight1", "[0, 6]")),
        ({"weight2": torch.zeros(3, 6)}, RuntimeError, ("weight2", "[6, 3]", "[3, 6]")),
        ({"weight2": [1.0]}, TypeError, ("weight2", "list")),
        ({"bias1": torch.zeros(6)}, RuntimeError, ("bias1", "[3]", "[6]")),
        ({"bias2": torch.zeros(3)}, RuntimeError, ("bias2", "[6]", "[3]")),
        ({"bias2": 1.0}, TypeError, ("bias2", "float")),
        ({"weight2": torch.zeros(6, 3, dtype=torch.float64)}, RuntimeError, ("weight2", "float32", "float64")),
        ({"activation": "gelu"}, ValueError, ("activation", "gelu", "silu")),
        ({"gate": "softmax"}, ValueError, ("gate", "softmax", "hardsigmoid")),
    ],
)
def test_wrong_call(changed: dict[str, Any], raises: type[Exception], words: tuple[str, ...]) -> None:
    right = {
        "x": torch.zeros(2, 6, 5, 5),
        "weight1": torch.zeros(3, 6, 1, 1),
        "bias1": torch.zeros(3),
        "weight2": torch.zeros(6, 3, 1, 1),
        "bias2": torch.zeros(6),
    }
    with pytest.raises(raises) as raised:
        CF.squeeze_excite(**{**right, **changed})
    for word in words:
        assert word in str(raised.value)


def test_wrong_gradient_call() -> None:
    x, w1, w2, wrong = torch.zeros(2, 6, 5, 5), torch.zeros(3, 6), torch.zeros(6, 3), torch.zeros(1)
    small = [torch.zeros(2, 6), torch.zeros(2, 3), torch.zeros(2, 6)]
    rest = ("relu", "sigmoid", True, True, True, True, True, "")
    for i, name in enumerate(("pooled", "hidden", "scale")):
        given = [wrong if j == i else t for j, t in enumerate(small)]
        with pytest.raises(RuntimeError, match=rf"expected {name} of shape \[2, [36]\].*\[1\]"):
            torch.ops.cnnops.squeeze_excite_backward(x, x, w1, None, w2, None, *given, *rest)
    with pytest.raises(RuntimeError, match=r"expected dy of shape \[2, 6, 5, 5\]"):
        torch.ops.cnnops.squeeze_excite_backward(x[:1], x, w1, None, w2, None, *small, *rest)
