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
CONV = {"stride_h": 1, "stride_w": 1, "pad_h": 1, "pad_w": 1, "groups": 1}
SCALARS = {
    "dilation_h": 1, "dilation_w": 1, "ceil_mode": False, "count_include_pad": True, "divisor_override": 0, "P": 1,
    "Q": 1, "training": True, "momentum": 0.1, "eps": 1e-5, "backend": "", "residual": None,
    "return_indices": False, "need_offsets": False,
}  # fmt: skip


def _norm(functional_norm):
    return lambda x, weight, bias, mean, var: functional_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)


# name: ours, torch's, names of the tensors it takes, the further values its torch.ops entry takes by name
OPS = {
    "conv2d": (
        lambda x, filters, bias: CF.conv2d(x, filters, bias, padding=1),
        lambda x, filters, bias: F.conv2d(x, filters, bias, padding=1),
        ("x", "filters", "bias"), CONV,
    ),
    "conv2d_act": (
        lambda x, filters, bias: CF.conv2d_act(x, filters, bias, padding=1),
        lambda x, filters, bias: F.relu(F.conv2d(x, filters, bias, padding=1)),
        ("x", "filters", "bias"), CONV | {"activation": "relu"},
    ),
    "max_pool2d": (lambda x: CF.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2), ("x",), WINDOW),
    "avg_pool2d": (lambda x: CF.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2), ("x",), WINDOW),
    "adaptive_avg_pool2d": (
        lambda x: CF.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, 1), ("x",), {},
    ),
    "adaptive_max_pool2d": (
        lambda x: CF.adaptive_max_pool2d(x, 1), lambda x: F.adaptive_max_pool2d(x, 1), ("x",), {},
    ),
    "batch_norm": (
        _norm(CF.batch_norm), _norm(F.batch_norm), ("x", "weight", "bias", "running_mean", "running_var"), None,
    ),
    "batch_norm_act": (
        _norm(CF.batch_norm_act), lambda *args: F.relu(_norm(F.batch_norm)(*args)),
        ("x", "weight", "bias", "running_mean", "running_var"), {"activation": "relu"},
    ),
}  # fmt: skip

# batch_norm has no torch.ops entry of its own: it is batch_norm_act without an activation.
ENTRIES = [
    (name, entry)
    for name in OPS
    for entry in ("functional", "torch.ops")
    if OPS[name][3] is not None or "." not in entry
]


def _by_schema(name, names, scalars):
    """torch.ops.cnnops.<name> as a function of the named tensors, its other arguments filled in by their names."""
    op = getattr(torch.ops.cnnops, name).default
    arguments = [argument.name for argument in op._schema.arguments]
    tensors = {"filters": "weight"}
    places = {tensors.get(tensor, tensor): i for i, tensor in enumerate(names)}
    template = [SCALARS.get(argument, scalars.get(argument)) for argument in arguments]
    spots = [(arguments.index(argument), place) for argument, place in places.items()]

    def call(*values):
        filled = template.copy()
        for spot, place in spots:
            filled[spot] = values[place]
        result = op(*filled)
        return result if isinstance(result, torch.Tensor) else result[0]

    return call


@pytest.mark.parametrize("pass_", ["forward", "forward+backward"])
@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_overhead(name, pass_, entry, measure, generator):
    ours, peer, names, scalars = OPS[name]
    if entry == "torch.ops":
        ours = _by_schema(name, names, scalars)
    dtype = torch.float32
    values = {
        "x": normal((1, 8, 4, 4), dtype, generator), "filters": normal((8, 8, 3, 3), dtype, generator),
        "weight": torch.full((8,), 1.5, device=generator.device), "bias": normal((8,), dtype, generator),
        "running_mean": torch.zeros(8, device=generator.device), "running_var": torch.ones(8, device=generator.device),
    }  # fmt: skip

    dy = normal(peer(*(values[n] for n in names)).shape, dtype, generator)

    def call(op):
        backward = pass_ == "forward+backward"
        leaves = [values[n].clone().requires_grad_(backward and not n.startswith("running")) for n in names]
        if not backward:
            return lambda: op(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return lambda: torch.autograd.grad(op(*leaves), wanted, dy)

    measure(
        op=name, case=entry, pass_=pass_, dtype=dtype, calls={OURS: call(ours), "torch": call(peer)},
        verify=agree("torch", 128), largest=values["x"].nbytes, layout="nchw", clock=CpuClock(time.thread_time),
        threads=1, limits=False,
    )  # fmt: skip
