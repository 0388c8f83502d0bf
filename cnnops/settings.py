"""Process-wide settings. Assign to them: ``cnnops.settings.strict = True``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

strict: bool = False
"""Raise where a call would fall back to torch's own kernels, with every backend's reason."""

on_change: list[Callable[[], None]] = []
"""Called after every change: what was decided under the old settings no longer holds."""


class _Settings(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "strict" and not isinstance(value, bool):
            raise TypeError(f"settings.strict must be True or False, but got {value!r}")
        if not name.startswith("__") and name not in ("strict", "on_change"):
            raise AttributeError(f"cnnops.settings has no setting {name!r}; there is: strict")
        super().__setattr__(name, value)
        for changed in on_change:
            changed()


sys.modules[__name__].__class__ = _Settings
