"""max_unpool2d against torch: a selection, so every result is torch's very own, on every backend that claims it."""

from __future__ import annotations

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, UNPOOL2D, VIEWS, Unpool2dCase, find, of_suite
from helpers import Backend, on, on_dtypes, over
from tolerance import assert_close, assert_exact, assert_same_layout

import cnnops
import cnnops.functional as CF

unpools = on("max_unpool2d_forward", "max_unpool2d_backward")
UNEVEN = find(UNPOOL2D, "3x2-uneven")


def input_of(case: Unpool2dCase, dtype: torch.dtype, layout: str, device: str) -> torch.Tensor:
    return helpers.laid_out(helpers.randn(case.x_shape, dtype, device, helpers.generator(case.id)), layout)


def indices_of(case: Unpool2dCase, layout: str, device: str) -> torch.Tensor:
    """Any positions, so that most cases have some that occur twice and some that never do."""
    *_, P, Q = case.output_shape
    random = helpers.generator(f"indices of {case.id}")
    return helpers.laid_out(torch.randint(0, max(P * Q, 1), case.x_shape, generator=random).to(device), layout)


def unpool(library: object, case: Unpool2dCase, indices: torch.Tensor) -> helpers.Function:
    return lambda x: library.max_unpool2d(x, indices, **case.arguments())  # type: ignore[attr-defined]


def check(case: Unpool2dCase, x: torch.Tensor, indices: torch.Tensor, dy: torch.Tensor | None = None) -> None:
    # torch's gradient takes no indices that are transposed in memory
    ours, theirs = unpool(CF, case, indices), unpool(F, case, indices.contiguous())
    if 0 in case.output_shape:  # torch has no gradient here
        y, their_y = ours(x), theirs(x)
        assert (y.shape, y.dtype) == (their_y.shape, their_y.dtype)
        return
    dy = helpers.gradient_for(theirs, [x]) if dy is None else dy
    (y, dx), (their_y, their_dx) = (helpers.evaluate(function, [x], dy) for function in (ours, theirs))
    assert y.dtype == dx.dtype == x.dtype
    assert_exact(y.cpu(), their_y.cpu().double(), "y", signed_zeros=True)
    assert_same_layout(y, their_y, "y")
    assert_exact(dx.cpu(), their_dx.cpu().double(), "dx", signed_zeros=True)


def check_twice(case: Unpool2dCase, x: torch.Tensor, indices: torch.Tensor) -> None:
    """A position's gradient is what all that were put there get, so their second gradients add up."""
    dy = helpers.gradient_for(unpool(F, case, indices), [x])
    direction = helpers.like(x, helpers.generator("direction"))

    def second(library: object, x: torch.Tensor, dy: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        # torch's gradient takes no indices that are transposed in memory
        function = unpool(library, case, (indices if library is CF else indices.contiguous()).to(x.device))
        return helpers.evaluate_twice(function, [x], dy, [direction])[0]

    got = second(CF, x, dy, direction)
    if not x.numel():  # torch has no gradient here
        assert_exact(got.cpu(), torch.zeros(case.output_shape, dtype=torch.float64), "ddy")
        return
    same_dtype = second(F, x, dy, direction)
    exact = helpers.mapped(lambda t: t, [x, dy, direction])
    magnitude = second(F, *exact[:2], exact[2].abs())
    length = second(F, *exact[:2], torch.ones_like(exact[2]))
    assert_close(got, same_dtype, second(F, *exact), magnitude, length, "ddy")


@over("max_unpool2d_forward", of_suite(UNPOOL2D, "corner"))
def test_max_unpool2d(backend: Backend, case: Unpool2dCase, dtype: torch.dtype, layout: str) -> None:
    for indices_layout in LAYOUTS:
        check(case, input_of(case, dtype, layout, backend.device), indices_of(case, indices_layout, backend.device))


@unpools
@pytest.mark.parametrize("case", [UNEVEN, find(UNPOOL2D, "2x2-beyond-tile")], ids=lambda case: case.id)
@pytest.mark.parametrize("layout", VIEWS)
def test_views_of_everything(backend: Backend, case: Unpool2dCase, layout: str) -> None:
    for other in LAYOUTS:
        x, indices = input_of(case, torch.float32, other, backend.device), indices_of(case, other, backend.device)
        dy = helpers.gradient_for(unpool(F, case, indices), [x])
        check(case, helpers.laid_out(x, layout), indices)
        check(case, x, helpers.laid_out(indices, layout))
        check(case, x, indices, helpers.laid_out(dy, layout))


@pytest.mark.quick
@unpools
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_of_equal_positions_stays(backend: Backend, layout: str) -> None:
    """In row-major order; each of them gets the position's gradient. NaN, infinities and -0.0 are values."""
    x = torch.tensor([[1.0, torch.nan, 3.0], [torch.inf, 5.0, -0.0]]).expand(2, 33, 2, 3)
    for last in range(6):  # the others are somewhere before
        indices = torch.full((2, 33, 2, 3), 7)
        indices.flatten(2)[..., last + 1 :] = 0
        placed = (helpers.laid_out(t.to(backend.device), layout) for t in (x, indices))
        check(Unpool2dCase("ties", 2, 33, 2, 3), *placed)


@unpools
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["max_pool2d", "adaptive_max_pool2d"])
def test_undoes_a_pool(backend: Backend, op: str, layout: str) -> None:
    """What a pool of ours took stays where it was, and the rest is zero; the size is the pool's input's."""
    x = helpers.laid_out(helpers.randn((2, 5, 9, 8), torch.float32, backend.device, helpers.generator(op)), layout)
    y, indices = getattr(CF, op)(x, 4, return_indices=True)
    window = {"kernel_size": 3, "stride": 2} if op == "adaptive_max_pool2d" else {"kernel_size": 4}
    unpooled = CF.max_unpool2d(y, indices, **window, output_size=x.shape)
    assert unpooled.shape == x.shape
    assert_same_layout(unpooled, x, "unpooled")
    kept = torch.zeros(2, 5, 72, dtype=torch.bool, device=backend.device).scatter_(2, indices.flatten(2), True)
    assert_exact(unpooled.cpu(), torch.where(kept.view(x.shape), x, 0.0).cpu().double(), "unpooled")


@unpools
@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_of_windows_without_a_tap_inside(backend: Backend, layout: str) -> None:
    """max_pool2d gives such windows -inf and an index that exists: unpooling takes it."""
    x = helpers.laid_out(helpers.randn((2, 3, 5, 1), torch.float32, backend.device, helpers.generator("x")), layout)
    y, indices = CF.max_pool2d(x, (1, 2), 1, (0, 1), 2, return_indices=True)
    unpooled = CF.max_unpool2d(y, indices, 1, 1, 0)
    assert_exact(unpooled.cpu(), torch.full(x.shape, -torch.inf).double(), "unpooled")


@unpools
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unbatched(backend: Backend, layout: str) -> None:
    x, indices = (
        make(UNEVEN, *rest, layout, backend.device) for make, rest in ((input_of, [torch.float32]), (indices_of, []))
    )
    check(UNEVEN, x[1], indices[1])
    y = unpool(CF, UNEVEN, indices[1])(x[1])
    assert_exact(y.cpu(), unpool(F, UNEVEN, indices)(x)[1].cpu().double(), "y")


@pytest.mark.quick
@unpools
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrong", [-1, 24, 25, 2**31, 2**32 + 3, -(2**63), 2**63 - 1])
def test_wrong_index_is_named(backend: Backend, wrong: int, layout: str) -> None:
    """The first in row-major order, with the plane's size; forward and backward."""
    x = helpers.laid_out(torch.zeros(2, 70, 2, 3, device=backend.device), layout)
    indices = helpers.laid_out(torch.zeros(2, 70, 2, 3, dtype=torch.int64, device=backend.device), layout)
    indices[0, 66, 1, 2] = wrong
    indices[0, 67, 0, 0] = indices[1, 0, 0, 0] = 77
    for call in (
        lambda: CF.max_unpool2d(x, indices, 2),
        lambda: torch.ops.cnnops.max_unpool2d_backward(x.new_zeros(2, 70, 4, 6), indices, False, backend.name),
    ):
        with pytest.raises(RuntimeError, match=rf"indices.*4x6.*got {wrong}$"):
            call()
    with pytest.raises(RuntimeError, match="invalid max index"):
        F.max_unpool2d(x, indices, 2)


@on("max_unpool2d_forward", "max_unpool2d_backward", dtype=torch.float64)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(backend: Backend, layout: str) -> None:
    """Each position is taken once: a value that another one replaced has torch's gradient, not its true one, zero."""
    x = input_of(UNEVEN, torch.float64, layout, backend.device).requires_grad_()
    *_, P, Q = UNEVEN.output_shape
    positions = torch.randperm(P * Q, generator=helpers.generator("positions"))[: UNEVEN.H * UNEVEN.W]
    function = unpool(CF, UNEVEN, positions.view(UNEVEN.H, UNEVEN.W).expand(UNEVEN.x_shape))
    assert torch.autograd.gradcheck(function, [x], fast_mode=True)
    assert torch.autograd.gradgradcheck(function, [x], fast_mode=True)


@on_dtypes("max_unpool2d_forward", "max_unpool2d_backward")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_double_backward(backend: Backend, dtype: torch.dtype, layout: str) -> None:
    x, indices = input_of(UNEVEN, dtype, layout, backend.device), indices_of(UNEVEN, layout, backend.device)
    check_twice(UNEVEN, x, indices)


def test_indices_want_no_gradient_and_are_not_changed() -> None:
    with cnnops.use_backend("cpu"):
        x, indices = input_of(UNEVEN, torch.float32, "nchw", "cpu").requires_grad_(), indices_of(UNEVEN, "nchw", "cpu")
        y = unpool(CF, UNEVEN, indices)(x)
        indices += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_torchs_own_kernel_by_name() -> None:
    """The fallback row has the op too, both passes."""
    for layout in LAYOUTS:
        with cnnops.use_backend("aten"):
            check(UNEVEN, input_of(UNEVEN, torch.float32, layout, "cpu"), indices_of(UNEVEN, layout, "cpu"))
