"""Which backend really ran, and what built it."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

from cnnops import dispatch, settings
from cnnops.backends import cpu, cuda
from cnnops.bench.results import ATEN


def backend_that_runs(call: Callable[[], object]) -> str:
    """Make the call and name the backend that dispatch chose for it, as `dispatch.select` decided inside it.

    Several backends are joined by "+"; with torch's own among them the whole call counts as torch's ("aten").
    Raises RuntimeError if the call reached no op of ours.
    """
    select, chosen = dispatch.select, set()

    def noted(*args: Any, **kwargs: Any) -> ModuleType:
        backend = select(*args, **kwargs)
        chosen.add(str(backend.NAME))
        return backend

    # Any assignment to a setting makes dispatch forget what it chose before, so that it must decide again here.
    settings.strict = settings.strict
    dispatch.select = noted
    try:
        call()
    finally:
        dispatch.select = select
    if not chosen:
        raise RuntimeError("backend_that_runs: expected a call of a cnnops op, but dispatch was not asked")
    return ATEN if ATEN in chosen else "+".join(sorted(chosen))


def compiler(device: str) -> str | None:
    """The compiler of the native kernels for `device` ("cpu", "cuda"); None where they are not built."""
    backend = cuda if device.startswith("cuda") else cpu
    if not backend.usable().ok:
        return None
    built: dict[str, Any] = json.loads(backend.library.build_info())
    return str(built["compiler"]) if "compiler" in built else None
