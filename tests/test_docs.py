"""README and docs tell the truth: their examples run, and their figures are those of bench/results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cnnops
from cnnops.bench import report, side_by_side

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda code: re.sub(r"\W+", "-", code)[-30:])
def test_the_readme_examples_run(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnnops.settings, "strict", True)
    exec(compile(example, "README.md", "exec"), {})


def test_figures_are_those_of_the_result_files(capsys: pytest.CaptureFixture[str]) -> None:
    pages = [str(ROOT / "README.md"), str(ROOT / "docs" / "benchmarks.md")]
    assert report.main([*pages, "--check"]) == 0, capsys.readouterr()


def test_the_page_of_kernels_says_what_the_sources_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert side_by_side.main([str(ROOT / "docs" / "side_by_side.md"), "--check"]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("backend", "pattern"), [("cpu", "parallel_for"), ("cuda", "__global__"), ("triton", "@triton.jit")]
)
def test_every_kernel_file_is_on_the_page(backend: str, pattern: str) -> None:
    """Or is one of those that other ops are made of, or a part of one on the page."""
    shown = {name for files in side_by_side.OPS.values() for name in files.get(backend, ())}
    folder = ROOT / side_by_side.FOLDERS[backend]
    kernels = {
        path.name for path in folder.iterdir() if path.suffix in (".cpp", ".cu", ".py") and pattern in path.read_text()
    }
    assert shown and shown <= {path.name for path in folder.iterdir()}
    assert kernels - shown <= side_by_side.PARTS[backend]


@pytest.mark.parametrize("op", side_by_side.OPS)
def test_every_op_says_who_owns_what_and_what_moves(op: str) -> None:
    for backend, files in side_by_side.OPS[op].items():
        header = side_by_side.header_of(ROOT / side_by_side.FOLDERS[backend] / files[0])
        assert header.equation and set(header.sections) >= set(side_by_side.SECTIONS), files[0]
