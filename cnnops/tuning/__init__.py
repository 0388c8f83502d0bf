"""How a kernel's configuration is chosen: ordered rules, the first whose condition holds wins. Nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Problem = TypeVar("Problem")
Config = TypeVar("Config")


@dataclass(frozen=True)
class Rule(Generic[Problem, Config]):
    condition: Callable[[Problem], bool]
    config: Config
    reason: str
    """Why this configuration suits these problems."""


def choose(rules: Sequence[Rule[Problem, Config]], problem: Problem) -> Config:
    """The configuration of the first rule that holds for `problem`. A table ends with a rule that always holds."""
    return next(rule.config for rule in rules if rule.condition(problem))
