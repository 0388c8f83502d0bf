"""Models: sizes, names, errors, and training side by side with the same network on torch.nn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnops
from cnnops import models
from cnnops import nn as cnn
from cnnops.models import torch_layers


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("simple_cnn", 620_362), ("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet50", 23_520_842)],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = models.create_model(name)
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
        ({"name": "resnet19"}, r"unknown model 'resnet19'; the models are resnet18, resnet34, resnet50, simple_cnn"),
        ({"name": "resnet18", "stem": "mnist"}, r"stem must be one of cifar, imagenet, but got stem='mnist'"),
        ({"name": "simple_cnn", "stem": "imagenet"}, r"stem must be 'cifar'"),
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


@pytest.mark.parametrize("name", models.list_models())
def test_gradients_are_torchs(name: str) -> None:
    images, labels = batches(name, torch.float64)
    grads = []
    for layers in (cnn, torch_layers):
        model = build(name, layers, torch.float64)
        with cnnops.use_backend("cpu"):
            F.cross_entropy(model(images[0]), labels[0]).backward()
        grads.append({key: p.grad for key, p in model.named_parameters()})
    for key, expected in grads[1].items():
        torch.testing.assert_close(grads[0][key], expected, rtol=1e-8, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


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
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    # Rounding grows along a trajectory, alike for both: ours may stray 4 times as far as torch's own float32 does.
    error, allowed = (ours_fp32 - theirs).abs(), 4 * (theirs_fp32 - theirs).abs().cummax(0).values + 1e-5
    assert (error <= allowed).all(), f"{error.tolist()} exceeds {allowed.tolist()}"
