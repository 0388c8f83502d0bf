"""The timing core under a fake clock: no wall-clock figure is asserted."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnnops
import cnnops.functional as CF
from cnnops.bench import memory, report, results
from cnnops.bench.backend import backend_that_runs
from cnnops.bench.models import ModelComparison, compare_models
from cnnops.bench.results import Environment, Limits, ResultError, Results, Row
from cnnops.bench.timing import MIN_ROUNDS, Comparison, CpuClock, Spread, compare
from cnnops.bench.verify import Mismatch, agree


class FakeClock:
    """Says that a call takes what `cost(name, sample number of that name)` says, and notes the order of samples."""

    def __init__(self, names, cost):
        self.names, self.cost, self.samples = names, cost, []

    def sample(self, call, repeats):
        name = self.names[call]
        self.samples.append((name, repeats))
        return repeats * self.cost(name, sum(n == name for n, _ in self.samples))


def candidates(*names):
    return {name: (lambda name=name: torch.ones(1)) for name in names}


def fake(calls, cost):
    return FakeClock({call: name for name, call in calls.items()}, cost)


def nothing(results):
    pass


def test_interleaved_in_a_rotating_order():
    calls = candidates("a", "b", "c")
    clock = fake(calls, lambda name, i: 1.0)
    compare(calls, verify=nothing, rounds=4, clock=clock)
    timed = [name for name, _ in clock.samples[3:]]
    assert timed == [*"abc", *"bca", *"cab", *"abc"]


def test_ratio_is_taken_within_each_round():
    # Both slow down tenfold half-way: the medians drift, the ratio of a round does not.
    drift = {"ours": [1, 1, 1, 1, 10, 10, 10, 10], "peer": [2, 2, 2, 2, 20, 20, 20, 30]}
    calls = candidates("ours", "peer")
    clock = fake(calls, lambda name, i: float(drift[name][i - 1]))
    comparison = compare(calls, verify=nothing, rounds=7, clock=clock)
    ratio = comparison.ratio("ours", "peer")
    assert (ratio.q1, ratio.median, ratio.q3, ratio.samples) == (2, 2, 2, 7)
    assert comparison.ratio("peer", "ours").median == 0.5
    assert comparison.time("ours") == Spread(10, 1, 10, 1, 7)
    assert comparison.fastest(["peer", "ours"]) == "ours"


def test_ratio_of_medians_would_differ():
    comparison = Comparison({"a": (1.0, 2.0, 9.0), "b": (3.0, 2.0, 9.0)}, {"a": 1, "b": 1}, 1, "cpu")
    assert comparison.ratio("a", "b").median == 1.0
    assert comparison.time("b").median / comparison.time("a").median == 1.5


def test_short_calls_are_repeated_within_a_sample():
    calls = candidates("short", "long")
    clock = fake(calls, lambda name, i: {"short": 3e-6, "long": 0.5}[name])
    comparison = compare(calls, verify=nothing, rounds=2, sample_s=1e-3, clock=clock)
    assert comparison.repeats["long"] == 1
    assert comparison.repeats["short"] * 3e-6 == pytest.approx(1e-3, rel=0.01)
    assert comparison.seconds["short"] == pytest.approx((3e-6, 3e-6))


def test_a_clock_that_stands_still_ends():
    calls = candidates("a")
    assert compare(calls, verify=nothing, rounds=1, clock=fake(calls, lambda name, i: 0.0)).seconds["a"] == (0.0,)


def test_budget_decides_the_rounds_but_not_below_the_least():
    calls = candidates("a", "b")
    assert len(compare(calls, verify=nothing, budget_s=20.0, clock=fake(calls, lambda n, i: 1.0)).seconds["a"]) == 10
    assert (
        len(compare(calls, verify=nothing, budget_s=0.0, clock=fake(calls, lambda n, i: 1.0)).seconds["a"])
        == MIN_ROUNDS
    )


def test_cpu_clock_counts_the_time_between_its_two_readings():
    readings, done = iter([5.0, 7.5]), []
    assert CpuClock(lambda: next(readings)).sample(lambda: done.append(1), 3) == 2.5
    assert len(done) == 3


def test_verified_before_and_after_and_never_timed_before():
    calls = candidates("a", "b")
    clock = fake(calls, lambda name, i: 1.0)
    seen = []

    def verify(results):
        assert set(results) == {"a", "b"}
        assert all(isinstance(r, torch.Tensor) for r in results.values())
        seen.append(len(clock.samples))

    compare(calls, verify=verify, rounds=3, clock=clock)
    assert seen == [0, len(clock.samples)]


@pytest.mark.parametrize("wrong_from", [1, 8])
def test_a_wrong_result_raises_before_or_after_timing(wrong_from):
    made = 0

    def broken():
        nonlocal made
        made += 1
        return torch.full((4,), 2.0 if made >= wrong_from else 1.0)

    calls = {"ours": broken, "peer": lambda: torch.ones(4)}
    clock = fake(calls, lambda name, i: 1.0)
    clock.sample, inner = (lambda call, repeats: (call(), inner(call, repeats))[1]), clock.sample
    with pytest.raises(Mismatch, match=r"ours differs from peer by 1 in a result of \[4\]"):
        compare(calls, verify=agree("peer", 1), rounds=5, clock=clock)
    assert bool(clock.samples) == (wrong_from > 1)


@pytest.mark.parametrize("fail", [False, True])
def test_threads_are_set_and_restored(fail):
    before = torch.get_num_threads()
    wanted, seen = before + 1, []

    def call():
        seen.append(torch.get_num_threads())
        if fail:
            raise KeyError("a failing candidate")
        return torch.ones(1)

    calls = {"a": call}
    clock = fake(calls, lambda name, i: 1.0)
    if fail:
        with pytest.raises(KeyError):
            compare(calls, verify=nothing, threads=wanted, clock=clock)
    else:
        assert compare(calls, verify=nothing, threads=wanted, clock=clock).threads == wanted
    assert set(seen) == {wanted}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rounds": 0}, "rounds=0"), ({"threads": 0}, "threads=0"), ({"warmup": -1}, "warmup=-1")],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(candidates("a"), verify=nothing, **arguments)
    with pytest.raises(ValueError, match="candidates"):
        compare({}, verify=nothing)


def test_agreement_allows_rounding_and_no_more():
    torch.manual_seed(0)
    a, b = torch.randn(64, 576), torch.randn(576, 64)
    exact = (a.double() @ b.double()).float()
    agree("peer", 576)({"peer": a @ b, "ours": exact})
    one_tap_short = a[:, 1:] @ b[1:]
    with pytest.raises(Mismatch, match="ours differs"):
        agree("peer", 576)({"peer": exact, "ours": one_tap_short})
    with pytest.raises(Mismatch, match="shapes"):
        agree("peer", 1)({"peer": exact, "ours": exact[1:]})
    with pytest.raises(Mismatch, match="float64"):
        agree("peer", 1)({"peer": exact, "ours": exact.double()})
    with pytest.raises(Mismatch, match="finite"):
        agree("peer", 1)({"peer": exact * torch.nan, "ours": exact * torch.nan})
    with pytest.raises(Mismatch, match="non-zero"):
        agree("peer", 1)({"peer": exact * 0, "ours": exact * 0})
    with pytest.raises(Mismatch, match="differs"):
        agree("peer", 1)({"peer": exact, "ours": exact * torch.nan})


ENVIRONMENT = Environment(
    device="some-cpu-2c-avx512", device_name="Some CPU", cores=2, threads=2, isa="AVX512", os="Linux",
    python="3.11.0", torch="2.13.0", triton=None, compiler=None, cnnops="0.1", commit="0123456789abcdef", dirty=False,
    malloc="glibc 2.36", load=0.5, date="2026-01-02T03:04:05+00:00",
)  # fmt: skip


def row(ours, *, backend="cpu", case="64@32"):
    """A row in which ours takes `ours` ms beside a peer of 2 ms and a slower one of 4 ms."""
    seconds = {"cnnops": (ours * 1e-3,) * 3, "torch channels_last": (2e-3,) * 3, "torch contiguous": (4e-3,) * 3}
    comparison = Comparison(seconds, dict.fromkeys(seconds, 1), 2, "cpu")
    return Row.of(
        comparison, op="conv2d", case=case, dtype=torch.float32, layout="channels_last", pass_="forward",
        memory="fresh", backend=backend, ours="cnnops", peers=["torch contiguous", "torch channels_last"],
        flops=10**8, bytes=10**6, limits=Limits(10.0, {"float32": 200.0}),
    )  # fmt: skip


def measured(*rows):
    return Results("conv2d", ENVIRONMENT, Limits(10.0, {"float32": 200.0}), rows or (row(1.0),))


def test_row_figures():
    r = row(1.0)
    assert r.peer == "torch channels_last"
    assert r.ratio.median == pytest.approx(2.0)
    assert r.ratios["torch contiguous"].median == pytest.approx(4.0)
    assert r.gflops == pytest.approx(100.0)  # 1e8 operations in 1 ms
    assert r.share == pytest.approx(0.5)  # 1e8 operations at 200 GFLOP/s take 0.5 ms, 1 MB at 10 GB/s 0.1 ms
    assert r.counted
    assert not r.loss
    assert row(3.0).loss
    assert not row(3.0, backend="aten").counted
    assert not row(3.0, backend="aten").loss


def test_results_come_back_as_they_were_saved(tmp_path):
    path = results.save(measured(row(1.0), row(3.0)), tmp_path)
    assert path == tmp_path / "some-cpu-2c-avx512" / "conv2d.json"
    assert results.load(path) == measured(row(1.0), row(3.0))
    assert results.load_all(tmp_path) == [results.load(path)]
    document = json.loads(path.read_text())
    assert document["schema"] == results.SCHEMA
    assert document["rows"][0]["pass"] == "forward"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = results.save(measured(), tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="No space left"):
                results.save(measured(row(3.0)), tmp_path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["conv2d.json"]


def test_what_would_not_load_is_not_written(tmp_path):
    bad = dataclasses.replace(row(1.0), gflops=float("nan"))
    with pytest.raises(ResultError, match=r"rows\[0\].gflops"):
        results.save(measured(bad), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(schema=99), "expected schema 1, but got 99"),
        (lambda d: d.pop("schema"), "expected schema 1, but got None"),
        (lambda d: d.pop("rows"), "missing rows"),
        (lambda d: d.update(extra=1), "unknown extra"),
        (lambda d: d["environment"].update(cores="2"), r"environment\.cores: expected a int, but got '2'"),
        (lambda d: d["environment"].pop("commit"), "environment: missing commit"),
        (lambda d: d["rows"][0].update({"pass": "sideways"}), r"rows\[0\]\.pass: expected one of forward"),
        (lambda d: d["rows"][0].update(memory="magic"), r"rows\[0\]\.memory: expected one of fresh, reused"),
        (lambda d: d["rows"][0].update(peer="nobody"), r"rows\[0\]\.peer: 'nobody' is not among"),
        (lambda d: d["rows"][0]["ratios"].popitem(), r"rows\[0\]\.ratios"),
        (lambda d: d["rows"][0]["candidates"]["cnnops"].update(median_us=-1), r"candidates\.cnnops: expected 0 < best"),
        (lambda d: d["rows"][0]["candidates"].update(cnnops=[]), r"candidates\.cnnops: expected a Timing"),
        (lambda d: d.update(rows={}), "rows: expected a tuple"),
    ],
)
def test_a_damaged_file_is_refused_by_field(tmp_path, damage, message):
    path = results.save(measured(), tmp_path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ResultError, match=message) as caught:
        results.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "half.json"
    path.write_text('{"schema": 1, "rows"')
    with pytest.raises(ResultError, match="not a JSON file"):
        results.load(path)


def test_the_environment_is_complete_and_its_slug_is_a_folder_name():
    e = results.environment(threads=1)
    assert e.threads == 1
    assert e.torch == torch.__version__
    assert e.cores >= 1
    assert e.device
    assert not set(e.device) - set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert f"{e.cores}c" in e.device


def test_malloc_settings_are_checked():
    with pytest.raises(ValueError, match="kind='warm'"), memory.outputs("warm"):
        pass


MAPPED_BLOCKS = """
import ctypes, torch
from cnnops.bench import memory

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(f, ctypes.c_size_t) for f in FIELDS]})
for kind in ("fresh", "reused", "fresh"):
    with memory.outputs(kind):
        before = libc.mallinfo2().hblks
        held = torch.empty(2 * memory.MAPPED_BYTES, dtype=torch.uint8)
        print(kind, libc.mallinfo2().hblks - before)
        del held
"""


def test_malloc_maps_large_outputs_afresh_or_not():
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("counting mapped blocks needs glibc 2.33")
    # A process of its own: the heap of this one may hold a free chunk of that size, left by any earlier test.
    run = subprocess.run([sys.executable, "-c", MAPPED_BLOCKS], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:3] == ["fresh 1", "reused 0", "fresh 1"]


def test_a_busy_machine_is_called_so():
    busy = dataclasses.replace(measured(), environment=dataclasses.replace(ENVIRONMENT, load=7.0))
    assert "BUSY MACHINE: 7.0" in report.render(busy)
    assert "BUSY" not in report.render(measured())


def test_the_backend_is_the_one_that_dispatch_chose_in_the_call():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    with cnnops.use_backend("aten"):
        CF.conv2d(x, weight)  # what was chosen before does not hide the choice
        assert backend_that_runs(lambda: CF.conv2d(x, weight)) == "aten"
    with pytest.raises(RuntimeError, match="expected a call of a cnnops op"):
        backend_that_runs(lambda: x + 1)


def small_network(scale=1.0):
    class Scaled(torch.nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * scale

    layers = [Scaled(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))


def test_models_are_compared_on_equal_weights_and_left_alone():
    torch.manual_seed(0)
    ours, peer = small_network(), small_network()
    batch = torch.randn(4, 3, 6, 6), torch.randint(5, (4,))
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (ours, peer)]
    state = torch.get_rng_state()
    compared = compare_models(ours, peer, batch, rounds=2)
    assert torch.equal(torch.get_rng_state(), state)
    for model, values in zip((ours, peer), before, strict=True):
        assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert {len(s) for c in (compared.train, compared.inference) for s in c.seconds.values()} == {2}
    with pytest.raises(Mismatch, match="from float64"):
        compare_models(small_network(scale=1.001), peer, batch, rounds=2)


def test_the_table_of_models_marks_a_loss():
    won = Comparison({"cnnops": (0.1,) * 3, "torch": (0.2,) * 3}, {"cnnops": 1, "torch": 1}, 2, "cpu")
    lost = Comparison({"cnnops": (0.4,) * 3, "torch": (0.2,) * 3}, {"cnnops": 1, "torch": 1}, 2, "cpu")
    text = ModelComparison(train=won, inference=lost, images=64).table()
    step, inference = text.splitlines()[1:3]
    assert "640" in step
    assert "320" in step
    assert "2.00x" in step
    assert "LOSS" not in step
    assert "160" in inference
    assert "0.50x" in inference
    assert "LOSS" in inference


@pytest.mark.parametrize("rich", [False, True])
def test_wins_and_losses_are_both_shown_and_losses_marked(rich):
    if rich:
        pytest.importorskip("rich")
    text = report.render(
        measured(row(1.0, case="won"), row(2.5, case="lost"), row(2.5, case="fallback", backend="aten")), rich
    )
    lines = {
        case: next(line for line in text.splitlines() if f" {case} " in line) for case in ("won", "lost", "fallback")
    }
    assert "2.00x" in lines["won"]
    assert "LOSS" not in lines["won"]
    assert "0.80x" in lines["lost"]
    assert "LOSS" in lines["lost"]
    assert "2.50 ms (cpu)" in lines["lost"]
    assert "not ours" in lines["fallback"]
    assert "LOSS" not in lines["fallback"]
    assert all("[fresh]" in line for line in lines.values())
    assert "1 wins, 1 losses, 1 ran torch's own kernel (aten) and are not counted" in text
    assert "geometric mean 1.26x" in text  # sqrt(2.0 * 0.8)


PAGE = "# Title\n<!-- bench:conv2d -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:pool2d -->\n<!-- /bench -->\nend\n"


def test_a_page_is_written_between_its_markers_and_checked(tmp_path, capsys):
    page, folder = tmp_path / "README.md", tmp_path / "results"
    page.write_text(PAGE)
    results.save(measured(row(1.0), row(2.5)), folder)
    arguments = [str(page), "--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert page.read_text() == PAGE
    assert "out of date" in capsys.readouterr().out
    assert report.main(arguments) == 0
    text = page.read_text()
    assert "old" not in text
    assert "**0.80x (0.80..0.80) LOSS**" in text
    assert "between" in text
    assert f"<!-- bench:pool2d -->\n{report.NOT_MEASURED}\n<!-- /bench -->" in text
    assert report.main([*arguments, "--check"]) == 0
    results.save(measured(row(1.5)), folder)
    assert report.main([*arguments, "--check"]) == 1


def test_a_page_without_its_end_marker_is_refused(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- bench:conv2d -->\ntext\n")
    assert report.main([str(page), "--results", str(tmp_path)]) == 2
    assert "<!-- /bench -->" in capsys.readouterr().err
    assert page.read_text() == "<!-- bench:conv2d -->\ntext\n"


ROOT = Path(__file__).resolve().parents[1]

BREAK_AVG_POOL2D = """
import cnnops.functional as CF
right = CF.avg_pool2d
CF.avg_pool2d = lambda *args, **kwargs: right(*args, **kwargs) * 1.01
"""


@pytest.mark.parametrize("broken", [False, True])
def test_a_suite_with_a_wrong_result_writes_nothing(tmp_path, broken):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "breaker.py").write_text(BREAK_AVG_POOL2D if broken else "")
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "breaker", "-p", "no:cacheprovider"]
    select = ["bench/test_overhead.py", "-k", "avg_pool2d and not adaptive and not torch.ops", "--quick"]
    options = ["--results", str(tmp_path / "results"), "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [*pytest_here, *select, *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
    )
    written = results.load_all(tmp_path / "results")
    assert (done.returncode != 0) == broken, done.stdout + done.stderr
    if broken:
        assert "cnnops differs from torch by" in done.stdout
        assert not written
    else:
        (overhead,) = written
        assert [(row.op, row.case, row.pass_) for row in overhead.rows] == [
            ("avg_pool2d", "functional", "forward"),
            ("avg_pool2d", "functional", "forward+backward"),
        ]
        assert all(row.candidates[name].samples == 3 for row in overhead.rows for name in ("cnnops", "torch"))
