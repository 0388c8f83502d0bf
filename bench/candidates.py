"""What the suites time: one op of ours and torch's in both memory layouts, forward or backward, on equal inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OURS = "cnnops"

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
"""The peer is torch eager in the better of these; ours runs in the first unless `--layout` says otherwise."""

Op = Callable[..., Tensor]
Calls = dict[str, Callable[[], object]]


def normal(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, device=generator.device, generator=generator).to(dtype)


def _leaf(value: Tensor, layout: torch.memory_format, needs_grad: bool) -> Tensor:
    copied = value.clone(memory_format=layout if value.dim() == 4 else torch.contiguous_format)
    return copied.requires_grad_(needs_grad)


def _forward(op: Op, leaves: Sequence[Tensor]) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return op(*leaves)

    return call


def _backward(op: Op, leaves: Sequence[Tensor], dy: Tensor) -> Callable[[], object]:
    y = op(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def forward(ours: Op, peer: Op, values: Sequence[Tensor], layout: str, inductor: bool = False) -> Calls:
    """op(*values) without a gradient, of ours in `layout`, of the peer in both, and of the compiled peer if asked."""

    def leaves(name: str) -> list[Tensor]:
        return [_leaf(value, LAYOUTS[name], False) for value in values]

    calls = {OURS: _forward(ours, leaves(layout)), **{f"torch {at}": _forward(peer, leaves(at)) for at in LAYOUTS}}
    if inductor:
        calls[f"inductor {layout}"] = _forward(torch.compile(peer, dynamic=False), leaves(layout))
    return calls


def backward(ours: Op, peer: Op, values: Sequence[Tensor], wanted: Sequence[int], dy: Tensor, layout: str) -> Calls:
    """The gradients of op(*values) with respect to the values at the places `wanted`; the forward is not timed."""

    def call(op: Op, at: str) -> Callable[[], object]:
        leaves = [_leaf(value, LAYOUTS[at], i in wanted) for i, value in enumerate(values)]
        return _backward(op, leaves, _leaf(dy, LAYOUTS[at], False))

    return {OURS: call(ours, layout), **{f"torch {at}": call(peer, at) for at in LAYOUTS}}
