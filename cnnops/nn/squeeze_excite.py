"""Squeeze and excitation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnnops import functional
from cnnops.geometry import check_activation, check_gate


class SqueezeExcite(nn.Module):
    """x * gate(fc2(activation(fc1(mean(x))))), fused: ``torchvision.ops.SqueezeExcitation``'s parameters and state_dict.

    channels: of x; squeeze_channels: between the two layers. activation: one of `cnnops.geometry.ACTIVATIONS`; gate: one
    of `cnnops.geometry.GATES`; raises ValueError for another. Parameters: fc1.weight [squeeze_channels, channels, 1, 1],
    fc1.bias, fc2.weight [channels, squeeze_channels, 1, 1], fc2.bias.
    """

    def __init__(
        self,
        channels: int,
        squeeze_channels: int,
        activation: str = "relu",
        gate: str = "sigmoid",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(type(self).__name__, activation)
        check_gate(type(self).__name__, gate)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1, device=device, dtype=dtype)
        self.activation, self.gate = activation, gate

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, channels, H, W], of the parameters' dtype. Returns the same shape."""
        fc1, fc2 = self.fc1, self.fc2
        return functional.squeeze_excite(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.activation, self.gate)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, gate={self.gate}"
