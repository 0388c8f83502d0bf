"""Modules: torch's arguments, state_dict and results. Values are checked on the cpu backend, never on aten."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_same_bits, assert_same_layout
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cnnops
from cnnops import nn as cnn


@pytest.fixture(autouse=True)
def on_cpu_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with cnnops.use_backend("cpu"):
        yield


class Twins:
    """The same calls on a module of ours, on one of torch's, and on torch's in float64: for `assert_same`."""

    def __init__(self, ours: nn.Module, theirs: nn.Module) -> None:
        """theirs: as ours, its state_dict in the same order; gets a random state, which ours loads."""
        for t in theirs.state_dict().values():
            if t.is_floating_point():
                t.uniform_(0.5, 1.5)
        ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
        self.ours, self.theirs, self.exact = ours, theirs, copy.deepcopy(theirs).double()

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.ours, self.theirs, self.exact))

    def eval(self) -> None:
        for module in self:
            module.eval()

    def check(self, x: Tensor, residual: Tensor | None = None, act: Any = None) -> None:
        """ours(x, residual) against act(theirs(x) + residual)."""
        results = []
        for module, dtype in ((self.theirs, x.dtype), (self.exact, torch.float64)):
            y = module(x.to(dtype))
            y = y if residual is None else y + residual.to(dtype)
            results.append(y if act is None else act(y))
        y = self.ours(x) if residual is None else self.ours(x, residual)
        assert_same_layout(y, results[0])
        assert_same(y, *results)

    def check_state(self) -> None:
        """Parameters, and statistics of inputs of unit variance: a mean's terms are about 1, however small it is."""
        states = [module.state_dict() for module in self]
        assert len({len(state) for state in states}) == 1
        for ours, theirs, exact in zip(*(state.values() for state in states), strict=True):
            if ours.is_floating_point():
                assert_close(ours, theirs, exact, exact.abs() + 1, 1)
            else:
                assert torch.equal(ours, theirs)


def twins(name: str, *args: object, **kwargs: object) -> Twins:
    """Our module and torch's of the same name."""
    found = Twins(getattr(cnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs))
    assert isinstance(found.ours, type(found.theirs))
    assert list(found.ours.state_dict()) == list(found.theirs.state_dict())
    return found


def assert_same(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert_close(ours, theirs, exact, exact.abs(), 1)


class Ops(TorchDispatchMode):
    """Notes the names of our ops below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cnnops":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


ONE_PASS, TWO_OPS = ["conv2d_bn_act"], ["conv2d", "batch_norm_act"]


@torch.no_grad()
def ops_of(function: Any, *args: Any) -> list[str]:
    with Ops() as seen:
        function(*args)
    return seen.names


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
def test_conv2d_is_torchs(padding_mode: str, padding: int | tuple[int, int] | str) -> None:
    options = {"padding": padding, "dilation": (2, 1), "groups": 2, "padding_mode": padding_mode}
    twins("Conv2d", 4, 6, (3, 2), **options).check(torch.randn(2, 4, 9, 8))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_conv2d_act_adds_the_residual_before_the_activation(padding_mode: str) -> None:
    options: Any = {"padding": 1, "padding_mode": padding_mode}
    pair = Twins(cnn.Conv2dAct(3, 4, 3, **options, activation="silu"), nn.Conv2d(3, 4, 3, **options))
    x, residual = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)
    pair.check(x, None, F.silu)
    pair.check(x, residual, F.silu)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 2, "dilation": 2, "multiplier": 3, "bias": False}])
def test_depthwise_conv2d_is_a_grouped_conv2d(options: dict[str, Any]) -> None:
    layer = cnn.DepthwiseConv2d(6, 3, **options)
    plain = nn.Conv2d(6, 6 * options.pop("multiplier", 1), 3, groups=6, **options)
    assert isinstance(layer, nn.Conv2d)
    assert repr(layer).replace("DepthwiseConv2d", "Conv2d") == repr(plain)
    assert layer.multiplier == plain.out_channels // 6
    assert list(layer.state_dict()) == list(plain.state_dict())
    pair = Twins(layer, plain)
    pair.check(torch.randn(2, 6, 9, 8))
    pair.check(torch.randn(6, 9, 8))


@pytest.mark.parametrize("arguments", [{"channels": 0}, {"channels": 3, "multiplier": 0}])
def test_depthwise_conv2d_wants_channels(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"DepthwiseConv2d: \w+ must be at least 1, but got \w+=0"):
        cnn.DepthwiseConv2d(kernel_size=3, **arguments)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_conv_bn_act_pads(padding_mode: str) -> None:
    block = cnn.ConvBNAct(4, 6, 3, padding=1, padding_mode=padding_mode)
    plain = nn.Conv2d(4, 6, 3, padding=1, bias=False, padding_mode=padding_mode)
    pair = Twins(block, nn.Sequential(plain, nn.BatchNorm2d(6)))
    pair.eval()
    pair.check(torch.randn(2, 4, 5, 5), None, F.relu)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs(momentum: float | None, track: bool, affine: bool) -> None:
    pair = twins("BatchNorm2d", 5, momentum=momentum, track_running_stats=track, affine=affine)
    for x in torch.randn(3, 4, 5, 3, 3):
        pair.check(x)
    pair.check_state()
    pair.eval()
    pair.check(x)


def test_batch_norm_frozen_by_hand_leaves_its_statistics_alone() -> None:
    pair = twins("BatchNorm2d", 5)
    for bn in pair:
        bn.track_running_stats = False
    pair.check(torch.randn(4, 5, 3, 3))
    assert torch.equal(pair.ours.running_mean, pair.theirs.running_mean)


@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
def test_batch_norm_act_adds_the_residual_before_the_activation(activation: str) -> None:
    pair = Twins(cnn.BatchNormAct2d(5, activation=activation), nn.BatchNorm2d(5))
    act = {"none": None, "relu": F.relu, "hardswish": F.hardswish}[activation]
    x, residual = torch.randn(2, 2, 5, 3, 3)
    pair.check(x, None, act)
    pair.check(x, residual, act)
    pair.check_state()
    assert int(pair.ours.num_batches_tracked) == 2


def conv_bn_act(**options: Any) -> Twins:
    """cnn.ConvBNAct beside torch's sequence, which has neither activation nor residual."""
    block = cnn.ConvBNAct(4, 6, 3, stride=2, padding=1, groups=2, activation="silu", **options)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=options.get("bias", False)), nn.BatchNorm2d(6))
    return Twins(block, plain)


X, RESIDUAL = (2, 4, 8, 8), (2, 6, 4, 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_bn_act(bias: bool, layout: torch.memory_format) -> None:
    pair = conv_bn_act(bias=bias)
    assert list(dict(pair.ours.named_children())) == ["conv", "bn"]
    assert (pair.ours.conv.bias is not None) == bias
    x, residual = (torch.randn(shape).contiguous(memory_format=layout) for shape in (X, RESIDUAL))
    in_eval = ONE_PASS if layout == torch.channels_last else TWO_OPS  # the latter for the residual's sake
    for expected in (TWO_OPS, in_eval):
        pair.check(x, None, F.silu)
        pair.check(x, residual, F.silu)
        assert ops_of(pair.ours, x, residual) == expected
        assert pair.ours.training or ops_of(pair.ours, x) == ONE_PASS
        pair.theirs(x), pair.exact(x.double())  # as often in training as ours
        pair.check_state()
        pair.eval()


def test_conv_bn_act_follows_what_training_changes() -> None:
    """Folded weights that were kept would be stale after each of these (pytorch/pytorch#108863)."""
    pair, x = conv_bn_act(), torch.randn(X)
    for _ in range(2):
        pair.eval()
        pair.check(x, None, F.silu)
        for module in pair:
            module.train()
        pair.check(x, None, F.silu)  # the running statistics
        pair.eval()
        pair.check(x, None, F.silu)
        with torch.no_grad():
            for parameters in zip(*(module.parameters() for module in pair), strict=True):
                for p in parameters:
                    p.mul_(1.25)
        pair.check(x, None, F.silu)
        with torch.no_grad():
            for module in pair:
                bn = module.bn if hasattr(module, "bn") else module[1]
                bn.running_var *= 2
                bn.weight = nn.Parameter(bn.weight + 1)
        pair.check(x, None, F.silu)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_conv_bn_act_copies(copied: Any) -> None:
    block, x = conv_bn_act().ours.eval(), torch.randn(X)
    again = copied(block)
    assert_same_bits(again(x), block(x))
    block.conv.weight.data.mul_(2)
    assert not torch.equal(again(x), block(x))
    again.load_state_dict(block.state_dict())
    assert_same_bits(again(x), block(x))


def test_conv_bn_act_with_gradients_in_eval_mode() -> None:
    """A frozen batch norm: the convolution before it still learns."""
    pair, x = conv_bn_act(), torch.randn(X)
    pair.eval()
    grads = [
        torch.autograd.grad(F.silu(module(x)).sum() if i else module(x).sum(), [*module.parameters()])
        for i, (module, x) in enumerate(zip(pair, (x, x, x.double()), strict=True))
    ]
    for ours, theirs, exact in zip(*grads, strict=True):
        assert_same(ours, theirs, exact)


@pytest.mark.parametrize(
    "attach",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
    ids=lambda attach: attach.__name__,
)
@pytest.mark.parametrize("child", ["conv", "bn"])
def test_hooked_modules_are_called(child: str, attach: Any) -> None:
    block, x, calls = conv_bn_act().ours.eval(), torch.randn(X, requires_grad=True), []
    handle = attach(getattr(block, child), lambda *_: calls.append(child))
    block(x).sum().backward()
    assert calls == [child]
    assert ops_of(block, x) == TWO_OPS
    handle.remove()
    assert ops_of(block, x) == ONE_PASS


def test_a_hooks_output_counts() -> None:
    block, x = conv_bn_act().ours.eval(), torch.randn(X)
    with torch.no_grad():
        block.conv.register_forward_hook(lambda module, args, y: 2 * y)
        expected = block.bn(2 * cnn.Conv2d.forward(block.conv, x))
        assert_same_bits(block(x), expected)


def test_changed_modules_are_called() -> None:
    """A parametrization, another class, another forward: what they compute is theirs to say."""

    class Mine(cnn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    x = torch.randn(X)
    for change in (
        lambda block: parametrizations.weight_norm(block.conv),
        lambda block: setattr(block, "conv", Mine(4, 6, 3, 2, 1)),
        lambda block: setattr(block, "conv", nn.Conv2d(4, 6, 3, 2, 1)),
        lambda block: setattr(block.conv, "forward", lambda x: Mine.forward(Mine(4, 6, 3, 2, 1), x)),
        lambda block: setattr(block, "bn", nn.Identity()),
        lambda block: setattr(block, "bn", cnn.BatchNormAct2d(6, track_running_stats=False)),
    ):
        block = conv_bn_act().ours
        change(block)
        block.eval()
        assert "conv2d_bn_act" not in ops_of(block, x)
        torch.manual_seed(1)
        y = block(x)
        torch.manual_seed(1)
        assert_same_bits(y, block.bn(block.conv(x)))


def test_conv_bn_of_each_kind() -> None:
    x = torch.randn(X)
    for conv in (cnn.Conv2d(4, 4, 3, padding="same"), cnn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
                 cnn.DepthwiseConv2d(4, 3, padding=1)):  # fmt: skip
        plain = nn.Conv2d(4, 4, 3, padding=conv.padding, padding_mode=conv.padding_mode, groups=conv.groups)
        for bn in (cnn.BatchNorm2d(4, affine=False), cnn.BatchNorm2d(4, momentum=None), cnn.BatchNormAct2d(4)):
            pair = Twins(nn.Sequential(conv, bn), nn.Sequential(plain, nn.BatchNorm2d(4, affine=bn.affine)))
            pair.eval()
            pair.ours.forward = lambda x, conv=conv, bn=bn: cnn.conv_bn(conv, bn, x)
            pair.check(x, None, F.relu if isinstance(bn, cnn.BatchNormAct2d) else None)
            assert ops_of(pair.ours, x) == ONE_PASS
    with pytest.raises(ValueError, match="expected 4D input"):
        cnn.conv_bn(conv, bn, x[0])


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
    pair, x = twins(name, **args), torch.randn(2, 3, 7, 8)
    pair.check(x)
    pair.check(x[0])


def test_max_pool_indices() -> None:
    ours, theirs, _ = twins("MaxPool2d", 2, return_indices=True)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(ours(x)[1], theirs(x)[1])


def test_adaptive_max_pool_indices() -> None:
    ours, theirs, _ = twins("AdaptiveMaxPool2d", (2, 4), return_indices=True)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    assert torch.equal(ours(x)[1], theirs(x)[1])


def test_max_unpool_is_torchs() -> None:
    ours, theirs, _ = twins("MaxUnpool2d", 3, stride=2, padding=1)
    x = torch.randn(2, 3, 7, 8)
    y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert_same_bits(ours(y, indices, output_size=x.shape), theirs(y, indices, output_size=x.shape))
    y, indices = F.max_pool2d(x[:, :, :, 1:], 3, 2, 1, return_indices=True)
    assert_same_bits(ours(y[0], indices[0]), theirs(y[0], indices[0]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("output_size", [None, (11, 12), [12, 11], (2, 6, 12, 12)])
def test_conv_transpose2d_is_torchs(output_size: Any, bias: bool) -> None:
    pair, x = twins("ConvTranspose2d", 4, 6, 3, 2, groups=2, bias=bias), torch.randn(2, 4, 5, 5)
    pair.check(x)
    assert_same(*(module(x.to(module.weight), output_size) for module in pair))
    with pytest.raises(ValueError, match="output size"):
        pair.ours(x, (13, 12))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_batch_norm_act_max_pool(activation: str, momentum: float | None) -> None:
    norm, act = nn.BatchNorm2d(5, momentum=momentum), {"relu": nn.ReLU(), "none": nn.Identity()}[activation]
    pair = Twins(
        cnn.BatchNormActMaxPool2d(5, activation=activation, momentum=momentum),
        nn.Sequential(norm, act, nn.MaxPool2d(3, 2, 1)),
    )
    assert list(pair.ours.state_dict()) == list(norm.state_dict())
    for x in torch.randn(3, 4, 5, 7, 8):
        pair.check(x)
    pair.check_state()
    pair.eval()
    pair.check(x)
    shown = f"kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, activation={activation}"
    assert shown in repr(pair.ours)


class ComposedSqueezeExcite(nn.Module):
    """torchvision's, of torch's own modules."""

    def __init__(self, channels: int, squeeze_channels: int, act: Any, gate: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeeze_channels, 1), nn.Conv2d(squeeze_channels, channels, 1)
        self.act, self.gate = act, gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_squeeze_excite(activation: str, gate: str) -> None:
    composed = ComposedSqueezeExcite(12, 4, getattr(F, activation), getattr(F, gate))
    pair = Twins(cnn.SqueezeExcite(12, 4, activation, gate), composed)
    shapes = {name: tuple(t.shape) for name, t in pair.ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in composed.state_dict().items()}
    pair.check(torch.randn(2, 12, 5, 6))
    assert f"activation={activation}, gate={gate}" in repr(pair.ours)


@pytest.mark.parametrize("layer", [cnn.Conv2dAct(1, 1, 1), cnn.BatchNormAct2d(1), cnn.ConvBNAct(1, 1, 1)])
def test_repr_says_the_activation(layer: nn.Module) -> None:
    assert "activation=relu" in repr(layer)


@pytest.mark.parametrize("build", [cnn.Conv2dAct, cnn.ConvBNAct])
def test_unknown_activation(build: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"activation must be one of none, relu.* but got activation='gelu'"):
        build(1, 1, 1, activation="gelu")


def test_unknown_activation_or_gate() -> None:
    for build in (cnn.BatchNormAct2d, cnn.BatchNormActMaxPool2d):
        with pytest.raises(ValueError, match=f"{build.__name__}: activation"):
            build(1, activation="gelu")
    with pytest.raises(ValueError, match="SqueezeExcite: activation"):
        cnn.SqueezeExcite(12, 4, "gelu")
    with pytest.raises(
        ValueError, match="SqueezeExcite: gate must be one of sigmoid, hardsigmoid, but got gate='tanh'"
    ):
        cnn.SqueezeExcite(12, 4, gate="tanh")


# A module of each class, with what it is called with beside an x of [2, 4, 6, 6].
LAYERS: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "AdaptiveAvgPool2d": (cnn.AdaptiveAvgPool2d((2, 3)), ()),
    "AdaptiveMaxPool2d": (cnn.AdaptiveMaxPool2d((2, 3)), ()),
    "AvgPool2d": (cnn.AvgPool2d(2), ()),
    "BatchNorm2d": (cnn.BatchNorm2d(4), ()),
    "BatchNormAct2d": (cnn.BatchNormAct2d(4), ()),
    "BatchNormActMaxPool2d": (cnn.BatchNormActMaxPool2d(4), ()),
    "Conv2d": (cnn.Conv2d(4, 6, 3, padding=1), ()),
    "Conv2dAct": (cnn.Conv2dAct(4, 6, 3), ()),
    "ConvBNAct": (cnn.ConvBNAct(4, 6, 3), ()),
    "ConvTranspose2d": (cnn.ConvTranspose2d(4, 6, 3, 2), ()),
    "DepthwiseConv2d": (cnn.DepthwiseConv2d(4, 3, multiplier=2), ()),
    "MaxPool2d": (cnn.MaxPool2d(2), ()),
    "MaxUnpool2d": (cnn.MaxUnpool2d(2), (torch.arange(36).view(6, 6).expand(2, 4, 6, 6).contiguous(),)),
    "SqueezeExcite": (cnn.SqueezeExcite(4, 2), ()),
}


def test_every_module_is_listed() -> None:
    assert set(LAYERS) == {name for name in cnn.__all__ if isinstance(getattr(cnn, name), type)}


@pytest.mark.parametrize("name", LAYERS)
def test_arguments_are_torchs(name: str) -> None:
    if hasattr(nn, name):
        ours, theirs = (inspect.signature(getattr(library, name)) for library in (cnn, nn))
        assert str(ours) == str(theirs)


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    file, again = io.BytesIO(), copy.deepcopy(layer)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for t in again.state_dict().values():
        t.zero_()
    again.load_state_dict(torch.load(file, weights_only=True))
    return again


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        saved_and_loaded,
        lambda layer: torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True),
        lambda layer: functools.partial(checkpoint, copy.deepcopy(layer), use_reentrant=False),
    ],
    ids=["deepcopy", "pickle", "save", "compile", "checkpoint"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_module_after(again: Any, name: str) -> None:
    torch._dynamo.reset()
    layer, rest = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    results = []
    x = torch.randn(2, 4, 6, 6)
    for module in (again(layer), layer):
        leaf = x.clone().requires_grad_()
        y = module(leaf, *rest)
        buffers = [] if isinstance(module, functools.partial) else module.buffers()  # a checkpoint runs forward twice
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf), *buffers))
    for a, b in zip(*results, strict=False):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_exported_module(name: str) -> None:
    layer, rest = copy.deepcopy(LAYERS[name][0]).eval(), LAYERS[name][1]
    x = torch.randn(2, 4, 6, 6)
    assert_same_bits(torch.export.export(layer, (x, *rest)).module()(x, *rest).detach(), layer(x, *rest).detach())


@pytest.mark.parametrize("name", LAYERS)
def test_meta_and_float64(name: str) -> None:
    """Built there, not moved there."""
    layer, rest = LAYERS[name]
    made = {
        "BatchNormAct2d": (4,),
        "BatchNormActMaxPool2d": (4,),
        "BatchNorm2d": (4,),
        "SqueezeExcite": (4, 2),
        "DepthwiseConv2d": (4, 3),
    }.get(name, (4, 6, 3))
    if not list(layer.parameters()):
        return
    for device in ("meta", "cpu"):
        module = type(layer)(*made, device=device, dtype=torch.float64)
        assert {(t.device.type, t.dtype) for t in module.parameters()} == {(device, torch.float64)}
        y = module(torch.randn(2, 4, 6, 6, dtype=torch.float64, device=device), *rest)
        assert (y.device.type, y.dtype) == (device, torch.float64)


def test_torchs_own_fusion_takes_ours() -> None:
    for name, transpose in (("Conv2d", False), ("ConvTranspose2d", True)):
        pair = Twins(
            nn.Sequential(getattr(cnn, name)(4, 6, 3), cnn.BatchNorm2d(6)),
            nn.Sequential(getattr(nn, name)(4, 6, 3), nn.BatchNorm2d(6)),
        )
        pair.eval()
        x = torch.randn(2, 4, 6, 6)
        fused = fuse_conv_bn_eval(*pair.ours, transpose=transpose)
        assert type(fused) is type(pair.ours[0])
        theirs, exact = (fuse_conv_bn_eval(*pair_, transpose=transpose) for pair_ in (pair.theirs, pair.exact))
        assert_same(fused(x), theirs(x), exact(x.double()))
