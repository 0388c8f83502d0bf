"""The layers of `cnnops.nn` that models use, made of torch's own ops.

`create_model(..., layers=torch_layers)` builds the same network with the same state_dict keys on `torch.nn`, written as
one would write it for torch (in place where that is safe): the reference for parity tests and for timings.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, MaxPool2d

__all__ = [
    "AdaptiveAvgPool2d",
    "BatchNorm2d",
    "BatchNormAct2d",
    "BatchNormActMaxPool2d",
    "Conv2d",
    "Conv2dAct",
    "MaxPool2d",
]


class Conv2dAct(nn.Conv2d):
    """relu(conv2d(x))."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu_(super().forward(input))


class BatchNormAct2d(nn.BatchNorm2d):
    """relu(batch_norm(x) + residual)."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        if residual is not None:
            y += residual
        return F.relu_(y)


class BatchNormActMaxPool2d(nn.BatchNorm2d):
    """max_pool2d(relu(batch_norm(x)))."""

    def __init__(self, num_features: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(num_features)
        self.window = kernel_size, stride, padding

    def forward(self, input: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(super().forward(input)), *self.window)
