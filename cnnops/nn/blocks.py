"""Modules made of several of ours."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from cnnops.nn.conv import Conv2d
from cnnops.nn.norm import BatchNormAct2d


class ConvBNAct(nn.Module):
    """act(bn(conv(x)) + residual): children `conv` (`Conv2d`) and `bn` (`BatchNormAct2d`).

    Raises ValueError for an activation that is not in `cnnops.geometry.ACTIVATIONS`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = False,
        activation: str = "relu",
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        self.bn = BatchNormAct2d(out_channels, activation=activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; residual: [N, K, P, Q] or None. Returns [N, K, P, Q]."""
        return self.bn(self.conv(x), residual)
