"""How an op is registered: once, here, for all ops.

An op is a schema, a description of its problem, a fake function, its derivatives (an autograd `Function` made of other
registered ops) and a batching rule. `register` turns these into ``torch.ops.cnnops.<name>``, with kernels below
autograd that ask `cnnops.dispatch`, and returns the same op for Python callers, who skip torch's dispatcher wherever
nobody traces, transforms, autocasts or differentiates forwards.

torch.func's transforms (grad, vmap, jvp) are layers of torch's dispatcher: each interprets the call by our kernel on
its key, Autograd or FuncTorchBatched, which calls the op again for the next layer. So they nest, and compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.native import Problem
from ..dispatch import kernel_of
from ..torch_private import (
    autocast_keys,
    autocasting,
    below_autograd,
    differentiating_forwards,
    dispatch_modes,
    exclude_keys,
    forward_ad,
    function_modes,
    inside_a_transform,
    transforming,
)
from .batching import Dims, Rule, for_each_sample, for_no_sample

library = torch.library.Library("cnnops", "DEF")

observers: list[Callable[[str, Problem, str], None]] = []
"""Told the native function, problem and named backend of every call on fake tensors (see `cnnops.explain`)."""

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_is_grad_enabled = torch.is_grad_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class Function(torch.autograd.Function):
    """An op's derivatives. Arguments are ``(run, *op arguments)``: `run` computes the op.

    Subclasses give `setup_context` and `backward`; `jvp` for forward mode, where ``ctx.saved_tensors`` is what
    setup_context saved for backward and a missing tangent is None (a result's may not be, if it is differentiable); and
    override `forward` where a derivative wants more than a plain call computes.
    """

    @staticmethod
    def forward(run: Callable[..., Any], *args: Any) -> Any:
        return run(*args)


def _at_dual_level(function: type[Function]) -> type[Function]:
    """`function` for calls that may get tangents, so that others need not pay for them."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        function.setup_context(ctx, inputs, output)
        if ctx.to_save is not None:
            ctx.save_for_forward(*ctx.to_save)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Any) -> Any:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        return function.backward(ctx, *grads)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        # torch has turned tangents off, for all layers: taking them off what was saved does it for this one alone.
        with differentiating_forwards(True):
            ctx.save_for_forward(*map(_primal, ctx.saved_tensors))
            return function.jvp(ctx, *tangents)

    rules = {"setup_context": setup_context, "backward": backward, "jvp": jvp}
    return type(function.__name__, (function,), {name: staticmethod(rule) for name, rule in rules.items()})


def _primal(t: Tensor | None) -> Tensor | None:
    return t if t is None or not t.is_floating_point() else forward_ad.unpack_dual(t, level=0).primal


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point() and forward_ad.unpack_dual(t, level=0).tangent is not None


def tangents_of(
    formula: Callable[..., Sequence[Tensor]],
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    *args: Any,
) -> list[Tensor]:
    """For a jvp: the tangents of formula(*primals, *args), a formula of torch's own ops; zeros where there are none."""
    duals = [p if t is None else forward_ad.make_dual(p, t, level=0) for p, t in zip(primals, tangents, strict=True)]
    found = [forward_ad.unpack_dual(y, level=0) for y in formula(*duals, *args)]
    return [torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in found]


def _eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on these tensors may skip the dispatcher: nobody traces, transforms, subclasses, autocasts or
    differentiates forwards."""
    for t in tensors:
        if type(t) not in _PLAIN:
            return False
    if _is_dynamo_compiling() or dispatch_modes() or function_modes() or transforming() or autocasting():
        return False
    first: Any = tensors[0]
    return forward_ad._current_level < 0 and not first.is_meta


def _needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    if _is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _marking(kernel: Callable[..., Any], written: Callable[..., list[Tensor]]) -> Callable[..., Any]:
    """`kernel`, telling autograd which tensors each call has written to."""

    def run(*args: Any) -> Any:
        result = kernel(*args)
        torch.autograd.graph.increment_version(written(*args))
        return result

    return run


def register(
    name: str,
    schema: str,
    *,
    tensors: int,
    kernel: str,
    describe: Callable[..., Problem],
    fake: Callable[..., Any],
    function: type[Function] | None = None,
    composite: Callable[..., Any] | None = None,
    batched: Rule = for_each_sample,
    autocast: int = 0,
    written: Callable[..., list[Tensor]] | None = None,
) -> Callable[..., Any]:
    """Register ``cnnops::<name>`` and return it as a Python callable that enters the same code faster.

    schema: "(arguments) -> results"; the first `tensors` arguments are the tensors, the last is ``str backend``.
    kernel: the backends' function. describe(*args): checks a call and describes its problem.
    fake(problem, *args): empty outputs of the right shapes, dtypes and strides. function: the derivatives, None for
    an op without. composite(*args): the same made of other ops, in place of derivatives and batching rule: it runs
    wherever something differentiates or maps. batched: the batching rule (see `batching`). autocast: how many of the
    first tensors autocast makes its dtype. written(*args): the tensors that a call writes to.
    """
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.cnnops, name).default
    run_kernel = kernel_of(kernel, tensors, describe)

    if written is not None:
        run_kernel = _marking(run_kernel, written)

    # What torch.autograd.Function.apply does beside this serves transforms by another way, and costs 19 us.
    enter: Any = None if function is None else super(torch.autograd.Function, function).apply  # type: ignore[misc]
    dual: Any = None if function is None else _at_dual_level(function)
    enter_dual: Any = None if function is None else super(torch.autograd.Function, dual).apply

    def run_below(*args: Any) -> Any:
        with below_autograd():
            return op(*args)

    def run_next_layer(*args: Any) -> Any:
        with torch.enable_grad(), differentiating_forwards(True):  # entering a Function turned them off for all layers
            return run_below(*args)

    def differentiate_layer(*args: Any) -> Any:
        if function is None:
            return run_below(*args)
        with inside_a_transform():
            return enter_dual(run_next_layer, *args)

    def decomposes(operands: Sequence[Tensor | None]) -> bool:
        return forward_ad._current_level >= 0 or transforming() or _needs_gradient(operands)

    def autograd(*args: Any) -> Any:
        operands = args[:tensors]
        # A compiled function enters its dual levels unseen, but is traced by a mode.
        traced = dispatch_modes()
        if composite is not None and (decomposes(operands) or (traced and any(map(_has_tangent, operands)))):
            return composite(*args)
        if transforming():
            return differentiate_layer(*args)
        run = run_kernel if _eager(operands) else run_below
        if function is not None and (forward_ad._current_level >= 0 or traced):
            return enter_dual(run, *args)
        if function is not None and _needs_gradient(operands):
            return enter(run, *args)
        return run(*args)

    def call(*args: Any) -> Any:
        operands = args[:tensors]
        # Under autocast the dispatcher first: it casts what a composite's ops would each cast for themselves alone.
        if composite is not None and decomposes(operands) and not autocasting():
            return composite(*args)
        if _eager(operands):
            if function is not None and _needs_gradient(operands):
                return enter(run_kernel, *args)
            return run_kernel(*args)
        return op(*args)

    def cast_by(device: str) -> Callable[..., Any]:
        keys = autocast_keys(device)

        def cast(*args: Any) -> Any:
            low = torch.get_autocast_dtype(device.lower())

            def lowered(t: Any) -> Any:
                eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
                return t.to(low) if eligible else t

            with exclude_keys(keys):
                return op(*[lowered(t) for t in args[:autocast]], *args[autocast:])

        return cast

    def fake_kernel(*args: Any) -> Any:
        problem = describe(*args)
        for observe in observers:
            observe(kernel, problem, args[-1])
        return fake(problem, *args)

    def batch(info: Any, dims: Dims, *args: Any) -> Any:
        if written is not None:
            shared = [t for t, dim in zip(args, dims, strict=True) if dim is None and isinstance(t, Tensor)]
            if any(t is each for t in written(*args) for each in shared):
                raise RuntimeError(f"{name}: vmap cannot write to a tensor that all samples share, but got one")
        if info.batch_size == 0:
            return for_no_sample(op, dims, *args)
        return batched(op, info.batch_size, dims, *args)

    for device in ("CPU", "CUDA"):
        library.impl(name, run_kernel, device)
        if autocast:
            library.impl(name, cast_by(device), "Autocast" + device)
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"cnnops::{name}", fake_kernel, lib=library)
    if composite is None:
        torch.library.register_vmap(f"cnnops::{name}", batch, lib=library)
    else:
        library.impl(name, composite, "FuncTorchBatched")
    call.__name__ = name
    return call


def differentiate(
    formula: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of sum(result * upstream) over all results of formula(*tensors), towards each tensor that is needed.

    For the backward of a gradient formula whose own gradient is rare. formula: made of differentiable ops. tensors: as
    saved for backward; only as many as `needed` has places for are differentiated by.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh nodes, so that what one tensor owes to another is not counted here: it is theirs to pass on.
        fresh = (lambda t: t.view_as(t)) if create_graph else (lambda t: t.detach().requires_grad_(t.requires_grad))
        tensors = [t if t is None else fresh(t) for t in tensors]
        results = formula(*tensors)
        pairs = [
            (r, u)
            for r, u in zip(results, upstream, strict=True)
            if u is not None and r is not None and r.requires_grad
        ]
        wanted = [t for t, need in zip(tensors, needed, strict=False) if need and t is not None]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [u for _, u in pairs], create_graph=create_graph, allow_unused=True
            )
            if pairs and wanted
            else [None] * len(wanted)
        )
    return [next(found) if need and t is not None else None for t, need in zip(tensors, needed, strict=False)]


def empty(like: Tensor, sizes: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of these sizes on `like`'s device, for fake functions."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(sizes), dtype=dtype or like.dtype, device=like.device, memory_format=layout)
