"""How an op is registered: once, here, for all ops.

An op is a schema, a description of its problem, a fake function, and a gradient formula (an autograd `Function` made of
other registered ops). `register` turns these into ``torch.ops.cnnops.<name>``, with kernels below autograd that ask
`cnnops.dispatch`, and returns the same op for Python callers, who skip torch's dispatcher wherever nobody traces,
transforms or autocasts.
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
    dispatch_modes,
    exclude_keys,
    function_modes,
    transforming,
)

library = torch.library.Library("cnnops", "DEF")

observers: list[Callable[[str, Problem, str], None]] = []
"""Told the native function, problem and named backend of every call on fake tensors (see `cnnops.explain`)."""

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_is_grad_enabled = torch.is_grad_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class Function(torch.autograd.Function):
    """An op's gradient formula. Arguments are ``(run, *op arguments)``: `run` computes the op.

    Subclasses give `setup_context` and `backward`; `forward` is overridden where a gradient wants more than a plain
    call computes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(run: Callable[..., Any], *args: Any) -> Any:
        return run(*args)


def _eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on these tensors may skip the dispatcher: nobody traces, transforms, subclasses or autocasts."""
    for t in tensors:
        if type(t) not in _PLAIN:
            return False
    if _is_dynamo_compiling() or dispatch_modes() or function_modes() or transforming() or autocasting():
        return False
    first: Any = tensors[0]
    return not first.is_meta


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
    autocast: int = 0,
    written: Callable[..., list[Tensor]] | None = None,
) -> Callable[..., Any]:
    """Register ``cnnops::<name>`` and return it as a Python callable that enters the same code faster.

    schema: "(arguments) -> results"; the first `tensors` arguments are the tensors, the last is ``str backend``.
    kernel: the backends' function. describe(*args): checks a call and describes its problem.
    fake(problem, *args): empty outputs of the right shapes, dtypes and strides. function: the gradient formula, None
    for an op without gradient. composite(*args): the same made of other ops, in place of a gradient formula: it
    runs wherever something differentiates or maps. autocast: how many of the first tensors autocast makes its dtype.
    written(*args): the tensors that a call writes to.
    """
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.cnnops, name).default
    run_kernel = kernel_of(kernel, tensors, describe)

    if written is not None:
        run_kernel = _marking(run_kernel, written)

    # What torch.autograd.Function.apply does beside this serves transforms alone, and costs 19 us.
    enter: Any = None if function is None else super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run_below(*args: Any) -> Any:
        with below_autograd():
            return op(*args)

    def autograd(*args: Any) -> Any:
        operands = args[:tensors]
        if composite is not None and (transforming() or _needs_gradient(operands)):
            return composite(*args)
        run = run_kernel if _eager(operands) else run_below
        if function is not None and _needs_gradient(operands):
            return (function.apply if transforming() else enter)(run, *args)
        return run(*args)

    def call(*args: Any) -> Any:
        operands = args[:tensors]
        if composite is not None and (transforming() or _needs_gradient(operands)):
            return composite(*args)
        if _eager(operands):
            if function is not None and _needs_gradient(operands):
                return enter(run_kernel, *args)
            return run_kernel(*args)
        if function is not None and transforming():
            return function.apply(op, *args)
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

    def for_each_sample(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        """vmap, one call for each sample: torch's own fallback takes neither optional results nor written arguments."""
        if written is not None:
            shared = [t for t, dim in zip(args, in_dims, strict=True) if dim is None and isinstance(t, Tensor)]
            if any(t is each for t in written(*args) for each in shared):
                raise RuntimeError(f"{name}: vmap cannot write to a tensor that all samples share, but got one")
        samples = [
            op(*[t if dim is None else t.select(dim, i) for t, dim in zip(args, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        results = [None if each[0] is None else torch.stack(each) for each in zip(*samples, strict=True)]
        return tuple(results), tuple(None if t is None else 0 for t in results)

    for device in ("CPU", "CUDA"):
        library.impl(name, run_kernel, device)
        if autocast:
            library.impl(name, cast_by(device), "Autocast" + device)
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"cnnops::{name}", fake_kernel, lib=library)
    torch.library.register_vmap(f"cnnops::{name}", for_each_sample, lib=library)
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
        if not create_graph:
            tensors = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
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
