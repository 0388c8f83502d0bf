"""A plain network of 3x3 convolutions after VGG (Simonyan and Zisserman 2014, arXiv:1409.1556), with batch norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnnops import nn as cnn
from cnnops.models.registry import Layers, initialise, register_model, scaled
from cnnops.nn import conv_bn

STAGES = ((64, 64), (128, 128), (256, 256, 256))
"""Channels of each convolution; a 2x2 max pool follows each stage."""


class ConvBlock(nn.Module):
    """relu(bn(conv3x3(x) + bias)). [N, in_channels, H, W] to [N, out_channels, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, layers: Layers = cnn) -> None:
        super().__init__()
        self.conv = layers.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn = layers.BatchNormAct2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return conv_bn(self.conv, self.bn, x)


class VGGStyleCNN(nn.Module):
    """Seven `ConvBlock`s in the stages 64-64, 128-128, 256-256-256, each with a 2x2 max pool at its end; then global
    average pool, a hidden layer of 256 with ReLU and dropout, and the logits.

    Takes [N, in_chans, H, W] with H, W >= 8; returns logits [N, num_classes]. width: factor on every channel count.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        stem: str = "cifar",
        width: float = 1.0,
        layers: Layers = cnn,
    ) -> None:
        super().__init__()
        if stem != "cifar":
            raise ValueError(
                f"VGGStyleCNN: it starts at full resolution, so stem must be 'cifar', but got stem={stem!r}"
            )
        modules: list[nn.Module] = []
        channels = in_chans
        for stage in STAGES:
            for to in (scaled(wanted, width) for wanted in stage):
                modules.append(ConvBlock(channels, to, layers))
                channels = to
            modules.append(layers.MaxPool2d(2))
        self.num_features = channels
        self.features = nn.Sequential(*modules)
        self.global_pool = layers.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(channels, num_classes)
        )
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] to the last feature map, [N, num_features, H / 8, W / 8]."""
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """[N, num_features, h, w] to logits [N, num_classes]."""
        return self.classifier(torch.flatten(self.global_pool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def vgg_style(**options: Any) -> VGGStyleCNN:
    """VGGStyleCNN: 1,806,154 parameters with 3 input channels and 10 classes."""
    return VGGStyleCNN(**options)
