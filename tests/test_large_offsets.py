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
HOPPER_C, HOPPER_SIDE = 64, 4_104  # and so have these, of channels that Hopper's kernels take
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python 3.11 has no name for
DIRECTIONS = ("forward", "backward_input", "backward_weight")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reading(direction: str) -> None:
    run("read", direction, "80")


@pytest.mark.parametrize("direction", DIRECTIONS[:2])
def test_writing(direction: str) -> None:
    """Of kernels whose blocks own a tile each, the blocks of the last tiles: all blocks would take days."""
    run("write", direction, "80")


@pytest.mark.parametrize(
    ("direction", "taps", "kernel"),
    [
        ("forward", "1", "conv2d_forward_sm90_kernel<BFloat16, 64>"),
        ("forward", "3", "conv2d_forward_halo_sm90_kernel<BFloat16>"),
        ("backward_input", "1", "conv2d_backward_input_sm90_kernel<BFloat16, 64>"),
        ("backward_input", "3", "conv2d_backward_input_halo_sm90_kernel<BFloat16>"),
        ("backward_weight", "1", "conv2d_backward_weight_columns_kernel<BFloat16, 128>"),
        ("backward_weight", "3", "conv2d_backward_weight_taps_kernel<BFloat16>"),
    ],
)
def test_hoppers_kernels(direction: str, taps: str, kernel: str) -> None:
    """Of a device with a multiprocessor for each tile, the last ones; a weight's gradient sums every eighth pixel."""
    run("hopper", direction, "90", taps, kernel)


def run(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CNNOPS_POISON"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def main(what: str, direction: str, architecture: str, taps: str = "1", kernel: str = "") -> None:
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

    def addresses(N: int, H: int, W: int, C: int = C) -> Tensor:
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

    def hopper() -> None:
        side, size, stride = HOPPER_SIDE, int(taps), 8 if direction == "backward_weight" else 1
        weight = integers(HOPPER_C, HOPPER_C, size, size).contiguous(memory_format=torch.channels_last)
        given, geometry = addresses(2, side, side, HOPPER_C), (stride, stride, size // 2, size // 2, 1, 1, 1, 0)
        last = given[-1:, :, -9:, -9:]  # of which the last eight see nothing beside them
        last.copy_(integers(*last.shape))
        simt.module().reset_counters()
        if direction == "backward_weight":
            dy = torch.zeros(2, HOPPER_C, side // 8, side // 8, dtype=torch.bfloat16)
            dy = dy.contiguous(memory_format=torch.channels_last)
            dy[-1:, :, -1:, -1:] = integers(1, HOPPER_C, 1, 1)
            got = backward(dy, given, weight, *geometry, False, True, False)[1]
            seen = given[-1, :, -8 - size // 2 :, -8 - size // 2 :][:, :size, :size]
            same(got, torch.einsum("k,crs->kcrs", dy[-1, :, -1, -1].float(), seen.float()))
        else:
            tiles = 2 * -(-2 * side * side // 256) if size == 1 else 2 * (-(-side // 16)) ** 2
            simt.module().set_device(90, tiles)
            simt.module().run_blocks(tiles - 2, 2)
            if direction == "forward":
                got = forward(given, weight, None, *geometry)
                expected = F.conv2d(last.float(), weight.float(), padding=size // 2)
            else:
                got = backward(given, given, weight, *geometry, True, False, False)[0]
                expected = F.conv_transpose2d(last.float(), weight.float(), padding=size // 2)
            same(got[-1:, :, -1:, -8:], expected[:, :, -1:, -8:])
        assert kernel in simt.module().counters()["kernels"], simt.module().counters()["kernels"]

    {"read": read, "write": write, "hopper": hopper}[what]()


if __name__ == "__main__":
    main(*sys.argv[1:])
