"""Pooling modules: subclasses of torch's, on cnnops' kernels."""

from __future__ import annotations

from torch import Tensor, nn

from cnnops import functional


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`. input: [N, C, H, W] or [C, H, W]; returns [.., C, P, Q], with return_indices also int64."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d`. input: [N, C, H, W] or [C, H, W]; returns [.., C, P, Q]."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d`. input: [N, C, H, W] or [C, H, W]; returns [.., C, *output_size], with
    return_indices also int64."""

    output_size: int | tuple[int | None, int | None]

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class MaxUnpool2d(nn.MaxUnpool2d):
    """`torch.nn.MaxUnpool2d`. input: [N, C, H, W] or [C, H, W], indices like it; returns [.., C, P, Q]."""

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        return functional.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d`. input: [N, C, H, W] or [C, H, W]; returns [.., C, *output_size]."""

    output_size: int | tuple[int | None, int | None]

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)
