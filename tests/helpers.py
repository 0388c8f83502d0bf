"""Inputs in every memory layout, and the comparison with torch that most tests are made of."""

from __future__ import annotations

import contextlib
import itertools
import os
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    LAYOUTS,
    Conv2dCase,
    ConvTranspose2dCase,
    NormCase,
    Pool2dCase,
    SqueezeExciteCase,
    Unpool2dCase,
    pairwise,
)
from tolerance import as_tf32, assert_close, assert_exact, assert_same_layout, assert_same_non_finite
from torch import Tensor

from cnnops import dispatch
from cnnops.backends.cuda import CONVOLUTIONS
from cnnops.backends.triton import launch
from cnnops.geometry import (
    PADDING_MODES,
    Conv2dProblem,
    ConvTranspose2dProblem,
    NormPool2dProblem,
    NormProblem,
    Pool2dProblem,
    SqueezeExciteProblem,
    is_channels_last,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What a problem may cost, in FLOPs, for the backends that run on a CPU in place of their device: in `make test`, and in
# `make test-slow`, where the emulator takes every layer of the networks. A group costs at least one tile, however little
# of it is used.
EMULATED_FLOPS = {"simt": (1_500_000, 300_000_000), "triton": (300_000, 6_000_000)}
FLOPS_OF_A_GROUP = 20_000


@dataclass(frozen=True)
class Backend:
    name: str
    device: str


def row(name: str) -> Any:
    """The row in the dispatch table of a backend or of a variant of one. Raises KeyError."""
    return {row.NAME: row for row in dispatch.BACKENDS}[name.split("-")[0]]


def device_of(row: Any) -> str:
    return "cuda" if "cuda" in row.devices and torch.cuda.is_available() else "cpu"


BACKENDS = tuple(
    row.NAME for row in dispatch.BACKENDS if row.NAME != "aten" and (row.NAME != "cuda" or torch.cuda.is_available())
)
"""The rows that the tests cover: all but ATen, which is what they compare with. A row without its build fails."""

VARIANTS = tuple(
    f"{name}-sm80"
    for name in BACKENDS
    if name in ("simt", "triton") or (name == "cuda" and torch.cuda.get_device_capability() == (9, 0))
)
"""The same on a device that claims to be of sm_80 alone, whose kernels would not be chosen elsewhere."""


def differs(name: str, case: Any) -> bool:
    """Whether a variant may run another kernel than its backend: Triton's later devices load dense convolutions by boxes
    of whole vectors of channels, and the rest, which costs the interpreter much time, as sm_80 does."""
    if name not in VARIANTS or row(name).NAME != "triton":
        return True
    features = case.features()
    whole = features["filters" if isinstance(case, ConvTranspose2dCase) else "channels"] == "full"
    return whole and features["groups"] == "dense" and case.stride in ((1, 1), (2, 2))


WITH_TF32 = tuple(name for name in (*BACKENDS, *VARIANTS) if name.startswith(("simt", "cuda")))


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """The device as the variant of a backend has it; nothing for a backend's plain name."""
    if name not in VARIANTS:
        yield
        return
    if row(name).NAME == "triton":
        with launch.as_device(launch.Device(int(name.split("-sm")[1]), processors=3)):
            yield
        return
    use_architecture = row(name).library.function("use_architecture")
    use_architecture(int(name.split("-sm")[1]))
    try:
        yield
    finally:
        use_architecture(int(os.environ.get("CNNOPS_CUDA_ARCH", 0)))


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Let convolutions on CUDA multiply float32 as TF32. Tests do without unless they say so."""
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        yield
    finally:
        switch.fp32_precision = before


def problem_of(function: str, case: Any, dtype: torch.dtype, layout: str, device: str) -> Any:
    """The problem that a case is to a backend; what `functional` does to the arguments first is of no concern here."""
    x = laid_out(torch.empty(case.x_shape, dtype=dtype, device="meta"), layout)
    problem = _problem_of(function, case, x, layout)
    if function.startswith("bn_act_max_pool2d"):
        norm = NormProblem.of(x, None, None, None, *[x.new_empty(case.C)] * 2, False, 0.1, "none")
        return NormPool2dProblem(*(replace(each, device=device) for each in (norm, problem)))
    return replace(problem, device=device)


def _problem_of(function: str, case: Any, x: Tensor, layout: str) -> Any:
    if isinstance(case, Conv2dCase):
        weight = laid_out(x.new_empty(case.weight_shape), layout)
        bias = x.new_empty(case.K) if case.bias else None
        padding = case.padding
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(case.dilation, (case.R, case.S), strict=True)]
            padding = (reach[0] // 2, reach[1] // 2) if padding == "same" else (0, 0)
        mode = PADDING_MODES.index(case.padding_mode)
        return Conv2dProblem.of(x, weight, bias, *case.stride, *padding, *case.dilation, case.groups, mode)
    if isinstance(case, ConvTranspose2dCase):
        weight = laid_out(x.new_empty(case.weight_shape), layout)
        geometry = (*case.stride, *case.padding, *case.output_padding, *case.dilation, case.groups)
        return ConvTranspose2dProblem.of(x, weight, x.new_empty(case.K) if case.bias else None, *geometry)
    if isinstance(case, NormCase):
        return NormProblem.of(x, None, None, None, *[x.new_empty(case.C)] * 2, case.training, 1.0, "none")
    if isinstance(case, SqueezeExciteCase):
        weights = x.new_empty(case.M, case.C), None, x.new_empty(case.C, case.M), None
        return SqueezeExciteProblem.of(x, *weights, "relu", "sigmoid")
    if isinstance(case, Unpool2dCase):
        return Pool2dProblem.unpooling(x, torch.empty_like(x, dtype=torch.int64), *case.output_shape[2:])
    if case.adaptive:
        return Pool2dProblem.adaptive(case.op, x, 2, 2)
    stride = case.stride or case.kernel
    window = (*case.kernel, *stride, *case.padding, *case.dilation, case.ceil_mode)
    return Pool2dProblem.of(case.op, x, *window)


PLAINEST: dict[str, Any] = {
    "activation": NormCase("plain", 2, 16, (8, 8)),
    "conv2d": Conv2dCase("plain", 1, 16, 8, 8, 16, 3, 3, padding=(1, 1)),
    "conv_transpose2d": ConvTranspose2dCase("plain", 1, 16, 8, 8, 16, 3, 3, padding=(1, 1)),
    "max_pool2d": Pool2dCase("plain", "max_pool2d", 1, 16, 8, 8, (2, 2)),
    "avg_pool2d": Pool2dCase("plain", "avg_pool2d", 1, 16, 8, 8, (2, 2)),
    "adaptive_avg_pool2d": Pool2dCase("plain", "adaptive_avg_pool2d", 1, 16, 8, 8, output_size=(2, 2)),
    "adaptive_max_pool2d": Pool2dCase("plain", "adaptive_max_pool2d", 1, 16, 8, 8, output_size=(2, 2)),
    "max_unpool2d": Unpool2dCase("plain", 1, 16, 4, 4),
    "batch_norm": NormCase("plain", 2, 16, (8, 8)),
    "bn_act_max_pool2d": Pool2dCase("plain", "max_pool2d", 1, 16, 8, 8, (2, 2)),
    "squeeze_excite": SqueezeExciteCase("plain", 1, 16, 8, 8, 8),
}


def supports(name: str, function: str, case: Any, dtype: torch.dtype, layout: str = "channels_last") -> bool:
    """Whether a backend says that it can do a case. An unusable one is taken at its best: its tests then fail."""
    backend = row(name)
    problem = problem_of(function, case, dtype, layout, device_of(backend))
    return bool(backend.supports(function, problem).ok) if backend.usable().ok else function == "conv2d_forward"


def claims(name: str, function: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a backend has a function at all: whether it takes the plainest of problems."""
    stem = next(stem for stem in PLAINEST if function.startswith(stem))
    return supports(name, function, PLAINEST[stem], dtype)


def _having(functions: Sequence[str], dtype: torch.dtype) -> list[str]:
    """The backends that have all these functions for a dtype; of convolutions, their variants too."""
    names = list(BACKENDS)
    if set(functions) & set(CONVOLUTIONS):
        names += [name for name in VARIANTS if row(name).NAME != "triton"]
    return [name for name in names if all(claims(name, function, dtype) for function in functions)]


def on(*functions: str, dtype: torch.dtype = torch.float32) -> Any:
    """The decorator that runs a test on each backend that has all these functions; of convolutions, on variants too.

    But not on Triton's, whose kernels `cross` compares case by case.
    """
    return pytest.mark.parametrize("backend", _having(functions, dtype), indirect=True)


def on_dtypes(*functions: str, dtypes: Sequence[torch.dtype] = DTYPES) -> Any:
    """As `on`, in each of these dtypes that the backend has them for."""
    pairs = [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for dtype in dtypes
        for name in _having(functions, dtype)
    ]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, indirect=["backend"])


def emulated(name: str) -> bool:
    """Whether a backend runs on this CPU in place of the device it is made for, and so takes small problems only."""
    return row(name).NAME in EMULATED_FLOPS and device_of(row(name)) == "cpu"


Item = tuple[Any, torch.dtype, str]  # case, dtype, layout


def _item_features(item: Item) -> dict[str, Hashable]:
    case, dtype, layout = item
    return {**case.features(), "dtype": str(dtype), "layout": layout}


def _case_features(item: Item) -> dict[str, Hashable]:
    return _item_features(item) | {"case": item[0].id}


def _emulated_flops(case: Any) -> int:
    return case.flops + FLOPS_OF_A_GROUP * case.groups if isinstance(case, Conv2dCase) else 0


def cross(
    function: str,
    cases: Sequence[Any],
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    backends: Sequence[str] = BACKENDS + VARIANTS,
) -> list[Any]:
    """Parameters (backend, case, dtype, layout): the whole product on a native backend, pairwise subsets elsewhere.

    What a backend refuses is left out; test_dispatch.py holds what it may not refuse. The rest of an emulated backend's
    product is marked slow; a pairwise subset of the CPU's is marked quick. A device's variant has a pairwise subset alone.
    """
    parameters = []
    for name in backends:
        if name in VARIANTS and function not in CONVOLUTIONS:
            continue
        items: list[Item] = [
            item
            for item in itertools.product(cases, dtypes, layouts)
            if differs(name, item[0]) and supports(name, function, *item)
        ]
        if emulated(name):
            usual_flops, most_flops = EMULATED_FLOPS[row(name).NAME]
            items = [item for item in items if _emulated_flops(item[0]) <= most_flops]
            small = [item for item in items if _emulated_flops(item[0]) <= usual_flops]
            # The emulator is quick enough for each case in each dtype and in each layout; the interpreter is not.
            usual = pairwise(small, _case_features if name == "simt" else _item_features)
            quick = [] if name in VARIANTS else usual[:: max(1, len(usual) // 4)]
        elif name in VARIANTS:
            items = usual = pairwise(items, _case_features)
            quick = []
        else:
            usual, quick = items, pairwise(items, _item_features)
        for item in items:
            marks = [pytest.mark.quick] if item in quick else [] if item in usual else [pytest.mark.slow]
            case, dtype, layout = item
            id = f"{name}-{case.id}-{str(dtype).removeprefix('torch.')}-{layout}"
            parameters.append(pytest.param(name, *item, marks=marks, id=id))
    return parameters


def over(
    function: str,
    cases: Sequence[Any],
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[Any] = DTYPES,
    backends: Sequence[str] = BACKENDS + VARIANTS,
) -> Any:
    """The decorator that runs a test over `cross`; "backend" goes through the fixture of that name."""
    parameters = cross(function, cases, layouts, dtypes, backends)
    return pytest.mark.parametrize(("backend", "case", "dtype", "layout"), parameters, indirect=["backend"])


def generator(name: str) -> torch.Generator:
    """Random numbers that depend on the test's case alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def randn(shape: Sequence[int], dtype: torch.dtype, device: str, random: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(tuple(shape), generator=random, dtype=torch.float64) * scale).to(device, dtype)


def integers(shape: Sequence[int], dtype: torch.dtype, device: str, random: torch.Generator, most: int = 3) -> Tensor:
    return torch.randint(-most, most + 1, tuple(shape), generator=random).to(device, dtype)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """`t`'s values in another memory layout. "expanded" repeats the first image, so it changes the values.

    What surrounds a view in memory is NaN, or the largest integer: reading beside it shows.
    """
    if t.dim() != 4:
        return t
    if layout == "nchw":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "transposed":  # W before H in memory
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    N, C, H, W = t.shape
    beside = torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max
    if layout == "offset":  # starts one element off any 16-byte boundary
        view = t.new_full((t.numel() + 1,), beside)[1:].view(t.shape)
    elif layout == "sliced":
        view = t.new_full((N, C + 1, H + 2, 2 * W), beside)[:, 1:, 1 : H + 1, ::2]
    else:
        assert layout == "channels_last_sliced", layout
        whole = t.new_full((N, C + 3, H + 1, W), beside).contiguous(memory_format=torch.channels_last)
        view = whole[:, 2 : C + 2, 1:]
    return view.copy_(t)


def conv2d_inputs(
    case: Conv2dCase | ConvTranspose2dCase,
    dtype: torch.dtype,
    layout: str,
    device: str,
    make: Callable[..., Tensor] = randn,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias; weights scaled so that outputs stay near 1 and no half overflows."""
    random = generator(case.id)
    scale = {} if make is integers else {"scale": (max(1, case.weight_shape[1]) * case.R * case.S) ** -0.5}
    x = make(case.x_shape, dtype, device, random)
    weight = make(case.weight_shape, dtype, device, random, **scale)
    bias = make((case.K,), dtype, device, random) if case.bias else None
    return laid_out(x, layout), laid_out(weight, layout if layout in LAYOUTS else "nchw"), bias


Function = Callable[..., Tensor]
Tensors = Sequence[Tensor | None]


def evaluate(function: Function, inputs: Tensors, dy: Tensor) -> list[Tensor]:
    """y, then its gradients towards every input that is there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def evaluate_twice(function: Function, inputs: Tensors, dy: Tensor, directions: Tensors) -> list[Tensor]:
    """Gradients of sum(gradient * direction) over all gradients, towards dy and every input that is there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    dy = dy.detach().requires_grad_()
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(function(*leaves), wanted, dy, create_graph=True)
    given = [t for t in directions if t is not None]
    found = torch.autograd.grad(gradients, [dy, *wanted], given, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, [dy, *wanted], strict=True)]


def like(y: Tensor, random: torch.Generator) -> Tensor:
    """Random numbers in y's dtype and layout."""
    return torch.empty_like(y).copy_(torch.randn(y.shape, generator=random, dtype=torch.float64))


def gradient_for(function: Function, inputs: Tensors) -> Tensor:
    """A random dy for function(*inputs), in the layout of that output."""
    y = function(*(None if t is None else t.detach() for t in inputs))
    return like(y, generator(str(tuple(y.shape))))


def result_names(names: Sequence[str], inputs: Tensors) -> list[str]:
    return ["y"] + [f"d{name}" for name, t in zip(names, inputs, strict=True) if t is not None]


def mapped(change: Callable[[Tensor], Tensor], tensors: Any) -> Any:
    """The same nest of tensors and None, each tensor changed, in float64 on the CPU."""
    if tensors is None:
        return None
    if isinstance(tensors, Tensor):
        return change(tensors.detach().cpu().double())
    return [mapped(change, t) for t in tensors]


def check_multilinear(
    ours: Function,
    theirs: Function,
    names: Sequence[str],
    *tensors: Any,
    compute: Callable[..., list[Tensor]] = evaluate,
    length: float | None = None,
    in_tf32: bool = False,
) -> None:
    """Compare compute(ours, *tensors) with torch's, where each result is a sum of products of the tensors' elements.

    The same sums over absolute values give each element's sum of magnitudes, and over ones its number of terms, borders
    and strides included; length says it where the products are weighted (averages). in_tf32: ours may round what it
    multiplies, activations and filters, to TF32; "dbias", which it only sums, it may not.
    """
    got, same_dtype = compute(ours, *tensors), compute(theirs, *tensors)
    reference = compute(theirs, *mapped(lambda t: t, tensors))
    if in_tf32:
        assert_same_layout(got[0], same_dtype[0], "y")
        rounded = compute(theirs, *mapped(lambda t: as_tf32(t) if t.dim() == 4 else t, tensors))
        same_dtype = [
            exact if what == "dbias" else short.to(exact.dtype)
            for what, exact, short in zip(names, same_dtype, rounded, strict=True)
        ]
    magnitude = compute(theirs, *mapped(torch.abs, tensors))
    if length is None:
        lengths: Sequence[Any] = compute(theirs, *mapped(torch.ones_like, tensors))
    else:
        lengths = [length] * len(got)
    if names[0] == "y" and not in_tf32:
        assert_same_layout(got[0], same_dtype[0], "y")
    for what, a, b, c, d, e in zip(names, got, same_dtype, reference, magnitude, lengths, strict=True):
        assert_close(a, b, c, d.abs(), e, what)


def check_multilinear_twice(ours: Function, theirs: Function, names: Sequence[str], inputs: Tensors) -> None:
    """`check_multilinear` of the double backward, in random directions."""
    dy, random = gradient_for(theirs, inputs), generator("directions")
    directions = [None if t is None else like(t, random) for t in inputs]
    names = ["ddy", *result_names(names, inputs)[1:]]
    check_multilinear(ours, theirs, names, inputs, dy, directions, compute=evaluate_twice)


def check_exact(ours: Function, theirs: Function, names: Sequence[str], inputs: Tensors, dy: Tensor) -> None:
    """Compare where no sum rounds on the way: each result is float64 torch's, rounded once."""
    got = evaluate(ours, inputs, dy)
    reference = evaluate(theirs, *mapped(lambda t: t, (inputs, dy)))
    for what, a, b in zip(result_names(names, inputs), got, reference, strict=True):
        assert_exact(a.cpu(), b.to(a.dtype).double(), what)


def check_non_finite(
    ours: Function, theirs: Function, inputs: Tensors, dy: Tensor, names: Sequence[str] = ("y", "dx")
) -> None:
    """Compare where the first of the results, which are named, have NaN, inf and -inf."""
    got, reference = evaluate(ours, inputs, dy), evaluate(theirs, *mapped(lambda t: t, (inputs, dy)))
    for what, a, b in zip(names, got, reference, strict=False):
        assert_same_non_finite(a.cpu(), b, what)


def torch_conv2d(case: Conv2dCase) -> Function:
    """torch's conv2d; another padding mode as torch.nn.Conv2d has it, by a padded copy."""
    if case.padding_mode == "zeros":
        return lambda x, weight, bias: F.conv2d(x, weight, bias, **case.arguments())
    sides = []
    for axis in (1, 0):
        total = case.dilation[axis] * ((case.R, case.S)[axis] - 1)
        same = (total // 2, total - total // 2)
        sides += same if isinstance(case.padding, str) else [case.padding[axis]] * 2

    def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = F.pad(x, sides, case.padding_mode)
        if is_channels_last(x):  # which torch's circular padding forgets
            padded = padded.clone(memory_format=torch.channels_last)  # contiguous() leaves a single channel as it is
        return F.conv2d(padded, weight, bias, case.stride, 0, case.dilation, case.groups)

    return function


def check_moments(y: Tensor, mean: Tensor, m2: Tensor) -> None:
    """mean and m2 [K] are the mean and the sum of squared deviations of each channel of y [N, K, P, Q], in float32."""
    assert mean.dtype == m2.dtype == torch.float32
    axes, count = (0, 2, 3), y.numel() // y.shape[1]
    exact = y.cpu().double()
    centre = exact.mean(axes, keepdim=True)
    deviation = (exact - centre).abs()
    assert_close(mean.cpu(), exact.float().mean(axes), centre.flatten(), exact.abs().mean(axes), count, "mean")
    # A deviation rounds by the magnitudes of what it is the difference of.
    magnitude = (deviation * (exact.abs() + centre.abs())).sum(axes)
    theirs = (exact.float() - centre.float()).square().sum(axes)
    assert_close(m2.cpu(), theirs, deviation.square().sum(axes), magnitude, count, "m2")


def check_pooled(y: Tensor, pooled: Tensor) -> None:
    """pooled [N, K] is the mean of each plane of y [N, K, P, Q], in float32."""
    exact, axes = y.cpu().double(), (2, 3)
    assert_close(pooled, exact.float().mean(axes), exact.mean(axes), exact.abs().mean(axes), y[0, 0].numel(), "pooled")
