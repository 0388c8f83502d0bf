"""conv2d_bn_act: one pass against torch's composition, two ops of ours where something differentiates or trains."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, of_activated
from cases import CONV2D, LAYOUTS, VIEWS, Conv2dCase, find, of_suite
from helpers import DTYPES, Backend, on, on_dtypes, over
from tolerance import assert_close, assert_exact, assert_same_bits, assert_same_layout, assert_same_non_finite
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import cnnops
import cnnops.functional as CF

FUNCTION = "conv2d_bn_act_forward"
EPS = 1e-3
CORNERS = tuple(case for case in of_suite(CONV2D, "corner") if case.C)
KINDS = tuple(
    find(CONV2D, id)
    for id in ("3x3-pad-bias", "1x1-s2-uneven", "5x2-uneven-everything", "depthwise-3x3-ragged", "3x3-beyond-tile")
)
Tensors = helpers.Tensors
Statistics = tuple[torch.Tensor, torch.Tensor]


def inputs_of(
    case: Conv2dCase,
    dtype: torch.dtype,
    layout: str,
    device: str,
    residual: bool = True,
    affine: bool = True,
    params: torch.dtype | None = None,
) -> tuple[list[torch.Tensor | None], Statistics]:
    """[x, weight, bias, residual, bn_weight, bn_bias] and (running_mean, running_var); the latter four in float32 where
    x is shorter."""
    params = params or (torch.float64 if dtype == torch.float64 else torch.float32)
    random = helpers.generator("batch norm of " + case.id)
    other = helpers.laid_out(helpers.randn(case.output_shape, dtype, device, random), layout) if residual else None
    bn_weight, bn_bias, mean, spread = (helpers.randn((case.K,), params, device, random) for _ in range(4))
    inputs = [*helpers.conv2d_inputs(case, dtype, layout, device), other]
    return [*inputs, *((bn_weight, bn_bias) if affine else (None, None))], (mean, spread.square() + 0.1)


def fused(case: Conv2dCase, statistics: Statistics, activation: str = "relu", training: bool = False) -> Any:
    def function(x: Any, weight: Any, bias: Any, residual: Any, bn_weight: Any, bn_bias: Any) -> torch.Tensor:
        return CF.conv2d_bn_act(
            x, weight, bias, *statistics, bn_weight, bn_bias, training, 0.1, EPS,
            **case.arguments(), residual=residual, activation=activation,
        )  # fmt: skip

    return function


def two_ops(case: Conv2dCase, statistics: Statistics, activation: str = "relu", training: bool = False) -> Any:
    def function(x: Any, weight: Any, bias: Any, residual: Any, bn_weight: Any, bn_bias: Any) -> torch.Tensor:
        z = CF.conv2d(x, weight, bias, **case.arguments())
        return CF.batch_norm_act(z, *statistics, bn_weight, bn_bias, training, 0.1, EPS, residual, activation)

    return function


def composed(case: Conv2dCase, statistics: Any, activation: str = "relu", eps: float = EPS) -> Any:
    """torch's own."""

    def function(x: Any, weight: Any, bias: Any, residual: Any, bn_weight: Any, bn_bias: Any) -> torch.Tensor:
        z = helpers.torch_conv2d(case)(x, weight, bias)
        z = F.batch_norm(z, *statistics, bn_weight, bn_bias, eps=eps)
        return ACTIVATIONS[activation](z if residual is None else z + residual)

    return function


def check(case: Conv2dCase, inputs: Tensors, statistics: Statistics, activation: str = "relu") -> None:
    exact, (mean, var) = helpers.mapped(lambda t: t, inputs), helpers.mapped(lambda t: t, statistics)
    before = [t.clone() for t in statistics]
    got = fused(case, statistics, activation)(*inputs)
    for t, same in zip(statistics, before, strict=True):
        assert torch.equal(t, same), "running statistics changed in eval"
    same_dtype = composed(case, statistics, activation)(*inputs)
    reference = composed(case, (mean, var), activation)(*exact)
    # (|conv| + |bias| + |mean|) |scale| + |bn_bias| + |residual|: every minus made a plus.
    magnitude = composed(case, (-mean.abs(), var), "none")(*helpers.mapped(torch.abs, inputs))
    length = case.R * case.S * (case.C // case.groups) + len(inputs)
    assert_same_layout(got, same_dtype, "y")
    assert_close(got, same_dtype, reference, of_activated(magnitude, reference), length, "y")


def check_gradients(case: Conv2dCase, inputs: Tensors, statistics: Statistics, activation: str) -> None:
    """A frozen batch norm: eval mode, and gradients towards everything but the statistics, are the two ops'."""
    dy = helpers.gradient_for(composed(case, statistics), inputs)
    got = helpers.evaluate(fused(case, statistics, activation), inputs, dy)
    expected = helpers.evaluate(two_ops(case, statistics, activation), inputs, dy)
    names = ("x", "weight", "bias", "residual", "bn_weight", "bn_bias")
    for name, a, b in zip(helpers.result_names(names, inputs), got, expected, strict=True):
        assert_same_bits(a, b, name)


@over(FUNCTION, CORNERS)
def test_forward(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    check(case, *inputs_of(case, dtype, layout, backend.device))


@over(FUNCTION, KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("affine", [False, True], ids=["bare", "affine"])
def test_kinds(
    backend: Backend,
    case: Conv2dCase,
    dtype: torch.dtype,
    layout: str,
    activation: str,
    residual: bool,
    affine: bool,
) -> None:
    check(case, *inputs_of(case, dtype, layout, backend.device, residual, affine), activation)


@over(FUNCTION, KINDS[:1], LAYOUTS, [torch.bfloat16, torch.float16])
def test_parameters_in_the_dtype_of_x(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    check(case, *inputs_of(case, dtype, layout, backend.device, params=dtype))


@over(FUNCTION, KINDS, VIEWS, [torch.float32])
def test_views(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    check(case, *inputs_of(case, dtype, layout, backend.device))


@on(FUNCTION)
def test_parameters_with_strides(backend: Backend) -> None:
    (*inputs, weight, bias), (mean, var) = inputs_of(KINDS[0], torch.float32, "nchw", backend.device)
    weight, bias, mean, var = (torch.stack([t, t + torch.nan], 1)[:, 0] for t in (weight, bias, mean, var))
    check(KINDS[0], [*inputs, weight, bias], (mean, var))


@on_dtypes(FUNCTION)
def test_integers_are_exact(backend: Backend, dtype: torch.dtype) -> None:
    """With var + eps = 1/4 or 4 the scale is 2 or 1/2: eps counts in full, and nothing rounds on the way."""
    case, random = KINDS[0], helpers.generator("integers")
    shapes = (case.x_shape, case.weight_shape, (case.K,), case.output_shape)
    inputs = [helpers.integers(shape, dtype, backend.device, random, 1) for shape in shapes]
    inputs += [helpers.integers((case.K,), torch.float32, backend.device, random).to(dtype) * 2 for _ in range(2)]
    mean = helpers.integers((case.K,), dtype, backend.device, random)
    precisions = [contextlib.nullcontext]
    if dtype == torch.float32 and backend.name in helpers.WITH_TF32:
        precisions.append(helpers.tf32)
    for (var, eps), precision in itertools.product(((0.0, 0.25), (3.0, 1.0)), precisions):
        statistics = mean, torch.full_like(mean, var)
        with precision():
            y = CF.conv2d_bn_act(
                *inputs[:3],
                *statistics,
                *inputs[4:],
                eps=eps,
                **case.arguments(),
                residual=inputs[3],
                activation="none",
            )
        x, weight, bias, residual, bn_weight, bn_bias = helpers.mapped(lambda t: t, inputs)
        z = F.conv2d(x, weight, bias, **case.arguments())
        expected = F.batch_norm(z, *helpers.mapped(lambda t: t, statistics), bn_weight, bn_bias, eps=eps) + residual
        assert_exact(y.cpu(), expected, "y")


@over(FUNCTION, KINDS, LAYOUTS)
def test_non_finite_values_land_where_torch_puts_them(
    backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str
) -> None:
    inputs, (mean, var) = inputs_of(case, dtype, layout, backend.device)
    x, residual, bn_weight = inputs[0], inputs[3], inputs[4]
    x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, -1, 2, 1] = torch.inf, torch.nan, -torch.inf
    residual[0, 0, 0, 0] = -torch.inf
    bn_weight[0] = 0  # times inf: NaN
    var[1], mean[2] = -1, torch.inf  # the root of a negative number, and inf - inf
    reference = composed(case, helpers.mapped(lambda t: t, (mean, var)))(*helpers.mapped(lambda t: t, inputs))
    assert reference.isnan().any()
    assert_same_non_finite(fused(case, (mean, var))(*inputs).cpu(), reference, "y")


@on(FUNCTION)
def test_the_sum_overflows_nowhere_on_the_way(backend: Backend) -> None:
    """The convolution alone is beyond float16; scaled, it is not."""
    x, weight = torch.full((1, 4, 2, 2), 200.0, dtype=torch.float16), torch.full((1, 4, 1, 1), 200.0).half()
    mean, var = torch.full((1,), 160_000.0), torch.full((1,), 1e10)
    y = CF.conv2d_bn_act(x.to(backend.device), weight.to(backend.device), None, mean, var, activation="none")
    assert_exact(y.cpu(), torch.zeros(1, 1, 2, 2, dtype=torch.float64))


@on(FUNCTION, "batch_norm_act_forward")
def test_unbatched(backend: Backend) -> None:
    (x, weight, bias, residual, *affine), statistics = inputs_of(KINDS[0], torch.float32, "nchw", backend.device)
    for training in (False, True):
        function = fused(KINDS[0], tuple(t.clone() for t in statistics), training=training)
        alone = function(x[0], weight, bias, residual[0], *affine)
        assert_same_bits(alone.unsqueeze(0), function(x[:1], weight, bias, residual[:1], *affine))


@on_dtypes(FUNCTION, "conv2d_backward", "batch_norm_act_backward")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_two_ops(backend: Backend, layout: str, activation: str, dtype: torch.dtype) -> None:
    for case in KINDS:
        check_gradients(case, *inputs_of(case, dtype, layout, backend.device), activation)


@on(FUNCTION, "conv2d_backward", "batch_norm_act_backward")
@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone(backend: Backend, wanted: int) -> None:
    """A single frozen or trained tensor is enough to take the differentiable way."""
    inputs, statistics = inputs_of(KINDS[0], torch.float32, "nchw", backend.device)
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    gradients = [
        torch.autograd.grad(function(KINDS[0], statistics)(*leaves).square().sum(), leaves[wanted])[0]
        for function in (fused, two_ops)
    ]
    assert_same_bits(*gradients)


@on(FUNCTION, "conv2d_backward", dtype=torch.float64)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend: Backend, activation: str) -> None:
    case = find(CONV2D, "1x1-s2-uneven")
    inputs, statistics = inputs_of(case, torch.float64, "channels_last", backend.device)
    leaves = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(fused(case, statistics, activation), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused(case, statistics, activation), leaves, fast_mode=True)


@on_dtypes(FUNCTION, "batch_norm_act_backward")
@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_training_is_the_two_ops(backend: Backend, dtype: torch.dtype, tracked: bool) -> None:
    case = KINDS[0]
    inputs, statistics = inputs_of(case, dtype, "channels_last", backend.device)
    dy = helpers.gradient_for(composed(case, statistics), inputs)
    results = []
    for function in (fused, two_ops):
        state = [t.clone() for t in statistics] if tracked else [None, None]
        results.append(
            [*helpers.evaluate(function(case, state, "silu", True), inputs, dy), *(state if tracked else [])]
        )
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert not tracked or not torch.equal(results[0][-1], statistics[1])


@on(FUNCTION)
def test_nothing_is_kept_between_calls(backend: Backend) -> None:
    """Every tensor that the folding reads may change in place: optimizers and running statistics do that."""
    inputs, statistics = inputs_of(KINDS[0], torch.float32, "nchw", backend.device)
    check(KINDS[0], inputs, statistics)
    for t in (*inputs, *statistics):
        t.mul_(1.5)
        check(KINDS[0], inputs, statistics)


@on(FUNCTION, "batch_norm_act_backward")
def test_transforms_take_the_two_ops(backend: Backend) -> None:
    case = KINDS[0]
    inputs, statistics = inputs_of(case, torch.float32, "nchw", backend.device)
    x, *rest = inputs
    samples = torch.stack([x, 2 * x - 1])
    function, expected = fused(case, statistics, "silu"), two_ops(case, statistics, "silu")
    got = torch.func.vmap(lambda x: function(x, *rest))(samples)
    assert_same_bits(got.contiguous(), torch.stack([expected(x, *rest) for x in samples]).contiguous())
    got = torch.func.grad(lambda *t: function(*t).square().sum(), (0, 4))(*inputs)
    leaves = [t.detach().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(expected(*leaves).square().sum(), (leaves[0], leaves[4]))
    for a, b in zip(got, wanted, strict=True):
        assert_same_bits(a.contiguous(), b.contiguous())


@on(FUNCTION, "batch_norm_act_backward", dtype=torch.bfloat16)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "gradient"])
def test_autocast_casts_all_but_the_batch_norm(backend: Backend, layout: str, gradient: bool) -> None:
    case = KINDS[0]
    inputs, statistics = inputs_of(case, torch.float32, layout, backend.device)
    for t in inputs:
        t.requires_grad_(gradient)
    low = [t.bfloat16() for t in inputs[:4]] + inputs[4:]
    for training in (False, True):
        function = fused(case, tuple(t.clone() for t in statistics), "silu", training)
        expected = function(*low)
        assert expected.dtype == torch.bfloat16
        with torch.autocast(backend.device, torch.bfloat16):
            y = function(*inputs)
        assert_same_bits(y.detach(), expected.detach())
        if gradient:
            gradients = torch.autograd.grad(y.float().sum(), inputs)
            assert [g.dtype for g in gradients] == [torch.float32] * 6


@on(FUNCTION)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_inference_is_one_op(backend: Backend, layout: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs, statistics = inputs_of(KINDS[0], torch.float32, layout, backend.device)
    function, targets = fused(KINDS[0], statistics), []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=note, dynamic=dynamic)
    with torch.no_grad():
        assert_same_bits(compiled(*inputs), function(*inputs))
    assert [name for name in targets if "cnnops" in name] == ["cnnops.conv2d_bn_act.default"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_without_gradients(layout: str) -> None:
    inputs, statistics = inputs_of(KINDS[0], torch.float32, layout, "cpu")
    arguments = (*inputs[:4], *statistics, *inputs[4:], 1, 1, 1, 1, 1, 1, 1, 0, EPS, "silu", "cpu")
    torch.library.opcheck(torch.ops.cnnops.conv2d_bn_act.default, arguments)


@on(FUNCTION)
def test_fake_outputs_have_the_real_strides(backend: Backend) -> None:
    for case in KINDS if backend.name == "triton" else CORNERS:  # the interpreter would take a minute for all
        for layout in LAYOUTS:
            (x, weight, *rest), statistics = inputs_of(case, torch.float32, layout, backend.device)
            for weight_layout in LAYOUTS:
                inputs = [x, helpers.laid_out(weight, weight_layout), *rest]
                real = fused(case, statistics)(*inputs)
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    copies = [None if t is None else mode.from_tensor(t) for t in (*inputs, *statistics)]
                    fake = fused(case, tuple(copies[6:]))(*copies[:6])
                assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@on(FUNCTION)
def test_flops_are_the_convolutions(backend: Backend) -> None:
    inputs, statistics = inputs_of(KINDS[0], torch.float32, "nchw", backend.device)
    totals = []
    for function in (fused, composed):
        with FlopCounterMode(display=False) as counter:
            function(KINDS[0], statistics)(*inputs)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_who_takes_it() -> None:
    """All of ours; explain says which one, for inference and for gradients."""
    assert all(helpers.claims(name, FUNCTION) for name in ("cpu", "simt", "triton"))
    inputs, statistics = inputs_of(KINDS[0], torch.float32, "nchw", "cpu")
    x, weight, bias, residual, *affine = inputs
    explanation = cnnops.explain(CF.conv2d_bn_act, x, weight, bias, *statistics, *affine, padding=1, residual=residual)
    assert explanation.backends == {
        FUNCTION: "cpu",
        "conv2d_forward": "cpu",
        "batch_norm_act_forward": "cpu",
        "batch_norm_act_backward": "cpu",
        "conv2d_backward": "cpu",
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_torchs_own_kernels(activation: str, residual: bool) -> None:
    with cnnops.use_backend("aten"):
        for dtype in DTYPES:
            inputs, statistics = inputs_of(KINDS[0], dtype, "channels_last", "cpu", residual)
            assert_same_bits(
                fused(KINDS[0], statistics, activation)(*inputs), composed(KINDS[0], statistics, activation)(*inputs)
            )
