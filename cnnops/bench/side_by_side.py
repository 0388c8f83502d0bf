"""The page that shows each op's kernels on every backend beside each other, in the words of their sources.

``python -m cnnops.bench.side_by_side docs/side_by_side.md`` takes the comment or docstring at the head of each kernel
file: what it computes, its equation, and its sections (Layout, Tile, Ownership, Traffic). ``--check`` changes nothing
and fails where the page says something else.
"""

from __future__ import annotations

import argparse
import ast
import html
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FOLDERS = {"cpu": "csrc/cpu", "cuda": "csrc/cuda", "triton": "cnnops/backends/triton"}

OPS: dict[str, dict[str, tuple[str, ...]]] = {
    "Convolution": {
        "cpu": ("conv2d.cpp",),
        "cuda": (
            *("conv2d_portable.cu", "conv2d_sm90.cu", "conv2d_weight_sm90.cu", "conv2d_halo_sm90.cu"),
            *("conv2d_stem.cu", "conv2d_packed.cu"),
        ),
        "triton": ("conv2d.py", "conv2d_tma.py", "conv_transpose2d.py"),
    },
    "Depthwise convolution": {
        "cpu": ("depthwise_conv2d.cpp",),
        "cuda": (
            *("depthwise_conv2d_forward.cu", "depthwise_conv2d_backward.cu", "depthwise_conv2d_any.cu"),
            *("depthwise_toeplitz.cu", "depthwise_nchw_forward.cu", "depthwise_nchw_backward.cu"),
        ),
        "triton": ("depthwise_conv2d.py",),
    },
    "Pooling": {"cpu": ("pool2d.cpp",), "cuda": ("max_pool2d.cu", "avg_pool2d.cu"), "triton": ("pool2d.py",)},
    "Unpooling": {"cpu": ("max_unpool2d.cpp",), "cuda": ("max_unpool2d.cu",), "triton": ("max_unpool2d.py",)},
    "Batch norm": {
        "cpu": ("batch_norm.cpp",),
        "cuda": ("batch_norm.cu", "batch_norm_sums.cu", "batch_norm_resident.cu"),
        "triton": ("batch_norm.py",),
    },
    "Batch norm, activation and max pool": {
        "cpu": ("bn_act_max_pool2d.cpp",),
        "cuda": ("bn_act_max_pool2d.cu",),
        "triton": ("bn_act_max_pool2d.py",),
    },
    "Squeeze and excitation": {
        "cpu": ("squeeze_excite.cpp",),
        "cuda": ("squeeze_excite.cu",),
        "triton": ("squeeze_excite.py",),
    },
    "Activations": {"cpu": ("activation.cpp",), "cuda": ("activation.cu",), "triton": ("activation.py",)},
}
"""Each op's kernel files by backend, the general one first: that one is shown whole, of the others a line."""

PARTS = {
    "cpu": {"copy.cpp", "parallel.cpp"},
    "cuda": {
        *("conv2d.cu", "conv2d_forward.cu", "conv2d_backward_input.cu", "conv2d_backward_weight.cu"),
        *("depthwise_conv2d.cu", "depthwise_nchw.cu", "copy.cu", "reduce.cu"),
    },
    "triton": {"epilogue.py", "layout.py", "reduce.py"},
}
"""Kernel files that the ops' files are made of."""

SECTIONS = ("Layout", "Tile", "Ownership", "Traffic")

_SECTION = re.compile(r"([A-Z][a-z]+)  +(\S.*)")
_INDENT = 11  # of what continues a section


@dataclass(frozen=True)
class Header:
    """What the head of a kernel file says."""

    summary: str
    equation: str
    """What stands between the summary and the sections, line by line."""
    sections: dict[str, str]
    """By name, line by line."""


def header_of(path: Path) -> Header:
    """The header of a C++ or Python source. Raises ValueError if it lacks a summary."""
    text = path.read_text()
    if path.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    else:
        comment = re.match(r"(?://.*\n)*", text)
        lines = [line[2:].removeprefix(" ") for line in comment[0].splitlines()] if comment else []
    blank = lines.index("") if "" in lines else len(lines)
    summary = " ".join(lines[:blank])
    if not summary:
        raise ValueError(f"{path}: expected a header that says what the file computes, but there is none")
    equation: list[str] = []
    sections: dict[str, list[str]] = {}
    into = equation
    for line in lines[blank:]:
        if found := _SECTION.fullmatch(line):
            into = sections.setdefault(found[1], [])
            into.append(found[2])
        elif sections:
            into.append(line[_INDENT:] if line.startswith(" " * _INDENT) else line)
        else:
            into.append(line)
    return Header(
        summary, "\n".join(equation).strip("\n"), {name: "\n".join(s).strip("\n") for name, s in sections.items()}
    )


def _cell(text: str, verbatim: bool) -> str:
    if not text:
        return ""
    if not verbatim:
        return html.escape(" ".join(text.split()))
    # An empty line would end the block of HTML.
    lines = "\n".join(html.escape(line) or "&nbsp;" for line in text.splitlines())
    return f"<pre>{lines}</pre>"


def _table(files: dict[str, Path]) -> Iterator[str]:
    headers = {backend: header_of(path) for backend, path in files.items()}
    yield "<table>"
    yield f"<tr><th></th>{''.join(f'<th>{backend}: {path.name}</th>' for backend, path in files.items())}</tr>"
    rows = [("", [_cell(header.summary, False) for header in headers.values()])]
    rows.append(("Equation", [_cell(header.equation, True) for header in headers.values()]))
    for name in SECTIONS:
        rows.append((name, [_cell(header.sections.get(name, ""), name == "Tile") for header in headers.values()]))
    for name, cells in rows:
        if any(cells):
            yield f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    yield "</table>"


def page() -> str:
    """What docs/side_by_side.md says."""
    lines = [
        "# Each op's kernels, side by side",
        "",
        "Generated by `python -m cnnops.bench.side_by_side docs/side_by_side.md` from the heads of the sources.",
    ]
    for op, files in OPS.items():
        lines += ["", f"## {op}", ""]
        lines += _table({backend: ROOT / FOLDERS[backend] / names[0] for backend, names in files.items()})
        others = [(backend, name) for backend, names in files.items() for name in names[1:]]
        if others:
            lines += ["", "| beside it | computes | traffic |", "|---|---|---|"]
        for backend, name in others:
            header = header_of(ROOT / FOLDERS[backend] / name)
            traffic = _cell(header.sections.get("Traffic", ""), False)
            lines.append(f"| {backend}: {name} | {_cell(header.summary, False)} | {traffic} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or with --check compare it; 1 if it differs."""
    parser = argparse.ArgumentParser(prog="python -m cnnops.bench.side_by_side", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page would change")
    options = parser.parse_args(arguments)
    text = page()
    if not options.check:
        options.page.write_text(text)
    elif not options.page.exists() or options.page.read_text() != text:
        print(f"{options.page} is not what the sources say; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
