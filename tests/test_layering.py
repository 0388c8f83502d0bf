"""Nothing travels up: each module imports from layers below its own, and kernels know neither torch nor raw PTX."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import cnnops

pytestmark = pytest.mark.quick

PACKAGE = Path(cnnops.__file__).parent
CSRC = Path(__file__).resolve().parents[1] / "csrc"

LAYERS = (
    {"files", "geometry", "resources", "settings", "tuning", "torch_private", "version"},
    {"backends"},
    {"dispatch"},
    {"ops"},
    {"functional", "explain", "teaching"},
    {"nn"},
    {"models"},
    {"convert", "data", "train", "bench", "viz", "cli"},
)
TOP = len(LAYERS) - 1
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}

# Tuning rows and backends speak of problems; otherwise those of one layer know nothing of each other. Above `models`
# they may, as long as there is no circle.
BESIDE = {("tuning", "files"), ("tuning", "geometry"), ("tuning", "version")}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: its first folder, or its own name."""
    return path.parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The parts of cnnops that a file imports, in whatever form; "" is the package itself."""
    package = ("cnnops", *path.parts[:-1])
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "cnnops":
                known = len(parts) > 1 and parts[1] in known_parts()
                found.add(parts[1] if known else "")
    return found


def known_parts() -> set[str]:
    return {part_of(path) for path in MODULES} - {"__init__", "__main__"}


def test_every_part_has_a_layer() -> None:
    assert known_parts() <= set(LAYER)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_come_from_below(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__"):  # the door of the house: it leads everywhere
        return
    for other in imports_of(path) - {part}:
        if other == "":
            assert LAYER[part] == TOP, f"{path} imports the package itself, which imports it"
        else:
            beside = (part, other) in BESIDE or LAYER[part] == TOP
            assert LAYER[other] < LAYER[part] or (beside and LAYER[other] == LAYER[part]), (
                f"{path} (layer {LAYER[part]}) imports {other} (layer {LAYER[other]})"
            )


def test_no_circles_above_models() -> None:
    needs = {part: set() for part in LAYERS[TOP]}
    for path in MODULES:
        if part_of(path) in needs:
            needs[part_of(path)] |= imports_of(path) & LAYERS[TOP] - {part_of(path)}
    while needs:
        free = [part for part, others in needs.items() if not others]
        assert free, f"a circle among {needs}"
        for part in free:
            del needs[part]
        needs = {part: others - set(free) for part, others in needs.items()}


def test_geometry_imports_nothing_of_ours() -> None:
    assert imports_of(Path("geometry.py")) == set()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_private_names_of_torch_stay_in_one_file(path: Path) -> None:
    if path != Path("torch_private.py"):
        source = (PACKAGE / path).read_text()
        assert not re.search(r"\btorch\._C\b|from torch import .*\b_C\b|from torch\._C\b", source)


SOURCES = sorted(path.relative_to(CSRC) for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))


def code_of(path: Path) -> str:
    """A source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", (CSRC / path).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] != "simt" or path.suffix == ".cu"], ids=str)
def test_launches_and_ptx_have_their_files(path: Path) -> None:
    """The emulator cannot run either; its own switch between fibers is assembly by nature."""
    code = code_of(path)
    if path != Path("cuda", "launch.h"):
        assert "<<<" not in code
    if path not in (Path("cuda", "ptx.cuh"), Path("cuda", "ptx_sm90.cuh")):
        assert not re.search(r"\basm\b", code)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_kernels_know_no_torch(path: Path) -> None:
    """bind.cpp alone sees tensors; cpu/parallel.cpp borrows torch's threads."""
    if path not in (Path("bind.cpp"), Path("cpu", "parallel.cpp")):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", code_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_only_the_stable_abi_is_used(path: Path) -> None:
    includes = re.findall(r"#include\s*[<\"]((?:torch|ATen|c10)[^>\"]*)", code_of(path))
    stable = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/", "torch/headeronly/")
    assert not [name for name in includes if not name.startswith(stable)]
