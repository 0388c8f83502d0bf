"""Harm to a training run: the places where its writes can be cut off, and a program whose children die there.

As a program it takes a JSON job a line on stdin and answers with a line. It forks for each job and runs no op itself:
so a child starts in milliseconds, and may run ops.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnops import data, files
from cnnops.train import Trainer

TRAIN = [
    *("train", "--model", "simple_cnn", "--data", "synthetic", "--width", "0.125", "--epochs", "2"),
    *("--batch-size", "8", "--lr", "0.02", "--checkpoint-every", "2", "--device", "cpu"),
]


def small(seed: int) -> data.Dataset:
    """Four steps of 8, the last of 4."""
    return data.synthetic(train=28, test=12, classes=4, seed=seed)


class Cuts:
    """Counts the places where `write_atomically` can be cut off, and acts at number `at` (from 1)."""

    def __init__(self, at: int = 0, action: Callable[[], None] = lambda: None) -> None:
        self.at, self.action, self.count = at, action, 0
        self.calls: list[str] = []

    def here(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.action()

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            self.here()
            result = call(*arguments)
            self.calls.append(f"{name} {_named(arguments[-1])}")
            self.here()
            return result

        return wrapped

    def _open(self, path: Path, mode: str) -> io.BufferedWriter:
        self.here()
        return _Torn(self, path, mode)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Cuts]:
        """While entered, the writes of `cnnops.files` are counted."""
        calls = {name: getattr(os, name) for name in ("fsync", "replace")}
        try:
            for name, call in calls.items():
                setattr(os, name, self._around(name, call))
            files.open = self._open  # type: ignore[attr-defined]
            yield self
        finally:
            for name, call in calls.items():
                setattr(os, name, call)
            del files.open  # type: ignore[attr-defined]


def _named(file: Any) -> str:
    return Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file).name


class _Torn(io.BufferedWriter):
    """A file whose content comes in two parts; the first may be all."""

    def __init__(self, cuts: Cuts, path: Path, mode: str) -> None:
        super().__init__(io.FileIO(path, mode))
        self._cuts = cuts

    def write(self, content: Any) -> int:
        half = len(content) // 2
        super().write(content[:half])
        self.flush()
        self._cuts.here()
        self._cuts.calls.append(f"write {Path(os.fsdecode(self.name)).name}")
        return half + super().write(content[half:])


@dataclass
class Job:
    """A command line of cnnops, in a child. cut: at which of `Cuts` it harms itself; after: s until it is killed."""

    arguments: list[str]
    log: str
    cut: int = 0
    signals: tuple[int, ...] = (signal.SIGKILL,)
    after: float | None = None
    draw_signal: int = 0
    file_size: int = 0


def _child(job: Job, pipe: int) -> int:
    from cnnops import cli, viz

    descriptor = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    data.DATASETS["synthetic"] = small
    if job.draw_signal:
        save_filters = viz.save_filters

        def interrupted(*arguments: Any) -> None:
            signal.raise_signal(job.draw_signal)
            save_filters(*arguments)

        viz.save_filters = interrupted
    else:
        Trainer._draw = lambda trainer: None  # type: ignore[method-assign]
    if job.file_size:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_size, job.file_size))

    def harm() -> None:
        for signum in job.signals:
            signal.raise_signal(signum)

    with Cuts(job.cut, harm).installed() as cuts:
        status = cli.main(job.arguments)
    os.write(pipe, str(cuts.count).encode())
    return status


def serve() -> None:
    """The program. Its answers: exit status (-n: signal n), seconds, and how many cuts there were (0: died before)."""
    import matplotlib.figure  # noqa: F401
    import rich.progress  # noqa: F401
    import torch._dynamo  # noqa: F401  (which the first optimizer would import)

    import cnnops.viz  # noqa: F401

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for line in sys.stdin:
        job = Job(**json.loads(line))
        ours, theirs = os.pipe()
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = _child(job, theirs)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(theirs)
        if job.after is not None:
            time.sleep(job.after)
            os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is its own
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.perf_counter() - began
        with open(ours) as pipe:
            cuts = int(pipe.read() or 0)
        print(json.dumps({"status": status, "seconds": seconds, "cuts": cuts}), flush=True)


if __name__ == "__main__":
    serve()
