"""The 2-d pools, forward and backward, over the layers of real networks."""

from __future__ import annotations

from functools import partial

import pytest
import torch.nn.functional as F
from candidates import backward, forward, normal

import cnnops.functional as CF
from cnnops.bench.verify import agree

CASES = "pool2d"


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_pool2d(case, dtype, pass_, measure, generator, pytestconfig):
    x = normal(case.x_shape, dtype, generator)
    ours, peer = (partial(getattr(functional, case.op), **case.arguments()) for functional in (CF, F))
    dy = normal(peer(x).shape, dtype, generator)
    layout, traffic = pytestconfig.option.layout, x.nbytes + dy.nbytes
    if pass_ == "forward":
        calls = forward(ours, peer, [x], layout, pytestconfig.option.inductor)
    else:
        calls = backward(ours, peer, [x], [0], dy, layout)
        if case.op == "max_pool2d":
            traffic += dy.numel()  # a byte for each output says where its maximum was
    measure(
        op=case.op, case=f"{case.id} N{case.N}", pass_=pass_, dtype=dtype, calls=calls,
        verify=agree("torch nchw", case.window), largest=x.nbytes, bytes=traffic,
    )  # fmt: skip
