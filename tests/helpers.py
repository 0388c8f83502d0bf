"""Inputs in every memory layout, and the comparison with torch that most tests are made of."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Conv2dCase, NormCase, Pool2dCase, pairwise
from tolerance import assert_close, assert_same_layout
from torch import Tensor

from cnnops import dispatch
from cnnops.geometry import Conv2dProblem, NormProblem, Pool2dProblem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# How large a problem the backends that run on a CPU in place of their device take in `make test`; both do some hundred
# MFLOP/s at best, and pay for whole tiles.
EMULATED_FLOPS = {"simt": 1_500_000, "triton": 300_000}


@dataclass(frozen=True)
class Backend:
    name: str
    device: str


def row(name: str) -> Any:
    """The backend's row in the dispatch table. Raises KeyError."""
    return {row.NAME: row for row in dispatch.BACKENDS}[name]


def device_of(row: Any) -> str:
    return "cuda" if "cuda" in row.devices and torch.cuda.is_available() else "cpu"


BACKENDS = tuple(
    row.NAME for row in dispatch.BACKENDS if row.NAME != "aten" and (row.NAME != "cuda" or torch.cuda.is_available())
)
"""The rows that the tests cover: all but ATen, which is what they compare with. A row that is missing its build fails."""


def claims(name: str, function: str, dtype: torch.dtype) -> bool:
    """Whether a backend says it has a function at all: whether it takes the plainest of problems."""
    backend = row(name)
    if not backend.usable().ok:
        return function.startswith("conv2d_forward")  # enough to make the tests fail with the reason
    x = torch.empty(1, 16, 8, 8, dtype=dtype, device=device_of(backend))
    if function.startswith(("conv2d", "activation")):
        problem: Any = Conv2dProblem.of(x, x.new_empty(16, 16, 3, 3), None, 1, 1, 1, 1, 1, 1, 1)
    elif function.startswith("adaptive"):
        problem = Pool2dProblem.adaptive("adaptive_avg_pool2d", x, 2, 2)
    elif "pool2d" in function:
        problem = Pool2dProblem.of(function, x, 2, 2, 2, 2, 0, 0)
    else:
        problem = NormProblem.of(x, None, None, None, None, None, True, 1e-5, "none")
    return bool(backend.supports(function, problem).ok)


def claiming(function: str, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    return tuple(name for name in BACKENDS if claims(name, function, dtype))


def emulated(name: str) -> bool:
    """Whether a backend runs on this CPU in place of the device it is made for, and so takes small problems only."""
    return name in EMULATED_FLOPS and device_of(row(name)) == "cpu"


Item = tuple[Any, torch.dtype, str]  # case, dtype, layout


def _item_features(item: Item) -> dict[str, Hashable]:
    case, dtype, layout = item
    return {**case.features(), "dtype": str(dtype), "layout": layout}


def cross(
    function: str,
    cases: Sequence[Conv2dCase] | Sequence[Pool2dCase] | Sequence[NormCase],
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Any]:
    """Parameters (backend, case, dtype, layout): the whole product on a native backend, a pairwise subset elsewhere.

    The rest of an emulated backend's product is marked slow; a pairwise subset of the CPU's is marked quick.
    """
    parameters = []
    for name in BACKENDS:
        kept = [dtype for dtype in dtypes if claims(name, function, dtype)]
        items: list[Item] = list(itertools.product(cases, kept, layouts))
        if emulated(name):
            small = [item for item in items if getattr(item[0], "flops", 0) <= EMULATED_FLOPS[name]]
            usual = pairwise(small, _item_features)
            quick = usual[:: max(1, len(usual) // 4)]
        else:
            usual, quick = items, pairwise(items, _item_features)
        for item in items:
            marks = [pytest.mark.quick] if item in quick else [] if item in usual else [pytest.mark.slow]
            case, dtype, layout = item
            id = f"{name}-{case.id}-{str(dtype).removeprefix('torch.')}-{layout}"
            parameters.append(pytest.param(name, *item, marks=marks, id=id))
    return parameters


def over(function: str, cases: Sequence[Any], layouts: Sequence[str] = LAYOUTS, dtypes: Sequence[Any] = DTYPES) -> Any:
    """The decorator that runs a test over `cross`; "backend" goes through the fixture of that name."""
    parameters = cross(function, cases, layouts, dtypes)
    return pytest.mark.parametrize("backend, case, dtype, layout", parameters, indirect=["backend"])


# ---- inputs


def generator(name: str) -> torch.Generator:
    """Random numbers that depend on the test's case alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def randn(shape: Sequence[int], dtype: torch.dtype, device: str, random: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(tuple(shape), generator=random, dtype=torch.float64) * scale).to(device, dtype)


def integers(shape: Sequence[int], dtype: torch.dtype, device: str, random: torch.Generator, most: int = 3) -> Tensor:
    return torch.randint(-most, most + 1, tuple(shape), generator=random).to(device, dtype)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """`t`'s values in another memory layout. "expanded" repeats the first image, so it changes the values.

    What surrounds a view in memory is NaN: reading beside it shows.
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
    if layout == "offset":  # starts one element off any 16-byte boundary
        view = t.new_full((t.numel() + 1,), torch.nan)[1:].view(t.shape)
    elif layout == "sliced":
        view = t.new_full((N, C + 1, H + 2, 2 * W), torch.nan)[:, 1:, 1 : H + 1, ::2]
    else:
        assert layout == "channels_last_sliced", layout
        whole = t.new_full((N, C + 3, H + 1, W), torch.nan).contiguous(memory_format=torch.channels_last)
        view = whole[:, 2 : C + 2, 1:]
    return view.copy_(t)


def conv2d_inputs(
    case: Conv2dCase, dtype: torch.dtype, layout: str, device: str, make: Callable[..., Tensor] = randn
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias; weights scaled so that outputs stay near 1 and no half overflows."""
    random = generator(case.id)
    scale = {} if make is integers else {"scale": (max(1, case.weight_shape[1]) * case.R * case.S) ** -0.5}
    x = make(case.x_shape, dtype, device, random)
    weight = make(case.weight_shape, dtype, device, random, **scale)
    bias = make((case.K,), dtype, device, random) if case.bias else None
    return laid_out(x, layout), laid_out(weight, layout if layout in LAYOUTS else "nchw"), bias


# ---- comparison


def evaluate(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """y and its gradients towards every input that is there. dy: ones where not given."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y) if dy is None else dy)
    return y.detach(), list(gradients)


def upcast(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().cpu().double() for t in inputs]


def like(y: Tensor, random: torch.Generator) -> Tensor:
    """A random gradient for y, in its layout."""
    return torch.empty_like(y).copy_(torch.randn(y.shape, generator=random, dtype=torch.float64))


def check_multilinear(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    names: Sequence[str],
    dy: Tensor | None = None,
) -> None:
    """Compare an op that is linear in each input, forward and gradients, with torch.

    For such an op the same op on absolute values gives each element's sum of magnitudes, and on ones the number of
    terms in it, borders and strides included.
    """
    y_theirs = theirs(*(None if t is None else t.detach() for t in inputs))
    if dy is None:
        dy = like(y_theirs, generator(str(tuple(y_theirs.shape))))
    got = _flat(evaluate(ours, inputs, dy))
    same_dtype = _flat(evaluate(theirs, inputs, dy))
    exact = upcast(inputs)
    dy64 = dy.cpu().double()
    reference = _flat(evaluate(theirs, exact, dy64))
    magnitude = _flat(evaluate(theirs, [None if t is None else t.abs() for t in exact], dy64.abs()))
    length = _flat(evaluate(theirs, [None if t is None else torch.ones_like(t) for t in exact]))
    assert_same_layout(got[0], same_dtype[0], "y")
    results = ["y"] + [f"d{name}" for name, t in zip(names, inputs, strict=True) if t is not None]
    for what, *values in zip(results, got, same_dtype, reference, magnitude, length, strict=True):
        assert_close(*values, what=what)


def _flat(result: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    return [result[0], *result[1]]


def torch_conv2d(case: Conv2dCase) -> Callable[..., Tensor]:
    return lambda x, weight, bias: F.conv2d(x, weight, bias, **case.arguments())
