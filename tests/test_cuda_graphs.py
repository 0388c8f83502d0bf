"""Convolutions in CUDA graphs, on a device: whatever a call does on the host, a replay does without."""

from __future__ import annotations

import helpers
import pytest
import torch
from cases import CONV2D, Conv2dCase, find
from helpers import Backend
from tolerance import assert_same_bits

import cnnops.functional as CF

ON_CUDA = [name for name in (*helpers.BACKENDS, *helpers.VARIANTS) if name.startswith("cuda")]
CASES = (
    find(CONV2D, "3x3-pad-bias"),
    find(CONV2D, "7x7-s2-stem"),
    find(CONV2D, "depthwise-3x3-ragged"),
    Conv2dCase("halo", 4, 64, 56, 56, 64, 3, 3, padding=(1, 1), bias=True),
    Conv2dCase("divided-sums", 8, 256, 7, 7, 256, 3, 3, padding=(1, 1), bias=True),
)


@pytest.mark.parametrize("backend", ON_CUDA, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_replay_computes_from_what_is_there_then(backend: Backend, case: Conv2dCase) -> None:
    inputs = helpers.conv2d_inputs(case, torch.bfloat16, "channels_last", backend.device)
    leaves = [t.detach().requires_grad_() for t in inputs if t is not None]
    absent = [None] * (3 - len(leaves))
    dy = helpers.like(CF.conv2d(*leaves, *absent, **case.arguments()).detach(), helpers.generator("graph"))

    def step() -> list[torch.Tensor]:
        y = CF.conv2d(*leaves, *absent, **case.arguments())
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (1.0, -0.5):
        with torch.no_grad():
            leaves[0].mul_(scale)
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert_same_bits(got, expected)
