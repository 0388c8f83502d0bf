"""Convolution modules."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from cnnops import functional
from cnnops.geometry import check_activation


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on cnnops' kernels: same arguments, same parameters, same state_dict.

    input: [N, C, H, W] or [C, H, W], of the weight's dtype. Returns [.., K, P, Q].
    """

    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups, padding_mode=self.padding_mode
        )


class DepthwiseConv2d(Conv2d):
    """Depthwise convolution: `multiplier` filters for each channel, which see that channel alone.

    `torch.nn.Conv2d` with groups=channels and channels * multiplier outputs, output c * multiplier + m from channel c;
    same parameters, same state_dict. Raises ValueError for channels or multiplier below 1.

    input: [N, channels, H, W] or [channels, H, W], of the weight's dtype. Returns [.., channels * multiplier, P, Q].
    """

    def __init__(
        self,
        channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        multiplier: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("channels", channels), ("multiplier", multiplier)):
            if value < 1:
                raise ValueError(f"DepthwiseConv2d: {name} must be at least 1, but got {name}={value}")
        super().__init__(
            channels,
            channels * multiplier,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    @property
    def multiplier(self) -> int:
        """Filters for each channel."""
        return self.out_channels // self.groups


class Conv2dAct(Conv2d):
    """act(conv2d(x) + residual) in one sweep over the output.

    Takes `Conv2d`'s arguments and `activation`, one of `cnnops.geometry.ACTIVATIONS`; raises ValueError for another.
    State_dict keys are those of `torch.nn.Conv2d`.
    """

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_activation(type(self).__name__, activation)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; residual: [N, K, P, Q] or None, of x's dtype. Returns [N, K, P, Q]."""
        return functional.conv2d_act(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            residual,
            self.activation,
            padding_mode=self.padding_mode,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on cnnops' kernels: same arguments, same parameters, same state_dict."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """input: [N, C, H, W] or [C, H, W], of the weight's dtype; output_size: (height, width) among those that the
        geometry allows, else ValueError. Returns [.., K, P, Q]."""
        stride: Any = self.stride
        padding: Any = self.padding
        kernel_size: Any = self.kernel_size
        dilation: Any = self.dilation
        output_padding: Any = self._output_padding(input, output_size, stride, padding, kernel_size, 2, dilation)
        return functional.conv_transpose2d(
            input, self.weight, self.bias, stride, padding, output_padding, self.groups, dilation
        )
