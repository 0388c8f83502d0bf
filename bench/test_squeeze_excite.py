"""squeeze_excite beside what a user writes without it: a mean, two linear layers, a product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from candidates import backward, forward, normal

import cnnops.functional as CF
from cnnops.bench.verify import agree

CASES = "squeeze_excite"


def _peer(x, weight1, bias1, weight2, bias2):
    hidden = F.relu(F.linear(x.mean((2, 3)), weight1, bias1))
    return x * torch.sigmoid(F.linear(hidden, weight2, bias2))[:, :, None, None]


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_squeeze_excite(case, dtype, pass_, measure, generator, pytestconfig):
    shapes = case.x_shape, (case.M, case.C), (case.M,), (case.C, case.M), (case.C,)
    values = [normal(shape, dtype, generator) for shape in shapes]
    x, dy, layout = values[0], normal(case.x_shape, dtype, generator), pytestconfig.option.layout
    # Forward reads x for the means and again to scale it; backward reads x and dy for the gate's gradient, then dy.
    if pass_ == "forward":
        calls, sweeps = forward(CF.squeeze_excite, _peer, values, layout, pytestconfig.option.inductor), 3
    else:
        calls, sweeps = backward(CF.squeeze_excite, _peer, values, range(len(values)), dy, layout), 4
    measure(
        op="squeeze_excite", case=f"{case.id} N{case.N}", pass_=pass_, dtype=dtype, calls=calls,
        verify=agree("torch nchw", case.H * case.W * case.M), largest=x.nbytes, bytes=sweeps * x.nbytes,
    )  # fmt: skip
