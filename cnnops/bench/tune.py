"""Measures the candidates of the tuning tables on a GPU, for the problems that a network meets, and keeps the fastest.

Nothing else in cnnops times a kernel to choose one: this runs when `cnnops tune` is called, and at no other time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnops import dispatch, tuning
from cnnops.bench.timing import Clock, compare
from cnnops.bench.verify import Mismatch, bound, tensors
from cnnops.tuning import Table, measured


@dataclass(frozen=True)
class Captured:
    """A call of a backend's function: its arguments, with new tensors in place of the old ones each time."""

    function: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    """A tensor's place is taken by its meta tensor, which has its shape, strides and dtype."""

    def call(self, device: torch.device) -> Callable[[], Any]:
        """The call on tensors of its own."""
        arguments = [_like(a, device) if isinstance(a, Tensor) else a for a in self.arguments]
        return lambda: self.run(*arguments)


def _like(meta: Tensor, device: torch.device) -> Tensor:
    """A tensor of these strides, of values in [1/128, 1/32), integers 0.

    Variances may have them, and sums of a million products do not leave float16.
    """
    reach = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True))
    memory = torch.zeros(reach if meta.numel() else 0, dtype=meta.dtype, device=device)
    if memory.is_floating_point():
        memory.uniform_(1 / 128, 1 / 32)
    return memory.as_strided(meta.shape, meta.stride())


def captured(work: Callable[[], object], backend: str = "triton") -> list[Captured]:
    """The distinct calls of the backend's functions that `work` makes, gradients included."""
    calls: list[Captured] = []

    def saw(function: str, arguments: tuple[Any, ...], run: Callable[..., Any]) -> None:
        metas = tuple(
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a
            for a in arguments
        )
        calls.append(Captured(function, run, metas))

    with dispatch.use_backend(backend), dispatch.observed(saw):
        work()
    return calls


@dataclass(frozen=True)
class Outcome:
    """What one problem's candidates took, and which was the fastest."""

    table: str
    problem: Any
    default: Any
    best: Any
    microseconds: dict[str, float]
    """By candidate."""
    refused: dict[str, str]
    """Candidates that did not run, or computed something else, and why."""

    @property
    def gain(self) -> float:
        """How many times faster than the rules' choice."""
        return self.microseconds[str(self.default)] / self.microseconds[str(self.best)]


def tune(
    calls: Iterable[Captured], device: torch.device, *, clock: Clock | None = None, rounds: int | None = None
) -> Iterator[Outcome]:
    """Time each candidate for each problem of the calls, one problem after another, and yield what came out.

    clock, rounds: as for `timing.compare`. A candidate that raises, or whose result is not as near the rules' choice's
    as rounding explains, is not taken. Raises RuntimeError while a CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: expected no CUDA graph capture on the current stream, but there is one")
    done = set()
    for captured_call in calls:
        call = captured_call.call(device)
        for table, problem in _asked(call):
            if (table.name, problem) not in done:
                done.add((table.name, problem))
                yield _tuned(table, problem, call, device, clock, rounds)


def _asked(call: Callable[[], Any]) -> list[tuple[Table[Any, Any], Any]]:
    """The tables that a call asks, and for which problems."""
    asked: list[tuple[Table[Any, Any], Any]] = []
    with tuning.observed(lambda table, problem: asked.append((table, problem))):
        call()
    return asked


def _tuned(
    table: Table[Any, Any],
    problem: Any,
    call: Callable[[], Any],
    device: torch.device,
    clock: Clock | None,
    rounds: int | None,
) -> Outcome:
    default = table.first(problem)
    with tuning.forced(table, problem, default):
        expected = tensors(call())
    candidates: dict[str, Any] = {str(default): default}
    refused: dict[str, str] = {}
    for config in table.candidates:
        try:
            with tuning.forced(table, problem, config):
                _near(tensors(call()), expected)
        except Exception as error:  # a configuration may not compile, or want more than the device has
            refused[str(config)] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            candidates[str(config)] = config

    # One after another: a change of configuration costs the host more than the pause that hides a launch.
    seconds = {}
    for name, config in candidates.items():
        with tuning.forced(table, problem, config):
            timed = compare({name: call}, verify=lambda _: None, device=device, clock=clock, rounds=rounds)
        seconds[name] = timed.time(name).median
    best = min(seconds, key=lambda name: seconds[name])
    return Outcome(table.name, problem, default, candidates[best], {n: s * 1e6 for n, s in seconds.items()}, refused)


_LONGEST_SUM = 1 << 16
"""Terms that a result is taken to be a sum of, for what rounding may explain."""


def _near(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Raise Mismatch if two results differ by more than rounding."""
    for a, b in zip(actual, expected, strict=True):
        if b.is_floating_point() and b.numel():
            difference, allowed = float((a - b).abs().max()), bound(b, _LONGEST_SUM)
            if not difference <= allowed:
                raise Mismatch(f"differs by {difference:.3g} in a result of {list(b.shape)}, expected {allowed:.3g}")


def row_of(outcome: Outcome) -> dict[str, Any]:
    """The outcome as `measured` keeps it."""
    return {
        "table": outcome.table,
        "problem": measured.described(outcome.problem),
        "config": measured.described(outcome.best),
        "microseconds": outcome.microseconds,
        "refused": outcome.refused,
    }


def line_of(outcome: Outcome) -> str:
    """The outcome in one line for a terminal."""
    best = outcome.microseconds[str(outcome.best)]
    refused = f"  ({len(outcome.refused)} refused)" if outcome.refused else ""
    return f"{outcome.table:28} {best:10.1f} us  {outcome.gain:5.2f}x of the rules' choice  {outcome.best}{refused}"
