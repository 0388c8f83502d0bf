"""Convolution modules."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnops import functional
from cnnops.geometry import check_activation


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on cnnops' kernels: same arguments, same parameters, same state_dict.

    input: [N, C, H, W] or [C, H, W], of the weight's dtype. Returns [.., K, P, Q].
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._pad(input)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _pad(self, input: Tensor) -> tuple[Tensor, Any]:
        """The input and the padding that is left to the kernel: it pads with zeros, torch pads in every other mode."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0


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
        x, padding = self._pad(x)
        return functional.conv2d_act(
            x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, residual, self.activation
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
