"""Convolution, batch norm with running statistics and ReLU in one pass, beside the three ops it stands for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from candidates import forward, normal

import cnnops.functional as CF
from cnnops.bench.verify import agree

CASES = "conv2d_bn_act"


def test_conv2d_bn_act(case, dtype, measure, generator, pytestconfig):
    x = normal(case.x_shape, dtype, generator)
    fan_in = math.prod(case.weight_shape[1:])
    weight = normal(case.weight_shape, dtype, generator) * (2 / fan_in) ** 0.5
    vectors = [torch.full((case.K,), value, device=x.device) for value in (0.1, 1.5, 1.2, -0.1)]
    y_bytes = math.prod(case.output_shape) * x.element_size()

    def ours(x, weight):
        return CF.conv2d_bn_act(x, weight, None, *vectors, **case.arguments())

    def peer(x, weight):
        return F.relu(F.batch_norm(F.conv2d(x, weight, **case.arguments()), *vectors))

    measure(
        op="conv2d_bn_act", case=f"{case.id} N{case.N} eval", pass_="forward", dtype=dtype,
        calls=forward(ours, peer, (x, weight), pytestconfig.option.layout, pytestconfig.option.inductor),
        verify=agree("torch nchw", fan_in), largest=max(x.nbytes, y_bytes), flops=case.flops,
        bytes=x.nbytes + weight.nbytes + y_bytes,
    )  # fmt: skip
