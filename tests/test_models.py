"""Models: sizes, names, errors, checkpoints, and inference and training beside the same network on torch.nn."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_close_in_double, assert_same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cnnops
from cnnops import models
from cnnops import nn as cnn
from cnnops.models import torch_layers


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("simple_cnn", 620_362),
        ("vgg_style", 1_806_154),
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("resnet101", 42_512_970),
        ("resnet152", 58_156_618),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = models.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_parameter_counts_for_imagenet(name: str, parameters: int) -> None:
    """torchvision's own, from its models' documentation."""
    with torch.device("meta"):
        model = models.create_model(name, num_classes=1000, stem="imagenet")
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", models.list_models())
def test_torch_layers_give_the_same_network(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = models.create_model(name), models.create_model(name, layers=torch_layers)
    shapes = [{key: t.shape for key, t in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert not any(type(m).__module__.startswith("cnnops.nn") for m in theirs.modules())
    of_torch = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
    assert all(type(m).__module__.startswith("cnnops.nn") for m in ours.modules() if isinstance(m, of_torch))


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_shapes(name: str, stem: str) -> None:
    model = models.create_model(name, num_classes=7, in_chans=2, stem=stem, width=0.125).eval()
    x = torch.randn(2, 2, 64, 64)
    with torch.no_grad(), cnnops.use_backend("cpu"):
        features = model.forward_features(x)
        logits = model(x)
    size = 8 if stem == "cifar" else 2
    assert features.shape == (2, model.num_features, size, size)
    assert logits.shape == (2, 7)


def test_vgg_style_shapes() -> None:
    model = models.create_model("vgg_style", num_classes=7, in_chans=2, width=0.125).eval()
    with torch.no_grad(), cnnops.use_backend("cpu"):
        assert model.forward_features(torch.randn(2, 2, 32, 24)).shape == (2, model.num_features, 4, 3)
        assert model(torch.randn(2, 2, 32, 24)).shape == (2, 7)


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(models.create_model("resnet18", width=0.125).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    weight = models.create_model("resnet18").get_parameter("layer3.0.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "resnet19"},
            r"unknown model 'resnet19'; the models are resnet101, resnet152, resnet18, resnet34, resnet50, simple_cnn",
        ),
        ({"name": "resnet18", "stem": "mnist"}, r"stem must be one of cifar, imagenet, but got stem='mnist'"),
        ({"name": "simple_cnn", "stem": "imagenet"}, r"stem must be 'cifar'"),
        ({"name": "vgg_style", "stem": "imagenet"}, r"stem must be 'cifar'"),
        ({"name": "resnet18", "width": 0.001}, r"width=0.001 leaves 0 of 64 channels; expected at least 1"),
        ({"name": "simple_cnn", "width": -1.0}, r"expected at least 1"),
        ({"name": "resnet18", "in_chans": 0}, r"in_chans must be at least 1, but got in_chans=0"),
        ({"name": "resnet18", "num_classes": 0}, r"num_classes must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create_model(**arguments)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        models.register_model(models.resnet18)


def build(name: str, layers: models.Layers, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = models.create_model(name, width=0.25, layers=layers)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its mask depends on the dtype
    return model.to(dtype).to(memory_format=torch.channels_last)


def batches(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [2, 8, 3, size, size] and labels [2, 8]: two batches to learn by heart."""
    torch.manual_seed(1)
    size = 32 if name == "simple_cnn" else 16
    return torch.randn(2, 8, 3, size, size, dtype=torch.float64).to(dtype), torch.randint(10, (2, 8))


def randomised(name: str, layers: models.Layers, dtype: torch.dtype) -> nn.Module:
    """In eval mode, with running statistics as if it had been trained."""
    model = build(name, layers, torch.float64).eval()
    for t in [*model.parameters(), *model.buffers()]:
        if t.dim() == 1 and t.is_floating_point():
            t.data.uniform_(0.5, 1.5)
    return model.to(dtype)


class Ops(TorchDispatchMode):
    """Counts our ops below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cnnops":
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def ops_of(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with cnnops.use_backend("cpu"), Ops() as seen:
        model(x)
    return seen.counts


FUSED = {"vgg_style": 7, "resnet18": 20, "resnet34": 36, "resnet50": 53, "resnet101": 104, "resnet152": 155}


@pytest.mark.parametrize("name", FUSED)
def test_inference_is_one_pass_for_each_convolution(name: str) -> None:
    """All convolutions: those of the blocks, the stem, and the shortcuts."""
    model = models.create_model(name, width=0.0625).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    counts = ops_of(model, x)
    assert counts.pop("conv2d_bn_act") == FUSED[name] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert not [op for op in counts if "conv" in op or "norm" in op]
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *_: None)
    counts = ops_of(model, x)
    assert (counts["conv2d_bn_act"], counts["conv2d"], counts["batch_norm_act"]) == (FUSED[name] - 1, 1, 1)
    assert not {"conv2d_bn_act"} & set(ops_of(model.train(), x.repeat(2, 1, 1, 1)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["vgg_style", "resnet18", "resnet50"])
@torch.no_grad()
def test_inference_is_torchs(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """One pass rounds less than torch's many, so torch's own error bounds ours."""
    images = batches(name, dtype)[0][0].contiguous(memory_format=layout)
    with cnnops.use_backend("cpu"):
        ours = randomised(name, cnn, dtype)(images)
    theirs = randomised(name, torch_layers, dtype)(images)
    exact = randomised(name, torch_layers, torch.float64)(images.double())
    assert_close(ours, theirs, exact, exact.abs(), 1, intermediate=dtype)


def test_gradients_in_eval_mode_are_torchs() -> None:
    """Frozen batch norms, as in fine-tuning."""
    images, labels = batches("resnet18", torch.float64)
    check_gradients(
        "resnet18", lambda model: F.cross_entropy(model.eval()(images[0].to(model.fc.weight.dtype)), labels[0])
    )


def test_copies_compute_the_same() -> None:
    model, x = randomised("resnet18", cnn, torch.float32), torch.randn(2, 3, 16, 16)
    other = models.create_model("resnet18", width=0.25).eval().to(memory_format=torch.channels_last)
    other.load_state_dict(model.state_dict())
    with torch.no_grad(), cnnops.use_backend("cpu"):
        expected = model(x)
        for each in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_bits(each(x), expected)
            each.load_state_dict(models.torchvision_state_dict(model))  # the hook is copied too
            assert_same_bits(each(x), expected)


def check_gradients(name: str, loss: Any) -> None:
    """The gradients of loss(model) towards every parameter, on our layers and on torch's."""
    grads = []
    for layers, dtype in ((cnn, torch.float64), (torch_layers, torch.float64), (torch_layers, torch.float32)):
        model = build(name, layers, dtype)
        with cnnops.use_backend("cpu"):
            loss(model).backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close_in_double(*grads)


@pytest.mark.parametrize("name", models.list_models())
def test_gradients_are_torchs(name: str) -> None:
    images, labels = batches(name, torch.float64)
    check_gradients(name, lambda model: F.cross_entropy(model(images[0].to(next(model.parameters()).dtype)), labels[0]))


def losses(name: str, layers: models.Layers, dtype: torch.dtype) -> torch.Tensor:
    """The losses of 20 SGD steps from the same weights on the same batches, in float64."""
    model = build(name, layers, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    images, labels = batches(name, dtype)
    out = []
    for step in range(20):
        x = images[step % 2].contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), labels[step % 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.detach().double())
    return torch.stack(out)


@pytest.mark.parametrize("name", ["resnet18", "simple_cnn"])
def test_training_stays_with_torch_over_20_steps(name: str) -> None:
    with cnnops.use_backend("cpu"):
        ours, ours_fp32 = (losses(name, cnn, dtype) for dtype in (torch.float64, torch.float32))
    theirs, theirs_fp32 = (losses(name, torch_layers, dtype) for dtype in (torch.float64, torch.float32))
    assert theirs[-2:].mean() < 0.7 * theirs[:2].mean()
    assert_close_in_double([ours], [theirs], [theirs_fp32])
    # Rounding grows along a trajectory, alike for both: ours may stray 4 times as far as torch's own float32 does.
    unit = torch.finfo(torch.float32).eps * theirs.abs()
    error, allowed = (ours_fp32 - theirs).abs(), 4 * ((theirs_fp32 - theirs).abs().cummax(0).values + unit)
    assert (error <= allowed).all(), f"{error.tolist()} exceeds {allowed.tolist()}"


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_layout(name: str, tracked: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of torchvision's resnet18 and resnet50, in their order, as its source has them.

    tracked=False: as before torch 0.4.1, without num_batches_tracked.
    """

    def norm(prefix: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for key in NORM if tracked else NORM[:-1]:
            yield f"{prefix}.{key}", () if key == "num_batches_tracked" else (channels,)

    bottleneck = name == "resnet50"
    depths = (3, 4, 6, 3) if bottleneck else (2, 2, 2, 2)
    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", 64)
    into = 64
    for stage, (depth, planes) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), 1):
        out = 4 * planes if bottleneck else planes
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            kernels = (1, 3, 1) if bottleneck else (3, 3)
            widths = (into, planes, planes, out) if bottleneck else (into, planes, planes)
            for i, kernel in enumerate(kernels):
                yield f"{prefix}.conv{i + 1}.weight", (widths[i + 1], widths[i], kernel, kernel)
                yield from norm(f"{prefix}.bn{i + 1}", widths[i + 1])
            if block == 0 and into != out:
                yield f"{prefix}.downsample.0.weight", (out, into, 1, 1)
                yield from norm(f"{prefix}.downsample.1", out)
            into = out
    yield "fc.weight", (1000, into)
    yield "fc.bias", (1000,)


def torchvision_checkpoint(name: str, tracked: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: torch.rand(shape) if shape else torch.tensor(7) for key, shape in torchvision_layout(name, tracked)}


def imagenet(name: str, layers: models.Layers = cnn) -> nn.Module:
    return models.create_model(name, num_classes=1000, stem="imagenet", layers=layers)


@pytest.mark.parametrize("layers", [cnn, torch_layers], ids=["cnn", "torch"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_checkpoints_load(name: str, assign: bool, layers: models.Layers) -> None:
    model, checkpoint = imagenet(name, layers), torchvision_checkpoint(name)
    before = list(checkpoint)
    assert str(model.load_state_dict(checkpoint, assign=assign)) == "<All keys matched successfully>"
    assert list(checkpoint) == before
    for key, t in model.state_dict().items():
        assert torch.equal(t, checkpoint[key.replace("shortcut", "downsample")]), key
    exported = models.torchvision_state_dict(model)
    assert list(exported) == before
    assert all(torch.equal(exported[key], t) for key, t in checkpoint.items())
    assert models.torchvision_state_dict(model).keys() == dict(torchvision_layout(name)).keys()


def test_checkpoints_without_batch_counts_load() -> None:
    model = imagenet("resnet18")
    model.load_state_dict(torchvision_checkpoint("resnet18", tracked=False))
    assert int(model.layer2[0].shortcut[1].num_batches_tracked) == 0


def test_part_of_a_larger_model_loads() -> None:
    both = nn.ModuleDict({"net": imagenet("resnet18")})
    both.load_state_dict({f"net.{key}": t for key, t in torchvision_checkpoint("resnet18").items()})


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"layer2.0.downsample.0.weight": (128, 64, 3, 3)}, ["size mismatch for layer2.0.shortcut.0.weight"]),
        ({"layer2.0.downsample.1.bias": None}, ['Missing key(s) in state_dict: "layer2.0.shortcut.1.bias"']),
        ({"layer1.0.downsample.0.weight": (64, 64, 1, 1)}, ['Unexpected key(s) in state_dict: "layer1.0.downsample.0.']),
        ({"layer2.0.downsample.2.weight": (1,)}, ['Unexpected key(s) in state_dict: "layer2.0.downsample.2.weight"']),
        ({"layer2.0.shortcut.0.weight": (128, 64, 1, 1)}, ['Unexpected key(s) in state_dict: "layer2.0.downsample.0.']),
        ({"fc.weight": (10, 512), "bn1.bias": None}, ["size mismatch for fc.weight", '"bn1.bias"']),
    ],
)  # fmt: skip
def test_strict_errors_name_the_entry(change: dict[str, tuple[int, ...] | None], messages: list[str]) -> None:
    checkpoint = torchvision_checkpoint("resnet18")
    for key, shape in change.items():
        checkpoint.pop(key, None)
        if shape is not None:
            checkpoint[key] = torch.zeros(shape)
    with pytest.raises(RuntimeError) as raised:
        imagenet("resnet18").load_state_dict(checkpoint)
    for message in messages:
        assert message in str(raised.value)
    assert str(raised.value).count("\n\t") == len(messages)
