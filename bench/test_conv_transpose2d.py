"""conv_transpose2d, each of its three passes, over the layers of decoders."""

from __future__ import annotations

from functools import partial

import pytest
import torch.nn.functional as F
from candidates import backward, forward, normal

import cnnops.functional as CF
from cnnops.bench.verify import agree

CASES = "conv_transpose2d"


@pytest.mark.parametrize("pass_", ["forward", "backward_input", "backward_weight"])
def test_conv_transpose2d(case, dtype, pass_, measure, generator, pytestconfig):
    x = normal(case.x_shape, dtype, generator)
    taps = case.R * case.S
    weight = normal(case.weight_shape, dtype, generator) * (2 / (case.C // case.groups * taps)) ** 0.5
    dy = normal(case.output_shape, dtype, generator)
    ours, peer = partial(CF.conv_transpose2d, **case.arguments()), partial(F.conv_transpose2d, **case.arguments())
    layout = pytestconfig.option.layout
    if pass_ == "forward":
        calls = forward(ours, peer, (x, weight), layout, pytestconfig.option.inductor)
        reduction = case.C // case.groups * taps
    elif pass_ == "backward_input":
        calls, reduction = backward(ours, peer, (x, weight), [0], dy, layout), case.K // case.groups * taps
    else:
        calls, reduction = backward(ours, peer, (x, weight), [1], dy, layout), case.N * case.H * case.W
    measure(
        op="conv_transpose2d", case=f"{case.id} N{case.N}", pass_=pass_, dtype=dtype, calls=calls,
        verify=agree("torch nchw", reduction), largest=max(x.nbytes, dy.nbytes), flops=case.flops,
        bytes=x.nbytes + weight.nbytes + dy.nbytes,
    )  # fmt: skip
