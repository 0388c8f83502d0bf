"""What squeeze_excite's kernels move, as the emulator counts it, is near the least that they can move.

Forward x is read twice, for the means and for the product, and y written; backward dy and x are read for the sums, then
dy once more, and dx written. What has no axis over positions (means, scales, hidden values, weights) is small beside
that: each kernel reads and writes it in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import helpers
import pytest
import torch
from cases import LAYOUTS, SqueezeExciteCase
from traffic import SECTOR, near, traffic

from cnnops.backends import simt

MOST = 1.15
"""DRAM bytes beside what is needed."""

CASES = (
    SqueezeExciteCase("few-channels", 2, 16, 40, 36, 4),
    SqueezeExciteCase("one-tile", 3, 112, 20, 24, 8),
    SqueezeExciteCase("two-tiles", 2, 544, 16, 14, 16),
    SqueezeExciteCase("many-images", 40, 96, 10, 16, 6),
    SqueezeExciteCase("one-image", 1, 32, 72, 88, 8),
)
"""Not among tests/cases.py's. Channels and positions are multiples of 16."""
ODD = (
    SqueezeExciteCase("odd-channels", 2, 49, 24, 20, 5),
    SqueezeExciteCase("odd-plane", 3, 64, 15, 13, 8),
    SqueezeExciteCase("odd-both", 3, 77, 15, 21, 4),
    SqueezeExciteCase("small-planes", 17, 100, 7, 7, 8),
)
"""Whose pixels or planes begin within a sector, in images that do."""

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Sizes:
    """Bytes of x and of what is small, the latter in float."""

    case: SqueezeExciteCase
    dtype: torch.dtype

    @property
    def x(self) -> int:
        return self.case.N * self.case.C * self.case.H * self.case.W * self.dtype.itemsize

    @property
    def by_channel(self) -> int:
        return 4 * self.case.N * self.case.C

    @property
    def by_hidden(self) -> int:
        return 4 * self.case.N * self.case.M

    @property
    def weight(self) -> int:
        return 4 * self.case.M * self.case.C

    @property
    def forward(self) -> int:
        """Means, hidden values as they are and activated, and scales are written and read; both weights are read."""
        return 3 * self.x + 4 * self.by_channel + 3 * self.by_hidden + 2 * self.weight

    @property
    def backward(self) -> int:
        """dgated and dpooled are written; scale is read twice, and dgated by the layer, the weight's and the bias's
        gradient. dhidden and the activations are written and read as often."""
        small = 8 * self.by_channel + 8 * self.by_hidden + 4 * self.weight + 4 * (self.case.C + self.case.M)
        return 4 * self.x + small


def counted(case: SqueezeExciteCase, dtype: torch.dtype, layout: str) -> tuple[dict[str, int], dict[str, int]]:
    """The totals of all kernels, of the forward and of the backward pass, copies of the weights left out."""
    random = helpers.generator(case.id)
    C, M = case.C, case.M
    x, dy = (helpers.laid_out(helpers.randn(case.x_shape, dtype, "cpu", random), layout) for _ in range(2))
    w1, b1, w2, b2 = (helpers.randn(shape, dtype, "cpu", random) for shape in ((M, C), (M,), (C, M), (C,)))
    simt.module()
    forward, backward = (simt.library.function(f"squeeze_excite_{each}") for each in ("forward", "backward"))
    kinds = "silu", "sigmoid"
    y, *small = forward(x, w1, b1, w2, b2, *kinds)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    passes = []
    for moved in (
        traffic(lambda: forward(x, w1, b1, w2, b2, *kinds)),
        traffic(lambda: backward(dy, x, w1, b1, w2, b2, *small, *kinds, *[True] * 5)),
    ):
        own = [counts for kernel, counts in moved.items() if kernel.startswith("squeeze_excite")]
        assert own
        passes.append({name: sum(counts[name] for counts in own) for name in own[0]})
    return passes[0], passes[1]


def every(cases: tuple[SqueezeExciteCase, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@every(CASES + ODD)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dram_moves_what_is_needed(case: SqueezeExciteCase, dtype: torch.dtype, layout: str) -> None:
    sizes = Sizes(case, dtype)
    for moved, needed, least in zip(counted(case, dtype, layout), (sizes.forward, sizes.backward), (3, 4), strict=True):
        dram = moved["dram_read_bytes"] + moved["dram_write_bytes"]
        assert least * sizes.x <= dram <= MOST * needed, f"DRAM moves {dram / needed:.3f} times the {needed} needed"


@every(CASES + ODD)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_moves_what_is_stated(case: SqueezeExciteCase, dtype: torch.dtype, layout: str) -> None:
    sizes = Sizes(case, dtype)
    stated = sizes.forward, sizes.backward
    for moved, each in zip(counted(case, dtype, layout), stated, strict=True):
        near("L2 moves", SECTOR * (moved["global_read_sectors"] + moved["global_write_sectors"]), each)


@every(CASES + ODD)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_sectors_are_moved(case: SqueezeExciteCase, dtype: torch.dtype, layout: str) -> None:
    for moved in counted(case, dtype, layout):
        for direction in ("read", "write"):
            used = moved[f"global_{direction}_bytes"] / (SECTOR * moved[f"global_{direction}_sectors"])
            assert used >= 0.9, f"{direction}s use {used:.2f} of the sectors"
