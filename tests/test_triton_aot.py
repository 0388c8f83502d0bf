"""The Triton kernels, compiled ahead of time for every architecture that they claim. No GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch

from cnnops.backends.triton import plan
from cnnops.backends.triton.aot import ARCHES, LAYERS, SHARED_LIMIT
from cnnops.tuning import choose
from cnnops.tuning.triton_conv2d import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD

pytest.importorskip("triton")

GEMMS = ("forward_kernel", "backward_input_kernel", "backward_weight_kernel")
SUMS = ("backward_bias_kernel", "slab_sum_kernel")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def compiled() -> list[dict[str, Any]]:
    """Every kernel compiled, in a process of its own: what is interpreted in this one cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cnnops.backends.triton.aot", "--json"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def on(arch: int) -> list[dict[str, Any]]:
    return [c for c in compiled() if c["arch"] == arch]


def multiplies_on_tensor_cores(c: dict[str, Any]) -> bool:
    return c["kernel"] in GEMMS and (c["dtype"] in ("bf16", "fp16") or c["precision"] == "tf32")


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_compiles(arch: int) -> None:
    for dtype in ("fp32", "fp16", "bf16"):
        assert {c["kernel"] for c in on(arch) if c["dtype"] == dtype} == {*GEMMS, *SUMS}


@pytest.mark.parametrize("arch", ARCHES)
def test_nothing_spills(arch: int) -> None:
    assert [c for c in on(arch) if c["stack"] or c["local"]] == []


@pytest.mark.parametrize("arch", ARCHES)
def test_shared_memory_fits(arch: int) -> None:
    assert [c for c in on(arch) if c["shared"] > SHARED_LIMIT[arch]] == []


@pytest.mark.parametrize("arch", ARCHES)
def test_tensor_cores_are_used(arch: int) -> None:
    """Warpgroup instructions take 64 rows or more; a lower tile takes a warp's ``mma.sync``."""
    own = {80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]
    wrong = []
    for c in filter(multiplies_on_tensor_cores, on(arch)):
        expected = own if c["tile"][0] >= 64 else "mma"
        if {name for name in ("mma", "wgmma", "tcgen05") if c[name]} != {expected}:
            wrong.append(c)
    assert wrong == []


@pytest.mark.parametrize("arch", ARCHES)
def test_exact_fp32_is_exact(arch: int) -> None:
    exact = [c for c in on(arch) if c["dtype"] == "fp32" and c["precision"] == "ieee"]
    assert exact
    assert [c for c in exact if c["mma"] or c["wgmma"] or c["tcgen05"]] == []


@pytest.mark.parametrize("arch", ARCHES)
def test_loads_of_many_channels_are_asynchronous(arch: int) -> None:
    """They are pipelined: a tap that fills a block is loaded in vectors of 16 bytes."""
    loops = [c for c in on(arch) if c["kernel"] in GEMMS and c["layer"] in ("3x3 64->64", "3x3 s2 128->256")]
    assert loops
    assert [c for c in loops if not c["async_copies"]] == []


@pytest.mark.parametrize("table", [FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT], ids=["forward", "dx", "dweight"])
def test_every_row_of_the_table_is_compiled(table: Any) -> None:
    """A row that holds for no layer here is never compiled, unless it is for the interpreter."""
    problems = [dataclasses.replace(p, dtype=dtype) for p in LAYERS.values() for dtype in DTYPES]
    chosen = [choose(table, p) for p in problems]
    for rule in table:
        if any(map(rule.condition, problems)):
            assert rule.config in chosen, rule.reason
        else:
            assert any(rule.condition(dataclasses.replace(p, device="cpu")) for p in problems), rule.reason


@pytest.mark.parametrize("layer", LAYERS)
def test_splits_depend_on_shape_and_processors_only(layer: str) -> None:
    few, many = (plan.backward_weight(LAYERS[layer], "ieee", processors) for processors in (1, 132))
    assert few.splits <= many.splits <= plan.MAX_SPLITS
    for launch in (few, many):
        covered = launch.splits * launch.partial.scalars["steps"] * int(launch.partial.constants["BLOCK_K"])
        assert covered >= launch.partial.scalars["pixels"]
        assert (launch.total is None) == (launch.splits == 1)
