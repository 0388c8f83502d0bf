"""A small plain network for 32 x 32 images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnops import nn as cnn
from cnnops.models.registry import Layers, initialise, register_model, scaled


class SimpleCNN(nn.Module):
    """Three times 3x3 convolution, ReLU and 2x2 max pool, then two fully connected layers.

    Takes [N, in_chans, 32, 32]; returns logits [N, num_classes].
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
            raise ValueError(f"SimpleCNN: it takes 32 x 32 images, so stem must be 'cifar', but got stem={stem!r}")
        c1, c2, c3, hidden = (scaled(channels, width) for channels in (32, 64, 128, 256))
        self.features = nn.Sequential(
            layers.Conv2dAct(in_chans, c1, 3, padding=1),
            layers.MaxPool2d(2),
            layers.Conv2dAct(c1, c2, 3, padding=1),
            layers.MaxPool2d(2),
            layers.Conv2dAct(c2, c3, 3, padding=1),
            layers.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(c3 * 4 * 4, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


@register_model
def simple_cnn(**options: Any) -> SimpleCNN:
    """SimpleCNN: 620,362 parameters with 3 input channels and 10 classes."""
    return SimpleCNN(**options)
