"""`make gpu` where it cannot run says why in one line, and takes no library but that of these sources."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "gpu"))


def test_without_a_device_nothing_runs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "gpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"gpu: torch {torch.__version__} of {sys.executable} sees no CUDA device\n"


def test_missing_packages_are_named(gpu: dict[str, Any]) -> None:
    gpu["need"](("pytest",), "the suite")
    with pytest.raises(gpu["CannotRun"], match=r"the suite needs no-such-module and nor-this, which .* does not have"):
        gpu["need"](("no_such_module", "pytest", "nor_this"), "the suite")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"usable": True, "reason": "", "sources": "abc"}, ""),
        ({"usable": True, "reason": "", "sources": "abd"}, "built from other sources"),
        ({"usable": False, "reason": "holds sm_80", "sources": "abc"}, "not usable: holds sm_80"),
        (None, "does not load: OSError: no such symbol"),
    ],
)
def test_library_that_is_there_is_judged(
    gpu: dict[str, Any], facts: dict[str, Any] | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"print({json.dumps(facts)!r})" if facts else "raise OSError('no such symbol')"
    monkeypatch.setitem(gpu["why_build"].__globals__, "FACTS", program)
    monkeypatch.setitem(gpu["why_build"].__globals__, "ROOT", tmp_path)
    assert "there is no" in gpu["why_build"]("abc")
    (tmp_path / "cnnops").mkdir()
    (tmp_path / "cnnops/_native_cuda.so").touch()
    found = gpu["why_build"]("abc")
    assert reason in found if reason else found == ""


def test_the_emulators_tests_are_not_selected(gpu: dict[str, Any]) -> None:
    """It is not built on such a machine; that a file of its tests has "cuda" in its name must not select them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        "tests/test_conv2d_cuda.py",
    ]
    done = subprocess.run([*command, "-k", gpu["SELECTED"]], cwd=ROOT, capture_output=True, text=True)
    assert "::" in subprocess.run([*command, "-k", "simt"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "-simt]" not in done.stdout and "deselected" in done.stdout


def test_the_build_is_for_every_claimed_architecture(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever list a container has."""
    environments = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        environments.append(env)
        return subprocess.CompletedProcess(command, 0)

    reasons = iter(("there is none", ""))
    names = gpu["library"].__globals__
    monkeypatch.setitem(names, "why_build", lambda _: next(reasons))
    monkeypatch.setitem(names["ENVIRONMENT"], "TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    setup = {**names["script"](), "find_cuda": lambda: ROOT}
    monkeypatch.setitem(names, "script", lambda: setup)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu["library"]() == "built here, because there is none"
    assert [env["TORCH_CUDA_ARCH_LIST"] for env in environments] == ["8.0+PTX;9.0a"]
