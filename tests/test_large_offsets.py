"""Offsets beyond 2^31 elements, on the emulator: tensors of addresses alone, few of whose pages are ever touched.

Each check is a program of its own, for our memory and torch's must not be filled with NaN there. It asks for an output
whose elements depend on the far end of a tensor, or for the last tiles of one, and compares them with torch's
convolution of just these pixels. Small integers, so that nothing rounds.
"""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys

import pytest

C, SIDE = 8, 11_600  # two images of SIDE x SIDE pixels have more than 2^31 elements
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python 3.11 has no name for
DIRECTIONS = ("forward", "backward_input", "backward_weight")


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reading(direction: str, architecture: int) -> None:
    run("read", direction, str(architecture))


@pytest.mark.parametrize("direction", DIRECTIONS[:2])
def test_writing(direction: str) -> None:
    """Of kernels whose blocks own a tile each, the blocks of the last tiles: all blocks would take days."""
    run("write", direction, "80")


def run(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CNNOPS_POISON"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def main(what: str, direction: str, architecture: str) -> None:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from cnnops.backends import cuda, simt
    from cnnops.geometry import Conv2dProblem

    assert simt.usable().ok, simt.usable().reason
    simt.library.function("use_architecture")(int(architecture))
    forward, backward = simt.function("conv2d_forward"), simt.function("conv2d_backward")
    random = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=random).bfloat16()

    def addresses(N: int, H: int, W: int) -> Tensor:
        """Zeros [N, C, H, W], channels_last, of pages that do not exist until something is written to them."""
        count = N * C * H * W
        assert count > 2**31
        pages = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        return torch.frombuffer(pages, dtype=torch.bfloat16).view(N, H, W, C).permute(0, 3, 1, 2)

    def same(got: Tensor, expected: Tensor) -> None:
        assert expected.count_nonzero() > expected.numel() / 2
        assert torch.equal(got, expected.bfloat16()), f"{got.flatten()} in place of {expected.flatten()}"

    weight = integers(C, C, 1, 1)

    def read() -> None:
        """One tap, and a stride from corner to corner: the far corner of the last image lies beyond 2^31."""
        if direction == "backward_input":  # of so much padding that dx are a few pixels amid dy
            pad = SIDE // 2
            dy, dx = addresses(3, SIDE + 2, SIDE + 2), integers(3, C, 2, 2)
            seen = dy[:, :, pad : pad + 2, pad : pad + 2]
            seen.copy_(integers(*seen.shape))
            got = backward(dy, dx, weight, 1, 1, pad, pad, 1, 1, 1, 0, True, False, False)[0]
            same(got, F.conv_transpose2d(seen.float(), weight.float()))
            return
        x, step = addresses(2, SIDE, SIDE), SIDE - 1
        corners = x[:, :, ::step, ::step]
        corners.copy_(integers(*corners.shape))
        geometry = (step, step, 0, 0, 1, 1, 1, 0)
        if direction == "forward":
            same(forward(x, weight, None, *geometry), F.conv2d(corners.float(), weight.float()))
        else:
            dy = integers(2, C, 2, 2)
            got = backward(dy, x, weight, *geometry, False, True, False)[1]
            same(got, torch.einsum("nkpq,ncpq->kc", dy.float(), corners.float())[:, :, None, None])

    def write() -> None:
        given, geometry = addresses(2, SIDE, SIDE), (1, 1, 0, 0, 1, 1, 1, 0)
        last = given[-1:, :, -1:, -64:]
        last.copy_(integers(*last.shape))
        problem = Conv2dProblem.of(given, weight, None, *geometry)
        for line in cuda.planned(
            simt.library, "conv2d_forward" if direction == "forward" else "conv2d_backward", problem
        ):
            if line.startswith(direction):
                tile = int(re.search(r"(\d+)x\d+", line.split(":", 1)[1])[1])
        tiles = -(-2 * SIDE * SIDE // tile)
        simt.module().run_blocks(tiles - 128 // tile)
        if direction == "forward":
            got, expected = forward(given, weight, None, *geometry), F.conv2d(last.float(), weight.float())
        else:
            got = backward(given, given, weight, *geometry, True, False, False)[0]
            expected = F.conv_transpose2d(last.float(), weight.float())
        same(got[-1:, :, -1:, -64:], expected)

    {"read": read, "write": write}[what]()


if __name__ == "__main__":
    main(*sys.argv[1:])
