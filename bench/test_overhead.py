"""What a call costs before any arithmetic: every public op on a tiny tensor, by its two entries, beside torch's.

Thread CPU time, so that neighbours do not count. `best_us` in the result file is the fastest sample.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from candidates import OURS, normal

import cnnops.functional as CF
from cnnops.bench.timing import CpuClock
from cnnops.bench.verify import agree

WINDOW = {"kernel_h": 2, "kernel_w": 2, "stride_h": 2, "stride_w": 2, "pad_h": 0, "pad_w": 0}
CONV = {"stride_h": 1, "stride_w": 1, "pad_h": 1, "pad_w": 1}
SCALARS = {
    "dilation_h": 1, "dilation_w": 1, "groups": 1, "pad_mode": 0, "output_pad_h": 0, "output_pad_w": 0,
    "ceil_mode": False, "count_include_pad": True, "divisor_override": 0, "need_offsets": False, "need_z": False,
    "training": True, "momentum": 0.1, "eps": 1e-5, "activation": "relu", "gate": "sigmoid", "backend": "",
}  # fmt: skip


def _norm(functional_norm):
    return lambda x, weight, bias, mean, var: functional_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)


def _squeeze_excite(x, fc1, fc1_bias, fc2, fc2_bias):
    hidden = F.relu(F.linear(x.mean((2, 3)), fc1, fc1_bias))
    return x * torch.sigmoid(F.linear(hidden, fc2, fc2_bias))[:, :, None, None]


FILTERED = {"x": "x", "weight": "filters", "bias": "bias"}
STATISTICS = {"running_mean": "running_mean", "running_var": "running_var"}
NORM = {"x": "x", "weight": "weight", "bias": "beta"} | STATISTICS

# op: ours, torch's, the tensors in both calls' order (argument of the torch.ops entry: value below), and the other
# arguments of that entry which `SCALARS` lacks; None for a function that has no entry of its own.
OPS = {
    "conv2d": (
        lambda x, filters, bias: CF.conv2d(x, filters, bias, padding=1),
        lambda x, filters, bias: F.conv2d(x, filters, bias, padding=1), FILTERED, CONV,
    ),
    "conv2d reflect": (
        lambda x, filters, bias: CF.conv2d(x, filters, bias, padding=1, padding_mode="reflect"),
        lambda x, filters, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), filters, bias), FILTERED, None,
    ),
    "conv2d_act": (
        lambda x, filters, bias: CF.conv2d_act(x, filters, bias, padding=1),
        lambda x, filters, bias: F.relu(F.conv2d(x, filters, bias, padding=1)), FILTERED, CONV,
    ),
    "conv2d_bn_act": (
        lambda x, filters, bias, *norm: CF.conv2d_bn_act(x, filters, bias, *norm, padding=1),
        lambda x, filters, bias, *norm: F.relu(F.batch_norm(F.conv2d(x, filters, bias, padding=1), *norm)),
        FILTERED | STATISTICS | {"bn_weight": "weight", "bn_bias": "beta"}, CONV,
    ),
    "conv_transpose2d": (
        lambda x, filters, bias: CF.conv_transpose2d(x, filters, bias, padding=1),
        lambda x, filters, bias: F.conv_transpose2d(x, filters, bias, padding=1), FILTERED, CONV,
    ),
    "max_pool2d": (lambda x: CF.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2), {"x": "x"}, WINDOW),
    "max_unpool2d": (
        lambda x, indices: CF.max_unpool2d(x, indices, 2), lambda x, indices: F.max_unpool2d(x, indices, 2),
        {"x": "pooled", "indices": "indices"}, {"P": 4, "Q": 4},
    ),
    "avg_pool2d": (lambda x: CF.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2), {"x": "x"}, WINDOW),
    "adaptive_avg_pool2d": (
        lambda x: CF.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, 1), {"x": "x"}, {"P": 1, "Q": 1},
    ),
    "adaptive_max_pool2d": (
        lambda x: CF.adaptive_max_pool2d(x, 1), lambda x: F.adaptive_max_pool2d(x, 1), {"x": "x"}, {"P": 1, "Q": 1},
    ),
    "batch_norm": (_norm(CF.batch_norm), _norm(F.batch_norm), NORM, None),
    "batch_norm_act": (_norm(CF.batch_norm_act), lambda *args: F.relu(_norm(F.batch_norm)(*args)), NORM, {}),
    "bn_act_max_pool2d": (
        _norm(CF.bn_act_max_pool2d), lambda *args: F.max_pool2d(F.relu(_norm(F.batch_norm)(*args)), 3, 2, 1),
        NORM, WINDOW | {"kernel_h": 3, "kernel_w": 3, "pad_h": 1, "pad_w": 1},
    ),
    "squeeze_excite": (
        CF.squeeze_excite, _squeeze_excite,
        {"x": "x", "weight1": "fc1", "bias1": "fc1_bias", "weight2": "fc2", "bias2": "fc2_bias"}, {},
    ),
}  # fmt: skip

ENTRIES = [
    (name, entry)
    for name in OPS
    for entry in ("functional", "torch.ops")
    if OPS[name][3] is not None or "." not in entry
]


def _by_schema(name, tensors, scalars):
    """torch.ops.cnnops.<name> as a function of the tensors, its other arguments filled in by their names."""
    op = getattr(torch.ops.cnnops, name).default
    arguments = [argument.name for argument in op._schema.arguments]
    template = [(SCALARS | scalars).get(argument) for argument in arguments]
    spots = [arguments.index(argument) for argument in tensors]

    def call(*values):
        filled = template.copy()
        for spot, value in zip(spots, values, strict=True):
            filled[spot] = value
        result = op(*filled)
        return result if isinstance(result, torch.Tensor) else result[0]

    return call


@pytest.mark.parametrize("pass_", ["forward", "forward+backward"])
@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_overhead(name, pass_, entry, measure, generator):
    ours, peer, tensors, scalars = OPS[name]
    if entry == "torch.ops":
        ours = _by_schema(name, tensors, scalars)
    names = tuple(tensors.values())
    dtype = torch.float32
    device = generator.device
    values = {
        "x": normal((1, 8, 4, 4), dtype, generator), "filters": normal((8, 8, 3, 3), dtype, generator),
        "weight": torch.full((8,), 1.5, device=device), "bias": normal((8,), dtype, generator),
        "beta": normal((8,), dtype, generator), "running_mean": torch.zeros(8, device=device),
        "running_var": torch.ones(8, device=device), "pooled": normal((1, 8, 2, 2), dtype, generator),
        "indices": torch.tensor([[0, 2], [8, 10]], device=device).expand(1, 8, 2, 2).contiguous(),
        "fc1": normal((2, 8), dtype, generator), "fc1_bias": normal((2,), dtype, generator),
        "fc2": normal((8, 2), dtype, generator), "fc2_bias": normal((8,), dtype, generator),
    }  # fmt: skip

    dy = normal(peer(*(values[n] for n in names)).shape, dtype, generator)

    def call(op):
        backward = pass_ == "forward+backward"
        leaves = [
            values[n].clone().requires_grad_(backward and not n.startswith(("running", "indices"))) for n in names
        ]
        if not backward:
            return lambda: op(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return lambda: torch.autograd.grad(op(*leaves), wanted, dy)

    measure(
        op=name, case=entry, pass_=pass_, dtype=dtype, calls={OURS: call(ours), "torch": call(peer)},
        verify=agree("torch", 128), largest=values["x"].nbytes, layout="nchw", clock=CpuClock(time.thread_time),
        threads=1, limits=False,
    )  # fmt: skip
