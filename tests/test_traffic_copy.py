"""What copies between NCHW and NHWC move, as the emulator counts it: each element once, in rows of both tensors.

A convolution of NCHW tensors copies x to NHWC, and y back.
"""

from __future__ import annotations

import helpers
import pytest
import torch
from traffic import SECTOR, pieces, traffic

from cnnops.backends import simt

SHAPES = ((2, 48, 12, 16, 64), (1, 144, 10, 24, 16), (3, 21, 9, 7, 37), (5, 16, 4, 4, 130), (1, 33, 1, 50, 17))
"""N, C, H, W of x, and the channels of y: in whole tiles and whole sectors, and not."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N,C,H,W,K", SHAPES)
def test_a_change_of_layout_moves_each_element_once(N: int, C: int, H: int, W: int, K: int, dtype: torch.dtype) -> None:
    random = helpers.generator("copies")
    x, weight = (helpers.randn(shape, dtype, "cpu", random) for shape in ((N, C, H, W), (K, C, 1, 1)))
    simt.module()
    convolve = simt.library.function("conv2d_forward")
    geometry = 1, 1, 0, 0, 1, 1, 1, 0
    kernels = traffic(lambda: convolve(x, weight, None, *geometry))
    copies = [moved for name, moved in kernels.items() if name.startswith("transposed_copy_kernel")]
    assert len(copies) == 1, kernels.keys()
    moved, element, lanes = copies[0], dtype.itemsize, 32  # a request is a warp's
    assert moved["global_read_bytes"] == moved["global_write_bytes"] == N * H * W * (C + K) * element
    read = pieces(N * C, H * W, lanes, element) + pieces(N * H * W, K, lanes, element)
    written = pieces(N * H * W, C, lanes, element) + pieces(N * K, H * W, lanes, element)
    assert moved["global_read_sectors"] * SECTOR == read
    assert moved["global_write_sectors"] * SECTOR == written
    assert moved["bank_conflicts"] == 0


@pytest.mark.parametrize("C,H,W", [(3, 30, 20), (40, 3, 5)])
def test_what_has_no_tile_is_copied_by_elements(C: int, H: int, W: int) -> None:
    x = helpers.randn((2, C, H, W), torch.float32, "cpu", helpers.generator("copies"))
    weight = torch.ones(1, C, 1, 1)
    simt.module()
    kernels = traffic(lambda: simt.library.function("conv2d_forward")(x, weight, None, 1, 1, 0, 0, 1, 1, 1, 0))
    assert any(name.startswith("copy_kernel") for name in kernels)
    assert not any(name.startswith("transposed_copy_kernel") for name in kernels)
