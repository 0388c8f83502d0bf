"""Batch normalisation modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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
