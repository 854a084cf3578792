"""Pictures: loss curves of a run, and the CTC peaks of an utterance over its spectrogram."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

INK, GRID = "#222222", "#dddddd"
BLUE, RED, GREEN = "#2b6cb0", "#c53030", "#2f855a"


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.grid(color=GRID, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8)
    return figure, axes


def save_figure(figure, path: str | Path) -> None:
    path = Path(path)
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, format=path.suffix.lstrip("."))
    os.replace(temporary, path)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    window = max(1, min(window, len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def loss_curves(runs: dict[str, list[dict]], path: str | Path) -> None:
    """Loss against step, one panel a run: CTC and, where it trains, cross-entropy; thin raw, bold 10-step mean.

    Args:
        runs: title -> rows of a metrics.jsonl ({step, ctc, ce, audio_tokens, ...}).
        path: PNG or SVG to write.
    """
    runs = {title: rows for title, rows in runs.items() if rows}
    if not runs:
        return
    figure, axes = new_figure(4.2 * len(runs), 3.1, 1, len(runs))
    for axis, (title, rows) in zip(axes.flat, runs.items(), strict=True):
        steps = np.array([row["step"] for row in rows])
        curves = [("ctc", "CTC, nats per token", BLUE)]
        if any(row.get("audio_tokens") for row in rows):
            curves.append(("ce", "cross-entropy, nats per token", RED))
        for key, label, color in curves:
            values = np.array([row[key] for row in rows], dtype=float)
            axis.plot(steps, values, color=color, linewidth=0.5, alpha=0.35)
            axis.plot(steps, _smooth(values, 10), color=color, linewidth=1.6, label=label)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.set_xlabel("step", fontsize=8, color=INK)
        axis.legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def ctc_peaks(
    mel: np.ndarray,  # (mels, M), 100 frames a second
    probabilities: np.ndarray,  # (T,) probability of the best class of each adapter frame
    is_blank: np.ndarray,  # (T,) whether that class is the blank
    peaks: Sequence[tuple[float, str]],  # (time in s, token) of each kept frame
    path: str | Path,
    title: str = "",
    seconds_per_frame: float = 0.04,
) -> None:
    """Spectrogram with the kept frames marked, and below it how sure the CTC head is, blank against content."""
    length = mel.shape[1] / 100
    figure, axes = new_figure(max(6.0, min(16.0, 2.6 * length)), 4.2, 2, 1, sharex=True, height_ratios=[2, 1])
    top, bottom = axes.flat
    top.imshow(mel, origin="lower", aspect="auto", extent=(0, length, 0, mel.shape[0]), cmap="magma")
    top.grid(False)
    for time, token in peaks:
        top.axvline(time, color="white", linewidth=0.8, alpha=0.9)
        top.text(time, mel.shape[0] * 1.01, token, rotation=55, ha="left", va="bottom", fontsize=8, color=INK)
    top.set_ylabel("mel bin", fontsize=8)
    times = (np.arange(len(probabilities)) + 0.5) * seconds_per_frame
    content = np.where(is_blank, np.nan, probabilities)
    bottom.bar(times, np.where(is_blank, probabilities, 0), seconds_per_frame, color=GRID, label="blank")
    bottom.bar(times, np.nan_to_num(content), seconds_per_frame, color=GREEN, label="token")
    for time, _ in peaks:
        bottom.axvline(time, color=RED, linewidth=0.8)
    bottom.set_ylim(0, 1.05)
    bottom.set_xlim(0, length)
    bottom.set_ylabel("probability", fontsize=8)
    bottom.set_xlabel("seconds", fontsize=8)
    bottom.legend(fontsize=7, frameon=False, loc="lower right")
    if title:
        figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    save_figure(figure, path)
