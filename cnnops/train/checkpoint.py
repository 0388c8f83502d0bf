"""Checkpoints: written whole or not at all, with their SHA-256 beside them, and read only if it is right.

A flipped byte in a weight loads silently from torch's own format, so the sum is checked before anything is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnnops.files import write_atomically

FORMAT = 1
"""Number of the layout of `Trainer.state`; another number is another program's checkpoint."""


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message is one line, with the file's name and the reason."""


def _sums_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded_sums(path: Path) -> list[str]:
    """The SHA-256 that may belong to `path`, newest first; none if none is recorded."""
    try:
        lines = _sums_path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line.split()[0] for line in lines if line.strip()]


def save_checkpoint(state: dict[str, Any], *paths: Path) -> None:
    """Write `state` to each of `paths`, and its SHA-256 to `<path>.sha256` in the format of sha256sum.

    However it ends, each path has a checkpoint that loads, the old or the new one. Raises OSError.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    new = hashlib.sha256(content).hexdigest()
    for path in paths:
        # Two files cannot be renamed at once, so both sums stand while the checkpoint changes. All old ones are kept:
        # a save that failed has left more than one, and which of them is right only the checkpoint can say.
        sums = dict.fromkeys([new, *_recorded_sums(path)])
        write_atomically(_sums_path(path), "".join(f"{s}  {path.name}\n" for s in sums).encode())
        write_atomically(path, content)
        write_atomically(_sums_path(path), f"{new}  {path.name}\n".encode())


def settle_sum(path: Path) -> None:
    """Leave the right one of the sums beside `path` where a save was cut off and there are two. Raises OSError."""
    if len(_recorded_sums(path)) > 1:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found in _recorded_sums(path):
            write_atomically(_sums_path(path), f"{found}  {path.name}\n".encode())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read the checkpoint `path`, or `last.pt` in the folder `path`, onto the CPU, with torch's `weights_only`.

    Raises CheckpointError if it is missing, damaged, without its SHA-256, or not a checkpoint of this program.
    """
    try:
        path = path / "last.pt" if path.is_dir() else path
        for file in (path, _sums_path(path)):
            if file.exists() and not file.is_file():  # a pipe would be waited for
                raise CheckpointError(f"cannot read checkpoint {path}: {file.name} is not a file")
        content = path.read_bytes()
        sums = _recorded_sums(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
    if not sums:
        raise CheckpointError(f"checkpoint {path} cannot be verified: {_sums_path(path).name} is not beside it")
    if hashlib.sha256(content).hexdigest() not in sums:
        raise CheckpointError(f"checkpoint {path} is damaged: its SHA-256 is not the one in {_sums_path(path).name}")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(content):
                raise ValueError("its members unpack to more than the file")  # torch.save never packs them
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise a dozen types for bytes that are no checkpoint
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {reason}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version: expected format {FORMAT}, but got {found}")
    return state


def random_state() -> dict[str, Any]:
    """The state of every global generator that a training step may draw from, in types that `weights_only` loads."""
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since `random_state`; CUDA generators only where as many devices are seen as then."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
