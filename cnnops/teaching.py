"""Convolutional arithmetic to learn from and to check against: sizes, parameter counts, receptive fields, plain loops.

Nothing here touches a kernel: `manual_conv2d` is written to be read, and is an independent reference for tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from cnnops.geometry import output_size

__all__ = ["conv2d_parameters", "manual_conv2d", "output_size", "receptive_field"]

IntOrPair = int | tuple[int, int]


def _pair(value: IntOrPair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def conv2d_parameters(
    in_channels: int, out_channels: int, kernel: IntOrPair, groups: int = 1, bias: bool = True
) -> int:
    """Number of learned values of a convolution: ``out_channels (in_channels / groups * R * S + 1)``; the 1 is the bias.

    kernel: R = S, or (R, S). Raises ValueError for a number below 1, or channels that `groups` does not divide.
    """
    R, S = _pair(kernel)
    if min(in_channels, out_channels, R, S, groups) < 1:
        raise ValueError(
            f"conv2d_parameters: expected numbers of at least 1, but got in_channels={in_channels}, "
            f"out_channels={out_channels}, kernel={kernel}, groups={groups}"
        )
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"conv2d_parameters: groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}"
        )
    return out_channels * (in_channels // groups * R * S + bias)


def receptive_field(layers: Iterable[int | Sequence[int]]) -> int:
    """Extent of the input that one output of a stack of layers sees, along one axis.

    layers: from the input on, each a kernel size, (kernel, stride) or (kernel, stride, dilation); a pool counts like a
    convolution. Layer i widens the field by ``dilation_i (kernel_i - 1)`` steps of its own input, and each of those is
    the product of the strides before it (Araujo, Norris, Sim 2019, doi:10.23915/distill.00021).
    Raises ValueError for a layer that is none of these.
    """
    field, step = 1, 1
    for layer in layers:
        numbers = (layer,) if isinstance(layer, int) else tuple(layer)
        if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
            raise ValueError(
                f"receptive_field: expected a layer like 3, (kernel, stride) or (kernel, stride, dilation), "
                f"each at least 1, but got {layer!r}"
            )
        kernel, stride, dilation = (*numbers, 1, 1)[:3]
        field += dilation * (kernel - 1) * step
        step *= stride
    return field


def manual_conv2d(
    image: Any,
    kernel: Any,
    bias: Any = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> list[Any]:
    """Convolution as deep learning means it (the kernel is not turned round), in plain Python.

    image: [H, W] with a kernel [R, S], or [C, H, W] or [N, C, H, W] with a kernel [K, C / groups, R, S]; nested lists
    of numbers, or tensors. bias: None, a number for the first form, [K] for the others. padding: of zeros.
    stride, padding, dilation: a number, or (vertical, horizontal).
    Returns nested lists [P, Q], [K, P, Q] or [N, K, P, Q]; whole numbers stay whole, so that its sums are exact.
    Raises ValueError if the kernel does not fit: its rank, its channels, or its size beside the padded image.
    """
    image, kernel, bias = (value.tolist() if isinstance(value, Tensor) else value for value in (image, kernel, bias))
    ranks = _rank(image), _rank(kernel)
    if ranks not in ((2, 2), (3, 4), (4, 4)):
        raise ValueError(
            f"manual_conv2d: expected an image of 2 dimensions with a kernel of 2, or of 3 or 4 with a kernel of 4, "
            f"but got an image of {ranks[0]} and a kernel of {ranks[1]}"
        )
    if ranks == (4, 4):
        return [manual_conv2d(one, kernel, bias, stride, padding, dilation, groups) for one in image]
    if ranks == (3, 4):
        return _layer(image, kernel, bias, groups, _pair(stride), _pair(padding), _pair(dilation))
    return _plane(image, kernel, bias or 0, _pair(stride), _pair(padding), _pair(dilation))


def _rank(nested: Any) -> int:
    return 1 + _rank(nested[0]) if isinstance(nested, (list, tuple)) and nested else 0


def _layer(
    image: Any, kernel: Any, bias: Any, groups: int, stride: Any, padding: Any, dilation: Any
) -> list[list[list[Any]]]:
    """Each filter sees the channels of its group; its output is the sum of what it makes of each of them."""
    channels = len(kernel[0])
    if groups < 1 or len(image) != channels * groups or len(kernel) % groups:
        raise ValueError(
            f"manual_conv2d: {len(kernel)} filters of {channels} channels with groups={groups} do not fit "
            f"an image of {len(image)} channels"
        )
    y = []
    for k, filter_planes in enumerate(kernel):
        first = k // (len(kernel) // groups) * channels
        planes = [_plane(image[first + c], filter_planes[c], 0, stride, padding, dilation) for c in range(channels)]
        b = bias[k] if bias is not None else 0
        y.append([[b + sum(values) for values in zip(*rows, strict=True)] for rows in zip(*planes, strict=True)])
    return y


def _plane(
    image: Any, kernel: Any, bias: Any, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> list[list[Any]]:
    """One image [H, W], one kernel [R, S]."""
    H, W, R, S = len(image), len(image[0]), len(kernel), len(kernel[0])
    P = output_size(H, R, stride[0], padding[0], dilation[0])
    Q = output_size(W, S, stride[1], padding[1], dilation[1])
    if P < 1 or Q < 1:
        raise ValueError(f"manual_conv2d: a kernel of {R} x {S} is larger than the padded image of {H} x {W}")
    y = []
    for p in range(P):
        row = []
        for q in range(Q):
            total = bias
            for r in range(R):
                for s in range(S):
                    h = p * stride[0] - padding[0] + r * dilation[0]
                    w = q * stride[1] - padding[1] + s * dilation[1]
                    if 0 <= h < H and 0 <= w < W:
                        total += image[h][w] * kernel[r][s]
            row.append(total)
        y.append(row)
    return y
