"""The ops under torch.func (vmap, grad, jvp and their nests), at dual levels, and all of that compiled."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import test_registration as registration
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from test_registration import NativeCalls
from tolerance import assert_close, assert_same_bits
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

import cnnops
import cnnops.functional as CF
from cnnops import dispatch, torch_private
from cnnops.ops.conv2d import Conv2d

Function = Callable[..., Any]
ACTIVATE = {"relu": F.relu, "silu": F.silu, "sigmoid": torch.sigmoid}
X, WEIGHT, Y = (2, 4, 5, 6), (6, 2, 3, 2), (2, 6, 3, 5)
CONV = ((2, 1), (1, 0), (1, 1), 2)  # stride, padding, dilation, groups
MEAN, VAR = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 2.0, 3.0])


@dataclass(frozen=True)
class Op:
    """A function of ours, the same made of torch's, and what both take."""

    id: str
    ours: Function
    theirs: Function
    shapes: tuple[tuple[int, ...], ...]
    calls: int = 1
    """Native calls of the function, mapped or not."""
    loops: bool = False
    """Whether three samples with layers of their own, or gradients of theirs, are three calls."""

    def tensors(self, dtype: torch.dtype = torch.float32, samples: int | None = None) -> list[Tensor]:
        lead = () if samples is None else (samples,)
        return [
            helpers.randn((*lead, *shape), dtype, "cpu", helpers.generator(f"{self.id}{i}{lead}"))
            for i, shape in enumerate(self.shapes)
        ]


def _norm(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    """Batch norm by its definition: torch's own is not differentiable in reverse over forward mode (it takes the batch's
    statistics for constants there)."""
    mean, var = MEAN.to(x), VAR.to(x)
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    rstd = (var + 1e-5).rsqrt()
    return (x - mean[:, None, None]) * (rstd * weight)[:, None, None] + bias[:, None, None]


def _conv2d_act(activation: str) -> Op:
    return Op(
        f"conv2d_act-{activation}",
        lambda x, w, b, r: CF.conv2d_act(x, w, b, *CONV, r, activation),
        lambda x, w, b, r: ACTIVATE[activation](F.conv2d(x, w, b, *CONV) + r),
        (X, WEIGHT, (6,), Y),
    )


def _batch_norm_act(activation: str, training: bool) -> Op:
    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        statistics = (None, None) if training else (MEAN.to(x), VAR.to(x))
        return CF.batch_norm_act(x, *statistics, weight, bias, training, 0.1, 1e-5, residual, activation)

    return Op(
        f"batch_norm_act-{activation}-{'train' if training else 'eval'}",
        ours,
        lambda x, w, b, r: ACTIVATE[activation](_norm(x, w, b, training) + r),
        (X, (4,), (4,), X),
    )


def _padded(function: Function) -> Function:
    """A convolution by torch, reflecting."""
    return lambda x, *rest: function(F.pad(x, (2, 2, 1, 1), "reflect"), *rest)


def _conv2d_bn_act(library: Any) -> Function:
    def function(x: Tensor, weight: Tensor, bias: Tensor, bn_weight: Tensor, bn_bias: Tensor, residual: Tensor) -> Any:
        mean, var = torch.linspace(-1, 1, 6).to(x), torch.linspace(4, 9, 6).to(x)
        if library is CF:
            return CF.conv2d_bn_act(
                x, weight, bias, mean, var, bn_weight, bn_bias, False, 0.1, 1e-5, *CONV, residual, "silu"
            )
        y = F.batch_norm(F.conv2d(x, weight, bias, *CONV), mean, var, bn_weight, bn_bias, False, 0.1, 1e-5)
        return F.silu(y + residual)

    return function


def _bn_act_max_pool2d(activation: str, training: bool) -> Op:
    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = (None, None) if training else (MEAN.to(x), VAR.to(x))
        return CF.bn_act_max_pool2d(x, *statistics, weight, bias, training, 0.1, 1e-5, activation=activation)

    return Op(
        f"bn_act_max_pool2d-{activation}-{'train' if training else 'eval'}",
        ours,
        lambda x, w, b: F.max_pool2d(ACTIVATE[activation](_norm(x, w, b, training)), 3, 2, 1),
        (X, (4,), (4,)),
    )


def _squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    hidden = F.silu(F.conv2d(x.mean((2, 3), keepdim=True), w1, b1))
    return x * torch.sigmoid(F.conv2d(hidden, w2, b2))


PLACES = (torch.arange(2 * 4 * 5 * 6) * 7 % 120).view(X)
"""Where unpooling puts values in planes of 10 x 12; none meet."""


def _unpooled(x: Tensor) -> Tensor:
    return (
        torch.zeros_like(x)
        .repeat(1, 1, 2, 2)
        .flatten(2)
        .scatter(2, PLACES.flatten(2), x.flatten(2))
        .unflatten(2, (10, 12))
    )


OPS = (
    Op("conv2d", lambda x, w, b: CF.conv2d(x, w, b, *CONV), lambda x, w, b: F.conv2d(x, w, b, *CONV), (X, WEIGHT, (6,))),
    Op(
        "conv2d-reflect",
        lambda x, w, b: CF.conv2d(x, w, b, (2, 1), (1, 2), 1, 2, padding_mode="reflect"),
        _padded(lambda x, w, b: F.conv2d(x, w, b, (2, 1), 0, 1, 2)),
        (X, WEIGHT, (6,)),
    ),
    Op(
        "conv_transpose2d",
        lambda x, w, b: CF.conv_transpose2d(x, w, b, (2, 1), (1, 0), (1, 0), 2),
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), (1, 0), (1, 0), 2),
        (X, (4, 3, 3, 2), (6,)),
    ),
    *(_conv2d_act(activation) for activation in ACTIVATE),
    Op("conv2d_bn_act", _conv2d_bn_act(CF), _conv2d_bn_act(F), (X, WEIGHT, *[(6,)] * 3, Y), 2),
    Op("max_pool2d", lambda x: CF.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), (X,)),
    Op("avg_pool2d", lambda x: CF.avg_pool2d(x, 3, 2, 1, True, False), lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), (X,)),
    Op("adaptive_avg_pool2d", lambda x: CF.adaptive_avg_pool2d(x, (3, 4)), lambda x: F.adaptive_avg_pool2d(x, (3, 4)), (X,)),
    Op("adaptive_max_pool2d", lambda x: CF.adaptive_max_pool2d(x, (3, 4)), lambda x: F.adaptive_max_pool2d(x, (3, 4)), (X,)),
    Op("max_unpool2d", lambda x: CF.max_unpool2d(x, PLACES, 2), _unpooled, (X,)),
    *(_batch_norm_act(activation, training) for activation in ACTIVATE for training in (True, False)),
    *(_bn_act_max_pool2d("silu", training) for training in (True, False)),
    Op(
        "squeeze_excite",
        lambda *t: CF.squeeze_excite(*t, "silu"),
        _squeeze_excite,
        (X, (3, 4, 1, 1), (3,), (4, 3, 1, 1), (4,)),
        loops=True,
    ),
)  # fmt: skip
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.id)


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with cnnops.use_backend("cpu"):
        yield


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeCalls]:
    """Notes every native call."""
    dispatch._chosen.clear()
    yield NativeCalls(monkeypatch, "cpu")
    dispatch._chosen.clear()


def everywhere(function: Function, count: int) -> tuple[Function, tuple[int, ...]]:
    """A scalar made of function's result with a curvature of its own, and the places of all arguments."""
    return lambda *t: function(*t).sin().sum(), tuple(range(count))


def check(op: Op, transformed: Callable[[Function], Function], tensors: list[Tensor]) -> None:
    """transformed(ours) in float32 against transformed(torch's) in float64, within torch's own error.

    The sums that make a derivative's elements are taken to be as large as its largest element.
    """
    got = tree_leaves(transformed(op.ours)(*tensors))
    same_dtype = tree_leaves(transformed(op.theirs)(*tensors))
    reference = tree_leaves(transformed(op.theirs)(*[t.double() for t in tensors]))
    for i, (a, b, c) in enumerate(zip(got, same_dtype, reference, strict=True)):
        assert_close(a, b, c, c.abs().amax().expand_as(c), tensors[0].numel(), f"result {i}")


def mapped(tensors: list[Tensor], samples: list[Tensor], axes: tuple[int | None, ...]) -> list[Tensor]:
    return [
        t if axis is None else s.movedim(0, axis).contiguous()
        for t, s, axis in zip(tensors, samples, axes, strict=True)
    ]


def combinations(op: Op) -> list[tuple[int | None, ...]]:
    """Every choice of arguments to map, each along the first, the second and the last axis."""
    found = []
    for choice in itertools.product((False, True), repeat=len(op.shapes)):
        for axis in (0, 1, -1) if any(choice) else ():
            found.append(tuple(axis if take else None for take in choice))
    return found


@each_op
def test_vmap_is_one_native_call_where_it_can_be(op: Op, native: NativeCalls) -> None:
    for axes in combinations(op):
        tensors = mapped(op.tensors(), op.tensors(samples=3), axes)
        native.calls.clear()
        dispatch._chosen.clear()
        vmap(op.ours, axes)(*tensors)
        expected = 3 if op.loops and any(axis is not None for axis in axes[1:]) else op.calls
        assert len(native.calls) == expected, (axes, [name for name, _ in native.calls])
        check(op, lambda function, axes=axes: vmap(function, axes), tensors)


@each_op
def test_nested_vmap(op: Op, native: NativeCalls) -> None:
    """Over x twice, over x in one and the rest in the other, and with another axis for the results."""
    outer, inner, both = op.tensors(samples=2), op.tensors(samples=3), op.tensors(samples=3)
    x = torch.stack([both[0], 2 * both[0]], 1)  # 3 x 2 samples
    shared = [None] * (len(op.shapes) - 1)
    check(op, lambda f: vmap(vmap(f, (0, *shared)), (1, *shared), out_dims=-1), [x, *op.tensors()[1:]])
    assert len(native.calls) == op.calls
    if shared:
        check(op, lambda f: vmap(vmap(f, (0, *shared)), (None, *[0 for _ in shared])), [inner[0], *outer[1:]])
        check(op, lambda f: vmap(vmap(f, (None, *[0 for _ in shared])), (0, *shared)), [outer[0], *inner[1:]])


@each_op
def test_gradients_of_each_sample(op: Op, native: NativeCalls) -> None:
    """vmap over grad, as in torch's tutorial on per-sample gradients: for each choice of what the samples share."""
    for axes in combinations(op):
        if -1 in axes:
            continue
        tensors = mapped(op.tensors(), op.tensors(samples=3), axes)

        def gradients(function: Function, axes: Any = axes) -> Function:
            scalar, places = everywhere(function, len(axes))
            return vmap(grad(scalar, places), axes)

        native.calls.clear()
        dispatch._chosen.clear()
        gradients(op.ours)(*tensors)
        names = [name for name, _ in native.calls]
        assert max(Counter(names).values()) == (3 if op.loops else 1), names
        check(op, gradients, tensors)


@each_op
def test_gradients_of_each_sample_by_x_alone(op: Op, native: NativeCalls) -> None:
    """Samples are images to every op, where no parameter wants a gradient and no statistic is of a batch."""
    axes = (0, *[None] * (len(op.shapes) - 1))

    def gradients(function: Function) -> Function:
        return vmap(grad(lambda *t: function(*t).sin().sum()), axes)

    tensors = mapped(op.tensors(), op.tensors(samples=3), axes)
    gradients(op.ours)(*tensors)
    assert max(Counter(name for name, _ in native.calls).values()) == 1
    check(op, gradients, tensors)


@each_op
def test_gradient_of_all_samples(op: Op, native: NativeCalls) -> None:
    """grad over vmap."""
    for axes in combinations(op):
        if 1 in axes:
            continue
        tensors = mapped(op.tensors(), op.tensors(samples=3), axes)

        def gradient(function: Function, axes: Any = axes) -> Function:
            scalar, places = everywhere(vmap(function, axes), len(axes))
            return grad(scalar, places)

        check(op, gradient, tensors)
    names = [name for name, _ in native.calls]
    assert len(names) <= (6 if op.loops else 3) * op.calls * len(combinations(op))


@each_op
def test_jacobians(op: Op) -> None:
    places = tuple(range(len(op.shapes)))
    check(op, lambda function: jacrev(function, places), op.tensors())
    check(op, lambda function: jacfwd(function, places), op.tensors())


@each_op
def test_hessian(op: Op) -> None:
    """Forward over reverse mode, mapped over all directions."""
    for place in range(len(op.shapes)):
        check(op, lambda function, place=place: hessian(everywhere(function, 1)[0], place), op.tensors())


def directions(tensors: Any) -> tuple[Tensor, ...]:
    return tuple(0.5 - t.flip(-1) for t in tensors)


@each_op
def test_jvp(op: Op) -> None:
    """Towards every choice of arguments."""
    for choice in itertools.product((False, True), repeat=len(op.shapes)):
        if not any(choice):
            continue

        def push(function: Function, choice: Any = choice) -> Function:
            def pushed(*tensors: Tensor) -> Any:
                def of_chosen(*chosen: Tensor) -> Any:
                    it = iter(chosen)
                    return function(*[next(it) if take else t for t, take in zip(tensors, choice, strict=True)])

                chosen = tuple(itertools.compress(tensors, choice))
                return jvp(of_chosen, chosen, tuple(itertools.compress(directions(tensors), choice)))

            return pushed

        check(op, push, op.tensors())


def pushed(function: Function, levels: int = 1) -> Function:
    """function's tangent, `levels` times over."""
    if levels == 0:
        return function
    inner = pushed(function, levels - 1)
    return lambda *tensors: jvp(inner, tensors, directions(tensors))[1]


NESTS: dict[str, Callable[[Function], Function]] = {
    "forward over forward": lambda f: pushed(f, 2),
    "forward over reverse": lambda f: (
        lambda *t: jvp(grad(*everywhere(f, len(t))), t, directions(t))[1]
    ),
    "reverse over forward": lambda f: lambda *t: grad(*everywhere(pushed(f), len(t)))(*t),
    "reverse over reverse": lambda f: (
        lambda *t: grad(
            lambda *t: sum(g.square().sum() for g in grad(*everywhere(f, len(t)))(*t)), tuple(range(len(t)))
        )(*t)
    ),
    "vmap over forward": lambda f: (
        lambda *t: vmap(lambda *t: jvp(f, t, directions(t))[1])(*t)
    ),
    "forward over vmap": lambda f: (
        lambda *t: jvp(vmap(f), t, directions(t))[1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("nest", NESTS)
@each_op
def test_nests_of_transforms(op: Op, nest: str) -> None:
    samples = 3 if "vmap" in nest else None
    check(op, NESTS[nest], op.tensors(samples=samples))


def at_dual_level(function: Function) -> Function:
    def tangent(*tensors: Tensor) -> Any:
        with fwd.dual_level():
            pairs = zip(tensors, directions(tensors), strict=True)
            return fwd.unpack_dual(function(*[fwd.make_dual(*pair) for pair in pairs])).tangent

    return tangent


@each_op
def test_dual_level(op: Op) -> None:
    check(op, at_dual_level, op.tensors())


@each_op
def test_dual_level_and_backward(op: Op) -> None:
    """The tangent's gradient, and the gradient's tangent."""

    def reverse_over_forward(function: Function) -> Function:
        def gradients(*tensors: Tensor) -> Any:
            leaves = [t.clone().requires_grad_() for t in tensors]
            result = at_dual_level(function)(*leaves).sin().sum() + sum(leaf.sum() for leaf in leaves)
            return torch.autograd.grad(result, leaves)

        return gradients

    def forward_over_reverse(function: Function) -> Function:
        def tangents(*tensors: Tensor) -> Any:
            leaves = [t.clone().requires_grad_() for t in tensors]
            with fwd.dual_level():
                pairs = zip(leaves, directions(leaves), strict=True)
                result = function(*[fwd.make_dual(*pair) for pair in pairs]).sin().sum()
                return [fwd.unpack_dual(g).tangent for g in torch.autograd.grad(result, leaves, create_graph=True)]

        return tangents

    check(op, reverse_over_forward, op.tensors())
    check(op, forward_over_reverse, op.tensors())


def test_dual_level_leaves_no_trace() -> None:
    x, weight = OPS[0].tensors()[:2]
    with fwd.dual_level():
        y = CF.conv2d(x, weight, groups=2)
        assert fwd.unpack_dual(y).tangent is None
    assert_same_bits(y, CF.conv2d(x, weight, groups=2))


@each_op
def test_gradcheck(op: Op) -> None:
    """Forward and reverse mode, and their nests, against finite differences."""
    leaves = [t.requires_grad_() for t in op.tensors(torch.float64)]
    assert gradcheck(op.ours, leaves, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(op.ours, leaves, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", registration.OPS)
def test_every_op_has_a_batching_rule(name: str, native: NativeCalls) -> None:
    """All tensors of torch.ops' entry mapped: one native call where samples fit into one, and the results of a loop."""
    op, args = registration.op_arguments(name)
    places = [i for i, t in enumerate(args) if isinstance(t, Tensor)]

    def function(*tensors: Tensor) -> Any:
        every = list(args)
        for place, t in zip(places, tensors, strict=True):
            every[place] = t
        return [t for t in tree_leaves(op(*every)) if t is not None]

    one = [args[i].detach() for i in places]
    samples = [one, [t * 2 if t.is_floating_point() else t for t in one]]
    each = [function(*[t.clone() for t in sample]) for sample in samples]
    native.calls.clear()
    got = vmap(function)(*[torch.stack(pair) for pair in zip(*samples, strict=True)])
    composite, looped = name == "conv2d_bn_act", name.startswith("squeeze_excite")
    assert len(native.calls) == (2 if composite or looped else 1)
    for t, *expected in zip(got, *each, strict=True):
        expected = torch.stack(expected)
        if t.is_floating_point():
            assert_close(t, expected, expected.double(), expected.double().abs().amax().expand_as(t), 128)
        else:
            assert torch.equal(t, expected)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("name", registration.OPS)
def test_no_sample(name: str, axis: int) -> None:
    """An empty batch results in empty batches of what a sample results in."""
    op, args = registration.op_arguments(name)
    places = [i for i, t in enumerate(args) if isinstance(t, Tensor)]
    tensors = [args[i].detach() for i in places]

    def function(*tensors: Tensor) -> Any:
        replaced = dict(zip(places, tensors, strict=True))
        return [t for t in tree_leaves(op(*[replaced.get(i, arg) for i, arg in enumerate(args)])) if t is not None]

    got = vmap(function, axis)(*[torch.stack([t, t], axis).narrow(axis, 0, 0).clone() for t in tensors])
    for t, sample in zip(got, function(*[t.clone() for t in tensors]), strict=True):
        assert (t.shape, t.dtype) == ((0, *sample.shape), sample.dtype)


@each_op
def test_derivatives_of_no_sample(op: Op) -> None:
    """Mapped arguments get as many gradients, shared ones a gradient of zeros."""
    x, *rest = [t[:0] for t in op.tensors(samples=1)]
    shared = op.tensors()[1:]
    axes = (0, *[None] * len(shared))
    scalar, places = everywhere(op.ours, len(axes))
    for t, g in zip([x, *rest], vmap(grad(scalar, places))(x, *rest), strict=True):
        assert g.shape == t.shape
    scalar, places = everywhere(vmap(op.ours, axes), len(axes))
    for t, g in zip([x, *shared], grad(scalar, places)(x, *shared), strict=True):
        assert torch.equal(g, torch.zeros_like(t))
    y, tangent = jvp(vmap(op.ours), (x, *rest), (x, *rest))
    assert y.shape == tangent.shape == (0, *op.ours(*op.tensors()).shape)


def test_a_sample_of_nan_stays_alone() -> None:
    """Layers of each sample's own."""
    tensors = next(op for op in OPS if op.id == "squeeze_excite").tensors(samples=3)
    expected = vmap(CF.squeeze_excite)(*tensors)
    tensors[1][1] = float("nan")
    got = vmap(CF.squeeze_excite)(*tensors)
    assert got[1].isnan().all()
    assert_same_bits(got[::2], expected[::2])


def test_windows_without_a_tap_have_no_tangent() -> None:
    """Nor a gradient: the one window begins in the padding and steps over the input."""

    def pool(x: Tensor) -> Tensor:
        return CF.max_pool2d(x, 2, 1, 1, 2)

    x = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    y, tangent = jvp(pool, (x,), (x,))
    assert torch.equal(y, torch.full_like(x, float("-inf")))
    assert torch.equal(tangent, torch.zeros_like(x))
    assert torch.equal(at_dual_level(pool)(x), torch.zeros_like(x))
    assert torch.equal(vmap(grad(lambda x: pool(x).exp().sum()))(x[None])[0], torch.zeros_like(x))
    # the gradient's own gradient and tangent, in both modes
    _, pullback = torch.func.vjp(pool, x)
    assert torch.equal(torch.func.vjp(lambda dy: pullback(dy)[0], y)[1](x)[0], torch.zeros_like(x))
    assert torch.equal(jvp(lambda dy: pullback(dy)[0], (x,), (x,))[1], torch.zeros_like(x))

    def norm_and_pool(x: Tensor) -> Tensor:
        return CF.bn_act_max_pool2d(x, None, None, None, None, True, 0.1, 1e-5, 2, 1, 1, 2)

    assert torch.equal(jvp(norm_and_pool, (x,), (x,))[1], torch.zeros_like(x))


def test_unpooled_values_that_meet() -> None:
    """The last stays, with its tangent; each gets the place's gradient."""
    x, where = registration.tensor(3, *X), torch.zeros(3, *X, dtype=torch.int64)

    def unpool(x: Tensor, where: Tensor) -> Tensor:
        return CF.max_unpool2d(x, where, 2)

    expected = torch.stack([unpool(*sample) for sample in zip(x, where, strict=True)])
    y, tangent = jvp(lambda x: vmap(unpool)(x, where), (x,), (3 * x,))
    assert torch.equal(y, expected)
    assert torch.equal(tangent, 3 * y)
    assert torch.equal(y[..., 0, 0], x[..., -1, -1])
    gradient = vmap(grad(lambda *t: unpool(*t).square().sum()))(x, where)
    assert torch.equal(gradient, 2 * x[..., -1:, -1:].expand_as(x))


def test_loss_of_an_ensemble_is_one_call_for_each_layer(native: NativeCalls) -> None:
    """Models by vmap over their parameters, as torch.func.stack_module_state has them."""
    models = [cnnops.nn.ConvBNAct(3, 4, 3, padding=1).eval() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    x = registration.tensor(2, 3, 9, 8)

    def call(params: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(models[0], (params, buffers), (x,))

    got = vmap(call)(params, buffers)
    assert [name for name, _ in native.calls] == ["conv2d_forward", "batch_norm_act_forward"]
    expected = torch.stack([model(x) for model in models])
    assert_close(got, expected, expected.double(), expected.abs().double(), 27)


def test_statistics_of_each_sample_are_updated() -> None:
    """In place, whatever their axis; one that all samples share cannot be."""
    x = registration.tensor(3, *X)
    alone = [(torch.zeros(4), torch.ones(4)) for _ in range(3)]
    for sample, (mean, var) in zip(x, alone, strict=True):
        CF.batch_norm(sample, mean, var, training=True)
    for axis in (0, 1):
        mean, var = [torch.stack(state, axis) for state in zip(*[(torch.zeros(4), torch.ones(4))] * 3, strict=True)]
        versions = mean._version, var._version
        vmap(lambda x, mean, var: CF.batch_norm(x, mean, var, training=True), (0, axis, axis))(x, mean, var)
        for got, expected in zip((mean, var), zip(*alone, strict=True), strict=True):
            reference = torch.stack(expected, axis)
            assert_close(got, reference, reference.double(), reference.abs().double(), 60)
        assert mean._version > versions[0] and var._version > versions[1]
    with pytest.raises(RuntimeError, match="vmap cannot write to a tensor that all samples share"):
        vmap(lambda x: CF.batch_norm(x, torch.zeros(4), torch.ones(4), training=True))(x)


COMPILED: dict[str, Callable[[Op], tuple[Function, list[Tensor]]]] = {
    "grad": lambda op: (grad(*everywhere(op.ours, len(op.shapes))), op.tensors()),
    "vmap": lambda op: (vmap(op.ours), op.tensors(samples=2)),
    "jvp": lambda op: (lambda *t: jvp(op.ours, t, directions(t)), op.tensors()),
    "vmap over grad": lambda op: (vmap(grad(*everywhere(op.ours, len(op.shapes)))), op.tensors(samples=2)),
    "grad over vmap": lambda op: (grad(*everywhere(vmap(op.ours), len(op.shapes))), op.tensors(samples=2)),
    "forward over reverse": lambda op: (NESTS["forward over reverse"](op.ours), op.tensors()),
    "jacfwd": lambda op: (jacfwd(op.ours), op.tensors()),
    "dual level": lambda op: (at_dual_level(op.ours), op.tensors()),
}


COMPILED_USUALLY = ("conv2d", "conv2d_act-silu", "max_pool2d", "batch_norm_act-silu-train")


@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[] if op.id in COMPILED_USUALLY else [pytest.mark.slow], id=op.id) for op in OPS]
)
def test_compiled_without_graph_breaks(op: Op, transform: str) -> None:
    """One graph, and the same kernels in it."""
    torch._dynamo.reset()
    function, tensors = COMPILED[transform](op)
    expected = tree_leaves(function(*tensors))
    got = tree_leaves(torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors))
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(a, b, b.double(), b.abs().amax().double().expand_as(b), tensors[0].numel(), f"result {i}")


def test_compiled_composite() -> None:
    """Traced by a mode alone, it is still taken apart where there are tangents, and nowhere else."""
    x, weight, *_, residual = next(op for op in OPS if op.id == "conv2d_bn_act").tensors()
    mean, var = torch.zeros(6), torch.ones(6)
    graphs: list[list[str]] = []

    def function(x: Tensor) -> Tensor:
        geometry = (2, 1, 1, 0, 1, 1, 2, 0)
        args = (None, residual, mean, var, None, None, *geometry, 1e-5, "silu", "cpu")
        return torch.ops.cnnops.conv2d_bn_act(x, weight, *args)

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if "cnnops" in str(node.target)])
        return graph

    for transformed in (function, at_dual_level(function), lambda x: jvp(function, (x,), (x,))[1]):
        torch._dynamo.reset()
        compiled = torch.compile(transformed, fullgraph=True, backend=aot_autograd(fw_compiler=note))
        assert_same_bits(compiled(x), transformed(x))
    assert graphs[0] == ["cnnops.conv2d_bn_act.default"]
    assert not [name for graph in graphs[1:] for name in graph if "bn_act" in name]


def test_autocast_inside_a_transform() -> None:
    x, weight, bias = OPS[0].tensors()

    def gradient(library: Any) -> Tensor:
        def scalar(x: Tensor) -> Tensor:
            y = library.conv2d(x, weight, bias, groups=2)
            assert y.dtype == torch.bfloat16
            return y.float().sin().sum()

        with torch.autocast("cpu", torch.bfloat16):
            return grad(scalar)(x)

    reference = grad(lambda x: F.conv2d(x, weight.double(), bias.double(), groups=2).sin().sum())(x.double())
    ours, theirs = gradient(CF), gradient(F)
    assert_close(ours, theirs, reference, reference.abs(), 8, intermediate=torch.bfloat16)


def test_an_op_without_a_jvp_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Conv2d, "jvp")
    x, weight, _ = OPS[0].tensors()
    with pytest.raises(NotImplementedError, match="implement the jvp function"):
        jvp(lambda x: CF.conv2d(x, weight, groups=2), (x,), (x,))
    with fwd.dual_level(), pytest.raises(NotImplementedError, match="implement the jvp function"):
        CF.conv2d(fwd.make_dual(x, x), weight, groups=2)


def test_private_names_of_torch() -> None:
    """As in test_registration: what forward mode and torch.func's layers rely on."""
    assert torch_private.forward_ad._current_level == -1
    levels = []
    jvp(lambda x: (levels.append(torch_private.forward_ad._current_level), x)[1], (torch.ones(2),), (torch.ones(2),))
    with fwd.dual_level():
        levels.append(torch_private.forward_ad._current_level)
        x = fwd.make_dual(torch.ones(2), torch.ones(2))
        with torch_private.differentiating_forwards(False):
            assert fwd.unpack_dual(x * 2).tangent is None
    assert levels == [0, 0]

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            assert ctx.to_save is None
            ctx.save_for_backward(*inputs)
            assert ctx.to_save == inputs

    enter = super(torch.autograd.Function, Twice).apply
    enter(torch.ones(2))

    def refused(x: Tensor) -> Tensor:
        with pytest.raises(RuntimeError, match="incorrectly used with"):
            enter(x)
        with torch_private.inside_a_transform():
            return enter(x)

    vmap(refused)(torch.ones(2))


def test_composites_run_wherever_something_differentiates_or_maps() -> None:
    """In a process of its own, for the op that it registers."""
    script = """
        import torch
        import torch.autograd.forward_ad as fwd
        from cnnops.ops import pool2d
        from cnnops.ops.registry import register

        ran = []

        def composite(x, *args):
            ran.append(True)
            return pool2d.adaptive_avg_pool2d(x, *args)

        call = register(
            "pool_or_composite", "(Tensor x, int P, int Q, str backend) -> Tensor", tensors=1,
            kernel="adaptive_avg_pool2d_forward", describe=pool2d._describe_adaptive, fake=pool2d._fake,
            composite=composite,
        )
        entries = (call, torch.ops.cnnops.pool_or_composite)
        x = torch.randn(2, 3, 6, 4)

        def dual(f):
            with fwd.dual_level():
                return fwd.unpack_dual(f(fwd.make_dual(x, x))).tangent

        uses = {
            "plain": (lambda f: f(x), False),
            "gradient": (lambda f: f(x.clone().requires_grad_()), True),
            "grad": (lambda f: torch.func.grad(lambda x: f(x).sum())(x), True),
            "vmap": (lambda f: torch.func.vmap(f)(torch.stack([x, x])), True),
            "jvp": (lambda f: torch.func.jvp(f, (x,), (x,))[1], True),
            "dual": (dual, True),
        }
        for name, (use, expected) in uses.items():
            for entry in entries:
                ran.clear()
                result = use(lambda x: entry(x, 3, 2, "cpu"))
                assert bool(ran) == expected, (name, entry)
                if name in ("jvp", "dual"):
                    assert torch.equal(result, call(x, 3, 2, "cpu"))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
