"""Modules made of several of ours, and the fusion of neighbours."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from cnnops import functional
from cnnops.geometry import is_channels_last
from cnnops.nn.conv import Conv2d, DepthwiseConv2d
from cnnops.nn.norm import BatchNorm2d, BatchNormAct2d
from cnnops.torch_private import watched


def conv_bn(conv: nn.Module, bn: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """bn(conv(x)), or bn(conv(x), residual): in one pass where that computes the same.

    It does for a `Conv2d` or `DepthwiseConv2d` before a `BatchNorm2d` or `BatchNormAct2d` in eval mode, with a residual if
    the output is channels_last. In training, with hooks on either module (they are then called as usual), and for modules
    of any other class, subclasses included, it is the two calls. Nothing is kept between calls, so new weights and statistics count at once.

    x: [N, C, H, W]; residual: [N, K, P, Q] or None, for `BatchNormAct2d`. Returns [N, K, P, Q].
    """
    fits = not bn.training and x.dim() == 4
    if fits and isinstance(conv, Conv2d) and residual is not None:
        # Converting an NCHW residual for the convolution would cost more than the pass over its output that it saves.
        fits = isinstance(bn, BatchNormAct2d) and (is_channels_last(x) or is_channels_last(conv.weight))
    if fits and isinstance(conv, Conv2d) and isinstance(bn, BatchNorm2d) and _known(conv) and _known(bn):
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        activation = bn.activation if isinstance(bn, BatchNormAct2d) else "none"
        statistics = (*bn._statistics(), bn.eps)
        return functional.conv2d_bn_act(
            x,
            conv.weight,
            conv.bias,
            *statistics,
            *geometry,
            residual,
            activation,
            padding_mode=conv.padding_mode,
        )
    y: Tensor = bn(conv(x)) if residual is None else bn(conv(x), residual)
    return y


def _known(module: nn.Module) -> bool:
    """Whether calling `module` does what its class does, and its class is one of ours."""
    return type(module) in (Conv2d, DepthwiseConv2d, BatchNorm2d, BatchNormAct2d) and not watched(module)


class ConvBNAct(nn.Module):
    """act(bn(conv(x)) + residual): children `conv` (`Conv2d`) and `bn` (`BatchNormAct2d`), fused in eval mode.

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
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.bn = BatchNormAct2d(out_channels, activation=activation, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; residual: [N, K, P, Q] or None. Returns [N, K, P, Q]."""
        return conv_bn(self.conv, self.bn, x, residual)
