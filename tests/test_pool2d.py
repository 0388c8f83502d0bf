"""The pools against torch: values, indices, gradients, ties, NaN, layouts, on every backend that claims them."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, POOL2D, VIEWS, Pool2dCase, find, networks, of_suite, pairwise, window_positions
from helpers import Backend, on, on_dtypes, over
from tolerance import assert_close, assert_exact, assert_same_layout

import cnnops.functional as CF

OPS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
CORNERS = of_suite(POOL2D, "corner")
NONEMPTY = [case for case in CORNERS if case.N and case.C and case.output_size != (0, 0)]
SMALL = pairwise(NONEMPTY, lambda case: case.features())
WITH_TIES = (*filter(lambda case: "max" in case.op, SMALL), find(POOL2D, "adaptive_max/global"))
KINDS = tuple(next(case for case in SMALL if case.op == op) for op in OPS)


def cases_of(op: str, cases: Any = CORNERS) -> list[Pool2dCase]:
    return [case for case in cases if case.op == op]


def is_max(case: Pool2dCase) -> bool:
    return "max" in case.op


def pool(library: Any, case: Pool2dCase) -> helpers.Function:
    return lambda x: getattr(library, case.op)(x, **case.arguments())


def input_of(case: Pool2dCase, dtype: torch.dtype, layout: str, device: str) -> torch.Tensor:
    return helpers.laid_out(helpers.randn(case.x_shape, dtype, device, helpers.generator(case.id)), layout)


def check_average(case: Pool2dCase, x: torch.Tensor, dy: torch.Tensor | None = None) -> None:
    dy = helpers.gradient_for(pool(F, case), [x]) if dy is None else dy
    helpers.check_multilinear(pool(CF, case), pool(F, case), ["y", "dx"], [x], dy, length=case.window)


def check_max(case: Pool2dCase, x: torch.Tensor, dy: torch.Tensor | None = None) -> None:
    """A maximum is one of the inputs, so it and its index are torch's very own; its gradient is a sum."""
    (y, indices), (their_y, their_indices) = (
        getattr(library, case.op)(x, **case.arguments(), return_indices=True) for library in (CF, F)
    )
    assert_exact(y.cpu(), their_y.cpu().double(), "y", signed_zeros=True)
    assert_same_layout(y, their_y, "y")
    assert indices.dtype == torch.int64
    assert torch.equal(indices, their_indices)
    assert_same_layout(indices, their_indices, "indices")
    dy = helpers.gradient_for(pool(F, case), [x]) if dy is None else dy
    got, same_dtype = (helpers.evaluate(pool(library, case), [x], dy) for library in (CF, F))
    exact_x, exact_dy = helpers.mapped(lambda t: t, (x, dy))
    reference = helpers.evaluate(pool(F, case), [exact_x], exact_dy)[1]
    magnitude = helpers.evaluate(pool(F, case), [exact_x], exact_dy.abs())[1]
    length = helpers.evaluate(pool(F, case), [exact_x], torch.ones_like(exact_dy))[1]
    assert_exact(got[0].cpu(), their_y.cpu().double(), "y without indices", signed_zeros=True)
    assert_close(got[1], same_dtype[1], reference, magnitude, length, "dx")


def check(case: Pool2dCase, x: torch.Tensor, dy: torch.Tensor | None = None) -> None:
    (check_max if is_max(case) else check_average)(case, x, dy)


def check_twice(case: Pool2dCase, x: torch.Tensor) -> None:
    dy = helpers.gradient_for(pool(F, case), [x])
    direction = helpers.like(x, helpers.generator("direction"))

    def twice(function: helpers.Function, x: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
        return helpers.evaluate_twice(function, [x], *rest)[:1]

    if is_max(case):  # the windows' choices are x's own, whatever the direction's sign
        got, same_dtype = (twice(pool(library, case), x, dy, [direction]) for library in (CF, F))
        exact = helpers.mapped(lambda t: t, (x, dy, [direction]))
        assert_exact(got[0].cpu(), twice(pool(F, case), *exact)[0], "ddy")
        assert_same_layout(got[0], same_dtype[0], "ddy")
    else:
        helpers.check_multilinear(
            pool(CF, case), pool(F, case), ["ddy"], x, dy, [direction], compute=twice, length=case.window
        )


def maximum_by_definition(case: Pool2dCase, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each window's maximum, the first one or the last NaN, and its position; -inf and -1 without a tap inside."""
    sides = zip((case.H, case.W), case.kernel, case.stride or case.kernel, case.padding, case.dilation, strict=True)
    rows, columns = (
        torch.arange(window_positions(size, k, step, pad, spread, case.ceil_mode))[:, None] * step
        + (torch.arange(k) * spread - pad)
        for size, k, step, pad, spread in sides
    )
    best = x.new_full((*x.shape[:2], len(rows), len(columns)), -torch.inf)
    position = torch.full(best.shape, -1)
    for row, column in itertools.product(rows.T, columns.T):
        inside = ((row >= 0) & (row < case.H))[:, None] & ((column >= 0) & (column < case.W))
        tap = x[:, :, row.clamp(0, case.H - 1)][..., column.clamp(0, case.W - 1)]
        better = inside & ((position < 0) | (tap > best) | tap.isnan())
        best = torch.where(better, tap, best)
        position = torch.where(better, row[:, None] * case.W + column, position)
    return best, position


def check_max_by_definition(case: Pool2dCase, x: torch.Tensor) -> None:
    """Every pass, also where a window has no tap inside the input: torch writes out of bounds there. Such a window gives
    -inf, an index that exists, and no gradient."""
    expected, positions = maximum_by_definition(case, x.double())
    y, indices = CF.max_pool2d(x, **case.arguments(), return_indices=True)
    for each in (y, CF.max_pool2d(x, **case.arguments())):
        assert_exact(each, expected, "y", signed_zeros=True)
    somewhere = positions >= 0
    assert torch.equal(indices[somewhere], positions[somewhere])
    assert ((indices >= 0) & (indices < case.H * case.W)).all()
    random = helpers.generator("dy")
    dy, direction = helpers.like(y, random), helpers.like(x, random)
    _, dx = helpers.evaluate(pool(CF, case), [x], dy)

    def scattered(dy: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(*x.shape[:2], case.H * case.W, dtype=torch.float64)
        return found.scatter_add_(2, positions.flatten(2).clamp_min(0), (dy * somewhere).flatten(2)).view(x.shape)

    reference = scattered(dy.double())
    lengths = scattered(torch.ones(y.shape, dtype=torch.float64))
    assert_close(dx, reference.to(x.dtype), reference, scattered(dy.double().abs()), lengths, "dx")
    ddy = helpers.evaluate_twice(pool(CF, case), [x], dy, [direction])[0]
    chosen = direction.double().flatten(2).gather(2, positions.flatten(2).clamp_min(0)).view(y.shape) * somewhere
    assert_exact(ddy, chosen, "ddy")


@over("max_pool2d_forward", cases_of("max_pool2d"))
def test_max_pool2d(backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str) -> None:
    check_max(case, input_of(case, dtype, layout, backend.device))


@over("avg_pool2d_forward", cases_of("avg_pool2d"))
def test_avg_pool2d(backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str) -> None:
    check_average(case, input_of(case, dtype, layout, backend.device))


@over("adaptive_avg_pool2d_forward", cases_of("adaptive_avg_pool2d"))
def test_adaptive_avg_pool2d(backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str) -> None:
    x = input_of(case, dtype, layout, backend.device)
    if case.id.endswith(("empty-output", "empty-channels")):  # torch has no gradient here
        assert CF.adaptive_avg_pool2d(x, case.output_size).shape == F.adaptive_avg_pool2d(x, case.output_size).shape
    else:
        check_average(case, x)


@over("adaptive_max_pool2d_forward", cases_of("adaptive_max_pool2d"))
def test_adaptive_max_pool2d(backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str) -> None:
    x = input_of(case, dtype, layout, backend.device)
    if case.id.endswith("empty-output"):  # torch has no gradient here
        y, indices = CF.adaptive_max_pool2d(x.requires_grad_(), case.output_size, return_indices=True)
        their_y, their_indices = F.adaptive_max_pool2d(x, case.output_size, return_indices=True)
        assert (y.shape, y.dtype) == (their_y.shape, their_y.dtype)
        assert (indices.shape, indices.dtype) == (their_indices.shape, torch.int64)
        assert_exact(torch.autograd.grad(y.sum(), x)[0].cpu(), torch.zeros(case.x_shape, dtype=torch.float64), "dx")
    else:
        check_max(case, x)


@on(*[op + "_forward" for op in OPS])
@pytest.mark.parametrize("case", [case.with_batch(2) for case in networks(POOL2D)], ids=lambda case: case.id)
def test_layers_of_networks(backend: Backend, case: Pool2dCase) -> None:
    for layout in LAYOUTS:
        check(case, input_of(case, torch.float32, layout, backend.device))


@on(*[op + "_forward" for op in OPS])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
@pytest.mark.parametrize("layout", [*LAYOUTS, *VIEWS])
def test_views_of_x_and_dy(backend: Backend, case: Pool2dCase, layout: str) -> None:
    x = input_of(case, torch.float32, "channels_last", backend.device)
    dy = helpers.gradient_for(pool(F, case), [x])
    check(case, x, helpers.laid_out(dy, layout))
    check(case, helpers.laid_out(x, layout))


@on(*[op + "_forward" for op in OPS])
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
def test_dy_of_one_number(backend: Backend, case: Pool2dCase) -> None:
    x = input_of(case, torch.float32, "channels_last", backend.device)
    check(case, x, torch.full((1,), 0.75).expand(pool(F, case)(x).shape))


@on(*[op + "_forward" for op in OPS])
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
def test_unbatched(backend: Backend, case: Pool2dCase) -> None:
    check(case, input_of(case.with_batch(1), torch.float32, "nchw", backend.device)[0])


@on_dtypes("avg_pool2d_forward", "adaptive_avg_pool2d_forward")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_average_of_integers_is_exact(backend: Backend, dtype: torch.dtype, layout: str) -> None:
    """Windows of 2 x 4: dividing by 8 is exact, so the whole average is."""
    random = helpers.generator("integers")
    x = helpers.laid_out(helpers.integers((2, 19, 8, 12), dtype, backend.device, random), layout)
    for name, arguments in (("avg_pool2d", {"kernel_size": (2, 4)}), ("adaptive_avg_pool2d", {"output_size": (4, 3)})):
        y = getattr(CF, name)(x, **arguments)
        assert_exact(y.cpu(), getattr(F, name)(x.cpu().double(), **arguments), name)


@pytest.mark.quick
@on_dtypes("max_pool2d_forward", "adaptive_max_pool2d_forward")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", WITH_TIES, ids=lambda case: case.id)
def test_ties_zeros_and_non_finite(backend: Backend, case: Pool2dCase, dtype: torch.dtype, layout: str) -> None:
    """The first maximum wins, -0.0 and 0.0 tie, the last NaN wins, and -inf is a value like any other."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, torch.inf, -torch.inf, -torch.inf, -1.0, torch.nan])
    for count in (2, 4, 7, 9):  # few values, so that every window has ties; the NaN comes last
        random = helpers.generator(f"ties of {count}")
        x = values[torch.randint(0, count, case.x_shape, generator=random)].to(backend.device, dtype)
        check_max(case, helpers.laid_out(x, layout))
    check_max(case, helpers.laid_out(torch.full(case.x_shape, -torch.inf, dtype=dtype, device=backend.device), layout))


@on("avg_pool2d_forward", "adaptive_avg_pool2d_forward")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in SMALL if not is_max(case)], ids=lambda case: case.id)
def test_non_finite_averages(backend: Backend, case: Pool2dCase, layout: str) -> None:
    x = input_of(case, torch.float32, layout, backend.device)
    x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, -1, -1, 0] = torch.inf, torch.nan, -torch.inf
    check_average(case, x)


# Windows of an input of 4 x 5 that begin in its padding and whose next tap is beyond it. An axis has one such window or
# none: where a second one would fit, it begins inside.
TAPLESS = {
    "rows": {"kernel_size": (2, 2), "stride": 2, "padding": (1, 0), "dilation": (5, 2)},
    "columns": {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 1), "dilation": (1, 6)},
    "both": {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": (5, 6)},
    "rows-ceil": {"kernel_size": (2, 1), "stride": (3, 1), "padding": (1, 0), "dilation": (7, 1), "ceil_mode": True},
    "columns-ceil": {"kernel_size": (1, 2), "stride": (2, 3), "padding": (0, 1), "dilation": (1, 8), "ceil_mode": True},
}


@pytest.mark.quick
@on_dtypes("max_pool2d_forward")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("C", [1, 3, 17, 67])
@pytest.mark.parametrize("id", TAPLESS)
def test_window_without_a_tap_inside(backend: Backend, id: str, C: int, dtype: torch.dtype, layout: str) -> None:
    """Such windows give -inf, an index that exists, and no gradient. torch itself writes out of bounds here."""
    x = helpers.laid_out(helpers.randn((2, C, 4, 5), dtype, backend.device, helpers.generator(id)), layout)
    y, indices = CF.max_pool2d(x.requires_grad_(), **TAPLESS[id], return_indices=True)
    assert y.numel() > 0
    for each in (y, CF.max_pool2d(x.detach(), **TAPLESS[id])):
        assert_exact(each.cpu(), torch.full(y.shape, -torch.inf, dtype=torch.float64), "y")
    assert ((indices >= 0) & (indices < 20)).all()
    dy = torch.ones_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert_exact(dx.cpu(), torch.zeros(x.shape, dtype=torch.float64), "dx")
    (ddy,) = torch.autograd.grad(dx, dy, torch.ones_like(dx))
    assert_exact(ddy.cpu(), torch.zeros(y.shape, dtype=torch.float64), "ddy")


@on("adaptive_avg_pool2d_forward", "adaptive_max_pool2d_forward")
@pytest.mark.parametrize("op", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_adaptive_windows_begin_beyond_32_bits(backend: Backend, op: str) -> None:
    """Where a window begins and ends is a quotient of products beyond 2^31. Windows of 1 and 2: every sum is exact."""
    case = Pool2dCase("tall", op, 1, 1, 46_345, 1, output_size=(46_341, 1))
    random = helpers.generator(op)
    x, dy = (helpers.integers((1, 1, rows, 1), torch.float32, backend.device, random) for rows in (46_345, 46_341))
    got, expected = (helpers.evaluate(pool(library, case), [x], dy) for library in (CF, F))
    for name, a, b in zip(("y", "dx"), got, expected, strict=True):
        assert_exact(a.cpu(), b.cpu().double(), name)


@on(*[op + "_forward" for op in OPS], dtype=torch.float64)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_gradcheck(backend: Backend, case: Pool2dCase) -> None:
    x = input_of(case, torch.float64, "channels_last", backend.device)
    if is_max(case):  # distinct values, further apart than gradcheck's steps
        x = helpers.laid_out(x.flatten().argsort().argsort().double().view(x.shape) / x.numel(), "channels_last")
    x.requires_grad_()
    assert torch.autograd.gradcheck(pool(CF, case), [x], fast_mode=True)
    assert torch.autograd.gradgradcheck(pool(CF, case), [x], fast_mode=True)


@on(*[op + "_forward" for op in OPS])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_double_backward(backend: Backend, case: Pool2dCase) -> None:
    check_twice(case, input_of(case, torch.float32, "channels_last", backend.device))


@on("max_pool2d_forward")
def test_indices_carry_no_gradient_and_serve_unpooling(backend: Backend) -> None:
    x = helpers.randn((2, 5, 8, 6), torch.float32, backend.device, helpers.generator("x")).requires_grad_()
    y, indices = CF.max_pool2d(x, 2, return_indices=True)
    assert y.requires_grad
    assert not indices.requires_grad
    assert torch.equal(F.max_unpool2d(y, indices, 2), F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8], ids=str)
def test_integer_maximum_falls_back(dtype: torch.dtype) -> None:
    x = torch.arange(36, dtype=dtype).view(1, 1, 6, 6)
    assert torch.equal(CF.max_pool2d(x, 2), F.max_pool2d(x, 2))
