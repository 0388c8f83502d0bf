"""Curves, first-layer filters and test images with predictions."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

TRAIN, TEST, WRONG = "#8a8f98", "#1f6feb", "#d1242f"


def save_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs. history: the lines of metrics.jsonl, at least one."""
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) <= 30 else ""
    figure = _figure(12, 3.6)
    axes = figure.subplots(1, 3)
    for ax, quantity, title in ((axes[0], "loss", "loss"), (axes[1], "accuracy", "accuracy")):
        for part, colour in (("train", TRAIN), ("test", TEST)):
            values = [row[f"{part}_{quantity}"] for row in history]
            ax.plot(epochs, values, marker=marker, markersize=4, color=colour, label=part)
        ax.set_title(title, loc="left")
        ax.legend(frameon=False)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    last = history[-1]["test_accuracy"]
    axes[1].annotate(
        f"{100 * last:.2f} %", (epochs[-1], last), textcoords="offset points", xytext=(0, -14), ha="right", color=TEST
    )
    axes[2].plot(epochs, [row["lr"] for row in history], marker=marker, markersize=4, color=TRAIN)
    axes[2].set_title("learning rate at the epoch's start", loc="left")
    axes[2].set_ylim(bottom=0)
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(color="#e5e7eb", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def save_filters(weight: Tensor, path: Path) -> None:
    """The filters [K, C, R, S] of a first layer: in colour for C = 3, else the mean over C in blue (-) and red (+)."""
    filters = weight.detach().float().cpu().numpy()
    count = len(filters)
    columns = min(count, 16)
    rows = math.ceil(count / columns)
    figure = _figure(0.62 * columns, 0.62 * rows + 0.5)
    colour = filters.shape[1] == 3
    title = f"{count} filters of the first layer, {filters.shape[2]} x {filters.shape[3]}"
    figure.suptitle(title if colour else f"{title} (blue: negative, red: positive)", fontsize=10, x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False)
    limit = float(np.abs(filters.mean(1)).max()) or 1.0
    for index, ax in enumerate(grid.flat):
        ax.axis("off")
        if index >= count:
            continue
        if colour:
            scale = float(np.abs(filters[index]).max()) or 1.0
            ax.imshow(0.5 + 0.5 * filters[index].transpose(1, 2, 0) / scale)
        else:
            ax.imshow(filters[index].mean(0), cmap="RdBu_r", vmin=-limit, vmax=limit)
    _save(figure, path)


def save_samples(
    images: Tensor, labels: Tensor, predictions: Tensor, classes: Sequence[str], path: Path, count: int = 40
) -> None:
    """A grid of `count` test images under their predicted class; wrong ones come first, in red, at most half of them.

    images: uint8 [N, C, H, W], C of 1 or 3 (else the first channel); labels, predictions: int64 [N].
    """
    wrong = (labels != predictions).nonzero().flatten().tolist()
    shown = wrong[: count // 2]
    right = (labels == predictions).nonzero().flatten().tolist()
    room = count - len(shown)
    # Evenly spread, because a data set may be sorted by class.
    shown += [right[i * len(right) // room] for i in range(min(room, len(right)))]
    columns = 10
    rows = math.ceil(len(shown) / columns)
    figure = _figure(columns * 1.3, rows * 1.7 + 0.5)
    heading = f"{len(wrong)} of {len(labels):,} test images wrong"
    if wrong:
        heading += f"; the first {min(len(wrong), count // 2)} in red: predicted, and what it is"
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat:
        ax.axis("off")
    for ax, index in zip(grid.flat, shown, strict=False):
        image, predicted, label = images[index].numpy(), int(predictions[index]), int(labels[index])
        if len(image) == 3:
            ax.imshow(image.transpose(1, 2, 0))
        else:
            ax.imshow(image[0], cmap="gray", vmin=0, vmax=255)
        # Below each other, or long names would run into the next image's.
        names = [classes[predicted]] if predicted == label else [classes[predicted], f"is {classes[label]}"]
        ax.set_title(
            "\n".join(map(_shown, names)),
            fontsize=8,
            color="#57606a" if predicted == label else WRONG,
            fontweight="normal" if predicted == label else "bold",
            pad=3,
            parse_math=False,  # a class may be called anything
        )
    _save(figure, path)


def _shown(name: str) -> str:
    """As much of a name as fits over an image, in characters that can be drawn."""
    drawable = "".join(c if c.isprintable() else "?" for c in name)
    return drawable if len(drawable) <= 17 else f"{drawable[:16]}…"


def _figure(width: float, height: float) -> Figure:
    """A figure in inches that no window system knows of."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """Draw in memory, then write under the final name only what is whole."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(buffer.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
