"""`cnnops tune`, with a fake clock; and that what it wrote is read by those alone for whom it was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from cnnops import cli, tuning
from cnnops import functional as CF
from cnnops.backends.triton import conv2d_plan, launch
from cnnops.bench import tune
from cnnops.geometry import Conv2dProblem
from cnnops.tuning import Table, measured
from cnnops.tuning.triton.conv2d import BACKWARD_INPUT, FORWARD

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_sm80() -> Iterator[None]:
    """Where every convolution goes through the tables of the pointer kernels."""
    with launch.as_device(launch.Device(80, 3)):
        yield


def convolve() -> None:
    x, weight = torch.rand(1, 8, 6, 6, requires_grad=True), torch.rand(8, 8, 3, 3, requires_grad=True)
    CF.conv2d(x, weight, padding=1).sum().backward()


class FakeClock:
    """Every call takes the time that its configuration of one table has here, others one second."""

    def __init__(self, table: str, seconds: dict[Any, float]) -> None:
        self.table, self.seconds = table, seconds
        self.sampled: list[Any] = []

    def sample(self, call: Any, repeats: int) -> float:
        chosen: list[Any] = []

        def asked(table: Table[Any, Any], problem: Any) -> None:
            if table.name == self.table:
                chosen.append(tuning._forced.get((table.name, problem)))

        with tuning.observed(asked):
            call()
        self.sampled += chosen
        return repeats * (self.seconds.get(chosen[-1], 1.0) if chosen else 1.0)


def test_calls_are_captured_with_their_gradients() -> None:
    calls = tune.captured(convolve)
    assert [c.function for c in calls] == ["conv2d_forward", "conv2d_backward"]
    x = calls[0].arguments[0]
    assert x.is_meta and list(x.shape) == [1, 8, 6, 6] and x.dtype == torch.float32
    y = calls[0].call(DEVICE)()
    assert list(y.shape) == [1, 8, 6, 6] and y.isfinite().all() and y.any()


def test_the_fastest_candidate_wins() -> None:
    fastest = FORWARD.candidates[-1]
    clock = FakeClock("conv2d.forward", {config: 0.5 for config in FORWARD.candidates} | {fastest: 0.25})
    outcomes = list(tune.tune(tune.captured(convolve), DEVICE, clock=clock, rounds=1))
    assert {o.table for o in outcomes} == {"conv2d.forward", "conv2d.backward_input", "conv2d.backward_weight"}
    (forward,) = (o for o in outcomes if o.table == "conv2d.forward")
    assert forward.best == fastest
    every = {*FORWARD.candidates, forward.default}
    assert forward.default not in FORWARD.candidates, "the interpreter's own, which no device tries"
    assert set(forward.microseconds) | set(forward.refused) == {str(config) for config in every}
    assert forward.microseconds[str(fastest)] == 0.25e6 and forward.gain == 4
    assert every == set(clock.sampled) - {None}
    assert "0.25" not in tune.line_of(forward) and "250000.0 us" in tune.line_of(forward)


def test_a_candidate_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = FORWARD.candidates[-1]
    (call,) = (c for c in tune.captured(convolve) if c.function == "conv2d_forward")
    run = call.run

    def run_wrongly(*arguments: Any) -> torch.Tensor:
        y = run(*arguments)
        return y + 1 if tuning._forced and wrong in tuning._forced.values() else y

    clock = FakeClock("conv2d.forward", {wrong: 0.001})
    (outcome,) = tune.tune([tune.Captured(call.function, run_wrongly, call.arguments)], DEVICE, clock=clock, rounds=1)
    assert outcome.best != wrong and str(wrong) not in outcome.microseconds
    assert "Mismatch: differs by 1" in outcome.refused[str(wrong)]


def test_a_choice_is_as_before_after_tuning() -> None:
    problem = helpers.problem_of("conv2d_forward", helpers.PLAINEST["conv2d"], torch.float32, "nchw", "cpu")
    before = conv2d_plan.forward(problem, "ieee")
    with tuning.forced(FORWARD, problem, FORWARD.candidates[-1]):
        assert conv2d_plan.forward(problem, "ieee") != before
    assert conv2d_plan.forward(problem, "ieee") == before


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A device that is not there, and an empty folder for its measurements."""
    monkeypatch.setenv("CNNOPS_TUNING", str(tmp_path / "tuning"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Device 9000")
    measured._rows_here.cache_clear()
    yield tmp_path / "tuning"
    measured._rows_here.cache_clear()


def problem_on(device: str) -> Conv2dProblem:
    return helpers.problem_of("conv2d_forward", helpers.PLAINEST["conv2d"], torch.bfloat16, "nchw", device)


def saved(problem: Conv2dProblem, table: Table[Any, Any] = FORWARD) -> Any:
    """The last of the table's configurations that its rules would not choose, saved as measured."""
    default = tuning.choose(table, problem)
    best = [config for config in table.candidates if config != default][-1]
    outcome = tune.Outcome(table.name, problem, default, best, {str(default): 2.0, str(best): 1.0}, {})
    measured.save("Device 9000", {measured.filed_under(table.name, problem): tune.row_of(outcome)})
    return best


def test_what_was_measured_is_chosen(on_a_gpu: Path) -> None:
    problem = problem_on("cuda")
    best = saved(problem)
    assert tuning.choose(FORWARD, problem) == best
    assert tuning.choose(FORWARD, problem_on("cpu")) != best, "the interpreter follows the rules"
    assert [path.name for path in on_a_gpu.iterdir()] == ["device-9000.json"]


@pytest.mark.parametrize("name", ["device", "torch", "triton", "cnnops", "kernels"])
def test_a_measurement_of_something_else_is_not_read(name: str, on_a_gpu: Path, caplog: Any) -> None:
    problem = problem_on("cuda")
    best = saved(problem)
    path = measured.path_for("Device 9000")
    content = json.loads(path.read_text())
    content["key"][name] = "another"
    path.write_text(json.dumps(content))
    measured._rows_here.cache_clear()
    assert tuning.choose(FORWARD, problem) != best
    assert f"{name} another and not" in caplog.text and "run cnnops tune again" in caplog.text


def test_what_another_process_measured_is_kept(on_a_gpu: Path) -> None:
    saved(problem_on("cuda"))
    saved(problem_on("cuda"), BACKWARD_INPUT)
    assert {row["table"] for row in measured.load("Device 9000").values()} == {FORWARD.name, BACKWARD_INPUT.name}


def test_what_was_measured_is_measured_again_against_the_rules(on_a_gpu: Path) -> None:
    problem = problem_on("cuda")
    assert FORWARD.first(problem) != saved(problem) == tuning.choose(FORWARD, problem)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), RuntimeError("no home directory")], ids=str
)
def test_a_home_that_cannot_be_read_has_no_measurements(
    error: Exception, on_a_gpu: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder() -> Path:
        raise error

    monkeypatch.setattr(measured, "folder", folder)
    assert tuning.choose(FORWARD, problem_on("cuda")) in FORWARD.candidates
    assert str(error) in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"key": {}}', '{"key": "x", "rows": []}', '{"key": {}, "rows": [1]}'),
        '{"key": {}, "rows": [{"table": "conv2d.forward", "problem": {}}]}',
    ],
)
def test_a_file_that_is_none_of_ours_is_not_read(content: str, on_a_gpu: Path, caplog: Any) -> None:
    on_a_gpu.mkdir()
    measured.path_for("Device 9000").write_text(content)
    problem = problem_on("cuda")
    assert tuning.choose(FORWARD, problem) in FORWARD.candidates
    assert "is not read" in caplog.text


def test_a_configuration_that_the_table_lost_is_not_chosen(on_a_gpu: Path) -> None:
    problem = problem_on("cuda")
    saved(problem)
    path = measured.path_for("Device 9000")
    content = json.loads(path.read_text())
    content["rows"][0]["config"]["block_m"] = 12345
    path.write_text(json.dumps(content))
    measured._rows_here.cache_clear()
    assert tuning.choose(FORWARD, problem) in FORWARD.candidates


def test_nothing_is_measured_during_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="no CUDA graph capture"):
        next(tune.tune([], torch.device("cuda")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert "tune measures on a CUDA device, and torch sees none" in capsys.readouterr().err
