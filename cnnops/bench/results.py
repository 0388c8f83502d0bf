"""The one result format: ``bench/results/<device>/<suite>.json``, written whole or not at all, checked when read."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cnnops
from cnnops.bench import memory
from cnnops.bench.timing import Comparison, Spread, compare
from cnnops.bench.verify import Mismatch, bound

SCHEMA = 1

PASSES = ("forward", "backward_input", "backward_weight", "backward", "forward+backward", "train", "inference")

ATEN = "aten"
"""The backend that is torch itself; its rows are never counted as ours."""


class ResultError(ValueError):
    """A result file that is not what this version writes."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median_us: float
    q1_us: float
    q3_us: float
    best_us: float
    samples: int

    @classmethod
    def of(cls, spread: Spread) -> Timing:
        return cls(spread.median * 1e6, spread.q1 * 1e6, spread.q3 * 1e6, spread.best * 1e6, spread.samples)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than a peer, taken round by round; below 1 is a loss."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, spread: Spread) -> Ratio:
        return cls(spread.median, spread.q1, spread.q3)


@dataclass(frozen=True)
class Limits:
    """What the machine reached in the same run. copy_gbps: GB/s read plus written by ``copy_`` between tensors beyond
    the caches; mm_gflops: GFLOP/s of a large ``torch.mm`` by dtype, a proxy for the arithmetic peak."""

    copy_gbps: float
    mm_gflops: dict[str, float]

    def seconds(self, flops: float, bytes: float, dtype: str) -> float | None:
        """The least time that `flops` and `bytes` take at these limits; None without one for `dtype`."""
        if dtype not in self.mm_gflops:
            return None
        return max(flops / (self.mm_gflops[dtype] * 1e9), bytes / (self.copy_gbps * 1e9))


@dataclass(frozen=True)
class Environment:
    """Where and with what a suite ran. isa: vector extensions that torch uses; compiler: what built the kernels;
    commit: of a checkout, dirty if files differ from it; load: runnable processes at the start (one-minute average)."""

    device: str
    device_name: str
    cores: int
    threads: int
    isa: str
    os: str
    python: str
    torch: str
    triton: str | None
    compiler: str | None
    cnnops: str
    commit: str | None
    dirty: bool
    malloc: str
    load: float
    date: str


@dataclass(frozen=True)
class Row:
    """One kernel beside its peers.

    op, case, dtype, layout, pass_: what was called; layout is ours, "channels_last" or "contiguous".
    memory: malloc setting, a kind of `memory.KINDS`. backend: the one that really ran.
    candidates: times by name; ours and peer name two of them, peer being the fastest of the eager ones.
    ratios: ours against every other candidate. flops, bytes: of one call, the least that memory must serve.
    gflops: GFLOP/s of ours. share: least time at the machine's limits over our time; above 1 where the data stays in
    cache or the algorithm needs fewer multiplications than counted. None where there is no limit to compare with.
    """

    op: str
    case: str
    dtype: str
    layout: str
    pass_: str
    memory: str
    backend: str
    ours: str
    peer: str
    candidates: dict[str, Timing]
    ratios: dict[str, Ratio]
    flops: int
    bytes: int
    gflops: float
    share: float | None

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        *,
        op: str,
        case: str,
        dtype: torch.dtype,
        layout: str,
        pass_: str,
        memory: str,
        backend: str,
        ours: str,
        peers: Sequence[str],
        flops: int = 0,
        bytes: int = 0,
        limits: Limits | None = None,
    ) -> Row:
        """The row of a comparison; `peer` becomes the fastest of `peers`. See the class for the arguments."""
        spread, name = comparison.time(ours), str(dtype).removeprefix("torch.")
        least = limits.seconds(flops, bytes, name) if limits and (flops or bytes) else None
        return cls(
            op,
            case,
            name,
            layout,
            pass_,
            memory,
            backend,
            ours,
            comparison.fastest(peers),
            {name: Timing.of(comparison.time(name)) for name in comparison.seconds},
            {name: Ratio.of(comparison.ratio(ours, name)) for name in comparison.seconds if name != ours},
            flops,
            bytes,
            flops / spread.median * 1e-9,
            least / spread.median if least else None,
        )

    @property
    def counted(self) -> bool:
        """Whether a kernel of ours ran, not torch's."""
        return self.backend != ATEN

    @property
    def ratio(self) -> Ratio:
        """Ours against the fastest eager peer."""
        return self.ratios[self.peer]

    @property
    def loss(self) -> bool:
        return self.counted and self.ratio.median < 1


@dataclass(frozen=True)
class Results:
    """One suite on one device."""

    suite: str
    environment: Environment
    limits: Limits | None
    rows: tuple[Row, ...]


def _plain(value: Any) -> Any:
    """`value` as JSON values; `pass_` becomes `pass`, which Python keeps for itself."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name.rstrip("_"): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value


def _built(kind: Any, value: Any, where: str) -> Any:
    """`value`, read from JSON, as the type `kind`; `where` names it in an error."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _built(next(p for p in parts if p is not type(None)), value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _built(parts[1], part, f"{where}.{key}") for key, part in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_built(parts[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        names = {f.name.rstrip("_"): f.name for f in dataclasses.fields(kind)}
        if missing := [name for name in names if name not in value]:
            raise ResultError(f"{where}: missing {', '.join(missing)}")
        if unknown := [name for name in value if name not in names]:
            raise ResultError(f"{where}: unknown {', '.join(unknown)}")
        fields = {names[name]: _built(hints[names[name]], part, f"{where}.{name}") for name, part in value.items()}
        return typing.cast(Callable[..., Any], kind)(**fields)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    expected = getattr(origin or kind, "__name__", str(kind))
    raise ResultError(f"{where}: expected a {expected}, but got {value!r:.60}")


def _check(results: Results, where: str) -> None:
    """Raise ResultError where values of the right type say something impossible."""
    for i, row in enumerate(results.rows):
        at = f"{where}: rows[{i}]"
        if row.pass_ not in PASSES:
            raise ResultError(f"{at}.pass: expected one of {', '.join(PASSES)}, but got {row.pass_!r}")
        if row.memory not in memory.KINDS:
            raise ResultError(f"{at}.memory: expected one of {', '.join(memory.KINDS)}, but got {row.memory!r}")
        for role, name in (("ours", row.ours), ("peer", row.peer)):
            if name not in row.candidates:
                raise ResultError(f"{at}.{role}: {name!r} is not among the candidates {', '.join(row.candidates)}")
        if set(row.ratios) != set(row.candidates) - {row.ours}:
            raise ResultError(f"{at}.ratios: expected one for each candidate but {row.ours!r}")
        for name, timing in row.candidates.items():
            if timing.samples < 1 or not 0 < timing.best_us <= timing.q1_us <= timing.median_us <= timing.q3_us:
                raise ResultError(f"{at}.candidates.{name}: expected 0 < best <= q1 <= median <= q3 and samples >= 1")


def save(results: Results, folder: Path | str) -> Path:
    """Write `results` to ``<folder>/<device>/<suite>.json`` by way of a temporary file there; returns the path.

    Raises ResultError if they would not load again, before anything is written, and OSError if they cannot be written.
    """
    path = Path(folder) / results.environment.device / f"{results.suite}.json"
    document = {"schema": SCHEMA, **_plain(results)}
    _parsed(document, str(path))
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _parsed(document: Any, where: str) -> Results:
    if not isinstance(document, dict):
        raise ResultError(f"{where}: expected a JSON object, but got {type(document).__name__}")
    document = dict(document)
    schema = document.pop("schema", None)
    if schema != SCHEMA:
        raise ResultError(f"{where}: expected schema {SCHEMA}, but got {schema!r}; measure again with this version")
    results: Results = _built(Results, document, where)
    _check(results, where)
    return results


def load(path: Path | str) -> Results:
    """Read and check one result file. Raises ResultError naming the file and the field, or OSError."""
    try:
        document = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: not a JSON file ({error})") from error
    return _parsed(document, str(path))


def load_all(folder: Path | str) -> list[Results]:
    """Every result file under `folder`, in order of device and suite; none where there is no such folder."""
    return [load(path) for path in sorted(Path(folder).glob("*/*.json"))]


def _fastest(call: Callable[[], object], right: Callable[[object], bool], device: str, threads: int | None) -> float:
    """Seconds of the fastest sample of `call`, whose result `right` accepts."""

    def verify(results: Mapping[str, object]) -> None:
        if not right(results["limit"]):
            raise Mismatch("machine_limits: torch's own result is wrong")

    return compare({"limit": call}, verify=verify, device=device, threads=threads).time("limit").best


def _copy_gbps(device: str, threads: int | None, elements: int) -> float:
    source = torch.rand(elements, device=device)
    target = torch.zeros_like(source)
    seconds = _fastest(lambda: target.copy_(source), lambda _: torch.equal(target, source), device, threads)
    return 2 * source.nbytes / seconds * 1e-9


def _mm_gflops(device: str, threads: int | None, dtype: torch.dtype, extent: int) -> float:
    a, b = (torch.randn(extent, extent, device=device).to(dtype) for _ in range(2))
    expected = (a[:8].double() @ b.double()).to(dtype)

    def right(product: object) -> bool:
        difference = product[:8] - expected if isinstance(product, torch.Tensor) else expected
        return float(difference.abs().max()) <= bound(expected, extent)

    return 2 * extent**3 / _fastest(lambda: a @ b, right, device, threads) * 1e-9


@functools.cache
def machine_limits(
    device: str, threads: int | None = None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> Limits:
    """Measure `Limits` on `device`, about two seconds for each figure; remembered for the process.

    The best sample counts, since a limit is what the machine can do. Copies are of 128 MiB (1 GiB on CUDA), products of
    2048 x 2048 (8192 x 8192 on CUDA), both beyond the caches. Draws from torch's global generator, and restores it.
    """
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng():
        copy_gbps = _copy_gbps(device, threads, 1 << (28 if cuda else 25))
        names = {dtype: str(dtype).removeprefix("torch.") for dtype in dtypes}
        extent = 8192 if cuda else 2048
        return Limits(copy_gbps, {names[dtype]: _mm_gflops(device, threads, dtype, extent) for dtype in dtypes})


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _slug(text: str) -> str:
    text = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says about the checkout that this module lies in; None without git or outside a checkout of ours."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment(device: str = "cpu", threads: int | None = None, compiler: str | None = None) -> Environment:
    """Describe this machine and these versions. compiler: what built the kernels, where that is known."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        slug, isa = _slug(name), "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        name, isa = _cpu_name(), capability
        slug = f"{_slug(name)}-{cores}c-{_slug(isa)}"
    return Environment(
        device=slug,
        device_name=name,
        cores=cores,
        threads=threads or torch.get_num_threads(),
        isa=isa,
        os=platform.platform(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=_version("triton"),
        compiler=compiler,
        cnnops=cnnops.__version__,
        commit=_git("rev-parse", "HEAD"),
        dirty=bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        malloc=memory.describe(),
        load=round(os.getloadavg()[0], 2),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
