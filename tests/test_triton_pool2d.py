"""The tables of the Triton pools, held against the calls that are compiled ahead of time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from cnnops.backends.triton.aot import jobs
from cnnops.backends.triton.calls import ADAPTIVE, ALL, SLIDING
from cnnops.geometry import Pool2dProblem
from cnnops.tuning import choose
from cnnops.tuning.triton.pool2d import BACKWARD, FORWARD


def problems() -> list[Pool2dProblem]:
    """Of the calls, as the passes over outputs and over inputs see them."""
    return [dataclasses.replace(p, dtype=dtype) for p in _problems() for dtype in ALL]


def _problems() -> list[Pool2dProblem]:
    found = []
    for last, C, side, kernel, stride, pad, dilation in SLIDING.values():
        x = torch.empty(32, C, side, side, dtype=torch.float16, device="meta")
        p = Pool2dProblem.of("max_pool2d", x, *(each for each in (kernel, stride, pad, dilation) for _ in "hw"))
        found.append(dataclasses.replace(p, device="cuda", channels_last=last))
    for last, C, side, out in ADAPTIVE.values():
        x = torch.empty(32, C, side, side, dtype=torch.float16, device="meta")
        p = Pool2dProblem.adaptive("adaptive_max_pool2d", x, out, out)
        found.append(dataclasses.replace(p, device="cuda", channels_last=last))
    return found


@pytest.mark.parametrize(
    ("pass_", "table"), [("forward", FORWARD), ("backward", BACKWARD)], ids=["forward", "backward"]
)
def test_every_row_is_compiled(pass_: str, table: tuple) -> None:
    """A row that holds for no call is for the interpreter alone, and what a row chooses is what is launched."""
    launched = {
        (how["BLOCK_M"], how.get("BLOCK_T", 1), how["BLOCK_C"], job.launch.num_warps)
        for job in jobs((90,))
        if job.kernel == f"max_{pass_}_kernel"
        for how in [job.launch.constants]
    }
    chosen = {dataclasses.astuple(choose(table, p)) for p in problems()}
    assert launched == chosen
    for rule in table.rules:
        interpreted = any(rule.condition(dataclasses.replace(p, device="cpu")) for p in problems())
        assert dataclasses.astuple(rule.config) in chosen or interpreted, rule.reason
