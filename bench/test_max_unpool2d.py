"""max_unpool2d, forward and backward, over the layers of a network that undoes its pools."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from candidates import backward, forward, normal

import cnnops.functional as CF
from cnnops.bench.verify import agree

CASES = "max_unpool2d"


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_max_unpool2d(case, dtype, pass_, measure, generator, pytestconfig):
    pooled = F.max_pool2d(normal(case.output_shape, dtype, generator), case.kernel, case.stride, return_indices=True)
    dy, layout = normal(case.output_shape, dtype, generator), pytestconfig.option.layout

    def ours(x, indices):
        return CF.max_unpool2d(x, indices, case.kernel, case.stride)

    def peer(x, indices):
        return F.max_unpool2d(x, indices, case.kernel, case.stride)

    if pass_ == "forward":
        calls = forward(ours, peer, pooled, layout, pytestconfig.option.inductor)
    else:
        calls = backward(ours, peer, pooled, [0], dy, layout)
    measure(
        op="max_unpool2d", case=f"{case.id} N{case.N}", pass_=pass_, dtype=dtype, calls=calls,
        verify=agree("torch nchw", 1), largest=dy.nbytes, bytes=dy.nbytes + sum(t.nbytes for t in pooled),
    )  # fmt: skip
