"""conv2d, each of its three passes, over the layers of real networks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch.nn.functional as F
from candidates import backward, forward, normal

import cnnops.functional as CF
from cnnops.bench.verify import agree

CASES = "conv2d"


@pytest.mark.parametrize("pass_", ["forward", "backward_input", "backward_weight"])
def test_conv2d(case, dtype, pass_, measure, generator, pytestconfig):
    x = normal(case.x_shape, dtype, generator)
    fan_in = math.prod(case.weight_shape[1:])
    weight = normal(case.weight_shape, dtype, generator) * (2 / fan_in) ** 0.5
    dy = normal(case.output_shape, dtype, generator)
    ours, peer = partial(CF.conv2d, **case.arguments()), partial(F.conv2d, **case.arguments())
    layout = pytestconfig.option.layout
    if pass_ == "forward":
        calls, reduction = forward(ours, peer, (x, weight), layout, pytestconfig.option.inductor), fan_in
    elif pass_ == "backward_input":
        calls = backward(ours, peer, (x, weight), [0], dy, layout)
        reduction = case.K // case.groups * case.R * case.S
    else:
        calls = backward(ours, peer, (x, weight), [1], dy, layout)
        reduction = dy.numel() // case.K
    measure(
        op="conv2d", case=f"{case.id} N{case.N}", pass_=pass_, dtype=dtype, calls=calls,
        verify=agree("torch nchw", reduction), largest=max(x.nbytes, dy.nbytes), flops=case.flops,
        bytes=x.nbytes + weight.nbytes + dy.nbytes,
    )  # fmt: skip
