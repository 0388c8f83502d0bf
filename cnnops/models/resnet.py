"""Residual networks (He et al. 2015, arXiv:1512.03385); the stride of a Bottleneck is on its 3x3 convolution (v1.5).

Names are torchvision's, but for the blocks' projection, there `downsample` and here `shortcut`: `load_state_dict` takes
either name, and `torchvision_state_dict` gives torchvision's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cnnops import nn as cnn
from cnnops.models.registry import Layers, initialise, register_model, scaled
from cnnops.nn import conv_bn


class Projection(nn.Sequential):
    """bn(conv1x1(x)): the shortcut of a block that changes its input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_bn(self[0], self[1], x)


def _shortcut(in_channels: int, out_channels: int, stride: int, layers: Layers) -> Projection | None:
    """None where x itself is added."""
    if stride == 1 and in_channels == out_channels:
        return None
    return Projection(
        layers.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), layers.BatchNorm2d(out_channels)
    )


def _take_torchvision_names(block: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a block loads: hand its shortcut the entries that torchvision calls downsample. Others keep their names, so
    that what is missing or unexpected is reported as the file has it."""
    if block.shortcut is None:
        return
    for key in block.shortcut.state_dict():
        theirs, ours = f"{prefix}downsample.{key}", f"{prefix}shortcut.{key}"
        if theirs in state_dict and ours not in state_dict:
            state_dict[ours] = state_dict.pop(theirs)


def torchvision_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of a `ResNet` under torchvision's names."""
    return {key.replace(".shortcut.", ".downsample."): t for key, t in model.state_dict().items()}


class BasicBlock(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x)): addition and activation are part of the last bn, and in
    eval mode that of its convolution.

    [N, in_channels, H, W] to [N, channels, H / stride, W / stride].
    """

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, layers: Layers = cnn) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = layers.BatchNormAct2d(channels)
        self.conv2 = layers.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = layers.BatchNormAct2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride, layers)
        self.register_load_state_dict_pre_hook(_take_torchvision_names)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        x = conv_bn(self.conv1, self.bn1, x)
        return conv_bn(self.conv2, self.bn2, x, residual)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones that narrow and widen, plus the shortcut; fused as in BasicBlock.

    [N, in_channels, H, W] to [N, 4 channels, H / stride, W / stride].
    """

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1, layers: Layers = cnn) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = layers.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = layers.BatchNormAct2d(channels)
        self.conv2 = layers.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = layers.BatchNormAct2d(channels)
        self.conv3 = layers.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = layers.BatchNormAct2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, layers)
        self.register_load_state_dict_pre_hook(_take_torchvision_names)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        x = conv_bn(self.conv1, self.bn1, x)
        x = conv_bn(self.conv2, self.bn2, x)
        return conv_bn(self.conv3, self.bn3, x, residual)


class ResNet(nn.Module):
    """Stem, four stages of blocks at 64, 128, 256 and 512 channels, global average pool, fully connected layer.

    block: BasicBlock or Bottleneck. depths: blocks in each stage. stem: "cifar", a 3x3 convolution that keeps the
    resolution, or "imagenet", a 7x7 one with stride 2 and a max pool, fused with bn1. width: factor on every channel count.
    Takes [N, in_chans, H, W]; returns logits [N, num_classes]. Loads torchvision's checkpoints of the same depth (stem
    "imagenet", 1000 classes).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
        stem: str = "cifar",
        width: float = 1.0,
        layers: Layers = cnn,
    ) -> None:
        super().__init__()
        stages = [scaled(channels, width) for channels in (64, 128, 256, 512)]
        channels = stages[0]
        if stem == "imagenet":
            self.conv1 = layers.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False)
            self.bn1 = layers.BatchNormActMaxPool2d(channels, kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = layers.Conv2d(in_chans, channels, 3, padding=1, bias=False)
            self.bn1 = layers.BatchNormAct2d(channels)

        def stage(depth: int, to: int, stride: int) -> nn.Sequential:
            nonlocal channels
            blocks = []
            for position in range(depth):
                blocks.append(block(channels, to, stride if position == 0 else 1, layers))
                channels = to * block.expansion
            return nn.Sequential(*blocks)

        self.layer1 = stage(depths[0], stages[0], 1)
        self.layer2 = stage(depths[1], stages[1], 2)
        self.layer3 = stage(depths[2], stages[2], 2)
        self.layer4 = stage(depths[3], stages[3], 2)

        self.num_features = channels
        self.global_pool = layers.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] to the last feature map, [N, num_features, h, w]."""
        x = self.layer1(conv_bn(self.conv1, self.bn1, x))
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """[N, num_features, h, w] to logits [N, num_classes]."""
        return self.fc(torch.flatten(self.global_pool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def resnet18(**options: Any) -> ResNet:
    """ResNet-18: 11,173,962 parameters with the CIFAR stem and 10 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


@register_model
def resnet34(**options: Any) -> ResNet:
    """ResNet-34: 21,282,122 parameters with the CIFAR stem and 10 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


@register_model
def resnet50(**options: Any) -> ResNet:
    """ResNet-50: 23,520,842 parameters with the CIFAR stem and 10 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


@register_model
def resnet101(**options: Any) -> ResNet:
    """ResNet-101: 42,512,970 parameters with the CIFAR stem and 10 classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


@register_model
def resnet152(**options: Any) -> ResNet:
    """ResNet-152: 58,156,618 parameters with the CIFAR stem and 10 classes."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)
