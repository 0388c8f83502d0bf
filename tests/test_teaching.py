"""The arithmetic of convolutions, by known numbers, and the plain-Python reference beside the kernels."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import Tensor, nn

import cnnops.functional as CF
from cnnops.teaching import conv2d_parameters, manual_conv2d, output_size, receptive_field

pytestmark = pytest.mark.quick

IMAGE = [[1, 2, 3, 0, 1], [0, 1, 2, 3, 1], [1, 2, 1, 0, 0], [2, 1, 0, 1, 1], [1, 0, 1, 2, 1]]
SOBEL = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [({}, 30), ({"pad": 1}, 32), ({"pad": 1, "stride": 2}, 16), ({"pad": 2, "dilation": 2}, 32)],
)
def test_output_size(geometry: dict[str, int], expected: int) -> None:
    assert output_size(32, 3, **geometry) == expected


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "kernel", "expected"),
    [(3, 16, 3, 448), (256, 64, 1, 16_448), (256, 64, 3, 147_520)],
)
def test_parameters(in_channels: int, out_channels: int, kernel: int, expected: int) -> None:
    assert conv2d_parameters(in_channels, out_channels, kernel) == expected


def test_parameters_are_those_of_the_module() -> None:
    for options in ({}, {"bias": False}, {"groups": 4}, {"groups": 2, "bias": False}):
        module = nn.Conv2d(8, 12, (3, 5), **options)
        assert conv2d_parameters(8, 12, (3, 5), **options) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], 1),
        ([3], 3),
        ([3, 3, (2, 2), 3, 3, (2, 2)], 16),
        ([(3, 1, 1), (3, 1, 2), (3, 1, 4)], 15),
        ([(7, 2), (3, 2), 3], 19),
    ],
)
def test_receptive_field(layers: list[int | tuple[int, ...]], expected: int) -> None:
    assert receptive_field(layers) == expected


@pytest.mark.parametrize(
    "layers", [[3, 3, (2, 2), 3, 3, (2, 2)], [(3, 1, 1), (3, 1, 2), (3, 1, 4)], [(5, 3), (2, 1, 3)]]
)
def test_receptive_field_is_where_the_gradient_reaches(layers: list[int | tuple[int, ...]]) -> None:
    x = torch.zeros(1, 1, 1, 64, requires_grad=True)
    y: Tensor = x
    for layer in layers:
        kernel, stride, dilation = (*((layer,) if isinstance(layer, int) else layer), 1, 1)[:3]
        y = nn.functional.conv2d(y, torch.ones(1, 1, 1, kernel), stride=(1, stride), dilation=(1, dilation))
    y[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert int(x.grad.flatten().nonzero().max()) + 1 == receptive_field(layers)


def test_the_sobel_example() -> None:
    expected = [[6, 0, -5], [0, -2, -2], [-4, 0, 1]]
    assert manual_conv2d(IMAGE, SOBEL) == expected
    assert manual_conv2d(torch.tensor(IMAGE), torch.tensor(SOBEL)) == expected
    assert manual_conv2d(IMAGE, SOBEL, bias=1, stride=2) == [[7, -4], [-3, 2]]


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "options"),
    [
        ((5, 7), (3, 2), {}),
        ((6, 5), (2, 3), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
        ((2, 5, 6), (3, 2, 3, 3), {"padding": 1, "bias": True}),
        ((2, 4, 7, 5), (6, 2, 3, 2), {"groups": 2, "stride": 2, "padding": (1, 0), "bias": True}),
        ((1, 3, 4, 4), (3, 1, 3, 3), {"groups": 3, "padding": 2, "dilation": (2, 1)}),
    ],
)
def test_conv2d_beside_plain_python(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], options: dict[str, object], backend: helpers.Backend
) -> None:
    """Small whole numbers, so that every sum is exact on both sides."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-4, 5, shape, generator=generator) for shape in (x_shape, weight_shape))
    options = dict(options)
    bias = torch.arange(weight_shape[0]) - 1 if options.pop("bias", False) else None
    expected = torch.tensor(manual_conv2d(x, weight, bias, **options))

    def on_device(t: Tensor) -> Tensor:
        return t.float().to(backend.device)

    planes = x[None] if x.dim() == 2 else x
    filters = weight[None, None] if weight.dim() == 2 else weight
    y = CF.conv2d(on_device(planes), on_device(filters), None if bias is None else on_device(bias), **options)
    assert torch.equal(y.cpu().view(expected.shape).long(), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv2d_parameters(0, 4, 3), "expected numbers of at least 1, but got in_channels=0"),
        (lambda: conv2d_parameters(6, 4, 3, groups=4), "groups=4 must divide in_channels=6"),
        (lambda: receptive_field([3, (2, 0)]), r"each at least 1, but got \(2, 0\)"),
        (lambda: receptive_field([()]), r"but got \(\)"),
        (lambda: manual_conv2d(IMAGE, [SOBEL]), "but got an image of 2 and a kernel of 3"),
        (lambda: manual_conv2d(IMAGE, SOBEL, dilation=3), "3 x 3 is larger than the padded image of 5 x 5"),
        (lambda: manual_conv2d([IMAGE], [[SOBEL, SOBEL]]), "1 filters of 2 channels with groups=1 do not fit"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
