"""The table of models by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import nn

from cnnops import nn as cnn

STEMS = ("cifar", "imagenet")
"""How a network starts: "cifar" keeps the resolution (for 32 x 32 images), "imagenet" reduces it to a quarter."""


class Layers(Protocol):
    """What a model is built from: `cnnops.nn`, or `cnnops.models.torch_layers`."""

    @property
    def Conv2d(self) -> Callable[..., nn.Module]: ...
    @property
    def Conv2dAct(self) -> Callable[..., nn.Module]: ...
    @property
    def BatchNorm2d(self) -> Callable[..., nn.Module]: ...
    @property
    def BatchNormAct2d(self) -> Callable[..., nn.Module]: ...
    @property
    def BatchNormActMaxPool2d(self) -> Callable[..., nn.Module]: ...
    @property
    def MaxPool2d(self) -> Callable[..., nn.Module]: ...
    @property
    def AdaptiveAvgPool2d(self) -> Callable[..., nn.Module]: ...


Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Builder) -> Builder:
    """Decorator: make a function that builds a model known to `create_model` under the function's name."""
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"register_model: a model named {name!r} is registered already")
    _BUILDERS[name] = builder
    return builder


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(_BUILDERS)


def create_model(
    name: str,
    num_classes: int = 10,
    in_chans: int = 3,
    stem: str = "cifar",
    width: float = 1.0,
    layers: Layers = cnn,
) -> nn.Module:
    """Build a model with freshly drawn weights; `torch.manual_seed` decides them.

    name: one of `list_models()`. in_chans: channels of the input. stem: "cifar" for 32 x 32 images, or "imagenet".
    width: factor on every channel count. layers: where the modules come from; `models.torch_layers` builds the same
    network from `torch.nn`, with the same state_dict keys.
    Raises ValueError for an argument outside these, or for a width that leaves a layer without a channel.
    """
    if name not in _BUILDERS:
        raise ValueError(f"create_model: unknown model {name!r}; the models are {', '.join(list_models())}")
    for argument, value in (("num_classes", num_classes), ("in_chans", in_chans)):
        if value < 1:
            raise ValueError(f"create_model: {argument} must be at least 1, but got {argument}={value}")
    if stem not in STEMS:
        raise ValueError(f"create_model: stem must be one of {', '.join(STEMS)}, but got stem={stem!r}")
    return _BUILDERS[name](num_classes=num_classes, in_chans=in_chans, stem=stem, width=width, layers=layers)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest integer; ValueError if that is less than 1."""
    count = round(channels * width)
    if count < 1:
        raise ValueError(f"create_model: width={width} leaves {count} of {channels} channels; expected at least 1")
    return count


def initialise(model: nn.Module) -> None:
    """Kaiming normal, fan-out, for convolutions (He et al. 2015, arXiv:1502.01852, eq. 14); their biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
