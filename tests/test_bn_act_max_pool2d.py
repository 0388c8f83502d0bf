"""bn_act_max_pool2d: the very numbers of our own separate ops, and torch's within tolerance, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, of_activated
from cases import LAYOUTS, POOL2D, VIEWS, NormCase, Pool2dCase, find, of_suite
from helpers import Backend, on, on_dtypes, over
from test_batch_norm import magnitudes
from tolerance import assert_close, assert_same_bits, assert_same_layout

import cnnops
import cnnops.functional as CF

NAMES = ("x", "weight", "bias")
CORNERS = tuple(
    case for case in of_suite(POOL2D, "corner") if case.op == "max_pool2d" and (case.N * case.H * case.W != 1)
)
STEM = find(POOL2D, "max/3x3-s2-pad")
KINDS = (STEM, find(POOL2D, "max/3x3-s1-overlap"), find(POOL2D, "max/2x3-d3-uneven"))
State = tuple[torch.Tensor, torch.Tensor]


def inputs_of(case: Pool2dCase, dtype: torch.dtype, layout: str, device: str) -> tuple[list[torch.Tensor], State]:
    """[x, weight, bias] and (running_mean, running_var). No two numbers in a plane of x are equal, nor nearly so, for the
    gradient of a maximum jumps there."""
    random = helpers.generator(case.id)
    N, C, H, W = case.x_shape
    places = torch.rand((N, C, H * W), generator=random).argsort(2).double()
    x = ((places - H * W // 2) / 16).view(N, C, H, W).to(device, dtype)
    params = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean = (helpers.randn((C,), params, device, random) for _ in range(3))
    return [helpers.laid_out(x, layout), weight, bias], (mean, weight.square() + 1)


def window_of(case: Pool2dCase) -> dict[str, Any]:
    stride = case.stride or case.kernel
    return {
        "kernel_size": case.kernel,
        "stride": stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "ceil_mode": case.ceil_mode,
    }


def fused(case: Pool2dCase, state: Any, training: bool, activation: str = "relu") -> helpers.Function:
    return lambda x, weight, bias: CF.bn_act_max_pool2d(
        x, *state, weight, bias, training, 0.1, 1e-5, **window_of(case), activation=activation
    )


def separate(case: Pool2dCase, state: Any, training: bool, activation: str = "relu") -> helpers.Function:
    def function(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        dense = x.contiguous(memory_format=torch.channels_last)
        a = CF.batch_norm_act(dense, *state, weight, bias, training, 0.1, 1e-5, None, activation)
        return CF.max_pool2d(a, **window_of(case))

    return function


def composed(case: Pool2dCase, state: Any, training: bool, activation: str = "relu") -> helpers.Function:
    def function(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        z = F.batch_norm(x, *state, weight, bias, training, 0.1, 1e-5)
        return F.max_pool2d(ACTIVATIONS[activation](z), **window_of(case))

    return function


def copies(state: State, dtype: torch.dtype | None = None) -> State:
    return tuple(t.detach().to(t.device, dtype or t.dtype, copy=True) for t in state)  # type: ignore[return-value]


def check(
    case: Pool2dCase,
    inputs: list[torch.Tensor],
    state: State,
    training: bool,
    activation: str = "relu",
    dy: torch.Tensor | None = None,
) -> None:
    """Against torch in float64, with the sums of magnitudes that batch norm's results have for the pool's gradient."""
    states = [copies(state), copies(state), tuple(t.cpu() for t in copies(state, torch.float64))]
    if dy is None:
        dy = helpers.gradient_for(composed(case, copies(state), training, activation), inputs)
    got = helpers.evaluate(fused(case, states[0], training, activation), inputs, dy)
    same_dtype = helpers.evaluate(composed(case, states[1], training, activation), inputs, dy)
    exact, exact_dy = helpers.mapped(lambda t: t, (inputs, dy))
    reference = helpers.evaluate(composed(case, states[2], training, activation), exact, exact_dy)
    assert_same_layout(got[0], same_dtype[0], "y")

    norm = NormCase("", *case.x_shape[:2], case.x_shape[2:], training)
    z = F.batch_norm(exact[0], *copies(states[2]), *exact[1:], training, 0.1, 1e-5).requires_grad_()
    pooled = F.max_pool2d(ACTIVATIONS[activation](z), **window_of(case))
    (da,) = torch.autograd.grad(pooled, z, exact_dy.abs())
    found = magnitudes(norm, [*inputs, None], state, da, activation)
    found["y"] = of_activated(F.max_pool2d(found["y"], **window_of(case)), reference[0])
    for name, a, b, c in zip(helpers.result_names(NAMES, inputs), got, same_dtype, reference, strict=True):
        assert_close(a, b, c, found[name], norm.count, name, intermediate=inputs[0].dtype)
    for name, a, b, c in zip(("running_mean", "running_var"), *states, strict=True):
        assert_close(a, b, c, found[name], norm.count, name)


def check_separate(
    case: Pool2dCase, inputs: list[torch.Tensor], state: State, training: bool, activation: str = "relu"
) -> None:
    """Against our own ops: the same bits, but for gradients that depend on sums, which run in another order."""
    states = copies(state), copies(state)
    ours, theirs = fused(case, states[0], training, activation), separate(case, states[1], training, activation)
    y = theirs(*inputs)
    assert_same_bits(ours(*inputs).flatten(), y.flatten(), "y")
    for a, b, name in zip(*states, ("running_mean", "running_var"), strict=True):
        assert_same_bits(a, b, name)
    if not training:
        dy = helpers.like(y, helpers.generator("dy"))
        (_, got, *_), (_, expected, *_) = (helpers.evaluate(function, inputs, dy) for function in (ours, theirs))
        assert_same_bits(got.flatten(), expected.flatten(), "dx")


def check_twice(
    case: Pool2dCase, inputs: list[torch.Tensor], state: State, training: bool, activation: str = "relu"
) -> None:
    """The double backward, in float64, where no rounding comes near a kink or makes a tie."""
    dy = helpers.gradient_for(composed(case, copies(state), training), inputs)
    random = helpers.generator("directions")
    directions = [helpers.like(t, random) for t in inputs]
    got, reference = (
        helpers.evaluate_twice(f(case, copies(state), training, activation), inputs, dy, directions)
        for f in (fused, composed)
    )
    norm = NormCase("", *case.x_shape[:2], case.x_shape[2:], training)
    found = magnitudes(norm, [*inputs, None], state, torch.ones_like(inputs[0]))
    most = max(found["y"].max().item(), found["dx"].max().item()) ** 2
    for name, a, b in zip(("ddy", "dx", "dweight", "dbias"), got, reference, strict=True):
        terms = norm.count if name in ("dweight", "dbias") else 1  # each sums over all positions
        assert_close(a, b, b, b.abs() + most * terms, norm.count, name)


@over("bn_act_max_pool2d_forward", CORNERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_numbers_of_the_separate_ops(
    backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str, training: bool
) -> None:
    check_separate(case, *inputs_of(case, dtype, layout, backend.device), training)


@over("bn_act_max_pool2d_forward", CORNERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_gradients_and_statistics(
    backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str, training: bool
) -> None:
    check(case, *inputs_of(case, dtype, layout, backend.device), training)


@on_dtypes("bn_act_max_pool2d_forward")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend: Backend, dtype: torch.dtype, activation: str, training: bool) -> None:
    for case, layout in itertools.product(KINDS, LAYOUTS):
        inputs, state = inputs_of(case, dtype, layout, backend.device)
        check_separate(case, inputs, state, training, activation)
        if activation in ("none", "relu"):  # the others turn values apart into ties
            check(case, inputs, state, training, activation)


@on("bn_act_max_pool2d_forward")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 530])
def test_any_number_of_channels(backend: Backend, channels: int, training: bool) -> None:
    """One, fewer than a vector holds, whole vectors, and more than a sum's tile."""
    case = Pool2dCase(f"{channels}", "max_pool2d", 2, channels, 9, 8, (3, 3), (2, 2), padding=(1, 1))
    inputs, state = inputs_of(case, torch.float32, "channels_last", backend.device)
    check_separate(case, inputs, state, training)
    check(case, inputs, state, training)


@over("bn_act_max_pool2d_forward", KINDS, VIEWS, [torch.float32])
def test_views_of_x(backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str) -> None:
    for training in (True, False):
        check(case, *inputs_of(case, dtype, layout, backend.device), training)


@over("bn_act_max_pool2d_forward", KINDS, (*LAYOUTS, *VIEWS), [torch.float32])
def test_layouts_of_dy(backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str) -> None:
    inputs, state = inputs_of(case, dtype, "channels_last", backend.device)
    dy = helpers.gradient_for(composed(case, copies(state), True), inputs)
    check(case, inputs, state, True, dy=helpers.laid_out(dy, layout))
    check(case, inputs, state, True, dy=torch.full((1,), 0.75, device=backend.device).expand(dy.shape))


@on("bn_act_max_pool2d_forward")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bands_meet(backend: Backend, training: bool) -> None:
    """Tall enough for images to be cut into bands of rows, which share the rows between them."""
    for kernel, stride, dilation in ((3, 2, 1), (3, 1, 2), (2, 3, 1), (5, 1, 1)):
        window: dict[str, Any] = {"stride": (stride, stride), "padding": (1, 1), "dilation": (dilation, dilation)}
        case = Pool2dCase("bands", "max_pool2d", 2, 5, 71, 6, (kernel, kernel), **window)
        inputs, state = inputs_of(case, torch.float32, "channels_last", backend.device)
        check_separate(case, inputs, state, training)
        check(case, inputs, state, training)


@on("bn_act_max_pool2d_forward")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_non_finite_values_and_ties(backend: Backend, training: bool) -> None:
    for case, layout in itertools.product(KINDS, LAYOUTS):
        inputs, state = inputs_of(case, torch.float32, layout, backend.device)
        x = (inputs[0] * 2).round()  # ties
        x[0, 0, 1, 1], x[0, 1, 2, 0], x[0, 2, 0, 3] = torch.nan, torch.inf, -torch.inf
        check_separate(case, [x, *inputs[1:]], state, training)
        got, expected = (f(case, copies(state), training)(x, *inputs[1:]) for f in (fused, composed))
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


@on("bn_act_max_pool2d_forward")
def test_windows_beside_the_input(backend: Backend) -> None:
    """A dilated window may have no tap inside the input: its maximum is -inf, and its gradient goes nowhere."""
    case = Pool2dCase("beside", "max_pool2d", 2, 3, 1, 9, (2, 2), (1, 1), padding=(1, 1), dilation=(2, 2))
    inputs, state = inputs_of(case, torch.float32, "channels_last", backend.device)
    y = fused(case, copies(state), True)(*inputs)
    assert y.isneginf().all()
    check_separate(case, inputs, state, True)


@on("bn_act_max_pool2d_forward")
def test_without_parameters_or_statistics(backend: Backend) -> None:
    (x, weight, bias), _ = inputs_of(STEM, torch.float32, "channels_last", backend.device)
    for w, b in ((None, None), (weight, None), (None, bias)):
        y = fused(STEM, (None, None), True)(x, w, b)
        assert_same_bits(y, separate(STEM, (None, None), True)(x, w, b))


@on_dtypes("bn_act_max_pool2d_forward", dtypes=(torch.bfloat16, torch.float16))
def test_parameters_as_short_as_x(backend: Backend, dtype: torch.dtype) -> None:
    inputs, state = inputs_of(STEM, dtype, "channels_last", backend.device)
    inputs = [t.to(dtype) for t in inputs]
    check_separate(STEM, inputs, copies(state, dtype), True)
    check(STEM, inputs, copies(state, dtype), True)


@on("bn_act_max_pool2d_forward")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_subset_of_gradients(backend: Backend, training: bool) -> None:
    inputs, state = inputs_of(STEM, torch.float32, "channels_last", backend.device)
    dy = helpers.gradient_for(composed(STEM, copies(state), training), inputs)
    together = helpers.evaluate(fused(STEM, copies(state), training), inputs, dy)[1:]
    for i, expected in enumerate(together):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        (alone,) = torch.autograd.grad(fused(STEM, copies(state), training)(*leaves), [leaves[i]], dy)
        assert_same_bits(alone, expected, f"d{NAMES[i]} alone")


@on("bn_act_max_pool2d_forward", dtype=torch.float64)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend: Backend, activation: str, training: bool) -> None:
    for case in KINDS:
        inputs, state = inputs_of(case, torch.float64, "channels_last", backend.device)
        leaves = [t.requires_grad_() for t in inputs]

        def function(*tensors: Any, case: Pool2dCase = case, state: State = state) -> torch.Tensor:
            return fused(case, copies(state), training, activation)(*tensors)

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    x, weight, _ = leaves
    assert torch.autograd.gradgradcheck(lambda x, w: function(x, w, None), [x, weight], fast_mode=True)


@on("bn_act_max_pool2d_forward")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_double_backward_is_that_of_the_separate_ops(backend: Backend, training: bool) -> None:
    inputs, state = inputs_of(STEM, torch.float32, "channels_last", backend.device)
    dy = helpers.gradient_for(composed(STEM, copies(state), training), inputs)
    directions = [helpers.like(t, helpers.generator("directions")) for t in inputs]
    got, expected = (
        helpers.evaluate_twice(f(STEM, copies(state), training, "silu"), inputs, dy, directions)
        for f in (fused, separate)
    )
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


def test_autocast_leaves_it() -> None:
    inputs, state = inputs_of(STEM, torch.float32, "channels_last", "cpu")
    with cnnops.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        assert fused(STEM, state, True)(*inputs).dtype == torch.float32


def test_running_statistics_count_as_written() -> None:
    inputs, state = inputs_of(STEM, torch.float32, "channels_last", "cpu")
    for training in (True, False):
        before = [t._version for t in state]
        fused(STEM, state, training)(*inputs)
        assert [t._version > version for t, version in zip(state, before, strict=True)] == [training] * 2


@pytest.mark.parametrize(
    ("changed", "raises", "words"),
    [
        ({"x": torch.zeros(3, 5, 5)}, RuntimeError, ("input", "[3, 5, 5]")),
        ({"x": torch.zeros(2, 3, 0, 5)}, RuntimeError, ("input", "[2, 3, 0, 5]")),
        ({"weight": torch.ones(3, dtype=torch.float64)}, RuntimeError, ("weight", "float32", "float64")),
        ({"x": None}, TypeError, ("x", "None")),
        ({"weight": torch.ones(4)}, RuntimeError, ("weight", "[3]", "[4]")),
        ({"bias": [1.0]}, TypeError, ("bias", "list")),
        ({"running_mean": None}, ValueError, ("running_mean", "running_var")),
        ({"running_mean": None, "running_var": None, "training": False}, RuntimeError, ("running_mean", "None")),
        ({"training": 1}, TypeError, ("training", "1")),
        ({"eps": 0.0}, ValueError, ("eps", "0")),
        ({"momentum": None}, TypeError, ("momentum", "None")),
        ({"padding": 2}, RuntimeError, ("padding", "(2, 2)", "(3, 3)")),
        ({"kernel_size": 0}, RuntimeError, ("kernel_size", "(0, 0)")),
        ({"kernel_size": 9, "padding": 0}, RuntimeError, ("9 x 9", "5 x 5")),
        ({"stride": 0}, RuntimeError, ("stride", "(0, 0)")),
        ({"dilation": 1.5}, TypeError, ("dilation", "1.5")),
        ({"ceil_mode": 1}, TypeError, ("ceil_mode", "1")),
        ({"activation": "gelu"}, ValueError, ("activation", "gelu", "silu")),
    ],
)
def test_wrong_call(changed: dict[str, Any], raises: type[Exception], words: tuple[str, ...]) -> None:
    right: dict[str, Any] = {
        "x": torch.zeros(2, 3, 5, 5),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.ones(3),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }
    with pytest.raises(raises) as raised:
        CF.bn_act_max_pool2d(**{**right, **changed})
    for word in words:
        assert word in str(raised.value)
    assert torch.equal(right["running_var"], torch.ones(3)), "a refused call leaves the running statistics alone"


def test_wrong_gradient_call() -> None:
    x, dy, one = torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 3, 3), torch.zeros(3)
    offsets = dy.to(torch.uint8)
    rest = (True, 1e-5, "relu", 3, 3, 2, 2, 1, 1, 1, 1, True, True, True, "")
    for wrong, given in (
        ("dy", (dy[:1], offsets, x, None, None, one, one)),
        ("offsets", (dy, offsets.long(), x, None, None, one, one)),
        ("offsets", (dy[:1], offsets[:1], x, None, None, one, one)),
        ("mean", (dy, offsets, x, None, None, one[:1], one)),
        ("rstd", (dy, offsets, x, None, None, one, one.double())),
    ):
        with pytest.raises(RuntimeError, match=f"bn_act_max_pool2d_backward: expected {wrong} "):
            torch.ops.cnnops.bn_act_max_pool2d_backward(*given, *rest)
