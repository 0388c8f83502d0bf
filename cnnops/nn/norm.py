"""Batch normalisation modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from cnnops import functional
from cnnops.geometry import check_activation


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on cnnops' kernels: same arguments, same parameters and buffers, same state_dict.

    input: [N, C, H, W]. Returns the same shape and dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return functional.batch_norm(input, *self._statistics(), self.eps)

    def _statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float]:
        """Count the batch; return running mean and variance, weight, bias, whether to use the batch's own statistics,
        and the share of the batch in the running ones (momentum=None: all batches weigh the same)."""
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        keep = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if keep else (None, None)
        return *running, self.weight, self.bias, of_batch, share


class BatchNormAct2d(BatchNorm2d):
    """act(batch_norm(x) + residual), fused.

    Takes `BatchNorm2d`'s arguments and `activation`, one of `cnnops.geometry.ACTIVATIONS`; raises ValueError for
    another. State_dict keys are those of `torch.nn.BatchNorm2d`.
    """

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_activation(type(self).__name__, activation)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; residual: like x, or None. Returns the same shape and dtype."""
        self._check_input_dim(x)
        return functional.batch_norm_act(x, *self._statistics(), self.eps, residual, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class BatchNormActMaxPool2d(BatchNorm2d):
    """max_pool2d(act(batch_norm(x))), fused: what follows the first convolution of an ImageNet network.

    num_features: channels of x; the window's arguments are `torch.nn.MaxPool2d`'s, keywords those of `BatchNorm2d`;
    activation: one of `cnnops.geometry.ACTIVATIONS`; raises ValueError for another. State_dict keys are those of
    `torch.nn.BatchNorm2d`.
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: _size_2_t = 3,
        stride: _size_2_t | None = 2,
        padding: _size_2_t = 1,
        dilation: _size_2_t = 1,
        ceil_mode: bool = False,
        activation: str = "relu",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, **kwargs)
        check_activation(type(self).__name__, activation)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.ceil_mode, self.activation = dilation, ceil_mode, activation

    def forward(self, input: Tensor) -> Tensor:
        """input: [N, C, H, W]. Returns [N, C, P, Q]."""
        self._check_input_dim(input)
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return functional.bn_act_max_pool2d(input, *self._statistics(), self.eps, *window, self.activation)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}, activation={self.activation}"
        )
