"""Which backend runs what, why, and who says so."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import CONV2D, CONV_TRANSPOSE2D, LAYOUTS, NORM, PADDED, POOL2D, SQUEEZE_EXCITE, UNPOOL2D, find, of_suite
from helpers import DTYPES

import cnnops
import cnnops.functional as CF
from cnnops import dispatch, settings

TESTS = Path(__file__).parent
X, WEIGHT = torch.ones(1, 4, 6, 5), torch.ones(3, 4, 3, 3)


def python(program: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, with a package path of its own."""
    root = path or Path(cnnops.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), **environment}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def strict() -> Iterator[None]:
    settings.strict = True
    yield
    settings.strict = False


@pytest.mark.quick
@pytest.mark.parametrize("name", helpers.BACKENDS)
def test_expected_backends_are_usable(name: str) -> None:
    usable = helpers.row(name).usable()
    assert usable.ok, usable.reason


def test_the_table_is_covered() -> None:
    """Here every backend but ATen and, without a device, CUDA."""
    names = {row.NAME for row in dispatch.BACKENDS}
    assert names >= {"cuda", "triton", "cpu", "simt", "aten"}
    assert set(helpers.BACKENDS) == names - {"aten"} - (set() if torch.cuda.is_available() else {"cuda"})


FUNCTIONS = {
    "conv2d": ("conv2d_forward", "conv2d_backward", "conv2d_act_forward", "conv2d_bn_act_forward"),
    "statistics": ("conv2d_statistics_forward",),
    "conv_transpose2d": ("conv_transpose2d_forward", "conv_transpose2d_backward"),
    "max_pool2d": ("max_pool2d_forward", "max_pool2d_backward", "max_pool2d_indices"),
    "avg_pool2d": ("avg_pool2d_forward", "avg_pool2d_backward"),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d_forward", "adaptive_avg_pool2d_backward"),
    "adaptive_max_pool2d": (
        "adaptive_max_pool2d_forward",
        "adaptive_max_pool2d_backward",
        "adaptive_max_pool2d_indices",
    ),
    "max_unpool2d": ("max_unpool2d_forward", "max_unpool2d_backward"),
    "squeeze_excite": ("squeeze_excite_forward", "squeeze_excite_backward"),
    "bn_act_max_pool2d": ("bn_act_max_pool2d_forward", "bn_act_max_pool2d_backward"),
    "norm": ("batch_norm_act_forward", "batch_norm_act_backward", "activation_backward"),
}


def test_the_cpu_backend_refuses_nothing() -> None:
    cases = [("conv2d", case) for case in (*CONV2D, *PADDED) if case.C]
    cases += [("conv_transpose2d", case) for case in CONV_TRANSPOSE2D]
    cases += [(case.op, case) for case in POOL2D] + [("norm", case) for case in NORM]
    cases += [("max_unpool2d", case) for case in UNPOOL2D]
    for stem, case in cases:
        for dtype in DTYPES:
            for function in FUNCTIONS[stem]:
                assert helpers.supports("cpu", function, case, dtype), f"{function} of {case} in {dtype}"


@pytest.mark.parametrize(("name", "dtypes"), [("simt", DTYPES[:1] + DTYPES[2:]), ("triton", DTYPES[:1] + DTYPES[3:])])
def test_the_device_kernels_take_every_convolution(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    functions = FUNCTIONS["conv2d"] + FUNCTIONS["statistics"]
    asked = [(case, functions) for case in of_suite(CONV2D, "corner") if case.C]
    asked += [(case, FUNCTIONS["conv_transpose2d"]) for case in of_suite(CONV_TRANSPOSE2D, "corner")]
    asked += [(case, FUNCTIONS["norm"]) for case in of_suite(NORM, "corner")]
    asked += [(case, FUNCTIONS[case.op]) for case in of_suite(POOL2D, "corner")]
    asked += [(case, FUNCTIONS["max_unpool2d"]) for case in of_suite(UNPOOL2D, "corner")]
    asked += [(case, FUNCTIONS["squeeze_excite"]) for case in of_suite(SQUEEZE_EXCITE, "corner")]
    pools = [case for case in of_suite(POOL2D, "corner") if case.op == "max_pool2d"]
    asked += [(case, FUNCTIONS["bn_act_max_pool2d"]) for case in pools]
    for (case, functions), dtype, layout in itertools.product(asked, dtypes, LAYOUTS):
        for function in functions:
            assert helpers.supports(name, function, case, dtype, layout), f"{function} of {case} in {dtype}"


@pytest.mark.parametrize(
    ("function", "changes", "reason"),
    [
        ("max_pool2d_forward", {}, "has no max_pool2d_forward kernel"),
        ("conv_transpose2d_forward", {}, "has no conv_transpose2d_forward kernel"),  # for this kind of problem
        ("conv2d_forward", {"dtype": torch.float64}, "torch.float64 is not one of float32, bfloat16, float16"),
        ("conv2d_forward", {"pad_mode": "reflect"}, "pads with zeros alone, not by reflect"),
        ("conv2d_forward", {"C": 0}, "nothing to sum"),
        ("conv2d_forward", {"C": 2**28, "R": 3, "S": 3}, "a sum of 2415919104 terms is beyond"),
        ("conv2d_backward", {"K": 2**28, "R": 3, "S": 3}, "a sum of 2415919104 terms is beyond"),
        ("conv2d_forward", {"H": 2**31 - 1, "pad_h": 1}, "beyond 2147483647"),
    ],
)
def test_the_cuda_kernels_say_what_they_do_not_take(function: str, changes: dict[str, Any], reason: str) -> None:
    problem = helpers.problem_of("conv2d_forward", helpers.PLAINEST["conv2d"], torch.float32, "nchw", "cpu")
    assert helpers.row("simt").supports("conv2d_forward", problem).ok
    support = helpers.row("simt").supports(function, replace(problem, **changes))
    assert not support.ok and reason in support.reason


def test_named_only_backends_are_never_chosen() -> None:
    for case in of_suite(CONV2D, "corner"):
        for dtype in DTYPES:
            problem = helpers.problem_of("conv2d_forward", case, dtype, "nchw", "cpu")
            chosen = dispatch.select("conv2d_forward", problem)
            expected = "cpu" if case.C else "aten"
            assert expected == chosen.NAME
            assert not chosen.named_only


def test_a_named_backend_refuses_rather_than_falls_back() -> None:
    with cnnops.use_backend("simt"), pytest.raises(dispatch.UnsupportedError, match=r"max_pool2d.*simt: .+"):
        CF.max_pool2d(X.double(), 2)
    with cnnops.use_backend("cpu"), pytest.raises(dispatch.UnsupportedError, match="int64"):
        CF.conv2d(X.long(), WEIGHT.long())
    with cnnops.use_backend("cuda"), pytest.raises(dispatch.UnsupportedError, match=r"cuda: .*cpu"):
        CF.conv2d(X, WEIGHT)


def test_strict_names_every_backends_reason(strict: None) -> None:
    with pytest.raises(dispatch.UnsupportedError) as raised:
        CF.conv2d(X.long(), WEIGHT.long())
    assert issubclass(dispatch.UnsupportedError, RuntimeError)
    for row in dispatch.BACKENDS:
        reason = str(raised.value).split(f"{row.NAME}: ", 1)
        assert len(reason) == 2, f"{row.NAME} is not in {raised.value}"
        assert not reason[1].startswith(";"), f"{row.NAME} has no reason in {raised.value}"


def test_strict_leaves_ours_alone(strict: None) -> None:
    assert CF.conv2d(X, WEIGHT).shape == (1, 3, 4, 3)


def test_changing_a_setting_forgets_what_was_chosen() -> None:
    x, weight = torch.ones(1, 1, 4, 4, dtype=torch.int32), torch.ones(1, 1, 2, 2, dtype=torch.int32)
    assert CF.conv2d(x, weight).shape == (1, 1, 3, 3)
    settings.strict = True
    try:
        with pytest.raises(dispatch.UnsupportedError):
            CF.conv2d(x, weight)
    finally:
        settings.strict = False
    assert CF.conv2d(x, weight).shape == (1, 1, 3, 3)


def test_falling_back_is_logged_and_explained(caplog: pytest.LogCaptureFixture) -> None:
    x, weight = torch.ones(1, 1, 5, 4, dtype=torch.int64), torch.ones(1, 1, 2, 2, dtype=torch.int64)
    with caplog.at_level(logging.DEBUG, logger="cnnops"):
        CF.conv2d(x, weight)
    assert any("falls back" in message and "cpu: " in message for message in caplog.messages)
    explanation = cnnops.explain(CF.conv2d, x, weight)
    assert explanation.backends == {"conv2d_forward": "aten"}
    assert "int64" in str(explanation)


def test_ours_is_not_logged_as_a_fallback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="cnnops"):
        CF.conv2d(torch.ones(1, 1, 9, 17), torch.ones(1, 1, 2, 2))
    assert not caplog.messages


def test_explain_decides_as_a_call_does() -> None:
    explanation = cnnops.explain(CF.conv2d, X, WEIGHT)
    assert explanation.backends == {"conv2d_forward": "cpu", "conv2d_backward": "cpu"}
    for decision in explanation.decisions:
        assert [name for name, _ in decision.verdicts] == [row.NAME for row in dispatch.BACKENDS]
        assert all(support.ok or support.reason for _, support in decision.verdicts)
    with cnnops.use_backend("aten"):
        assert set(cnnops.explain(CF.conv2d, X, WEIGHT).backends.values()) == {"aten"}


def test_explain_sees_a_backend_that_the_call_itself_names() -> None:
    def call(pair: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        with cnnops.use_backend("simt"):
            return {"y": CF.conv2d(*pair)}

    chosen = {"conv2d_forward": "simt", "conv2d_backward": "simt"}
    assert cnnops.explain(call, (X, WEIGHT)).backends == chosen


def test_steps_beyond_an_int_are_not_the_kernels() -> None:
    """They cross to native code as 32-bit ints; torch takes them."""
    assert torch.equal(CF.conv2d(X, WEIGHT, stride=2**32), F.conv2d(X, WEIGHT, stride=2**32))
    with cnnops.use_backend("cpu"), pytest.raises(dispatch.UnsupportedError, match="stride"):
        CF.conv2d(X, WEIGHT, stride=2**32)


def test_use_backend_nests_and_restores() -> None:
    before = dispatch.scope.backend
    with cnnops.use_backend("cpu"):
        with cnnops.use_backend("aten"):
            assert dispatch.scope.backend == "aten"
        assert dispatch.scope.backend == "cpu"
        with pytest.raises(KeyError), cnnops.use_backend("aten"):
            raise KeyError
        assert dispatch.scope.backend == "cpu"
    assert dispatch.scope.backend == before


def test_use_backend_is_the_threads_own() -> None:
    seen = []
    with cnnops.use_backend("aten"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.scope.backend))
        thread.start()
        thread.join()
    assert seen == [os.environ.get("CNNOPS_BACKEND", "")]


def test_one_is_not_one_point_nought() -> None:
    """Keys of the cache compare equal where their types differ; a wrong type must not hit a right call's entry."""
    x, weight = torch.ones(1, 2, 13, 11), torch.ones(2, 2, 3, 3)
    CF.conv2d(x, weight, groups=1)
    with pytest.raises(TypeError):
        CF.conv2d(x, weight, groups=1.0)


CHOSEN = """
import torch, cnnops, cnnops.functional as CF
print(sorted(set(cnnops.explain(CF.conv2d, torch.ones(1, 4, 6, 5), torch.ones(3, 4, 3, 3)).backends.values())))
print(CF.conv2d(torch.ones(1, 4, 6, 5), torch.ones(3, 4, 3, 3)).sum().item())
CF.conv2d(torch.ones(1, 1, 4, 4, dtype=torch.int64), torch.ones(1, 1, 2, 2, dtype=torch.int64))
"""


def test_environment_names_the_backend() -> None:
    aten = python(CHOSEN, CNNOPS_BACKEND="aten")
    assert aten.returncode == 0, aten.stderr
    assert aten.stdout.splitlines() == ["['aten']", str(3 * 4 * 3 * 36.0)]
    cpu = python(CHOSEN, CNNOPS_BACKEND="cpu")
    assert cpu.stdout.splitlines() == ["['cpu']", str(3 * 4 * 3 * 36.0)]
    assert "UnsupportedError" in cpu.stderr, "named by the environment, a backend is as strict"


def test_environment_names_no_backend() -> None:
    result = python(CHOSEN, CNNOPS_BACKEND="cdna")
    assert result.returncode
    assert "ValueError" in result.stderr
    assert "CNNOPS_BACKEND" in result.stderr
    assert "'cdna'" in result.stderr


def test_works_with_nothing_native_built(tmp_path: Path) -> None:
    """Triton and ATen remain, and what is missing is said with how to get it."""
    shutil.copytree(
        Path(cnnops.__file__).parent, tmp_path / "cnnops", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    program = (
        "import torch, json, cnnops, cnnops.functional as CF\n"
        "print(cnnops.explain(CF.conv2d, torch.ones(1, 4, 6, 5), torch.ones(3, 4, 3, 3)).backends['conv2d_forward'])\n"
        "print(json.dumps(cnnops.info()['backends']['cpu']))"
    )
    result = python(program, tmp_path)
    assert result.returncode == 0, result.stderr
    chosen, cpu = result.stdout.splitlines()
    assert chosen == "aten"
    assert json.loads(cpu)["usable"] is False
    assert "make build" in json.loads(cpu)["why_not"]


def levels() -> list[str]:
    """The ISA levels that this processor has."""
    capability = torch.backends.cpu.get_cpu_capability()
    return ["baseline"] + ["avx2"] * (capability in ("AVX2", "AVX512")) + ["avx512"] * (capability == "AVX512")


def test_best_isa_level_is_chosen() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CNNOPS_CPU_ISA"}
    program = "import cnnops; print(cnnops.info()['backends']['cpu']['built']['isa'])"
    env = {**environment, "PYTHONPATH": str(Path(cnnops.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == levels()[-1]


@pytest.mark.parametrize("level", levels()[:-1])
def test_lower_isa_levels(level: str) -> None:
    """Every level's kernels against torch, over the quick tests; the best level runs all the others."""
    program = f"import cnnops; assert cnnops.info()['backends']['cpu']['built']['isa'] == {level!r}"
    assert python(program, CNNOPS_CPU_ISA=level).returncode == 0
    files = [
        str(TESTS / f"test_{stem}.py") for stem in ("conv2d", "conv2d_act", "conv2d_bn_act", "pool2d", "batch_norm")
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-m",
        "quick",
        "-k",
        "cpu",
        *files,
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(cnnops.__file__).parents[1]), "CNNOPS_CPU_ISA": level}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:]


def test_unknown_isa_level_is_said() -> None:
    result = python("import cnnops; print(cnnops.info()['backends']['cpu']['built']['isa'])", CNNOPS_CPU_ISA="sse9")
    assert result.stdout.strip() == levels()[-1]
    assert "sse9" in result.stderr


def test_cases_name_no_case_twice() -> None:
    for cases in (CONV2D, PADDED, CONV_TRANSPOSE2D, POOL2D, NORM):
        assert len({case.id for case in cases}) == len(cases)
        assert find(cases, cases[-1].id) is cases[-1]
