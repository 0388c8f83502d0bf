"""Why a call runs where it runs, and what this installation can do."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import dispatch, resources, settings
from .backends import Support, aten
from .backends.native import Library, Problem
from .ops.registry import observers
from .torch_private import FakeTensorMode, tree_leaves, tree_map
from .version import __version__


@dataclass(frozen=True)
class Decision:
    """What every backend says to one native function of a call, and which one is chosen (None: the call would raise)."""

    function: str
    problem: Problem
    verdicts: tuple[tuple[str, Support], ...]
    chosen: str | None
    plan: tuple[str, ...] = ()
    """The kernels of a backend that has several, a line for each pass, with the reason."""

    def __str__(self) -> str:
        lines = [f"{self.function}: {self.chosen or 'no backend'}"]
        for name, support in self.verdicts:
            state = "chosen" if name == self.chosen else "supports it" if support.ok else support.reason
            lines.append(f"  {name:8s} {state}")
            if name == self.chosen:
                lines += [f"           {line}" for line in self.plan]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The decisions of a call, forward first, then its gradients. Prints as a table."""

    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.decisions))

    @property
    def backends(self) -> dict[str, str | None]:
        """The chosen backend of each native function."""
        return {d.function: d.chosen for d in self.decisions}


def _decide(function: str, problem: Problem, named: str) -> Decision:
    verdicts = []
    chosen: ModuleType | None = None
    for backend, support in dispatch.verdicts(function, problem, named):
        if backend is aten and settings.strict and not named:
            support = Support(False, "not ours, and settings.strict is on")
        verdicts.append((backend.NAME, support))
        if chosen is None and support.ok:
            chosen = backend
    plan = getattr(chosen, "plan", lambda *_: ())
    return Decision(
        function, problem, tuple(verdicts), None if chosen is None else chosen.NAME, plan(function, problem)
    )


def explain(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run ``call(*args, **kwargs)`` and its gradients, and why each other one would not.

    call: a function made of cnnops ops, e.g. ``cnnops.functional.conv2d`` or a module. Nothing is computed: the call
    runs on fake tensors, once as in inference and once for its gradients, which are explained where a floating tensor
    argument or parameter could require one. A wrong call raises as it would.
    """
    seen: dict[tuple[str, Problem, str], Decision] = {}

    def observe(function: str, problem: Problem, named: str) -> None:
        if (function, problem, named) not in seen:
            seen[function, problem, named] = _decide(function, problem, named)

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = mode.from_tensor(value.detach(), static_shapes=True)
        return copy.requires_grad_() if copy.is_floating_point() else copy

    observers.append(observe)
    try:
        with mode, torch.autograd.set_multithreading_enabled(False):
            run: Callable[..., Any] = call
            args, kwargs = tree_map(fake, (args, kwargs))
            if isinstance(call, torch.nn.Module):
                state = {name: fake(t) for name, t in call.state_dict(keep_vars=True).items()}
                buffers = {name for name, _ in call.named_buffers()}
                state = {name: t.detach() if name in buffers else t for name, t in state.items()}
                run, args, kwargs = torch.func.functional_call, (call, state, args, kwargs), {}
            with torch.no_grad():
                run(*args, **kwargs)  # as inference does: with gradients, an op may be made of others
            with torch.enable_grad():
                result = run(*args, **kwargs)
            total = [y.sum() for y in tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]
            if total:
                torch.autograd.backward(total)
    finally:
        observers.remove(observe)
    return Explanation(tuple(seen.values()))


def info() -> dict[str, Any]:
    """What is built, what is usable here, and what is missing and how to get it; `cnnops info` prints it."""
    backends = {}
    for backend in dispatch.BACKENDS:
        usable: Support = backend.usable()
        entry: dict[str, Any] = {"usable": usable.ok, "devices": list(backend.devices)}
        if not usable.ok:
            entry["why_not"] = usable.reason
        if backend.named_only:
            entry["note"] = "used only by name"
        library: Library | None = getattr(backend, "library", None)
        if library is not None:
            entry["library"] = library.path.name if library.path.exists() else "not built"
            if library.status().ok:
                entry["built"] = json.loads(library.build_info())
        if backend.NAME == "cuda" and entry["library"] != "not built":
            try:
                entry["table"] = [asdict(row) for row in resources.table(backend.library.path)]
            except (FileNotFoundError, RuntimeError) as error:
                entry["why_no_table"] = str(error)
        backends[backend.NAME] = entry
    return {
        "cnnops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
        "backends": backends,
    }
