"""batch_norm and batch_norm_act against torch: values, statistics, gradients, on every backend that claims them."""

from __future__ import annotations

from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, away_from_kinks, of_activated
from cases import LAYOUTS, NORM, VIEWS, NormCase, find, networks, of_suite
from helpers import Backend, on, on_dtypes, over
from tolerance import assert_close, assert_exact, assert_same_bits, assert_same_layout

import cnnops
import cnnops.functional as CF

CORNERS = of_suite(NORM, "corner")
KINDS = tuple(find(NORM, id) for id in ("train", "train-ragged", "eval", "train-bare"))
NAMES = ("x", "weight", "bias", "residual")

State = tuple[torch.Tensor | None, torch.Tensor | None]


def inputs_of(
    case: NormCase, dtype: torch.dtype, layout: str, device: str, residual: bool = False, params: Any = None
) -> tuple[list[torch.Tensor | None], State]:
    """[x, weight, bias, residual] and (running_mean, running_var); parameters in float32 where x is shorter."""
    random = helpers.generator(case.id)
    params = params or (torch.float64 if dtype == torch.float64 else torch.float32)
    x = helpers.laid_out((helpers.randn(case.x_shape, torch.float64, device, random) + case.mean).to(dtype), layout)
    vectors = [helpers.randn((case.C,), params, device, random) for _ in range(4)]
    weight, bias = vectors[:2] if case.affine else (None, None)
    state = (vectors[2] + case.mean, vectors[3].square() + 0.1) if case.tracked else (None, None)
    other = helpers.laid_out(helpers.randn(case.x_shape, dtype, device, random), layout) if residual else None
    return [x, weight, bias, other], state


def batch_norm(library: Any, case: NormCase, state: State) -> helpers.Function:
    return lambda x, weight, bias, _: library.batch_norm(
        x, *state, weight, bias, case.training, case.momentum, case.eps
    )


def copies(state: State, dtype: torch.dtype | None = None) -> State:
    return tuple(None if t is None else t.detach().to(t.device, dtype or t.dtype, copy=True) for t in state)  # type: ignore[return-value]


def magnitudes(
    case: NormCase, inputs: helpers.Tensors, state: State, dy: torch.Tensor, activation: str = "none"
) -> dict[str, torch.Tensor]:
    """The sums of magnitudes behind each result, in float64: the formulas of batch norm with every minus made a plus.

    xhat = (x - mean) rstd;  dx = weight rstd (dz - mean(dz) - xhat mean(dz xhat));  dz = dy activation'(z)
    Activations have first derivatives of at most 1.1 and second ones of at most 0.5, which carry z's rounding into dz.
    """
    x, weight, bias, residual = helpers.mapped(lambda t: t, inputs)
    dy = dy.detach().cpu().double().abs()
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    if case.training:
        mean_of, mean = x.abs().mean(axes), x.mean(axes)
        variance = (x - mean.view(shape)).square().mean(axes)
        if not case.count:
            mean_of, mean, variance = (torch.zeros(case.C, dtype=torch.float64) for _ in range(3))
    else:
        mean, variance = (t.detach().cpu().double() for t in state)
        mean_of = mean.abs()
    rstd = (variance + case.eps).rsqrt().view(shape)
    spread = (x.abs() + mean_of.view(shape)) * rstd
    # An error of the mean reaches the variance through (x - mean) ** 2, and so every result through rstd.
    through_rstd = 1 + (mean_of.view(shape) * rstd) if case.training else torch.ones(())
    scale = torch.ones_like(mean) if weight is None else weight.abs()
    scale = scale.view(shape)
    y = spread * scale * through_rstd
    y = y if bias is None else y + bias.abs().view(shape)
    found = {"y": y if residual is None else y + residual.abs()}
    if activation != "none":
        dy = 1.1 * dy * (1 + found["y"])
    inner = dy
    if case.training:
        inner = dy + dy.mean(axes, keepdim=True) + spread * (dy * spread).mean(axes, keepdim=True)
    found["dx"] = inner * scale * rstd * through_rstd
    found["dweight"] = (dy * spread * through_rstd).sum(axes)
    found["dbias"] = dy.sum(axes)
    found["dresidual"] = dy
    unbiased = case.count / max(case.count - 1, 1)
    found["running_mean"] = mean_of
    found["running_var"] = (
        (spread / rstd).square().mean(axes).nan_to_num() * unbiased if case.training else variance.abs()
    )
    if case.training and state[0] is not None:
        found["running_mean"] = found["running_mean"] + state[0].cpu().double().abs()
        found["running_var"] = found["running_var"] + state[1].cpu().double().abs()
    return found


EXTENDED: dict[str, Any] = {
    "none": lambda z: z,
    "relu": lambda z: np.where(z < 0, 0, z),
    "relu6": lambda z: np.clip(z, 0, 6),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "hardswish": lambda z: z * np.clip(z + 3, 0, 6) / 6,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}


def extended_y(case: NormCase, inputs: helpers.Tensors, state: State, activation: str) -> torch.Tensor:
    """y computed in numpy's longest float and rounded once: torch's float64 rounds as often as what it would judge."""
    shape = [1, -1, *[1] * (len(case.x_shape) - 2)]
    x, weight, bias, residual, mean, variance = (
        None if t is None else t.detach().cpu().numpy().astype(np.longdouble) for t in (*inputs, *state)
    )
    axes = (0, *range(2, x.ndim))
    with np.errstate(all="ignore"):
        if case.training:
            mean = x.mean(axes)
            variance = np.square(x - mean.reshape(shape)).mean(axes)
        z = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + case.eps)
        z = z if weight is None else z * weight.reshape(shape)
        z = z if bias is None else z + bias.reshape(shape)
        y = EXTENDED[activation](z if residual is None else z + residual)
    return torch.from_numpy(y.astype(np.float64))


def check(
    case: NormCase,
    inputs: helpers.Tensors,
    state: State,
    ours: Any,
    theirs: Any,
    dy: torch.Tensor | None = None,
    activation: str = "none",
) -> None:
    """ours(state), theirs(state): functions of the inputs that update that state."""
    states = [copies(state), copies(state), copies(state, torch.float64)]
    if states[2][0] is not None:
        states[2] = tuple(t.cpu() for t in states[2])
    if dy is None:
        dy = helpers.gradient_for(theirs(copies(state)), inputs)
    got = helpers.evaluate(ours(states[0]), inputs, dy)
    same_dtype = helpers.evaluate(theirs(states[1]), inputs, dy)
    reference = helpers.evaluate(theirs(states[2]), *helpers.mapped(lambda t: t, (inputs, dy)))
    assert_same_layout(got[0], same_dtype[0], "y")
    if inputs[0].dtype == torch.float64 and case.count:
        reference[0] = extended_y(case, inputs, state, activation)
    magnitude = magnitudes(case, inputs, state, dy, activation)
    magnitude["y"] = of_activated(magnitude["y"], reference[0])
    names = helpers.result_names(NAMES, inputs)
    for name, a, b, c in zip(names, got, same_dtype, reference, strict=True):
        stored = None if activation == "none" or name == "y" else inputs[0].dtype
        assert_close(a, b, c, magnitude[name], 1 if name == "dresidual" else case.count, name, intermediate=stored)
    if state[0] is not None:
        for name, *values in zip(("running_mean", "running_var"), *states, strict=True):
            a, b, c = values
            assert_close(a, b, c, magnitude[name], case.count, name)
            if not case.training:
                assert torch.equal(a, state[("running_mean", "running_var").index(name)]), f"{name} changed in eval"


def check_batch_norm(case: NormCase, inputs: helpers.Tensors, state: State, dy: torch.Tensor | None = None) -> None:
    check(case, inputs, state, lambda s: batch_norm(CF, case, s), lambda s: batch_norm(F, case, s), dy)


@over("batch_norm_act_forward", CORNERS)
def test_forward_gradients_and_statistics(backend: Backend, case: NormCase, dtype: torch.dtype, layout: str) -> None:
    check_batch_norm(case, *inputs_of(case, dtype, layout, backend.device))


@over("batch_norm_act_forward", [case.with_batch(2) for case in networks(NORM)], ["channels_last"], [torch.float32])
def test_layers_of_networks(backend: Backend, case: NormCase, dtype: torch.dtype, layout: str) -> None:
    check_batch_norm(case, *inputs_of(case, dtype, layout, backend.device))


@over("batch_norm_act_forward", KINDS, VIEWS, [torch.float32])
def test_views_of_x(backend: Backend, case: NormCase, dtype: torch.dtype, layout: str) -> None:
    check_batch_norm(case, *inputs_of(case, dtype, layout, backend.device))


@over("batch_norm_act_forward", KINDS, (*LAYOUTS, *VIEWS), [torch.float32])
def test_layouts_of_dy(backend: Backend, case: NormCase, dtype: torch.dtype, layout: str) -> None:
    inputs, state = inputs_of(case, dtype, "channels_last", backend.device)
    dy = helpers.gradient_for(batch_norm(F, case, copies(state)), inputs)
    check_batch_norm(case, inputs, state, helpers.laid_out(dy, layout))
    check_batch_norm(case, inputs, state, torch.full((1,), 0.75, device=backend.device).expand(dy.shape))


@on_dtypes("batch_norm_act_forward", dtypes=(torch.bfloat16, torch.float16))
def test_parameters_as_short_as_x(backend: Backend, dtype: torch.dtype) -> None:
    for case in KINDS:
        check_batch_norm(case, *inputs_of(case, dtype, "channels_last", backend.device, params=dtype))


@on("batch_norm_act_forward")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_values_stay_in_their_channel(backend: Backend, layout: str) -> None:
    for case in KINDS:
        inputs, state = inputs_of(case, torch.float32, layout, backend.device)
        inputs[0][0, 1, 0, 0], inputs[0][-1, 2, -1, -1] = torch.nan, torch.inf
        got, reference = (batch_norm(library, case, copies(state))(*inputs) for library in (CF, F))
        broken = ~reference.isfinite()
        assert torch.equal(~got.isfinite(), broken)
        assert torch.equal(broken.any(0).flatten(1).any(1).nonzero().flatten().cpu(), torch.tensor([1, 2]))


@on_dtypes("batch_norm_act_forward")
@pytest.mark.parametrize("shape", [(3, 16, 16, 12), (3, 11, 7, 5), (40, 24, 7, 7), (2, 3, 41, 37)], ids=str)
def test_an_infinite_channel_has_an_infinite_mean(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Wherever the infinity lies: in the first or the last slice of its channel, or between."""
    x = helpers.randn(shape, dtype, backend.device, helpers.generator("infinite"))
    x[0, 0, 0, 0] = x[-1, 1, -1, -1] = x[1, 2, 2, 1] = torch.inf
    x[1, 0, 3, 3] = x[0, 1, 0, 0] = 3.0
    x[0, 2, 0, 0] = -torch.inf
    for values in (x, -x):
        for layout in LAYOUTS:
            mean, var = (torch.full(shape[1:2], 0.5, device=x.device, dtype=torch.float64) for _ in range(2))
            if dtype != torch.float64:
                mean, var = mean.float(), var.float()
            expected = mean.clone(), var.clone()
            CF.batch_norm(helpers.laid_out(values, layout), mean, var, None, None, True)
            F.batch_norm(values, *expected, None, None, True)
            broken = slice(0, 3)
            assert_exact(mean[broken].cpu(), expected[0][broken].cpu().double(), "running_mean")
            assert_exact(var[broken].cpu(), expected[1][broken].cpu().double(), "running_var")
            assert mean[3:].isfinite().all()
            assert var[3:].isfinite().all()


def composed(case: NormCase, activation: str, state: State) -> helpers.Function:
    def function(x: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        z = F.batch_norm(x, *state, weight, bias, case.training, case.momentum, case.eps)
        return ACTIVATIONS[activation](z if residual is None else z + residual)

    return function


def fused(case: NormCase, activation: str, state: State) -> helpers.Function:
    return lambda x, weight, bias, residual: CF.batch_norm_act(
        x, *state, weight, bias, case.training, case.momentum, case.eps, residual, activation
    )


def check_batch_norm_act(case: NormCase, inputs: helpers.Tensors, state: State, activation: str) -> None:
    z = composed(case, "none", copies(state, torch.float64))(*helpers.mapped(lambda t: t, inputs))
    dy = away_from_kinks(helpers.gradient_for(composed(case, activation, copies(state)), inputs), z, activation)
    check(
        case,
        inputs,
        state,
        lambda s: fused(case, activation, s),
        lambda s: composed(case, activation, s),
        dy,
        activation,
    )


def check_twice(case: NormCase, inputs: helpers.Tensors, state: State, activation: str = "none") -> None:
    """Against float64 torch, whose own second derivative in this dtype sets the scale."""
    dy = helpers.gradient_for(composed(case, activation, copies(state)), inputs)
    random = helpers.generator("directions")
    directions = [None if t is None else helpers.like(t, random) for t in inputs]

    def twice(function: Any, tensors: Any) -> list[torch.Tensor]:
        inputs, dy, directions = tensors
        return helpers.evaluate_twice(function(case, activation, copies(state, dy.dtype)), inputs, dy, directions)

    tensors = [inputs, dy, directions]
    got, same_dtype = twice(fused, tensors), twice(composed, tensors)
    reference = twice(composed, helpers.mapped(lambda t: t, tensors))
    magnitude = magnitudes(case, inputs, state, dy)
    most = max(magnitude["y"].max().item(), magnitude["dx"].max().item()) ** 2
    names = ["ddy", *helpers.result_names(NAMES, inputs)[1:]]
    for name, a, b, c in zip(names, got, same_dtype, reference, strict=True):
        assert_close(a, b, c, c.abs() + most, case.count, name)


@on_dtypes("batch_norm_act_forward")
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
def test_batch_norm_act(backend: Backend, case: NormCase, dtype: torch.dtype, activation: str, residual: bool) -> None:
    for layout in LAYOUTS:
        inputs, state = inputs_of(case, dtype, layout, backend.device, residual)
        check_batch_norm_act(case, inputs, state, activation)


@on("batch_norm_act_forward")
def test_activation_none_is_batch_norm(backend: Backend) -> None:
    case = KINDS[0]
    inputs, state = inputs_of(case, torch.float32, "channels_last", backend.device)
    dy = helpers.gradient_for(batch_norm(F, case, copies(state)), inputs)
    plain = helpers.evaluate(batch_norm(CF, case, copies(state)), inputs, dy)
    for a, b in zip(plain, helpers.evaluate(fused(case, "none", copies(state)), inputs, dy), strict=True):
        assert_same_bits(a, b)


@on("batch_norm_act_forward")
def test_relu_keeps_nan_and_negative_zero(backend: Backend) -> None:
    x = torch.tensor([-0.0, 0.0, torch.nan, -1.0, torch.inf, -torch.inf], device=backend.device).view(1, 6, 1, 1)
    zero, one = torch.zeros(6, device=backend.device), torch.ones(6, device=backend.device)
    y = CF.batch_norm_act(x, zero, one, one, -zero, False, 0.1, 0.0)
    assert_exact(y.cpu(), F.relu(F.batch_norm(x, zero, one, one, -zero, False, 0.1, 0.0)).cpu().double(), "y")


@on_dtypes("batch_norm_act_forward")
@pytest.mark.parametrize(
    "shape",
    [
        (3, 272, 9, 7),
        (2, 24, 40, 33),
        (5, 3, 31, 17),
        (2, 1, 29, 31),
        (600, 40, 1, 1),
        *((7, 67, 1, 3), (3, 300, 2, 1), (5, 19, 2, 2), (4, 5, 2, 4), (2, 3, 1, 1021)),
    ],
    ids=str,
)
def test_integers_are_exact(backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """With mean 0, variance 1 and eps 0 nothing rounds on the way: a sum that misses an element, or has one twice, shows."""
    random = helpers.generator(str(shape))
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (helpers.integers(shape[1:2], vectors, backend.device, random) for _ in range(2))
    state = torch.zeros_like(weight), torch.ones_like(weight)
    case = NormCase("integers", shape[0], shape[1], shape[2:], training=False, eps=0.0)
    for layout in LAYOUTS:
        x, residual, dy = (
            helpers.laid_out(helpers.integers(shape, dtype, backend.device, random), layout) for _ in range(3)
        )
        for inputs in ([x, weight, bias, None], [x, weight, bias, residual]):
            got = helpers.evaluate(fused(case, "relu", state), inputs, dy)
            exact_state = tuple(t.cpu().double() for t in state)
            reference = helpers.evaluate(
                composed(case, "relu", exact_state), *helpers.mapped(lambda t: t, (inputs, dy))
            )
            names = helpers.result_names(NAMES, inputs)
            for name, ours, theirs in zip(names, got, reference, strict=True):
                assert_exact(ours.cpu(), theirs.to(ours.dtype).double(), name)


@on("batch_norm_act_forward")
def test_every_subset_of_gradients(backend: Backend) -> None:
    """What is computed beside a gradient does not change it."""
    case = KINDS[0]
    inputs, state = inputs_of(case, torch.float32, "channels_last", backend.device, residual=True)
    dy = helpers.gradient_for(batch_norm(F, case, copies(state)), inputs)
    together = helpers.evaluate(fused(case, "relu", copies(state)), inputs, dy)[1:]
    for i, expected in enumerate(together):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        y = fused(case, "relu", copies(state))(*leaves)
        assert_same_bits(*torch.autograd.grad(y, [leaves[i]], dy), expected, f"d{NAMES[i]} alone")


@on("batch_norm_act_forward", dtype=torch.float64)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
def test_gradcheck(backend: Backend, case: NormCase, activation: str, residual: bool) -> None:
    inputs, state = inputs_of(case, torch.float64, "channels_last", backend.device, residual)
    leaves = [t.detach().requires_grad_() for t in inputs if t is not None]
    given = [t is not None for t in inputs]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        left = iter(tensors)
        # Running statistics are copied: gradcheck calls often, and in eval they are what is read.
        return fused(case, activation, copies(state))(*[next(left) if there else None for there in given])

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@on("batch_norm_act_forward")
def test_double_backward_is_float64s(backend: Backend) -> None:
    for case in KINDS:
        check_twice(case, *inputs_of(case, torch.float32, "channels_last", backend.device))


@pytest.mark.quick
def test_five_dimensions_in_any_layout() -> None:
    x = torch.randn(3, 2, 5, 4, 3).transpose(0, 3)
    dense = x.contiguous()
    with cnnops.use_backend("cpu"):
        ours, of_dense = (
            CF.batch_norm(t, None, None, torch.full((2,), 1.5), torch.full((2,), -0.25), True) for t in (x, dense)
        )
    assert torch.equal(ours, of_dense)
    theirs, exact = (
        F.batch_norm(t, None, None, torch.full((2,), 1.5).to(t), torch.full((2,), -0.25).to(t), True)
        for t in (dense, dense.double())
    )
    assert_close(ours, theirs, exact, exact.abs().amax().expand_as(exact), dense.numel() // 2)
