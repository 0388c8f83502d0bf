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

from cnnops.backends.triton import conv2d_plan
from cnnops.backends.triton.aot import ARCHES, GFX942, SHARED_LIMIT
from cnnops.backends.triton.calls import CONVOLUTIONS, NORMS, STEMS
from cnnops.backends.triton.launch import MAX_SPLITS, Device
from cnnops.geometry import NormPool2dProblem, NormProblem, Pool2dProblem
from cnnops.tuning import choose
from cnnops.tuning.triton import batch_norm, bn_act_max_pool2d
from cnnops.tuning.triton.conv2d import (
    BACKWARD_INPUT,
    BACKWARD_INPUT_TMA,
    BACKWARD_WEIGHT,
    BACKWARD_WEIGHT_TMA,
    FORWARD,
    FORWARD_NCHW,
    FORWARD_TMA,
)

pytest.importorskip("triton")

pytestmark = pytest.mark.xdist_group("aot")  # by `--dist loadgroup` one worker compiles for all of these tests

EVERY = [pytest.param(False, id="covering"), pytest.param(True, id="all", marks=pytest.mark.slow)]
GEMMS = ("forward_kernel", "forward_nchw_kernel", "backward_input_kernel", "backward_weight_kernel")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = ("mma", "wgmma", "tcgen05")


@cache
def compiled(every: bool, *arches: int) -> list[dict[str, Any]]:
    """The kernels compiled, in a process of its own: what is interpreted in this one cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cnnops.backends.triton.aot", "--json", *["--all"] * every]
    command += [argument for arch in arches for argument in ("--arch", str(arch))]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def multiplies_on_tensor_cores(c: dict[str, Any]) -> bool:
    dense = c["module"] in ("conv2d", "conv2d_tma") and c["kernel"] in GEMMS
    return dense and (c["dtype"] != "fp32" or c["precision"] == "tf32")


@pytest.mark.parametrize("every", EVERY)
def test_every_kernel_compiles_for_every_architecture_and_in_every_dtype(every: bool) -> None:
    kernels = {(c["module"], c["kernel"]) for c in compiled(every)}
    assert {("conv2d", kernel) for kernel in GEMMS} <= kernels
    assert {("conv2d_tma", kernel) for kernel in GEMMS if "nchw" not in kernel} <= kernels
    for arch in ARCHES:
        portable = {(module, kernel) for module, kernel in kernels if module != "conv2d_tma"}
        on_arch = {(c["module"], c["kernel"]) for c in compiled(every) if c["arch"] == arch}
        assert on_arch == (kernels if arch >= 90 else portable)
    for dtype in ("fp32", "fp16", "bf16"):
        assert {(c["module"], c["kernel"]) for c in compiled(every) if c["dtype"] == dtype} == kernels


@pytest.mark.parametrize("every", EVERY)
def test_nothing_spills(every: bool) -> None:
    assert [c for c in compiled(every) if c["stack"] or c["local"]] == []


@pytest.mark.parametrize("every", EVERY)
def test_shared_memory_fits(every: bool) -> None:
    assert [c for c in compiled(every) if c["shared"] > SHARED_LIMIT[c["arch"]]] == []


@pytest.mark.parametrize("every", EVERY)
def test_the_launcher_packs_what_the_kernel_takes(every: bool) -> None:
    """Each argument has the size of the parameter in its place, scratch pointers included."""
    assert [c for c in compiled(every) if c["arguments"] != c["parameters"]] == []


@pytest.mark.parametrize("every", EVERY)
def test_tensor_cores_are_used(every: bool) -> None:
    """Warpgroup instructions take 64 rows or more; a lower tile takes a warp's ``mma.sync``."""
    own = {80: "mma", 90: "wgmma", 100: "tcgen05"}
    wrong = []
    for c in filter(multiplies_on_tensor_cores, compiled(every)):
        expected = own[c["arch"]] if c["blocks"]["BLOCK_M"] >= 64 else "mma"
        if {name for name in PRODUCTS if c[name]} != {expected}:
            wrong.append(c)
    assert wrong == []


@pytest.mark.parametrize("every", EVERY)
def test_boxes_are_loaded_by_tma(every: bool) -> None:
    boxed = [c for c in compiled(every) if c["module"] == "conv2d_tma"]
    assert {c["arch"] for c in boxed} == {90, 100}
    assert [c for c in boxed if not c["tma_loads"]] == []
    assert [c for c in compiled(every) if c["module"] == "conv2d" and c["tma_loads"]] == []


@pytest.mark.parametrize("every", EVERY)
def test_programs_fit_side_by_side(every: bool) -> None:
    """As many as their row says share a multiprocessor's 64 Ki registers and its shared memory, 1 KiB of each their own."""
    tables = {"forward_kernel": FORWARD_TMA, "backward_input_kernel": BACKWARD_INPUT_TMA}
    checked = 0
    for c in compiled(every):
        if c["module"] != "conv2d_tma" or c["kernel"] not in tables:
            continue
        sizes = tuple(c["blocks"][name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tile = next(
            rule.config
            for rule in tables[c["kernel"]].rules
            if (rule.config.block_m, rule.config.block_n, rule.config.block_k) == sizes
            and (rule.config.num_warps, rule.config.num_stages) == (c["num_warps"], c["num_stages"])
        )
        if "statistics" in c["call"] and tile.block_n > 64:
            continue  # one to a multiprocessor
        assert tile.resident * (c["shared"] + 1024) <= SHARED_LIMIT[c["arch"]] + 1024, c
        assert tile.resident * c["num_warps"] * 32 * c["registers"] <= 2**16, c
        checked += tile.resident > 1
    assert checked


@pytest.mark.parametrize("every", EVERY)
def test_exact_fp32_is_exact(every: bool) -> None:
    exact = [c for c in compiled(every) if c["dtype"] == "fp32" and c["precision"] == "ieee"]
    assert exact
    assert [c for c in exact if any(c[name] for name in PRODUCTS)] == []


@pytest.mark.parametrize("every", EVERY)
def test_loads_of_many_channels_are_asynchronous(every: bool) -> None:
    """They are pipelined: a tap that fills a block is loaded in vectors of 16 bytes."""
    loops = [
        c
        for c in compiled(every)
        if c["kernel"] in GEMMS
        and "nchw" not in c["kernel"]
        and c["call"].endswith(("3x3 64->64", "3x3 s2 128->256"))
        and c["module"] == "conv2d"
    ]
    assert loops
    assert [c for c in loops if not c["async_copies"]] == []


TABLES = {"forward": FORWARD, "dx": BACKWARD_INPUT, "dweight": BACKWARD_WEIGHT}
BOXED = {
    "forward": (FORWARD_TMA, conv2d_plan.forward_tma),
    "dx": (BACKWARD_INPUT_TMA, conv2d_plan.backward_input_tma),
    "dweight": (BACKWARD_WEIGHT_TMA, conv2d_plan.backward_weight_tma),
}
PROBLEMS = [dataclasses.replace(p, dtype=dtype) for p in CONVOLUTIONS.values() for dtype in DTYPES]


def check_rows(table: Any, problems: list[Any]) -> None:
    """A row that holds for no call here is never compiled, unless it is for the interpreter."""
    chosen = [choose(table, p) for p in problems]
    for rule in table.rules:
        if any(map(rule.condition, problems)):
            assert rule.config in chosen, rule.reason
        else:
            assert any(rule.condition(dataclasses.replace(p, device="cpu")) for p in problems), rule.reason


@pytest.mark.parametrize("direction", TABLES)
def test_every_row_of_the_table_is_compiled(direction: str) -> None:
    check_rows(TABLES[direction], PROBLEMS)


def test_every_row_of_nchw_is_compiled() -> None:
    problems = [dataclasses.replace(p, channels_last=False) for p in PROBLEMS]
    check_rows(FORWARD_NCHW, [p for p in problems if conv2d_plan.reads_nchw(p)])


@pytest.mark.parametrize("direction", BOXED)
def test_every_row_of_boxes_is_compiled(direction: str) -> None:
    table, plan = BOXED[direction]
    check_rows(table, [p for p in PROBLEMS if plan(p, "tf32", Device(90, 132))])


def norm_of(C: int, side: int, channels_last: bool = True, device: str = "cuda", N: int = 32) -> NormProblem:
    return NormProblem(N, C, side * side, True, "relu", torch.float16, torch.float32, device, channels_last)


def test_every_row_of_batch_norms_tables_is_compiled() -> None:
    """Each for what `calls` has, or for a small or a large problem under the interpreter."""
    norms = [norm_of(norm.C, norm.side, norm.channels_last) for norm in NORMS.values()]
    norms += [norm_of(8, side, last, "cpu", 2) for side in (8, 64) for last in (True, False)]
    stems = [norm_of(C, side) for C, side, *_ in STEMS.values()] + [norm_of(8, side, device="cpu") for side in (2, 64)]
    pooled = [NormPool2dProblem(p, Pool2dProblem(*[1] * 14, p.dtype, p.device, True)) for p in stems]
    for table, problems in ((batch_norm.TILES, norms), (bn_act_max_pool2d.TILES, pooled)):
        chosen = [choose(table, p) for p in problems]
        for rule in table.rules:
            assert rule.config in chosen, rule.reason


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_splits_depend_on_shape_and_processors_only(layer: str) -> None:
    few, many = (conv2d_plan.backward_weight(CONVOLUTIONS[layer], "ieee", processors) for processors in (1, 132))
    assert few.splits <= many.splits <= MAX_SPLITS
    for launch in (few, many):
        covered = launch.splits * launch.partial.scalars["steps"] * int(launch.partial.constants["BLOCK_K"])
        assert covered >= launch.partial.scalars["pixels"]
        assert (launch.total is None) == (launch.splits == 1)


@pytest.mark.slow
def test_every_kernel_compiles_for_amd() -> None:
    """Without scratch memory or spilled vector registers, within the local data share, on matrix cores."""
    wrong = [c for c in compiled(False, GFX942) if c["stack"] or c["local"] or c["shared"] > SHARED_LIMIT[GFX942]]
    assert wrong == []
    assert {c["kernel"] for c in compiled(False, GFX942)} == {c["kernel"] for c in compiled(False)}
    products = [c for c in compiled(False, GFX942) if multiplies_on_tensor_cores(c)]
    assert products
    assert [c for c in products if not c["mfma"]] == []
