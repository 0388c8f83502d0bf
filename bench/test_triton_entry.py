"""What it costs to enter a Triton kernel: by our opaque ops, and by an op of torch.library.triton_op.

`triton_op` shows the kernel to Inductor, at a price on every eager call. Both entries reach the same host function of
the backend, whose launches are dropped: thread CPU time of everything before them, on tiny tensors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from candidates import OURS, normal

import cnnops
import cnnops.functional as CF
from cnnops.backends.triton import launch
from cnnops.bench.timing import CpuClock

pytest.importorskip("triton")


@torch.library.triton_op("cnnops_bench::conv2d", mutates_args=())
def conv2d(x: torch.Tensor, weight: torch.Tensor, pad: int) -> torch.Tensor:
    from cnnops.backends.triton.conv2d import conv2d_forward

    return conv2d_forward(x, weight, None, 1, 1, pad, pad, 1, 1, 1, 0)


@torch.library.triton_op("cnnops_bench::conv2d_backward", mutates_args=())
def conv2d_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from cnnops.backends.triton import conv2d as kernels

    dx, dweight, _ = kernels.conv2d_backward(dy, x, weight, 1, 1, pad, pad, 1, 1, 1, 0, True, True, False)
    return dx, dweight


def _save(ctx, inputs, output):
    x, weight, ctx.pad = inputs
    ctx.save_for_backward(x, weight)


conv2d.register_autograd(lambda ctx, dy: (*conv2d_backward(dy, *ctx.saved_tensors, ctx.pad), None), setup_context=_save)


@pytest.fixture
def without_launches() -> Iterator[None]:
    with cnnops.use_backend("triton"), launch.recording(lambda _: None, launch.Device(90, 132)):
        yield


def _of_equal_shape(results) -> None:
    shapes = {name: [tuple(t.shape) for t in (r if isinstance(r, tuple) else (r,))] for name, r in results.items()}
    assert len({str(shape) for shape in shapes.values()}) == 1, shapes


@pytest.mark.parametrize("pass_", ["forward", "forward+backward"])
def test_entry(pass_, measure, generator, without_launches):
    x, weight = normal((1, 8, 4, 4), torch.float32, generator), normal((8, 8, 3, 3), torch.float32, generator)
    dy = torch.ones_like(x)

    def call(op):
        if pass_ == "forward":
            return lambda: op(x, weight)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        return lambda: torch.autograd.grad(op(*leaves), leaves, dy)

    entries = {
        OURS: call(lambda x, weight: CF.conv2d(x, weight, padding=1)),
        "torch triton_op": call(lambda x, weight: conv2d(x, weight, 1)),
    }
    measure(
        op="conv2d", case="entry", pass_=pass_, dtype=torch.float32, calls=entries, verify=_of_equal_shape,
        largest=x.nbytes, layout="nchw", clock=CpuClock(time.thread_time), threads=1, limits=False,
    )  # fmt: skip
