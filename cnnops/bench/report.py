"""Tables of measured results: on the terminal, and in Markdown between the markers of a page.

``python -m cnnops.bench.report README.md`` writes what the result files say between ``<!-- bench:SUITE -->`` and
``<!-- /bench -->``; ``--check`` changes nothing and fails where a page says something else.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cnnops.bench.results import ResultError, Results, Row, load_all

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"

NOT_MEASURED = "not measured"

_MARKERS = re.compile(r"(<!-- bench:(?P<suite>\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

HEADINGS = ("kernel", "ours", "peer", "ratio", "share of limit")


def duration(us: float) -> str:
    """Microseconds in the unit that reads best, three significant digits."""
    value, unit = (us, "us") if us < 1e3 else (us * 1e-3, "ms") if us < 1e6 else (us * 1e-6, "s")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def verdict(row: Row) -> str:
    """The ratio with its quartiles and, where it is no win of ours, the word for it."""
    r = row.ratio
    word = " not ours" if not row.counted else " LOSS" if row.loss else ""
    return f"{r.median:.2f}x ({r.q1:.2f}..{r.q3:.2f}){word}"


def cells(row: Row) -> tuple[str, ...]:
    """One row under `HEADINGS`."""
    kernel = " ".join((row.op, row.case, row.pass_, row.dtype, row.layout, f"[{row.memory}]"))
    return (
        kernel,
        f"{duration(row.candidates[row.ours].median_us)} ({row.backend})",
        f"{duration(row.candidates[row.peer].median_us)} ({row.peer})",
        verdict(row),
        "" if row.share is None else f"{row.share:.0%}",
    )


def headline(results: Results) -> str:
    """Wins, losses and fallbacks, and the geometric mean over what is ours."""
    ours = [row for row in results.rows if row.counted]
    losses, aten = sum(row.loss for row in ours), len(results.rows) - len(ours)
    parts = [f"{len(ours) - losses} wins", f"{losses} losses"]
    if aten:
        parts.append(f"{aten} ran torch's own kernel (aten) and are not counted")
    if ours:
        mean = math.exp(math.fsum(math.log(row.ratio.median) for row in ours) / len(ours))
        parts.append(f"geometric mean {mean:.2f}x")
    return f"{results.suite}: {', '.join(parts)}"


def provenance(results: Results) -> str:
    """Device, threads, versions, commit, date and the machine's limits in one line; a busy machine is called so."""
    e = results.environment
    commit = f"commit {e.commit[:12]}{' with local changes' if e.dirty else ''}" if e.commit else "no commit"
    text = f"{e.device_name}, {e.cores} cores, {e.threads} threads, {e.isa}; torch {e.torch}; {commit}; {e.date[:10]}"
    if e.load > e.cores / 2:
        text += f"; BUSY MACHINE: {e.load:.1f} runnable processes at the start"
    if results.limits:
        peaks = ", ".join(f"{name} mm {value:.0f} GFLOP/s" for name, value in results.limits.mm_gflops.items())
        text += f"; copy {results.limits.copy_gbps:.1f} GB/s, {peaks}"
    return text


def plain(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    table = [headings, *rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    )


def render(results: Results, rich: bool | None = None) -> str:
    """The suite as a table for a terminal: wins and losses both, losses marked. rich: None uses it where installed."""
    rows = [cells(row) for row in results.rows]
    lines = [headline(results), provenance(results)]
    if rich is not False:
        try:
            return "\n".join([*lines, _rich(results.rows, rows)])
        except ImportError:
            if rich:
                raise
    return "\n".join([*lines, plain(HEADINGS, rows)])


def _rich(rows: Sequence[Row], texts: Sequence[Sequence[str]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row, text in zip(rows, texts, strict=True):
        table.add_row(*text, style="red" if row.loss else None if row.counted else "dim")
    width = sum(max(len(line[i]) for line in [HEADINGS, *texts]) + 3 for i in range(len(HEADINGS))) + 2
    console = Console(width=max(width, 80), markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def summary(measured: Sequence[Results]) -> str:
    """A line for every suite and device; `NOT_MEASURED` without any."""
    lines = [f"- {r.environment.device_name}, {r.environment.threads} threads: {headline(r)}." for r in measured]
    return "\n".join(lines) or NOT_MEASURED


def markdown(suite: str, measured: Sequence[Results]) -> str:
    """The suite's tables, one for each device, or the `summary` of all; `NOT_MEASURED` without any."""
    if suite == "summary":
        return summary(measured)
    tables = []
    for results in measured:
        if results.suite != suite:
            continue
        lines = [provenance(results) + ".", "", "| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * 4 + "|"]
        for row in results.rows:
            text = [cell.replace("|", r"\|") for cell in cells(row)]
            text[3] = f"**{text[3]}**" if row.loss else text[3]
            lines.append("| " + " | ".join(text) + " |")
        tables.append("\n".join([*lines, "", headline(results) + "."]))
    return "\n\n".join(tables) or NOT_MEASURED


def updated(page: str, measured: Sequence[Results]) -> str:
    """`page` with every marked part as the results say. Raises ResultError for markers that do not pair up."""
    opened, closed = len(re.findall(r"<!-- bench:\w+ -->", page)), page.count("<!-- /bench -->")
    if opened != closed or opened != len(_MARKERS.findall(page)):
        raise ResultError(
            f"expected every <!-- bench:SUITE --> line to have its <!-- /bench -->, but got {opened} and {closed}"
        )
    return _MARKERS.sub(lambda m: f"{m[1]}{markdown(m['suite'], measured)}\n{m[3]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Update or check pages; 0 if all is well, 1 if a page is out of date, 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m cnnops.bench.report", description="Put measured results into pages."
    )
    parser.add_argument(
        "pages", nargs="+", type=Path, metavar="PAGE", help="Markdown file with <!-- bench:SUITE --> markers"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is out of date")
    options = parser.parse_args(arguments)
    stale = []
    try:
        measured = load_all(options.results)
        for path in options.pages:
            page = path.read_text()
            new = updated(page, measured)
            if new != page:
                stale.append(path)
                if not options.check:
                    path.write_text(new)
    except (ResultError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path}: {'out of date' if options.check else 'updated'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
