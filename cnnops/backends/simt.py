"""The CUDA kernels' own sources on a CPU, under the SIMT emulator. For tests: built by them, chosen only by name.

CNNOPS_SIMT_LIBRARY=address|thread, read on import, takes the library that CNNOPS_SANITIZE made of setup.py build_native
--simt in place of the plain one. A sanitizer's runtime has to be in the process first: .ci/slow-parts has the recipe.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

from . import cuda
from .native import Library, Problem

NAME = "simt"
devices = ("cpu",)
named_only = True

library = Library(NAME, "run `make build-simt` in a checkout", variant=os.environ.get("CNNOPS_SIMT_LIBRARY", ""))
usable = library.status
supports = cuda.supports


def function(name: str) -> Callable[..., Any]:
    """The native op of this name, which follows torch's TF32 switch as it does on CUDA."""
    return cuda.switched(library, name)


def plan(function: str, problem: Problem) -> tuple[str, ...]:
    """Which kernels would compute a convolution's function on the emulated device, and why."""
    return cuda.planned(library, function, problem)


@functools.cache
def module() -> ModuleType:
    """The emulator's Python face (schedules, seeds, counters, faults), in the library that holds its ops."""
    status = usable()
    if not status.ok:
        raise RuntimeError(status.reason)
    name = library.path.stem
    spec = spec_from_file_location(name, library.path, loader=ExtensionFileLoader(name, str(library.path)))
    assert spec is not None and spec.loader is not None
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
