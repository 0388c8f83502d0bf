"""Drop-in functions: same arguments, results and errors as ``torch.nn.functional``, on kernels of ours.

Each normalises its arguments (an int to a pair, "same" to numbers, an unbatched input to a batch of one) and calls the op.
`input` is [N, C, H, W] or, unbatched, [C, H, W]; results are channels_last if the input (or the weight) is.
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymFloat, SymInt, Tensor

from .dispatch import scope
from .geometry import PADDING_MODES, is_channels_last, pad_mode_of
from .ops.batch_norm import batch_norm_act as _batch_norm_act
from .ops.bn_act_max_pool2d import bn_act_max_pool2d as _bn_act_max_pool2d
from .ops.conv2d import conv2d as _conv2d
from .ops.conv2d_act import conv2d_act as _conv2d_act
from .ops.conv2d_bn_act import conv2d_bn_act as _conv2d_bn_act
from .ops.conv_transpose2d import conv_transpose2d as _conv_transpose2d
from .ops.max_unpool2d import max_unpool2d as _max_unpool2d
from .ops.pool2d import adaptive_avg_pool2d as _adaptive_avg_pool2d
from .ops.pool2d import adaptive_max_pool2d as _adaptive_max_pool2d
from .ops.pool2d import adaptive_max_pool2d_indices as _adaptive_max_pool2d_indices
from .ops.pool2d import avg_pool2d as _avg_pool2d
from .ops.pool2d import max_pool2d as _max_pool2d
from .ops.pool2d import max_pool2d_indices as _max_pool2d_indices
from .ops.squeeze_excite import squeeze_excite as _squeeze_excite

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_act",
    "bn_act_max_pool2d",
    "conv2d",
    "conv2d_act",
    "conv2d_bn_act",
    "conv_transpose2d",
    "max_pool2d",
    "max_unpool2d",
    "squeeze_excite",
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


def _float(function: str, name: str, value: Any) -> Any:
    """`value` as a float (or what stands for one, while tracing): numpy's numbers and a tensor of one are, a None is not."""
    if isinstance(value, (float, int, SymInt, SymFloat)):
        return value
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()):
        return float(value)
    raise TypeError(f"{function}: {name} must be a float, but got {name}={value!r}")


def _padding(
    function: str, input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, padding_mode: str
) -> tuple[Tensor, tuple[int, int], int]:
    """The input, the padding of each side and the mode's place in `PADDING_MODES`. Padding "same" of an even kernel is
    uneven: its odd row and column, at the end as in torch, are added to the input; in another mode than zeros that means
    all of the padding."""
    pad_mode = pad_mode_of(function, padding_mode)
    if not isinstance(padding, str):
        return _unless_single(input, _pair(function, "padding", padding), pad_mode)
    if padding == "valid":
        return input, (0, 0), 0
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
            padded = F.pad(input, sides, padding_mode)
            if is_channels_last(input) and not is_channels_last(padded):  # which torch's circular padding forgets
                # By permutations, which vmap can map; a clone, because what has one channel is contiguous either way.
                rows = padded.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
                padded = rows.permute(0, 3, 1, 2)
            return padded, (0, 0), 0
        input = F.pad(input, (0, total_w % 2, 0, total_h % 2))
    return _unless_single(input, (pad_h, pad_w), pad_mode)


def _unless_single(input: Tensor, pads: tuple[int, int], pad_mode: int) -> tuple[Tensor, tuple[int, int], int]:
    """The input, padding and mode; but images of a single value are padded here. torch pads first and lays out what it
    padded, where our rule, which is that for single values, would see another layout."""
    if pads == (0, 0):
        return input, pads, 0
    if pad_mode and PADDING_MODES[pad_mode] == "replicate" and min(pads) >= 0 and input.shape[1:] == (1, 1, 1):
        return F.pad(input, (pads[1], pads[1], pads[0], pads[0]), "replicate"), (0, 0), 0
    return input, pads, pad_mode


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
    padding_mode. On CUDA this and the other convolutions multiply float32 as TF32 where torch's would, as
    ``torch.backends.cudnn.conv.fp32_precision`` says.
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
    if type(padding) is int and padding_mode == "zeros":
        pad_h, pad_w, pad_mode = padding, padding, 0
    else:
        strides, dilations = (stride_h, stride_w), (dilation_h, dilation_w)
        x, (pad_h, pad_w), pad_mode = _padding("conv2d", x, weight, strides, padding, dilations, padding_mode)
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
    batch, padding, pad_mode = _padding("conv2d_act", batch, weight, stride, padding, dilation, padding_mode)
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


def conv2d_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "relu",
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """activation(batch_norm(conv2d(x, weight, bias, ...), ...) + residual): `batch_norm_act` of `conv2d`.

    With training=False in one pass over the output, which is rounded once: activation(conv(x) * scale + shift +
    residual), scale = bn_weight / sqrt(running_var + eps), shift = (bias - running_mean) * scale + bn_bias. These are
    computed anew by each call, in float32 or wider. Where a gradient is wanted (a frozen batch norm) or a torch.func
    transform is active it is two ops, and rounds after each. With training=True it is always the two, and moves the
    running statistics.

    x, weight, bias, stride, padding, dilation, groups, padding_mode: as `conv2d`; running_mean, running_var, bn_weight,
    bn_bias: [K] or None, of one dtype, x's or float32; training, momentum, eps: as `batch_norm`; residual: like the
    output, or None; activation: none, relu, relu6, silu, hardswish or sigmoid. Returns [.., K, P, Q]. Autocast lowers
    x, weight, bias and residual. Raises what `conv2d` and `batch_norm` raise: RuntimeError for running statistics that
    are None with training=False, ValueError for another activation.
    """
    _check_tensor("conv2d_bn_act", "x", x)
    _check_tensor("conv2d_bn_act", "weight", weight)
    _check_optional(
        "conv2d_bn_act",
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        bn_weight=bn_weight,
        bn_bias=bn_bias,
        residual=residual,
    )
    _check_flags("conv2d_bn_act", training=training)
    momentum, eps = _float("conv2d_bn_act", "momentum", momentum), _float("conv2d_bn_act", "eps", eps)
    batch = x.unsqueeze(0) if x.dim() == 3 else x
    if residual is not None and x.dim() == 3:
        residual = residual.unsqueeze(0)
    if training or running_mean is None or running_var is None:
        z = conv2d(batch, weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode)
        if residual is not None and torch.is_autocast_enabled(z.device.type):
            residual = residual.to(z.dtype)
        statistics = (running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
        y = batch_norm_act(z, *statistics, residual, activation)
    else:
        groups = _one_int("conv2d_bn_act", "groups", groups)
        stride, dilation = _pair("conv2d_bn_act", "stride", stride), _pair("conv2d_bn_act", "dilation", dilation)
        batch, padding, pad_mode = _padding("conv2d_bn_act", batch, weight, stride, padding, dilation, padding_mode)
        tensors = (batch, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias)
        y = _conv2d_bn_act(*tensors, *stride, *padding, *dilation, groups, pad_mode, eps, activation, scope.backend)
    return y.squeeze(0) if x.dim() == 3 else y


def _window(function: str, kernel_size: Any, stride: Any, padding: Any) -> tuple[int, int, int, int, int, int]:
    """Kernel, stride and padding; plain ints, which most calls have, cost no more than this line."""
    if type(kernel_size) is int and type(padding) is int and (stride is None or type(stride) is int):
        step = kernel_size if stride is None else stride
        return kernel_size, kernel_size, step, step, padding, padding
    kernel = _pair(function, "kernel_size", kernel_size)
    unset = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    strides = kernel if unset else _pair(function, "stride", stride)
    return (*kernel, *strides, *_pair(function, "padding", padding))


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
    if not isinstance(input, Tensor):
        _check_tensor("max_pool2d", "input", input)
    if type(ceil_mode) is not bool:
        _check_flags("max_pool2d", ceil_mode=ceil_mode)
    window = _window("max_pool2d", kernel_size, stride, padding)
    dilations = (dilation, dilation) if type(dilation) is int else _pair("max_pool2d", "dilation", dilation)
    batched = input.dim() != 3
    x = input if batched else input.unsqueeze(0)
    y, offsets = _max_pool2d(x, *window, *dilations, ceil_mode, bool(return_indices), scope.backend)
    if not return_indices:
        return y if batched else y.squeeze(0)
    indices = _max_pool2d_indices(offsets, *x.shape[2:], *window, *dilations, scope.backend)
    if not is_channels_last(x):
        indices = indices.contiguous()
    return (y, indices) if batched else (y.squeeze(0), indices.squeeze(0))


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
    exceeds half the window, IndexError for an input of fewer dimensions.
    """
    if not isinstance(input, Tensor):
        _check_tensor("avg_pool2d", "input", input)
    if type(ceil_mode) is not bool or type(count_include_pad) is not bool:
        _check_flags("avg_pool2d", ceil_mode=ceil_mode, count_include_pad=count_include_pad)
    window = _window("avg_pool2d", kernel_size, stride, padding)
    divisor = 0
    if divisor_override is not None:
        divisor = _one_int("avg_pool2d", "divisor_override", divisor_override)
        if divisor == 0:
            raise RuntimeError("avg_pool2d: divisor_override must not be zero, but got divisor_override=0")
    batched = input.dim() != 3
    x = input if batched else input.unsqueeze(0)
    y: Tensor = _avg_pool2d(x, *window, ceil_mode, count_include_pad, divisor, scope.backend)
    return y if batched else y.squeeze(0)


def _adaptive_size(function: str, input: Tensor, output_size: Any) -> tuple[int, int]:
    """P and Q, with the input's extents for None. Raises as torch does: by kind of mistake, TypeError to RuntimeError."""
    if isinstance(output_size, (tuple, list)):
        if input.dim() <= len(output_size):
            raise ValueError(
                f"{function}: output_size={output_size} needs an input of at least {len(output_size) + 1} dimensions, "
                f"but got {list(input.shape)}"
            )
        if len(output_size) != 2:
            raise RuntimeError(f"{function}: output_size must be an int or a pair, but got output_size={output_size}")
        extents = zip(output_size, input.shape[-2:], strict=True)
        output_size = [extent if size is None else size for size, extent in extents]
    return _pair(function, "output_size", output_size)


def adaptive_max_pool2d(
    input: Tensor, output_size: int | tuple[int | None, int | None], return_indices: bool = False
) -> Any:
    """Maximum over P x Q windows that cover the input, ``torch.nn.functional.adaptive_max_pool2d``.

    input: [N, C, H, W] or [C, H, W], floating; only N may be 0. output_size: P = Q or (P, Q); None keeps the input's
    extent. Windows as in `adaptive_avg_pool2d`. Returns [.., P, Q], and with return_indices also int64 flat positions
    in each H*W plane; ties and NaN as in `max_pool2d`. Raises RuntimeError for a negative size or an empty image.
    """
    _check_tensor("adaptive_max_pool2d", "input", input)
    P, Q = _adaptive_size("adaptive_max_pool2d", input, output_size)
    one = _axis_of_one(input)
    x = input if one is None else input.unsqueeze(one)
    y, offsets = _adaptive_max_pool2d(x, P, Q, bool(return_indices), scope.backend)
    if not return_indices:
        return y if one is None else y.squeeze(one)
    indices = _adaptive_max_pool2d_indices(offsets, *x.shape[2:], scope.backend)
    if not is_channels_last(x):
        indices = indices.contiguous()
    return (y, indices) if one is None else (y.squeeze(one), indices.squeeze(one))


def _axis_of_one(input: Tensor) -> int | None:
    """The axis that makes [C, H, W] a batch: of one image, or of C where that is 0, as torch lets only a batch be empty."""
    if input.dim() != 3:
        return None
    return 0 if input.shape[0] else 1


def _unpooled_pair(name: str, value: Any, lacking: type[Exception] = IndexError) -> tuple[Any, Any]:
    """`value` as two ints, raising what torch raises in computing the output's size; it ignores what comes after two."""
    try:
        each = value if isinstance(value, (tuple, list)) else (value, value)
        values = [v if isinstance(v, (int, SymInt)) else operator.index(v) for v in each]
    except TypeError:
        raise TypeError(f"max_unpool2d: {name} must be an int or a pair of ints, but got {name}={value!r}") from None
    if len(values) < 2:
        raise lacking(f"max_unpool2d: {name} must be a single int or two ints, but got {name}={value}")
    return values[0], values[1]


def _unpooled_size(extents: Any, kernel: Any, strides: Any, pads: Any, output_size: Any) -> tuple[Any, Any]:
    """P and Q: the size that a pool with these windows would have had as its input, or the one asked for near it."""
    sides = zip(extents, kernel, strides, pads, strict=True)
    P, Q = ((extent - 1) * step + size - 2 * pad for extent, size, step, pad in sides)
    if output_size is not None:
        if not isinstance(output_size, (tuple, list)):
            raise TypeError(f"max_unpool2d: output_size must be a tuple of ints, but got output_size={output_size!r}")
        if len(output_size) not in (2, 4):
            raise ValueError(f"max_unpool2d: output_size must have 2 or 4 elements, but got output_size={output_size}")
        wanted = _unpooled_pair("output_size", output_size[-2:])
        for name, size, usual, step in zip(("height", "width"), wanted, (P, Q), strides, strict=True):
            if not usual - step < size < usual + step:
                raise ValueError(
                    f"max_unpool2d: output_size's {name} must be between {usual - step + 1} and {usual + step - 1}, "
                    f"but got output_size={output_size}"
                )
        P, Q = wanted
    if P < 0 or Q < 0:
        raise ValueError(f"max_unpool2d: the output's size must not be negative, but is {(P, Q)}")
    return P, Q


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    output_size: Any = None,
) -> Tensor:
    """Put each value back where its maximum was, zeros elsewhere, ``torch.nn.functional.max_unpool2d``.

    input: [N, C, H, W] or [C, H, W], floating; indices: like input, int64 flat positions in each P*Q plane, as
    `max_pool2d` returns them. Of values that share a position the last in row-major order stays, and each gets that
    position's gradient. P = (H - 1) stride - 2 padding + kernel_size, unless output_size says (P, Q) or a whole shape,
    less than stride away. Raises ValueError for an output_size out of that range, RuntimeError for an index outside the
    plane, before anything is written. Autocast on the CPU widens input to float32, as torch's does.
    """
    _check_tensor("max_unpool2d", "input", input)
    _check_tensor("max_unpool2d", "indices", indices)
    kernel = _unpooled_pair("kernel_size", kernel_size, RuntimeError)
    if isinstance(kernel_size, (tuple, list)) and len(kernel_size) > 2:
        raise IndexError(
            f"max_unpool2d: kernel_size must be a single int or two ints, but got kernel_size={kernel_size}"
        )
    strides = kernel if stride is None else _unpooled_pair("stride", stride)
    pads = _unpooled_pair("padding", padding)
    if input.dim() not in (3, 4):
        raise RuntimeError(f"max_unpool2d: expected input of 3 or 4 dimensions, but got {list(input.shape)}")
    P, Q = _unpooled_size(input.shape[-2:], kernel, strides, pads, output_size)
    one = _axis_of_one(input)
    x, where = (input, indices) if one is None else (input.unsqueeze(one), indices.unsqueeze(one))
    y: Tensor = _max_unpool2d(x, where, P, Q, scope.backend)
    return y if one is None else y.squeeze(one)


def adaptive_avg_pool2d(input: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """Mean over P x Q windows that cover the input: rows floor(p H / P) to ceil((p + 1) H / P), columns likewise.

    input: [N, C, H, W] or [C, H, W], floating. output_size: P = Q or (P, Q); None keeps the input's extent. Returns
    [.., P, Q]. Raises RuntimeError for a negative size or an input without rows or columns.
    """
    _check_tensor("adaptive_avg_pool2d", "input", input)
    P, Q = _adaptive_size("adaptive_avg_pool2d", input, output_size)
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
    variance, and move the running ones towards them by momentum (the running variance towards the unbiased one). They
    get no gradient. Raises RuntimeError where sizes do not fit, ValueError in training for one value per channel,
    eps <= 0 or one running statistic without the other.
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
    momentum, eps = _float("batch_norm", "momentum", momentum), _float("batch_norm", "eps", eps)
    y: Tensor = _batch_norm_act(
        x, weight, bias, residual, running_mean, running_var, training, momentum, eps, activation, scope.backend
    )[0]
    return y


def bn_act_max_pool2d(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    kernel_size: Pair = 3,
    stride: Pair | None = 2,
    padding: Pair = 1,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    activation: str = "relu",
) -> Tensor:
    """max_pool2d(activation(batch_norm(x, ...)), kernel_size, ...), without writing what is pooled to memory.

    x: [N, C, H, W]; the rest as in `batch_norm`, `max_pool2d` and `batch_norm_act`; stride=None: kernel_size. Returns
    [N, C, P, Q], the very numbers of the separate functions on a channels_last x. Errors are those of these functions.
    """
    name = "bn_act_max_pool2d"
    _check_tensor(name, "x", x)
    _check_optional(name, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_flags(name, training=training, ceil_mode=ceil_mode)
    momentum, eps = _float(name, "momentum", momentum), _float(name, "eps", eps)
    window = (*_window(name, kernel_size, stride, padding), *_pair(name, "dilation", dilation), ceil_mode)
    y: Tensor = _bn_act_max_pool2d(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, *window, False, scope.backend
    )[0]
    return y


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """x * gate(bias2 + weight2 activation(bias1 + weight1 mean(x))), the mean over rows and columns. Hu et al., 2018.

    x: [N, C, H, W] or [C, H, W]; weight1: [M, C] or [M, C, 1, 1]; weight2: [C, M] or [C, M, 1, 1]; bias1: [M] or None;
    bias2: [C] or None, all of one dtype. activation: none, relu, relu6, silu, hardswish or sigmoid; gate: sigmoid or
    hardsigmoid. Returns x's shape. The means and what is made of them are float32 (float64 for float64) throughout.
    Raises RuntimeError where shapes or dtypes do not fit, ValueError for another activation or gate.
    """
    _check_tensor("squeeze_excite", "x", x)
    _check_tensor("squeeze_excite", "weight1", weight1)
    _check_tensor("squeeze_excite", "weight2", weight2)
    _check_optional("squeeze_excite", bias1=bias1, bias2=bias2)
    batch = x.unsqueeze(0) if x.dim() == 3 else x
    y: Tensor = _squeeze_excite(batch, weight1, bias1, weight2, bias2, activation, gate, scope.backend)[0]
    return y.squeeze(0) if x.dim() == 3 else y
