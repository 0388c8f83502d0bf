"""The one table of backends, and the choice among them.

A call's key (every tensor's shape, strides, dtype and device, every other argument, the backend's name) maps to the
chosen backend's function. On a hit that is all that happens. On a miss the call is checked and described as a problem,
and `select` asks the backends in the table's order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from . import settings
from .backends import Support, aten, cpu, cuda, no, simt, triton
from .backends.native import Problem

log = logging.getLogger("cnnops")

BACKENDS: tuple[ModuleType, ...] = (cuda, triton, cpu, simt, aten)
"""In order of preference; each takes the devices it lists. See `cnnops.backends` for what a row offers."""

NAMES: dict[str, ModuleType] = {backend.NAME: backend for backend in BACKENDS}


class UnsupportedError(RuntimeError):
    """No backend that may be used can do the call; the message has every backend's reason."""


class _Scope(threading.local):
    # A threading.local, not a ContextVar: Dynamo guards on the one and breaks the graph on the other. Its attribute is
    # set in each thread before any `with`, or Dynamo would guard on its absence, which tracing a `with` ends.
    def __init__(self) -> None:
        self.backend = os.environ.get("CNNOPS_BACKEND", "")


scope = _Scope()


class use_backend:
    """``with use_backend("cpu"):`` names the backend of every op in the block, and of its backward wherever that runs.

    Strict: a call that the backend cannot do raises `UnsupportedError` with the reason.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"use_backend: name must be one of {', '.join(NAMES)}, but got {name!r}")
        self.name = name

    def __enter__(self) -> None:
        self.before = scope.backend
        scope.backend = self.name

    def __exit__(self, *_: object) -> None:
        scope.backend = self.before


def consider(backend: ModuleType, function: str, problem: Problem) -> Support:
    """Whether `backend` can do `function` on `problem` here and now."""
    if problem.device not in backend.devices:
        return no(f"takes {' or '.join(backend.devices)} tensors, not {problem.device}")
    usable: Support = backend.usable()
    if not usable.ok:
        return usable
    support: Support = backend.supports(function, problem)
    return support


def verdicts(function: str, problem: Problem, named: str = "") -> Iterator[tuple[ModuleType, Support]]:
    """Every backend that may be asked, in order, and what it says."""
    if named and named not in NAMES:
        raise ValueError(f"the backend (CNNOPS_BACKEND) must be one of {', '.join(NAMES)}, but got {named!r}")
    for backend in (NAMES[named],) if named else BACKENDS:
        if backend.named_only and not named:
            yield backend, no("is used only by name")
        else:
            yield backend, consider(backend, function, problem)


def select(function: str, problem: Problem, named: str = "") -> ModuleType:
    """The first backend that supports the call; only the named one where a name is given."""
    refusals: list[str] = []
    for backend, support in verdicts(function, problem, named):
        if support.ok and (backend is not aten or named or not settings.strict):
            if backend is aten and not named:
                log.debug("%s falls back to torch's own kernel: %s", function, "; ".join(refusals))
            return backend
        refusals.append(f"{backend.NAME}: {support.reason or 'not ours, and settings.strict is on'}")
    raise UnsupportedError(f"{function}: no backend can do {problem}. {'; '.join(refusals)}")


Saw = Callable[[str, tuple[Any, ...], Callable[..., Any]], None]
_observers: list[Saw] = []


@contextlib.contextmanager
def observed(saw: Saw) -> Iterator[None]:
    """Tell `saw` of each kind of call the first time that it is made: function, arguments, and the chosen backend's
    function. Not for threads."""
    _observers.append(saw)
    _chosen.clear()
    try:
        yield
    finally:
        _observers.remove(saw)


_chosen: dict[Any, Callable[..., Any]] = {}
_CHOSEN_AT_MOST = 1 << 14  # entries are small, but shapes may never repeat
settings.on_change.append(_chosen.clear)


def kernel_of(function: str, tensors: int, describe: Callable[..., Problem]) -> Callable[..., Any]:
    """The callable that finds and runs `function`'s kernel.

    tensors: how many leading arguments are tensors (or None). describe(*args): checks a call and describes it. The
    callable's last argument is the name of the backend, "" to choose.
    """
    # Spelled out for the pools and the convolutions: a comprehension would cost a fifth of the whole call.
    if tensors == 1:

        def kernel1(x: Any, *rest: Any) -> Any:
            key = function, x.shape, x.stride(), x.dtype, x.device, rest
            found = _chosen.get(key)
            if found is None:
                found = _choose(function, describe, (x, *rest), key)
            return found(x, *rest[:-1])

        return kernel1

    if tensors == 3:

        def kernel3(a: Any, b: Any, c: Any, *rest: Any) -> Any:
            key = (
                function,
                a.shape,
                a.stride(),
                a.dtype,
                a.device,
                b.shape,
                b.stride(),
                b.dtype,
                b.device,
                None if c is None else (c.shape, c.stride(), c.dtype, c.device),
                rest,
            )
            found = _chosen.get(key)
            if found is None:
                found = _choose(function, describe, (a, b, c, *rest), key)
            return found(a, b, c, *rest[:-1])

        return kernel3

    def kernel(*args: Any) -> Any:
        key = (
            function,
            *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in args[:tensors]],
            args[tensors:],
        )
        found = _chosen.get(key)
        if found is None:
            found = _choose(function, describe, args, key)
        return found(*args[:-1])

    return kernel


def _choose(function: str, describe: Callable[..., Problem], args: tuple[Any, ...], key: Any) -> Callable[..., Any]:
    problem = describe(*args)
    chosen: Callable[..., Any] = select(function, problem, args[-1]).function(function)
    if len(_chosen) >= _CHOSEN_AT_MOST:
        _chosen.clear()
    _chosen[key] = chosen
    for saw in _observers:
        saw(function, args[:-1], chosen)
    return chosen
