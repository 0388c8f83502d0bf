"""How a kernel's configuration is chosen: ordered rules, the first whose condition holds wins. Nothing is timed here.

Where `cnnops tune` has measured a problem on this device, what it found goes before the rules: see `measured`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cnnops.tuning import measured

Problem = TypeVar("Problem")
Config = TypeVar("Config")
Planned = TypeVar("Planned")


@dataclass(frozen=True)
class Rule(Generic[Problem, Config]):
    condition: Callable[[Problem], bool]
    config: Config
    reason: str
    """Why this configuration suits these problems."""
    interpreted: bool = False
    """Whether it is for Triton's interpreter, on the CPU, alone."""


def interpreted(condition: Callable[[Any], bool], config: Config, reason: str) -> Rule[Any, Config]:
    """The rule for problems on the CPU that `condition` holds for."""
    return Rule(lambda p: p.device == "cpu" and condition(p), config, reason, interpreted=True)


@dataclass(frozen=True)
class Table(Generic[Problem, Config]):
    """A kernel's rules. The last one always holds."""

    name: str
    """Of the kernel, as its module and pass: what a measurement is filed under."""
    rules: tuple[Rule[Problem, Config], ...]

    @property
    def candidates(self) -> tuple[Config, ...]:
        """Every configuration for a device, once."""
        return tuple(dict.fromkeys(rule.config for rule in self.rules if not rule.interpreted))

    def first(self, problem: Problem) -> Config:
        """The configuration of the first rule that holds for `problem`."""
        return next(rule.config for rule in self.rules if rule.condition(problem))


Asked = Callable[[Table[Any, Any], Any], None]
_observers: list[Asked] = []
_forced: dict[tuple[str, Any], Any] = {}
_on_change: list[Callable[[], None]] = []


def choose(table: Table[Problem, Config], problem: Problem) -> Config:
    """What was measured for `problem` on this device, else the configuration of the first rule that holds for it."""
    for asked in _observers:
        asked(table, problem)
    forced: Config | None = _forced.get((table.name, problem))
    if forced is not None:
        return forced
    found = measured.lookup(table.name, problem)
    for config in table.candidates if found is not None else ():
        if measured.described(config) == found:
            return config
    return table.first(problem)


def cached(plan: Callable[..., Planned]) -> Callable[..., Planned]:
    """`plan` with its results kept for as long as `choose` answers the same."""
    kept = functools.lru_cache(maxsize=1024)(plan)
    _on_change.append(kept.cache_clear)
    return functools.wraps(plan)(kept)


def changed() -> None:
    """Forget every plan: measurements have changed."""
    for forget in _on_change:
        forget()


@contextlib.contextmanager
def observed(asked: Asked) -> Iterator[None]:
    """Tell `asked` of each choice that is made, plans of earlier ones forgotten. Not for threads."""
    _observers.append(asked)
    changed()
    try:
        yield
    finally:
        _observers.remove(asked)


@contextlib.contextmanager
def forced(table: Table[Problem, Config], problem: Problem, config: Config) -> Iterator[None]:
    """Choose `config` for `problem`, whatever the rules say. Not for threads."""
    _forced[table.name, problem] = config
    changed()
    try:
        yield
    finally:
        del _forced[table.name, problem]
        changed()
