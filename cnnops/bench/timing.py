"""The one timing function: candidates interleaved round by round, verified before and after.

Neighbours and clock frequencies drift over seconds, so a candidate is only ever compared with another of the same
round. A ratio is taken in each round and then summarised, which cancels the drift that two separate medians would keep.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

MIN_ROUNDS = 7
"""Fewest rounds where the budget decides: quartiles of fewer say little."""

MAX_REPEATS = 1_000_000

Call = Callable[[], object]
Verify = Callable[[Mapping[str, object]], None]


class Clock(Protocol):
    """How a device is timed."""

    def sample(self, call: Call, repeats: int) -> float:
        """Seconds that `repeats` calls take together."""


class CpuClock:
    """Host time of calls made one after another, caches warm.

    timer: gives seconds; ``time.thread_time`` for call overhead.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer

    def sample(self, call: Call, repeats: int) -> float:
        steps = range(repeats)
        start = self.timer()
        for _ in steps:
            call()
        return self.timer() - start


class CudaClock:
    """Device time between two events around each call, the L2 cache flushed before each.

    The flush also keeps the queue ahead of the host, so that launch latency counts only where it exceeds the flush.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(2 * l2, 1 << 20), dtype=torch.uint8, device=device)

    def sample(self, call: Call, repeats: int) -> float:
        marks = []
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            for _ in range(repeats):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.flush.zero_()
                start.record()
                call()
                end.record()
                marks.append((start, end))
            torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in marks) * 1e-3


def clock_for(device: torch.device | str) -> Clock:
    """The clock that times work on `device`."""
    device = torch.device(device)
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and minimum of `samples` values."""

    median: float
    q1: float
    q3: float
    best: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, min(values), len(values))


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. seconds: for each candidate the time of one call, one entry for each round."""

    seconds: Mapping[str, tuple[float, ...]]
    repeats: Mapping[str, int]
    threads: int
    device: str

    def time(self, name: str) -> Spread:
        """Seconds of one call of the candidate `name`."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, peer: str) -> Spread:
        """How many times faster `name` is than `peer`, over ratios taken within each round. Below 1 is a loss."""
        return Spread.of([b / a for a, b in zip(self.seconds[name], self.seconds[peer], strict=True)])

    def fastest(self, names: Sequence[str]) -> str:
        """The candidate of `names` with the smallest median."""
        return min(names, key=lambda name: self.time(name).median)


@contextmanager
def fixed_threads(threads: int | None) -> Iterator[int]:
    """Run with `threads` torch threads (None: as many as now) and restore the number afterwards."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _repeats(clock: Clock, call: Call, sample_s: float) -> int:
    """Calls in one sample, so that it lasts at least about `sample_s`."""
    repeats = 1
    while (seconds := clock.sample(call, repeats)) < sample_s and repeats < MAX_REPEATS:
        wanted = repeats * sample_s / seconds if seconds > 0 else math.inf
        repeats = min(math.ceil(min(wanted, 10 * repeats)), MAX_REPEATS)
        if wanted <= repeats:
            break
    return repeats


def compare(
    candidates: Mapping[str, Call],
    *,
    verify: Verify,
    budget_s: float = 1.0,
    rounds: int | None = None,
    sample_s: float = 1e-3,
    warmup: int = 2,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> Comparison:
    """Time the candidates against each other, one sample of each in every round, in an order that rotates.

    candidates: calls without arguments, by name. A call's result is dropped inside its own timing, as in real use.
    verify: gets every candidate's result by name, once before and once after the timing, and raises if they disagree;
        nothing is timed, or nothing is returned, then.
    budget_s: seconds of samples to take, at least `MIN_ROUNDS` rounds. rounds: this many rounds instead.
    sample_s: shortest sample in seconds; faster calls are repeated within a sample.
    warmup: calls of each candidate, beside the verified one, before its first sample.
    threads: torch threads while timing, restored afterwards; None keeps the current number.
    device: where the candidates run; decides the clock, unless `clock` is given.
    Raises ValueError for a bad argument, and whatever a candidate or `verify` raises.
    """
    if not candidates:
        raise ValueError("compare: candidates must name at least one call, but got none")
    for argument, value in (("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"compare: {argument} must be at least 1, but got {argument}={value}")
    if warmup < 0:
        raise ValueError(f"compare: warmup must not be negative, but got warmup={warmup}")
    names = list(candidates)
    with fixed_threads(threads) as used:
        verify({name: call() for name, call in candidates.items()})
        clock = clock or clock_for(device)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        with _no_garbage_collection():
            for call in candidates.values():
                for _ in range(warmup):
                    call()
            repeats = {name: _repeats(clock, call, sample_s) for name, call in candidates.items()}
            spent, done = 0.0, 0
            while done < rounds if rounds is not None else done < MIN_ROUNDS or spent < budget_s:
                first = done % len(names)
                for name in names[first:] + names[:first]:
                    sample = clock.sample(candidates[name], repeats[name])
                    seconds[name].append(sample / repeats[name])
                    spent += sample
                done += 1
        verify({name: call() for name, call in candidates.items()})
    return Comparison({name: tuple(values) for name, values in seconds.items()}, repeats, used, str(device))
