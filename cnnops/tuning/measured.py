"""The configurations that `cnnops tune` found fastest, in one file for each device.

A file holds for the device, torch, triton, cnnops and kernels that it names: for others it is not read. It lies in
$CNNOPS_TUNING, or ~/.cache/cnnops/tuning where that is not set.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from cnnops.files import locked, write_atomically
from cnnops.version import __version__

log = logging.getLogger("cnnops")

KERNELS = Path(__file__).resolve().parents[1] / "backends" / "triton"


@functools.cache
def kernel_hash() -> str:
    """Of the sources of the Triton kernels: measurements of other kernels say nothing."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def key(device: str) -> dict[str, str]:
    """What a measurement on the device of this name depends on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton,
        "cnnops": __version__,
        "kernels": kernel_hash(),
    }


def folder() -> Path:
    """Where the files are."""
    return Path(os.environ.get("CNNOPS_TUNING") or Path.home() / ".cache" / "cnnops" / "tuning")


def path_for(device: str) -> Path:
    """The file of the device of this name."""
    return folder() / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def described(value: Any) -> dict[str, Any]:
    """A problem or a configuration as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value), default=str))
    return found


Rows = dict[str, dict[str, Any]]
"""By table and problem (`filed_under`), the row: table, problem, config, and microseconds of each candidate."""


def filed_under(table: str, problem: Any) -> str:
    """The key of a problem's row."""
    return f"{table} {json.dumps(described(problem), sort_keys=True)}"


def load(device: str) -> Rows:
    """The rows measured on this device with what runs here; none, and a word in the log, if the file is of others."""
    try:
        path = path_for(device)
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        log.warning("measurements of cnnops tune are not read: %s", error)
        return {}
    try:
        content = json.loads(text)
        told = dict(content["key"])
        found: Rows = {
            f"{row['table']} {json.dumps(row['problem'], sort_keys=True)}": row | {"config": dict(row["config"])}
            for row in content["rows"]
        }
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is not read: it is no file of cnnops tune (%s)", path, error)
        return {}
    here = key(device)
    if told != here:
        other = ", ".join(
            f"{name} {told.get(name)} and not {here[name]}" for name in here if told.get(name) != here[name]
        )
        log.warning("%s is not read: it was measured with %s; run cnnops tune again", path, other)
        return {}
    return found


def save(device: str, rows: Rows) -> Path:
    """Write the device's file, whole or not at all, with these rows and those it has of other problems."""
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent, wait=True):  # two processes may tune on two devices of one kind
        rows = load(device) | rows
        content = {"key": key(device), "rows": [rows[name] for name in sorted(rows)]}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    _rows_here.cache_clear()
    return path


@functools.cache
def _rows_here() -> Rows:
    return load(torch.cuda.get_device_name()) if torch.cuda.is_available() else {}


def lookup(table: str, problem: Any) -> dict[str, Any] | None:
    """The configuration measured fastest for a problem on the current CUDA device, as `described`; None: nobody did."""
    if problem.device != "cuda":
        return None
    rows = _rows_here()
    row = rows.get(filed_under(table, problem)) if rows else None
    return None if row is None else row["config"]
