"""Modules: torch's arguments, state_dict and results. Values are checked on the cpu backend, never on aten."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnops
from cnnops import nn as cnn


@pytest.fixture(autouse=True)
def on_cpu_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with cnnops.use_backend("cpu"):
        yield


def twins(name: str, *args: object, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """Our module and torch's of the same name, in float64, with the same state."""
    ours, theirs = getattr(cnn, name)(*args, **kwargs).double(), getattr(nn, name)(*args, **kwargs).double()
    for t in theirs.state_dict().values():
        if t.is_floating_point():
            t.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
def test_conv2d_is_torchs(padding_mode: str, padding: int | tuple[int, int] | str) -> None:
    options = {"padding": padding, "dilation": (2, 1), "groups": 2, "padding_mode": padding_mode}
    ours, theirs = twins("Conv2d", 4, 6, (3, 2), **options)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    assert isinstance(ours, nn.Conv2d)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_conv2d_act_adds_the_residual_before_the_activation(padding_mode: str) -> None:
    layer = cnn.Conv2dAct(3, 4, 3, padding=1, padding_mode=padding_mode, activation="silu").double()
    plain = nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode).double()
    plain.load_state_dict(layer.state_dict())
    x, residual = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_same(layer(x), F.silu(plain(x)))
    assert_same(layer(x, residual), F.silu(plain(x) + residual))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_conv_bn_act_pads(padding_mode: str) -> None:
    block = cnn.ConvBNAct(4, 6, 3, padding=1, padding_mode=padding_mode).double().eval()
    plain = nn.Conv2d(4, 6, 3, padding=1, bias=False, padding_mode=padding_mode).double()
    plain.load_state_dict(block.conv.state_dict())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert_same(block(x), F.relu(plain(x) / (1 + block.bn.eps) ** 0.5))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs(momentum: float | None, track: bool, affine: bool) -> None:
    ours, theirs = twins("BatchNorm2d", 5, momentum=momentum, track_running_stats=track, affine=affine)
    for x in torch.randn(3, 4, 5, 3, 3, dtype=torch.float64):
        assert_same(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, t in theirs.state_dict().items():
        assert_same(ours.state_dict()[name], t)
    ours.eval(), theirs.eval()
    assert_same(ours(x), theirs(x))


def test_batch_norm_frozen_by_hand_leaves_its_statistics_alone() -> None:
    ours, theirs = twins("BatchNorm2d", 5)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    for bn in (ours, theirs):
        bn.track_running_stats = False
    assert_same(ours(x), theirs(x))
    assert_same(ours.running_mean, theirs.running_mean)


@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
def test_batch_norm_act_adds_the_residual_before_the_activation(activation: str) -> None:
    bn, plain = cnn.BatchNormAct2d(5, activation=activation).double(), nn.BatchNorm2d(5).double()
    act = {"none": nn.Identity(), "relu": F.relu, "hardswish": F.hardswish}[activation]
    x, residual = torch.randn(2, 2, 5, 3, 3, dtype=torch.float64)
    assert_same(bn(x), act(plain(x)))
    assert_same(bn(x, residual), act(plain(x) + residual))
    assert_same(bn.running_var, plain.running_var)
    assert int(bn.num_batches_tracked) == 2


def test_conv_bn_act() -> None:
    block = cnn.ConvBNAct(4, 6, 3, stride=2, padding=1, groups=2, activation="silu").double()
    assert list(dict(block.named_children())) == ["conv", "bn"]
    assert block.conv.bias is None
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), block.state_dict().values(), strict=True)))
    x, residual = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    assert_same(block(x, residual), F.silu(plain(x) + residual))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("MaxPool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
        ("MaxPool2d", {"kernel_size": 2}),
        ("AvgPool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
        ("AvgPool2d", {"kernel_size": 2, "divisor_override": 3}),
        ("AdaptiveAvgPool2d", {"output_size": (3, None)}),
        ("AdaptiveAvgPool2d", {"output_size": 1}),
        ("AdaptiveMaxPool2d", {"output_size": (3, None)}),
        ("AdaptiveMaxPool2d", {"output_size": 2}),
    ],
)
def test_pools_are_torchs(name: str, args: dict[str, object]) -> None:
    ours, theirs = twins(name, **args)
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    assert isinstance(ours, type(theirs))
    assert_same(ours(x), theirs(x))
    assert_same(ours(x[0]), theirs(x[0]))


def test_max_pool_indices() -> None:
    ours, theirs = twins("MaxPool2d", 2, return_indices=True)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(ours(x)[1], theirs(x)[1])


def test_adaptive_max_pool_indices() -> None:
    ours, theirs = twins("AdaptiveMaxPool2d", (2, 4), return_indices=True)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    assert torch.equal(ours(x)[1], theirs(x)[1])


def test_max_unpool_is_torchs() -> None:
    ours, theirs = twins("MaxUnpool2d", 3, stride=2, padding=1)
    assert isinstance(ours, nn.MaxUnpool2d)
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert_same(ours(y, indices, output_size=x.shape), theirs(y, indices, output_size=x.shape))
    y, indices = F.max_pool2d(x[:, :, :, 1:], 3, 2, 1, return_indices=True)
    assert_same(ours(y[0], indices[0]), theirs(y[0], indices[0]))


@pytest.mark.parametrize("layer", [cnn.Conv2dAct(1, 1, 1), cnn.BatchNormAct2d(1), cnn.ConvBNAct(1, 1, 1)])
def test_repr_says_the_activation(layer: nn.Module) -> None:
    assert "activation=relu" in repr(layer)


@pytest.mark.parametrize("build", [cnn.Conv2dAct, cnn.ConvBNAct])
def test_unknown_activation(build: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"activation must be one of none, relu.* but got activation='gelu'"):
        build(1, 1, 1, activation="gelu")
    with pytest.raises(ValueError, match="BatchNormAct2d: activation"):
        cnn.BatchNormAct2d(1, activation="gelu")
