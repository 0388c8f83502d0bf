"""Batch norm alone, with ReLU, and with a residual and ReLU, over the layers of real networks.

The peer of `batch_norm_act` is what a user writes without it: F.batch_norm, an addition, F.relu.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from candidates import backward, forward, normal

import cnnops.functional as CF
from cnnops.bench.verify import agree

CASES = "batch_norm"

# Passes over the whole tensor that memory must serve: training reads x once for the statistics and once to apply them;
# backward reads dy and x once for each of the same two steps and writes dx. A residual is one more read, its gradient
# one more write.
SWEEPS = {"eval": 2, "forward": 3, "backward": 5}


@pytest.mark.parametrize("variant", ["batch_norm", "batch_norm_act", "batch_norm_act+residual"])
@pytest.mark.parametrize("pass_", ["eval", "forward", "backward"])
def test_batch_norm(case, dtype, variant, pass_, measure, generator, pytestconfig):
    # Away from zero and with the residual on the same side, so that rounding flips no ReLU between two right results.
    noise = normal(case.x_shape, torch.float32, generator)
    x = (noise + 0.25 * noise.sign()).to(dtype)
    residual = noise.sign() * normal(case.x_shape, torch.float32, generator).abs()
    values = [x, *(torch.full((case.C,), value, device=x.device) for value in (1.5, 0.0))]
    mean, var = torch.zeros_like(values[1]), torch.ones_like(values[1])
    if variant.endswith("residual"):
        values.append(residual.to(dtype))
    training = pass_ != "eval"

    def stats():
        return mean.clone(), var.clone()

    # Each side has running statistics of its own, because it updates them.
    ours_stats, peer_stats = stats(), stats()

    def ours(x, weight, bias, residual=None):
        arguments = (x, *ours_stats, weight, bias, training, case.momentum, case.eps)
        return CF.batch_norm(*arguments) if variant == "batch_norm" else CF.batch_norm_act(*arguments, residual, "relu")

    def peer(x, weight, bias, residual=None):
        y = F.batch_norm(x, *peer_stats, weight, bias, training, case.momentum, case.eps)
        y = y if residual is None else y + residual
        return y if variant == "batch_norm" else F.relu(y)

    layout, sweeps = pytestconfig.option.layout, SWEEPS[pass_] + len(values) - 3
    if pass_ == "backward":
        dy = normal(case.x_shape, dtype, generator)
        calls = backward(ours, peer, values, range(len(values)), dy, layout)
    else:
        calls = forward(ours, peer, values, layout, pytestconfig.option.inductor)
    measure(
        op=variant, case=f"{case.id} N{case.N}{'' if training else ' eval'}",
        pass_="backward" if pass_ == "backward" else "forward", dtype=dtype, calls=calls,
        verify=agree("torch nchw", case.count), largest=x.nbytes, bytes=sweeps * x.nbytes,
    )  # fmt: skip
