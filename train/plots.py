"""Curves of a run as one picture: losses, held-out error rates, right answers, and what was drawn of each task."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from soundwave_fast.plots import BLUE, GREEN, INK, RED, new_figure, save_figure
from train.validation_figures import WER, figures_of, tasks_of

FILE = "curves.png"
WINDOWS = 60  # at most so many parts of the run the task shares are means over
WINDOW_UTTERANCES = 200  # chance alone moves a share of a half by 3.5 %
MOST_TASKS = 9  # with a colour of their own
COLOURS = (BLUE, RED, GREEN, "#b7791f", "#6b46c1", "#319795", "#97266d", "#4a5568", "#9c4221", "#2c5282")


def task_shares(rows: list[dict[str, Any]], windows: int = WINDOWS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(last step of each window, task -> its share of the utterances drawn in it); the commonest task first.

    A window holds WINDOW_UTTERANCES or more, where there are enough for two. Past MOST_TASKS, the rest are 'others'.
    """
    tallies = [Counter(row.get("tasks") or {}) for row in rows]
    total = sum(tallies, Counter())
    names = [task for task, _ in total.most_common(MOST_TASKS if len(total) > MOST_TASKS + 1 else None)]
    windows = max(1, min(windows, len(rows), max(2, total.total() // WINDOW_UTTERANCES)))
    parts = [part for part in np.array_split(np.arange(len(rows)), windows) if len(part)]
    shares: dict[str, list[float]] = {name: [] for name in names}
    for part in parts:
        drawn = sum((tallies[i] for i in part), Counter())
        for name in names:
            shares[name].append(drawn[name] / max(1, drawn.total()))
    found = {name: np.array(values) for name, values in shares.items()}
    if len(names) < len(total):
        found["others"] = 1.0 - sum(found.values())
    return np.array([rows[part[-1]]["step"] for part in parts]), found


def _mean(values: np.ndarray, window: int) -> np.ndarray:
    """Trailing mean over `window` steps, over fewer at the beginning; NaN is left out."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(known, values, 0.0), known))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / np.maximum(counts[ends] - counts[starts], 1)


def _losses(axis, rows: list[dict]) -> None:
    steps = np.array([row["step"] for row in rows])
    window = max(10, len(rows) // 50)
    curves = [("ctc", "CTC", BLUE), ("ce", "cross-entropy", RED)]
    for key, label, colour in curves if any(row.get("audio_tokens") for row in rows) else curves[:1]:
        values = np.array([row.get(key, np.nan) for row in rows], dtype=float)
        axis.plot(steps, values, color=colour, linewidth=0.5, alpha=0.3)
        axis.plot(steps, _mean(values, window), color=colour, linewidth=1.6, label=f"{label}, mean of {window} steps")
    axis.set_yscale("log")
    axis.set_title("loss, nats per token", fontsize=9, color=INK, loc="left")


def _held_out(axis, rows: list[dict], names: dict[str, str], title: str) -> None:
    """One curve each, or, where they are too many to tell apart, a bar for what was measured last."""
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    points = {
        label: [(row["step"], 100 * figures_of(row)[key]) for row in rows if key in figures_of(row)]
        for key, label in names.items()
    }
    if len(points) > len(COLOURS):
        last = sorted(((curve[-1][1], label) for label, curve in points.items()), reverse=True)
        axis.barh([label for _, label in last], [value for value, _ in last], color=BLUE)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=6)
        axis.set_xlim(0, 100)
        axis.set_xlabel(f"after step {max(curve[-1][0] for curve in points.values())}", fontsize=8, color=INK)
        return
    for colour, (label, curve) in zip(COLOURS, points.items(), strict=False):
        steps, values = zip(*curve, strict=True)
        axis.plot(steps, values, color=colour, marker="o", markersize=3, label=f"{label}: {values[-1]:.1f} %")
    axis.set_ylim(0, max(5.0, 1.05 * max(value for curve in points.values() for _, value in curve)))


def _tasks(axis, rows: list[dict]) -> None:
    steps, shares = task_shares(rows)
    if len(steps) == 1:  # a stack of one point has no width
        steps, shares = np.array([rows[0]["step"], steps[0]]), {k: np.repeat(v, 2) for k, v in shares.items()}
    labels = [f"{name}: {100 * share[-1]:.0f} %" for name, share in shares.items()]
    axis.stackplot(steps, [100 * share for share in shares.values()], labels=labels, colors=COLOURS, alpha=0.8)
    axis.set_ylim(0, 100)
    axis.set_title("share of each task in what was drawn, %", fontsize=9, color=INK, loc="left")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def curves(rows: list[dict[str, Any]], path: Path) -> bool:
    """Write the picture: losses, and what else there is of error rates, right answers and several tasks.

    Args:
        rows: of a metrics.jsonl: {step, ctc, ce, audio_tokens, tasks, valid_...}; keys may be missing.
        path: PNG or SVG.

    Returns:
        Whether it was written: losses alone are in loss.png already.
    """
    panels: list[Any] = [_losses]
    measured = {key: label for key, label in WER.items() if any(key in figures_of(row) for row in rows)}
    asked = {task: task for task in sorted({task for row in rows for task in tasks_of(row)})}
    if measured:
        panels.append(lambda axis, rows: _held_out(axis, rows, measured, "held-out word error rate, %"))
    if asked:
        panels.append(lambda axis, rows: _held_out(axis, rows, asked, "held-out answers that are right, %"))
    if len({task for row in rows for task in row.get("tasks") or {}}) > 1:
        panels.append(_tasks)
    if len(panels) == 1:
        return False
    columns = min(2, len(panels))
    figure, axes = new_figure(4.6 * columns, 3.0 * -(-len(panels) // columns), -(-len(panels) // columns), columns)
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis, rows)
        if not axis.get_xlabel():
            axis.set_xlabel("step", fontsize=8, color=INK)
        if axis.get_legend() is None and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    save_figure(figure, path)
    return True
