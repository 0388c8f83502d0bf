"""README and docs tell the truth: their examples run, and their figures are those of bench/results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cnnops
from cnnops.bench import report

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
