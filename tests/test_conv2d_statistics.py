"""The convolution that gives the statistics of its result too, an op of the backends for GPUs."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from cases import CONV2D, Conv2dCase, find, of_suite
from helpers import Backend, over
from tolerance import assert_same_bits

FUNCTION = "conv2d_statistics_forward"
ON_GPUS = tuple(name for name in (*helpers.BACKENDS, *helpers.VARIANTS) if helpers.claims(name, FUNCTION))
CORNERS = tuple(case for case in of_suite(CONV2D, "corner") if case.C)


def geometry(case: Conv2dCase) -> tuple[int, ...]:
    problem = helpers.problem_of(FUNCTION, case, torch.float32, "nchw", "cpu")
    pairs = ((getattr(problem, f"{name}_h"), getattr(problem, f"{name}_w")) for name in ("stride", "pad", "dilation"))
    return (*sum(pairs, ()), case.groups, 0)


def run(backend: Backend, case: Conv2dCase, inputs: Any) -> tuple[torch.Tensor, ...]:
    result: tuple[torch.Tensor, ...] = helpers.row(backend.name).function(FUNCTION)(*inputs, *geometry(case))
    return result


def check(backend: Backend, case: Conv2dCase, inputs: Any) -> None:
    """Of what was written, not of what was summed; y is conv2d's own."""
    y, mean, m2 = run(backend, case, inputs)
    plain = helpers.row(backend.name).function("conv2d_forward")(*inputs, *geometry(case))
    assert_same_bits(y, plain, "y")
    helpers.check_moments(y, mean, m2)


@over(FUNCTION, [case for case in CORNERS if case.N], backends=ON_GPUS)
def test_statistics(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    inputs = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    check(backend, case, inputs)
    if dtype == torch.float32 and backend.name in helpers.WITH_TF32:
        with helpers.tf32():
            check(backend, case, inputs)


@pytest.mark.parametrize("backend", ON_GPUS, indirect=True)
def test_far_from_zero(backend: Backend) -> None:
    """Squares of these numbers have more digits than float32, so that raw sums of them would tell nothing."""
    case, random = find(CONV2D, "3x3-pad-bias"), helpers.generator("far from zero")
    x = torch.randint(0, 2, case.x_shape, generator=random).to(backend.device, torch.float32)
    weight = torch.zeros(case.weight_shape, device=backend.device)
    weight[:, 0, 1, 1] = 1
    check(backend, case, (x, weight, torch.full((case.K,), 4097.0, device=backend.device)))


@over(FUNCTION, [case for case in CORNERS if case.N and case.K > 1], backends=ON_GPUS)
def test_an_infinite_channel_has_an_infinite_mean(
    backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str
) -> None:
    """Wherever the infinities lie; as torch's mean, and with squares that are no number."""
    x, weight, _ = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    for channel in (0, case.K - 1):
        bias = torch.zeros(case.K, dtype=dtype, device=backend.device)
        bias[channel] = -torch.inf
        _, mean, m2 = run(backend, case, (x, weight, bias))
        there = torch.arange(case.K) == channel
        assert mean.isneginf().cpu().equal(there)
        assert m2.isnan().cpu().equal(there)


@pytest.mark.parametrize("backend", ON_GPUS, indirect=True)
def test_of_nothing(backend: Backend) -> None:
    case = find(CONV2D, "3x3-pad-bias").with_batch(0)
    y, mean, m2 = run(backend, case, helpers.conv2d_inputs(case, torch.float32, "nchw", backend.device))
    assert y.shape == case.output_shape
    assert not mean.any() and not m2.any()
