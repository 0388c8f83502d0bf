"""The command line, as a user meets it."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cnnops
from cnnops import cli, data, dispatch, resources
from cnnops.backends import cuda
from cnnops.bench.verify import Mismatch
from cnnops.models import list_models
from cnnops.train import Reporter, Trainer

TRAIN = ["train", "--model", "simple_cnn", "--data", "synthetic", "--width", "0.125", "--epochs", "2", "--lr", "0.02"]


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    small = data.synthetic(train=128, test=40, classes=4)
    tiny = data.synthetic(train=128, test=40, classes=4, channels=1, size=8)
    monkeypatch.setitem(data.DATASETS, "synthetic", lambda seed: small)
    monkeypatch.setitem(data.DATASETS, "mnist-5k", lambda seed: tiny)


def assert_fails(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], status: int = 2) -> None:
    assert cli.main(arguments) == status
    out = capsys.readouterr()
    assert message in out.err
    assert out.err.startswith("cnnops: error: ")
    assert out.err.count("\n") == 1
    assert out.err.endswith("\n")


def test_python_dash_m_shows_the_commands() -> None:
    root = Path(cnnops.__file__).parents[1]
    command = [sys.executable, "-m", "cnnops", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert "train" in done.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    """As `cnnops info | head` does."""
    read, write = os.pipe()
    os.close(read)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "cnnops", "info"]
    done = subprocess.run(command, cwd=root, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_train_help_has_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--model", "--batch-size", "--weight-decay", "--resume", "--out"):
        assert option in text
    assert "(default: resnet18)" in text
    assert "(default: 0.0005)" in text
    for name in (*list_models(), *data.DATASETS):
        assert name in text


def test_train_and_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--out", "run"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["1", "2"]
    assert "\x1b" not in out
    assert out.splitlines()[-1].startswith("test accuracy ")
    assert out.endswith(" %\n")
    assert cli.main(["train", "--resume", "run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == out.splitlines()[-1]


def test_default_folder_is_in_runs(tmp_path: Path) -> None:
    assert cli.main([*TRAIN, "--epochs", "1"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("simple_cnn-synthetic-")
    assert (folder / "samples.png").is_file()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_with_a_hint_and_can_be_resumed(
    signum: signal.Signals, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Reporter, trainer: Trainer, loss: float | None) -> None:
        signal.raise_signal(signum)

    with monkeypatch.context() as patch:
        patch.setattr("cnnops.train.console.ConsoleReporter.stepped", interrupt)
        assert cli.main([*TRAIN, "--out", "run"]) == status
    expected = "cnnops: stopped in epoch 1 of 2, after step 1 of 2; go on with: cnnops train --resume run\n"
    assert capsys.readouterr().err == expected
    assert cli.main(["train", "--resume", "run"]) == 0


def test_interrupt_elsewhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seed: int) -> data.Dataset:
        raise KeyboardInterrupt

    monkeypatch.setitem(data.DATASETS, "synthetic", interrupt)
    assert cli.main(TRAIN) == 130
    assert capsys.readouterr().err == "cnnops: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["train", "--epochs", "0"], "epochs must be at least 1, but got epochs=0"),
        (["train", "--model", "alexnet"], "model must be one of resnet101, resnet152, resnet18, resnet34"),
        (["train", "--width", "0.001"], "width=0.001 leaves 0 of 64 channels"),
        (["train", "--model", "simple_cnn", "--stem", "imagenet"], "stem must be 'cifar'"),
        (["train", "--device", "cuda:99"], "device must be one that torch sees"),
        (["train", "--resume", "absent"], "checkpoint absent does not exist"),
        (["train", "--resume", "absent", "--lr", "1"], "leave out --lr"),
        (["train", "--resume", "absent", "--out", "x"], "leave out --out"),
        (["train", "--resume", "absent", "--device", "cpu", "--data-dir", "x"], "checkpoint absent does not exist"),
        (["train", "--data", "synthetic", "--pad", "1000000"], "out of memory"),
        (["train", "--width", "1e12"], "out of memory"),
        (["demo", "--epochs", "0"], "epochs must be at least 1"),
        (["explain", "conv2d", "--input", "1,1,4,4", "--device", "cuda:99"], "CUDA"),
        (["explain", "conv2d", "--input", "1,1,4,4", "--weight", "1,1,2,2", "--padding", "some"], "'some'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_fails(arguments, message, capsys)


def test_explain_takes_what_the_function_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "conv2d", "--input", "1,1,4,4", "--weight", "1,1,2,2", "--padding", "same"]) == 0
    assert capsys.readouterr().out.startswith("conv2d_forward: cpu")


EXPLAINED = {
    "adaptive_avg_pool2d": ["--output-size", "2"],
    "adaptive_max_pool2d": ["--output-size", "2,3"],
    "avg_pool2d": ["--kernel-size", "2"],
    "batch_norm": ["--training"],
    "batch_norm_act": ["--activation", "silu"],
    "bn_act_max_pool2d": ["--training"],
    "conv2d": ["--weight", "4,6,3,3", "--padding-mode", "reflect", "--padding", "1"],
    "conv2d_act": ["--weight", "4,6,3,3", "--activation", "silu"],
    "conv2d_bn_act": ["--weight", "4,6,3,3"],
    "conv_transpose2d": ["--weight", "6,4,3,3", "--stride", "2", "--output-padding", "1"],
    "max_pool2d": ["--kernel-size", "2"],
    "max_unpool2d": ["--kernel-size", "2"],
    "squeeze_excite": ["--weight", "2,6", "--gate", "hardsigmoid"],
}


@pytest.mark.parametrize("op", cnnops.functional.__all__)
def test_explain_knows_every_op(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", op, "--input", "2,6,8,9", "--channels-last", *EXPLAINED[op]]) == 0
    decisions = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert len(decisions) >= 2
    assert all(line.endswith(": cpu") for line in decisions), decisions


def test_environment_names_no_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.scope, "backend", "cdna")
    assert_fails(TRAIN, "CNNOPS_BACKEND must be one of", capsys)
    monkeypatch.setattr(dispatch.scope, "backend", "cuda")
    assert_fails(TRAIN, "no backend can do", capsys)


def test_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    assert_fails([*TRAIN, "--out", "run"], "run exists and is not an empty folder", capsys)
    assert_fails([*TRAIN, "--out", "run/mine/below"], "run/mine/below: Not a directory", capsys)


def test_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--epochs", "1", "--out", "run"]) == 0
    capsys.readouterr()
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert_fails(["train", "--resume", "run"], "checkpoint run/last.pt is damaged", capsys)


@pytest.mark.parametrize(("package", "command"), [("mlxtend", ["demo"]), ("rich", TRAIN), ("matplotlib", TRAIN)])
def test_missing_package(
    package: str, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def missing(name: str, of: str | None = None) -> Any:
        return None if name == package else find_spec(name, of)

    monkeypatch.setitem(data.DATASETS, "mnist-5k", data.embedded_mnist)
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert_fails(command, f"pip install {package}", capsys)


def test_full_disk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert_fails([*TRAIN, "--out", "run"], "run/config.json: No space left on device", capsys)


def test_demo_does_not_time_networks_that_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disagree(*_: Any, **__: Any) -> None:
        raise Mismatch("logits differ")

    monkeypatch.setattr("cnnops.bench.models.compare_models", disagree)
    assert cli.main(["demo", "--epochs", "1", "--device", "cpu", "--out", "run"]) == 1
    out = capsys.readouterr()
    assert out.err == "cnnops: not timed, because the networks disagree: logits differ\n"
    assert "test accuracy" in out.out


def test_demo_ends_with_the_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--epochs", "1", "--device", "cpu", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "resnet18, width 0.5" in out
    assert "training step" in out
    assert "inference" in out
    assert out.splitlines()[-1].startswith("test accuracy ")


def test_info_says_what_is_built_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["cpu"]["built"]["isa_levels"] == ["baseline", "avx2", "avx512"]
    for backend in found["backends"].values():
        assert backend["usable"] or backend["why_not"]
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for backend in cnnops.dispatch.BACKENDS:
        assert f"\n{backend.NAME} " in printed


def test_info_has_a_table_of_the_cuda_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cuda.library.path.exists() or resources.find_cuobjdump() is None:
        pytest.skip("no CUDA library, or no cuobjdump")
    assert cli.main(["info", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["backends"]["cuda"]["table"]
    forward = next(row for row in rows if row["kernel"].startswith("conv2d_forward_kernel") and row["image"] == "sm_80")
    assert forward["threads"], "launches.json does not know the library's kernels; run: make docs"
    assert 32 < forward["registers"] <= 255 and forward["threads"] % 32 == 0
    assert set(forward["blocks"]) == set(forward["occupancy"]) == {"8.0", "8.6", "8.9"}
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(row["kernel"] in printed for row in rows)
    monkeypatch.setattr(resources, "find_cuobjdump", lambda: None)
    assert cli.main(["info"]) == 0
    assert "no table of the CUDA kernels: cuobjdump is not found" in capsys.readouterr().out


def test_explain_names_the_backend_and_every_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["explain", "conv2d", "--input", "8,64,16,16", "--weight", "64,64,3,3", "--padding", "1"]
    assert cli.main(call) == 0
    text = capsys.readouterr().out
    assert "conv2d_forward: cpu" in text
    assert "conv2d_backward: cpu" in text
    assert "takes cuda tensors, not cpu" in text


@pytest.mark.parametrize(
    "options, words",
    [
        (["--input", "8,64,16,16", "--weight", "64,60,3,3"], "60 channels"),
        (["--input", "8,64,16", "--weight", "64"], "weight"),
        (["--input", "8,x"], "8,x"),
        (["--input", "8,64,16,16", "--weight", "64,64,3,3", "--backend", "none"], "'none'"),
        (["--input", "8,64,16,16", "--weight", "64,64,3,3", "--stride", "1,2,3"], "stride"),
    ],
)
def test_explain_refuses_a_wrong_call_in_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_fails(["explain", "conv2d", *options], words, capsys)
