"""What the Triton depthwise kernels fuse: residual, activation, statistics, means over an image."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from activations import ACTIVATIONS, of_activated
from cases import CONV2D, Conv2dCase, find, of_suite
from helpers import Backend, over
from test_conv2d_bn_act import EPS, composed, inputs_of
from test_conv2d_statistics import geometry
from tolerance import assert_close, assert_same_bits, assert_same_layout

from cnnops.backends.triton import depthwise_conv2d_plan as plan
from cnnops.tuning import choose
from cnnops.tuning.triton.depthwise_conv2d import BACKWARD, FORWARD

pytest.importorskip("triton")

POOLED = "conv2d_bn_act_pooled_forward"
TRITON = ("triton",)
DEPTHWISE = tuple(case for case in of_suite(CONV2D, "corner") if case.C and case.depthwise)
# What functional makes of padding="same" is no matter of a backend's.
NONEMPTY = [case for case in DEPTHWISE if case.N and not isinstance(case.padding, str)]
KINDS = [find(CONV2D, f"depthwise-{id}") for id in ("3x3-ragged", "5x5-s2", "3x3-d2", "multiplier-3-s2")]


def forward(case: Conv2dCase, inputs: Any, dtype: torch.dtype, layout: str, **wanted: Any) -> Any:
    from cnnops.backends.triton import depthwise_conv2d

    x, weight, bias = inputs
    problem = helpers.problem_of("conv2d_forward", case, dtype, layout, x.device.type)
    return depthwise_conv2d.forward(problem, x, weight, bias=bias, **wanted)


def pool(case: Conv2dCase, inputs: Any, statistics: Any, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias, residual, *affine = inputs
    function = helpers.row("triton").function(POOLED)
    result: tuple[torch.Tensor, torch.Tensor] = function(
        x, weight, bias, residual, *statistics, *affine, *geometry(case), EPS, activation
    )
    return result


def check_means(y: torch.Tensor, pooled: torch.Tensor) -> None:
    exact, axes = y.cpu().double(), (2, 3)
    assert_close(pooled, exact.float().mean(axes), exact.mean(axes), exact.abs().mean(axes), y[0, 0].numel(), "pooled")


@over(POOLED, NONEMPTY, backends=TRITON)
def test_batch_norm_activation_and_means(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    for activation, residual in (("silu", False), ("none", True)):
        inputs, statistics = inputs_of(case, dtype, layout, backend.device, residual)
        y, pooled = pool(case, inputs, statistics, activation)
        same_dtype = composed(case, statistics, activation)(*inputs)
        mean, var = helpers.mapped(lambda t: t, statistics)
        reference = composed(case, (mean, var), activation)(*helpers.mapped(lambda t: t, inputs))
        magnitude = composed(case, (-mean.abs(), var), "none")(*helpers.mapped(torch.abs, inputs))
        assert_same_layout(y, same_dtype, "y")
        length = case.R * case.S + len(inputs)
        assert_close(y, same_dtype, reference, of_activated(magnitude, reference), length, "y")
        check_means(y, pooled)


@over(POOLED, KINDS, backends=TRITON)
def test_batch_norm_without_weight_and_bias(
    backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str
) -> None:
    inputs, statistics = inputs_of(case, dtype, layout, backend.device, False, affine=False)
    ones, zeros = (make(case.K, device=backend.device) for make in (torch.ones, torch.zeros))
    bare, affine = (pool(case, [*inputs[:4], *rest], statistics, "relu") for rest in ((None, None), (ones, zeros)))
    for a, b in zip(bare, affine, strict=True):
        assert_same_bits(a, b)


@over(POOLED, NONEMPTY, backends=TRITON)
def test_statistics(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    """Of what was written, not of what was summed; y is conv2d's own."""
    inputs = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    done = forward(case, inputs, dtype, layout, statistics=True)
    assert_same_bits(done.y, helpers.row("triton").function("conv2d_forward")(*inputs, *geometry(case)), "y")
    helpers.check_moments(done.y, *done.statistics)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_statistics_far_from_zero_in_many_parts(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of these numbers have more digits than float32, so that raw sums of them would tell nothing."""
    from cnnops.backends.triton import epilogue

    monkeypatch.setattr(epilogue, "_MERGE_ROWS", 4)
    monkeypatch.setattr(epilogue, "_MERGE_STEPS", 2)
    case = Conv2dCase("tall", 3, 5, 30, 23, 5, 1, 1, groups=5)
    x = torch.randint(0, 2, case.x_shape, generator=helpers.generator("far")).to(backend.device, torch.float32)
    weight = torch.ones(case.weight_shape, device=backend.device)
    bias = torch.full((5,), 4097.0, device=backend.device)
    problem = helpers.problem_of("conv2d_forward", case, torch.float32, "nchw", backend.device)
    assert plan.parts_of(plan.forward(problem, "none")) > 8
    done = forward(case, (x, weight, bias), torch.float32, "nchw", statistics=True)
    helpers.check_moments(done.y, *done.statistics)


@over(POOLED, KINDS, backends=TRITON)
def test_residual_activation_and_z(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    inputs = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    random = helpers.generator("residual")
    residual = helpers.laid_out(helpers.randn(case.output_shape, dtype, backend.device, random), layout)
    conv2d = helpers.torch_conv2d(case)
    exact = conv2d(*helpers.mapped(lambda t: t, inputs)) + residual.cpu().double()
    magnitude = conv2d(*helpers.mapped(torch.abs, inputs)) + residual.cpu().double().abs()
    for activation in ("relu6", "silu"):
        done = forward(case, inputs, dtype, layout, residual=residual, activation=activation, need_z=True)
        length = case.R * case.S + 2
        assert_close(done.z, conv2d(*inputs) + residual, exact, magnitude, length, "z")
        assert_same_layout(done.z, done.y, "z")
        z = done.z.cpu()
        reference = ACTIVATIONS[activation](z.double())
        assert_close(done.y, ACTIVATIONS[activation](z), reference, of_activated(z.double().abs(), reference), 1, "y")
        alone = forward(case, inputs, dtype, layout, residual=residual, activation=activation)
        assert alone.z is None
        if dtype == torch.float32:
            assert_same_bits(alone.y, done.y, "y without z")


@over(POOLED, [*KINDS, find(CONV2D, "depthwise-s5-exceeds-input")], backends=TRITON)
def test_the_gradient_of_x_with_a_bias(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    """Which is what a transposed convolution is."""
    from cnnops.backends.triton import depthwise_conv2d

    _, weight, _ = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    random = helpers.generator("dy")
    dy = helpers.laid_out(helpers.randn(case.output_shape, dtype, backend.device, random), layout)
    bias = helpers.randn((case.C,), dtype, backend.device, random)
    problem = helpers.problem_of("conv2d_forward", case, dtype, layout, backend.device)
    got = depthwise_conv2d.backward_input(problem, dy, weight, bias)

    def theirs(dy: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        dx = torch.nn.grad.conv2d_input(case.x_shape, weight, dy, case.stride, case.padding, case.dilation, case.groups)
        return dx + bias[:, None, None]

    reference, magnitude = (theirs(*helpers.mapped(change, (dy, weight, bias))) for change in (lambda t: t, torch.abs))
    length = case.R * case.S * (case.K // case.C) + 1
    assert_close(got, theirs(dy, weight, bias), reference, magnitude, length, "dx")


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_of_nothing(backend: Backend) -> None:
    case = find(CONV2D, "depthwise-3x3").with_batch(0)
    inputs, statistics = inputs_of(case, torch.float32, "nchw", backend.device, False)
    y, pooled = pool(case, inputs, statistics, "relu")
    assert (y.shape, pooled.shape) == (case.output_shape, (0, case.K))
    done = forward(case, inputs[:3], torch.float32, "nchw", statistics=True, need_z=True)
    assert done.z.shape == case.output_shape
    assert not any(t.any() for t in done.statistics)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_others_are_refused(backend: Backend) -> None:
    for case in (find(CONV2D, "3x3-pad-bias"), find(CONV2D, "5x2-uneven-everything")):
        problem = helpers.problem_of(POOLED, case, torch.float32, "nchw", backend.device)
        assert "depthwise" in helpers.row("triton").supports(POOLED, problem).reason


@pytest.mark.parametrize("table", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_every_row_of_the_table_is_compiled(table: Any) -> None:
    """A row that holds for no call of `calls.py` is never compiled, unless it is for the interpreter."""

    from cnnops.backends.triton.calls import DEPTHWISE as CALLS

    problems = [
        replace(p, dtype=dtype) for p, dtype in itertools.product(CALLS.values(), (torch.float32, torch.bfloat16))
    ]
    chosen = [choose(table, p) for p in problems]
    for rule in table.rules:
        assert rule.config in chosen or rule.condition(replace(problems[0], device="cpu")), rule.reason


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_splits_cover_every_pixel(processors: int) -> None:
    from cnnops.backends.triton.calls import DEPTHWISE as CALLS

    for p in CALLS.values():
        split = (plan.backward if plan.shares_dy(p) else plan.backward_weight)(p, processors)
        scalars, constants = split.partial.scalars, split.partial.constants
        covered = split.splits * scalars["steps"] * constants["BLOCK_M"]
        assert covered >= scalars.get("positions", scalars.get("pixels"))
        assert (split.total is None) == (split.splits == 1)
