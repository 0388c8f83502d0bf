"""How the suites run, for all of them: ``python -m pytest bench -q`` (`make bench`).

Each test builds the candidates of one case, ours and torch's, and hands them to `measure`, which has
`cnnops.bench.timing.compare` verify and time them and makes a row of ``bench/results/<device>/<suite>.json`` of its
samples; a suite is one test file. pytest-benchmark collects and reports but times nothing of its own: each test gives
it a timer that replays the samples of ours, so its table, its JSON and its `--benchmark-compare` show the core's
figures, with the peers' in `extra_info`.

A result file is written only for a suite that ran whole and without a failure; `--quick`, `-k` and the like print their
tables and write nothing, unless `--results` names a folder for them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from candidates import LAYOUTS, OURS

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton; the backend is then used by name alone

from cnnops.bench import memory, report
from cnnops.bench.backend import backend_that_runs, compiler
from cnnops.bench.results import Environment, Results, Row, environment, machine_limits, save
from cnnops.bench.timing import Clock, compare

ROOT = Path(__file__).resolve().parents[1]

QUICK_SUITES = ("resnet18_cifar", "pools")

CUDA_BATCH = 256  # KERNELS.md's targets are at this batch


def _cases() -> ModuleType:
    """tests/cases.py, which is no package's module."""
    if "cases" not in sys.modules:
        spec = importlib.util.spec_from_file_location("cases", ROOT / "tests" / "cases.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["cases"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["cases"])
    return sys.modules["cases"]


def bench_cases(op: str) -> list[Any]:
    """The network layers of tests/cases.py for a suite's `CASES`."""
    cases = _cases()
    lists = {
        "conv2d": cases.CONV2D,
        "conv2d_bn_act": cases.of_suite(cases.CONV2D, "resnet18_cifar", "resnet18"),
        "conv_transpose2d": cases.CONV_TRANSPOSE2D,
        "pool2d": cases.POOL2D,
        "max_unpool2d": cases.UNPOOL2D,
        "batch_norm": cases.NORM,
        "bn_act_max_pool2d": [case for case in cases.POOL2D if case.op == "max_pool2d" and case.kernel == (3, 3)],
        "squeeze_excite": cases.SQUEEZE_EXCITE,
    }
    return list(cases.networks(lists[op]))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cnnops", "kernel benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--dtypes", help="comma-separated, default float32 on the CPU, bfloat16,float32 on CUDA")
    group.addoption("--suites", help="comma-separated suites of tests/cases.py, default all networks")
    group.addoption("--layout", default="channels_last", choices=tuple(LAYOUTS), help="memory layout of ours")
    group.addoption("--batch", type=int, help=f"batch of every case, default the case's own, {CUDA_BATCH} on CUDA")
    group.addoption("--threads", type=int, help="torch threads, default torch's own choice")
    group.addoption("--budget", type=float, default=1.0, help="seconds of samples for each row")
    group.addoption("--quick", action="store_true", help="three rounds, the CIFAR-size cases only")
    group.addoption("--inductor", action="store_true", help="also torch.compile of torch's own op")
    group.addoption("--results", type=Path, help="folder for the result files, also of a partial run")


@dataclass
class Session:
    """What the run has measured so far."""

    environment: Environment
    """As it was before the first case."""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    """What each suite ran with."""
    failed: set[str] = field(default_factory=set)
    """Suites with a failed case, which write nothing."""
    partial: str = ""
    """Why this run is no whole one."""
    lines: list[str] = field(default_factory=list)


SESSION = pytest.StashKey[Session]()

_replayed: Iterator[float] = iter(())


def _replay() -> float:
    """pytest-benchmark's timer: it is read before and after each of its rounds, and gets what the core measured."""
    return next(_replayed)


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("benchmarks share the machine with nothing: run them without -n")
    device = config.option.device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch sees no GPU here")
    session = config.stash[SESSION] = Session(environment(device, config.option.threads, compiler(device)))
    options = {name: config.getoption(name) for name in ("quick", "suites", "dtypes", "batch", "keyword", "markexpr")}
    given = [f"--{name}" for name, value in options.items() if value]
    given += [argument for argument in config.args if "::" in argument]
    session.partial = ", ".join(given)
    torch.backends.cudnn.benchmark = True


def dtypes_of(config: pytest.Config) -> tuple[torch.dtype, ...]:
    names = config.option.dtypes or ("bfloat16,float32" if config.option.device.startswith("cuda") else "float32")
    dtypes = tuple(getattr(torch, name, None) for name in names.split(","))
    if not all(isinstance(dtype, torch.dtype) and dtype.is_floating_point for dtype in dtypes):
        raise pytest.UsageError(f"--dtypes: expected names like float32,bfloat16, but got {names}")
    return dtypes


def _selected(config: pytest.Config, op: str) -> list[Any]:
    cases, cuda = bench_cases(op), config.option.device.startswith("cuda")
    wanted = config.option.suites.split(",") if config.option.suites else QUICK_SUITES if config.option.quick else None
    if config.option.suites:
        names = ("conv2d", "conv_transpose2d", "pool2d", "max_unpool2d", "batch_norm", "squeeze_excite")
        known = {case.suite for name in names for case in bench_cases(name)}
        if unknown := sorted(set(wanted) - known):
            raise pytest.UsageError(f"--suites: expected {', '.join(sorted(known))}, but got {', '.join(unknown)}")
    batch = config.option.batch or (CUDA_BATCH if cuda else None)
    cases = [case for case in cases if wanted is None or case.suite in wanted]
    return [case.with_batch(batch) for case in cases] if batch else cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = _selected(metafunc.config, metafunc.module.CASES)
        metafunc.parametrize("case", cases, ids=lambda case: f"{case.id}-N{case.N}")
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", dtypes_of(metafunc.config), ids=lambda dtype: str(dtype).removeprefix("torch."))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_replay, group=item.path.stem))


def _suite(path: Path) -> str:
    """The suite of a test file."""
    return path.stem.removeprefix("test_")


def _kinds(config: pytest.Config, largest: int) -> tuple[str, ...]:
    """The malloc settings that matter to a case whose largest tensor has that many bytes."""
    if config.option.device.startswith("cuda"):
        return ("reused",)  # torch's caching allocator
    return memory.KINDS if largest >= memory.MAPPED_BYTES else ("reused",)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator(request.config.option.device).manual_seed(0)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Returns the function that times one case and notes its rows; a test calls it once.

    measure(op=, case=, pass_=, dtype=, calls={name: call}, verify=, largest=, flops=0, bytes=0, layout=None,
    clock=None, threads=, limits=True): `calls` has ours under `OURS` and at least one peer; largest is the bytes of the
    largest tensor.
    """
    config = request.config
    session, suite = config.stash[SESSION], _suite(request.path)

    def run(
        *,
        op: str,
        case: str,
        pass_: str,
        dtype: torch.dtype,
        calls: Mapping[str, Callable[[], object]],
        verify: Callable[[Mapping[str, object]], None],
        largest: int,
        flops: int = 0,
        bytes: int = 0,
        layout: str | None = None,
        clock: Clock | None = None,
        threads: int | None = config.option.threads,
        limits: bool = True,
    ) -> None:
        device = config.option.device
        backend = backend_that_runs(calls[OURS])
        measured = machine_limits(device, threads, dtypes_of(config)) if limits else None
        samples: list[float] = []
        for kind in _kinds(config, largest):
            with memory.outputs(kind):
                comparison = compare(
                    calls,
                    verify=verify,
                    budget_s=config.option.budget,
                    rounds=3 if config.option.quick else None,
                    threads=threads,
                    device=device,
                    clock=clock,
                )
            row = Row.of(
                comparison,
                op=op,
                case=case,
                dtype=dtype,
                layout=layout or config.option.layout,
                pass_=pass_,
                memory=kind,
                backend=backend,
                ours=OURS,
                peers=[name for name in calls if name.startswith("torch")],
                flops=flops,
                bytes=bytes,
                limits=measured,
            )
            session.rows.setdefault(suite, []).append(row)
            session.threads[suite] = comparison.threads
            benchmark.extra_info[kind] = dataclasses.asdict(row)
            samples = list(comparison.seconds[OURS])
        global _replayed
        _replayed = itertools.chain.from_iterable((0.0, sample) for sample in samples)
        benchmark.pedantic(lambda: None, rounds=len(samples))

    return run


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        item.config.stash[SESSION].failed.add(_suite(item.path))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        items[0].config.stash[SESSION].partial += " deselected cases"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    state, device = config.stash[SESSION], config.option.device
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or session.shouldfail:
        state.partial += " stopped early"
    folder: Path | None = config.option.results or (None if state.partial else report.RESULTS)
    for suite, rows in state.rows.items():
        limits = (
            machine_limits(device, config.option.threads, dtypes_of(config)) if rows[0].flops or rows[0].bytes else None
        )
        described = dataclasses.replace(state.environment, threads=state.threads[suite])
        results = Results(suite, described, limits, tuple(rows))
        state.lines += ["", *report.render(results).splitlines()]
        if suite in state.failed:
            state.lines.append("not written: a case of this suite failed")
        elif folder is None:
            state.lines.append(f"not written: a partial run ({state.partial.strip()}); --results FOLDER keeps it")
        else:
            state.lines.append(f"written to {save(results, folder)}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash[SESSION].lines:
        terminalreporter.write_line(line)
