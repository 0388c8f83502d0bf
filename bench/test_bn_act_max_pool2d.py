"""Batch norm, ReLU and max pool of the ImageNet stem in one op, beside the three that a user writes without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from candidates import backward, forward, normal

import cnnops.functional as CF
from cnnops.bench.verify import agree

CASES = "bn_act_max_pool2d"


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_bn_act_max_pool2d(case, dtype, pass_, measure, generator, pytestconfig):
    x = normal(case.x_shape, dtype, generator)
    values = [x, *(torch.full((case.C,), value, device=x.device) for value in (1.5, 0.1))]
    window = (case.kernel, case.stride, case.padding)

    def ours(x, weight, bias):
        return CF.bn_act_max_pool2d(x, None, None, weight, bias, True, 0.1, 1e-5, *window)

    def peer(x, weight, bias):
        return F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, True)), *window)

    dy = normal(peer(*values).shape, dtype, generator)
    layout = pytestconfig.option.layout
    if pass_ == "forward":
        calls, traffic = forward(ours, peer, values, layout, pytestconfig.option.inductor), 2 * x.nbytes + dy.nbytes
    else:
        # x, dy and a byte for each output are read twice, for the sums and for dx.
        calls = backward(ours, peer, values, range(3), dy, layout)
        traffic = 3 * x.nbytes + 2 * (dy.nbytes + dy.numel())
    measure(
        op="bn_act_max_pool2d", case=f"{case.id} N{case.N}", pass_=pass_, dtype=dtype, calls=calls,
        verify=agree("torch nchw", case.N * case.H * case.W), largest=x.nbytes, bytes=traffic,
    )  # fmt: skip
