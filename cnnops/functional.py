"""Drop-in functions: same arguments, results and errors as ``torch.nn.functional``, on kernels of ours.

Each normalises its arguments (an int to a pair, "same" to numbers, an unbatched input to a batch of one) and calls the op.
`input` is [N, C, H, W] or, unbatched, [C, H, W]; results are channels_last if the input (or the weight) is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import SymInt, Tensor, channels_last

from .dispatch import scope
from .geometry import PADDING_MODES, is_channels_last, pad_mode_of
from .ops.batch_norm import batch_norm_act as _batch_norm_act
from .ops.conv2d import conv2d as _conv2d
from .ops.conv2d_act import conv2d_act as _conv2d_act
from .ops.conv_transpose2d import conv_transpose2d as _conv_transpose2d
from .ops.pool2d import adaptive_avg_pool2d as _adaptive_avg_pool2d
from .ops.pool2d import avg_pool2d as _avg_pool2d
from .ops.pool2d import max_pool2d as _max_pool2d
from .ops.pool2d import max_pool2d_indices as _max_pool2d_indices

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_act",
    "conv2d",
    "conv2d_act",
    "conv_transpose2d",
    "max_pool2d",
]

Pair = int | tuple[int, int]


def _int(value: Any) -> Any:
    """`value` as an int (or a SymInt, while tracing); TypeError for what torch takes for none: a bool, a float."""
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, (int, SymInt)):
        return value
    return operator.index(value)  # numpy's integers, a tensor of one integer


def _pair(function: str, name: str, value: Any) -> tuple[int, int]:
    """`value` as two ints; TypeError where it is none, RuntimeError where it is too many."""
    if type(value) is int:
        return value, value
    try:
        values = [_int(v) for v in value] if isinstance(value, (tuple, list)) else [_int(value)]
    except TypeError:
        raise TypeError(f"{function}: {name} must be an int or a pair of ints, but got {name}={value!r}") from None
    if len(values) not in (1, 2):
        raise RuntimeError(f"{function}: {name} must be a single int or two ints, but got {name}={value}")
    return values[0], values[-1]


def _one_int(function: str, name: str, value: Any) -> Any:
    try:
        return _int(value)
    except TypeError:
        raise TypeError(f"{function}: {name} must be an int, but got {name}={value!r}") from None


def _check_tensor(function: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a Tensor, but got {type(value).__name__}")


def _check_optional(function: str, **tensors: Any) -> None:
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a Tensor or None, but got {type(value).__name__}")


def _check_flags(function: str, **flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{function}: {name} must be a bool, but got {name}={value!r}")


def _padding(
    function: str, input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, pad_mode: int
) -> tuple[Tensor, tuple[int, int]]:
    """The input and the padding of each side. Padding "same" of an even kernel is uneven: its odd row and column, at the
    end as in torch, are added to the input; in another mode than zeros that means all of the padding."""
    if not isinstance(padding, str):
        return input, _pair(function, "padding", padding)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"{function}: padding must be 'same', 'valid' or numbers, but got padding={padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"{function}: padding='same' needs stride 1, but got stride={stride}")
    _check_dims(function, "weight", weight)
    total_h, total_w = dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1)
    pad_h, pad_w = total_h // 2, total_w // 2
    if total_h % 2 or total_w % 2:
        if pad_mode:
            sides = (pad_w, total_w - pad_w, pad_h, total_h - pad_h)
            padded = F.pad(input, sides, PADDING_MODES[pad_mode])
            if is_channels_last(input):  # which torch's circular padding forgets
                padded = padded.contiguous(memory_format=channels_last)
            return padded, (0, 0)
        input = F.pad(input, (0, total_w % 2, 0, total_h % 2))
    return input, (pad_h, pad_w)


def _check_dims(function: str, name: str, t: Tensor) -> None:
    if t.dim() != 4:
        raise RuntimeError(f"{function}: expected {name} of 4 dimensions, but got {list(t.shape)}")


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """2-d convolution (cross-correlation), ``torch.nn.functional.conv2d``.

    input: [N, C, H, W] or [C, H, W]; weight: [K, C/groups, R, S]; bias: [K] or None, all of one dtype. stride, padding,
    dilation: an int or (height, width); padding also "valid" or "same" (stride 1). padding_mode: what is read beside
    the input, as in ``torch.nn.Conv2d``: "zeros", "reflect" (padding < extent), "replicate" or "circular" (padding <=
    extent). Returns [.., K, P, Q], P = floor((H + 2 padding - dilation (R - 1) - 1) / stride) + 1. Raises RuntimeError
    where shapes, dtypes or geometry do not fit, TypeError where an argument is of the wrong type, ValueError for another
    padding_mode.
    """
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        _check_tensor("conv2d", "input", input)
        _check_tensor("conv2d", "weight", weight)
    if bias is not None and not isinstance(bias, Tensor):
        _check_optional("conv2d", bias=bias)
    if type(groups) is not int:
        groups = _one_int("conv2d", "groups", groups)
    stride_h, stride_w = (stride, stride) if type(stride) is int else _pair("conv2d", "stride", stride)
    dilation_h, dilation_w = (dilation, dilation) if type(dilation) is int else _pair("conv2d", "dilation", dilation)
    batched = input.dim() != 3
    x = input if batched else input.unsqueeze(0)
    pad_mode = 0 if padding_mode == "zeros" else pad_mode_of("conv2d", padding_mode)
    if type(padding) is int:
        pad_h = pad_w = padding
    else:
        strides, dilations = (stride_h, stride_w), (dilation_h, dilation_w)
        x, (pad_h, pad_w) = _padding("conv2d", x, weight, strides, padding, dilations, pad_mode)
    if not (pad_h or pad_w):
        pad_mode = 0
    y: Tensor = _conv2d(
        x, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, pad_mode, scope.backend
    )
    return y if batched else y.squeeze(0)


def conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "relu",
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """activation(conv2d(x, weight, bias, ...) + residual) in one pass over the output.

    As `conv2d`; residual: like the output, or None; activation: none, relu, relu6, silu, hardswish or sigmoid.
    Raises ValueError for another activation or padding_mode.
    """
    _check_tensor("conv2d_act", "x", x)
    _check_tensor("conv2d_act", "weight", weight)
    _check_optional("conv2d_act", bias=bias, residual=residual)
    groups = _one_int("conv2d_act", "groups", groups)
    stride, dilation = _pair("conv2d_act", "stride", stride), _pair("conv2d_act", "dilation", dilation)
    batch = x.unsqueeze(0) if x.dim() == 3 else x
    if residual is not None and x.dim() == 3:
        residual = residual.unsqueeze(0)
    pad_mode = pad_mode_of("conv2d_act", padding_mode)
    batch, padding = _padding("conv2d_act", batch, weight, stride, padding, dilation, pad_mode)
    if padding == (0, 0):
        pad_mode = 0
    y: Tensor = _conv2d_act(
        batch, weight, bias, residual, *stride, *padding, *dilation, groups, pad_mode, activation, False, scope.backend
    )[0]
    return y.squeeze(0) if x.dim() == 3 else y


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
) -> Tensor:
    """2-d transposed convolution, the gradient of `conv2d` by its input, ``torch.nn.functional.conv_transpose2d``.

    input: [N, C, H, W] or [C, H, W]; weight: [C, K/groups, R, S]; bias: [K] or None, all of one dtype. stride, padding,
    output_padding, dilation: an int or (height, width); output_padding: rows and columns more at the end, fewer than
    stride or dilation. Returns [.., K, P, Q], P = (H - 1) stride - 2 padding + dilation (R - 1) + output_padding + 1;
    what no tap reaches is the bias. Raises RuntimeError where shapes, dtypes or geometry do not fit, TypeError where an
    argument is of the wrong type.
    """
    _check_tensor("conv_transpose2d", "input", input)
    _check_tensor("conv_transpose2d", "weight", weight)
    _check_optional("conv_transpose2d", bias=bias)
    groups = _one_int("conv_transpose2d", "groups", groups)
    pairs = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    strides, pads, output_pads, dilations = (_pair("conv_transpose2d", name, pair) for name, pair in pairs.items())
    x = input.unsqueeze(0) if input.dim() == 3 else input
    y: Tensor = _conv_transpose2d(x, weight, bias, *strides, *pads, *output_pads, *dilations, groups, scope.backend)
    return y.squeeze(0) if input.dim() == 3 else y


def _window(
    function: str, kernel_size: Any, stride: Any, padding: Any
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    kernel = _pair(function, "kernel_size", kernel_size)
    strides = kernel if stride is None or stride == [] or stride == () else _pair(function, "stride", stride)
    return kernel, strides, _pair(function, "padding", padding)


def max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maximum over each window; padding counts as -inf.

    input: [N, C, H, W] or [C, H, W], floating. Returns [.., P, Q] in its dtype, and with return_indices also int64 flat
    positions in each H*W plane. A tie goes to the first maximum; NaN wins. Raises RuntimeError if padding exceeds half
    the window.
    """
    _check_tensor("max_pool2d", "input", input)
    _check_flags("max_pool2d", ceil_mode=ceil_mode, return_indices=return_indices)
    kernel, stride, padding = _window("max_pool2d", kernel_size, stride, padding)
    window = (*kernel, *stride, *padding, *_pair("max_pool2d", "dilation", dilation))
    x = input.unsqueeze(0) if input.dim() == 3 else input
    y, offsets = _max_pool2d(x, *window, ceil_mode, return_indices, scope.backend)
    indices = None
    if return_indices:
        indices = _max_pool2d_indices(offsets, *x.shape[2:], *window, scope.backend)
        if not is_channels_last(x):
            indices = indices.contiguous()
    if input.dim() == 3:
        y, indices = y.squeeze(0), None if indices is None else indices.squeeze(0)
    return (y, indices) if return_indices else y


def avg_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over each window, ``torch.nn.functional.avg_pool2d``.

    input: [N, C, H, W] or [C, H, W], floating. count_include_pad: padding counts as zeros in the mean.
    divisor_override: what to divide each window's sum by, not 0. Returns [.., P, Q]. Raises RuntimeError if padding
    exceeds half the window.
    """
    _check_tensor("avg_pool2d", "input", input)
    _check_flags("avg_pool2d", ceil_mode=ceil_mode, count_include_pad=count_include_pad)
    kernel, stride, padding = _window("avg_pool2d", kernel_size, stride, padding)
    divisor = 0 if divisor_override is None else _one_int("avg_pool2d", "divisor_override", divisor_override)
    if divisor_override is not None and divisor == 0:
        raise RuntimeError("avg_pool2d: divisor_override must not be zero, but got divisor_override=0")
    x = input.unsqueeze(0) if input.dim() == 3 else input
    y: Tensor = _avg_pool2d(x, *kernel, *stride, *padding, ceil_mode, count_include_pad, divisor, scope.backend)
    return y.squeeze(0) if input.dim() == 3 else y


def adaptive_avg_pool2d(input: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """Mean over P x Q windows that cover the input: rows floor(p H / P) to ceil((p + 1) H / P), columns likewise.

    input: [N, C, H, W] or [C, H, W], floating. output_size: P = Q or (P, Q); None keeps the input's extent. Returns
    [.., P, Q]. Raises RuntimeError for a negative size or an input without rows or columns.
    """
    _check_tensor("adaptive_avg_pool2d", "input", input)
    sizes: Any = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if input.dim() in (3, 4) and len(sizes) == 2:
        sizes = tuple(extent if size is None else size for size, extent in zip(sizes, input.shape[-2:], strict=True))
    P, Q = _pair("adaptive_avg_pool2d", "output_size", sizes)
    x = input
    if input.dim() == 3 or (input.dim() == 2 and P == Q == 1):  # to a single value torch takes a bare plane as well
        x = input[(None,) * (4 - input.dim())]
    y: Tensor = _adaptive_avg_pool2d(x, P, Q, scope.backend)
    return y.reshape(*input.shape[:-2], *y.shape[2:]) if x is not input else y


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias per channel, ``torch.nn.functional.batch_norm``.

    input: [N, C, ...]; the others [C] or None, in input's dtype or float32. training: use this batch's mean and biased
    variance, and move the running ones towards them by momentum (the running variance towards the unbiased one).
    Raises RuntimeError where sizes do not fit, ValueError in training for one value per channel or eps <= 0.
    """
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps, activation="none")


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """activation(batch_norm(x, ...) + residual) in the fewest sweeps over x.

    As `batch_norm`; residual: like x, or None; activation: none, relu, relu6, silu, hardswish or sigmoid.
    """
    _check_tensor("batch_norm", "input", x)
    _check_optional(
        "batch_norm", running_mean=running_mean, running_var=running_var, weight=weight, bias=bias, residual=residual
    )
    _check_flags("batch_norm", training=training)
    if not isinstance(momentum, (float, int)) or not isinstance(eps, (float, int)):
        raise TypeError(f"batch_norm: momentum and eps must be floats, but got momentum={momentum!r}, eps={eps!r}")
    y: Tensor = _batch_norm_act(
        x, weight, bias, residual, running_mean, running_var, training, momentum, eps, activation, scope.backend
    )[0]
    return y
