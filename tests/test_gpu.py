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
