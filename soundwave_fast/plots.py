"""Pictures: loss curves of a run, and the CTC peaks of an utterance over its spectrogram."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAX_PICTURE_SECONDS = 120.0  # of the CTC peaks: 24 rows
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


def check_target(path: str | Path) -> None:
    """Whether a picture can be written to `path`, as far as can be told without drawing one.

    Raises:
        FileNotFoundError: its folder is not there.
        ValueError: a suffix that is no kind of picture, or a folder of that name.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    path, kinds = Path(path), FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        kind = f"{path.suffix} is no kind of picture" if path.suffix else "its name has no suffix"
        raise ValueError(f"{path}: {kind}; there are {', '.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path}: is a directory")


def save_figure(figure, path: str | Path) -> None:
    path = Path(path)
    temporary = path.with_name("." + path.name)
    try:
        figure.savefig(temporary, format=path.suffix.lstrip("."))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


ROW_SECONDS = 5.0  # of a peak picture: a token's label has room beside its neighbours'
_LABEL_INCHES = 0.16  # along the time axis, of one upright label
_ROW_INCHES = 12.0


def spread(times: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Places for labels (sorted), as near their times as at least `gap` between neighbours allows, within low...high.

    Neighbours that come too close form a cluster that is centred on its times (pool adjacent violators). Where not
    all fit, the gap is what there is.
    """
    count = len(times)
    gap = min(gap, (high - low) / max(count - 1, 1))
    clusters: list[list[float]] = []  # [sum of (time - its place in the cluster), members]
    for i, time in enumerate(times):
        clusters.append([time - i * gap, 1])
        while len(clusters) > 1 and clusters[-2][0] / clusters[-2][1] >= clusters[-1][0] / clusters[-1][1]:
            total, members = clusters.pop()
            clusters[-1][0] += total
            clusters[-1][1] += members
    places = np.concatenate([np.full(int(members), total / members) for total, members in clusters] or [np.zeros(0)])
    places = np.clip(places, low, max(low, high - (count - 1) * gap))
    return places + gap * np.arange(count)


def ctc_peaks(
    mel: np.ndarray,  # (mels, M), 100 frames a second
    probabilities: np.ndarray,  # (T,) probability of the best class of each adapter frame
    is_blank: np.ndarray,  # (T,) whether that class is the blank
    peaks: Sequence[tuple[float, str]],  # (time in s, token) of each kept frame
    path: str | Path,
    title: str = "",
    seconds_per_frame: float = 0.04,
) -> None:
    """Spectrogram with the kept frames marked, and below it how sure the CTC head is, blank against content.

    Longer audio takes several rows. Labels stand upright above the spectrogram and make room for each other.
    """
    length = max(mel.shape[1] / 100, seconds_per_frame)
    rows = max(1, int(np.ceil(length / ROW_SECONDS - 1e-6)))
    seconds = min(length, ROW_SECONDS) if rows == 1 else ROW_SECONDS
    width = max(4.0, _ROW_INCHES * seconds / ROW_SECONDS)
    figure, axes = new_figure(width, 3.6 * rows, 2 * rows, 1, height_ratios=[2, 1] * rows)
    times = (np.arange(len(probabilities)) + 0.5) * seconds_per_frame
    for row, (top, bottom) in enumerate(axes.reshape(rows, 2)):
        begin = row * seconds
        own = [(time, token) for time, token in peaks if begin <= time < begin + seconds]
        inside = (times >= begin) & (times < begin + seconds)
        _spectrogram(top, mel, length, begin, seconds, own, _LABEL_INCHES * seconds / width)
        _certainty(bottom, times[inside], probabilities[inside], is_blank[inside], own, seconds_per_frame)
        for axis in (top, bottom):
            axis.set_xlim(begin, begin + seconds)
        top.tick_params(labelbottom=False)
    bottom.set_xlabel("seconds", fontsize=8)
    axes[1, 0].legend(fontsize=7, framealpha=0.85, edgecolor="none", loc="lower right")
    if title:
        figure.suptitle(_wrapped(title, int(width * 14)), fontsize=10, color=INK, x=0.01, ha="left")
    save_figure(figure, path)


def _wrapped(title: str, characters: int, lines: int = 3) -> str:
    return "\n".join(textwrap.wrap(_plain(title), characters, max_lines=lines, placeholder=" ..."))


def _plain(text: str) -> str:
    """As it is: a dollar would begin a formula."""
    return text.replace("$", r"\$")


def _spectrogram(axis, mel: np.ndarray, length: float, begin: float, seconds: float, peaks, gap: float) -> None:
    """One row of the picture: mel (mels, M) of `length` s cut to its seconds, a line and a label for each peak."""
    from matplotlib.collections import LineCollection

    mels = mel.shape[0]
    own = mel[:, int(round(begin * 100)) : int(round((begin + seconds) * 100))]
    extent = (begin, min(begin + seconds, length), 0, mels)
    axis.imshow(own, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=mel.min(), vmax=mel.max())
    axis.grid(False)
    axis.set_ylim(0, mels)
    axis.set_ylabel("mel bin", fontsize=8)
    axis.vlines([time for time, _ in peaks], 0, mels, color="white", linewidth=0.8, alpha=0.9)
    places = spread([time for time, _ in peaks], gap, begin + gap / 2, begin + seconds - gap / 2)
    foot, head = mels * 1.02, mels * 1.09
    leaders = [[(time, foot), (place, head)] for (time, _), place in zip(peaks, places)]
    axis.add_collection(LineCollection(leaders, colors=INK, linewidths=0.5, clip_on=False), autolim=False)
    longest = max((len(token) for _, token in peaks), default=0)
    for (_, token), place in zip(peaks, places):
        text = axis.text(
            place, head * 1.01, _plain(token), rotation=90, ha="center", va="bottom", fontsize=8, color=INK
        )
        text.set_in_layout(len(token) == longest)  # laying out hundreds of labels takes seconds


def _certainty(axis, times, probabilities, is_blank, peaks, width: float) -> None:
    """Bars of the best class's probability in each frame, and a line at each peak."""
    axis.bar(times, np.where(is_blank, probabilities, 0), width, color=GRID, label="blank")
    axis.bar(times, np.where(is_blank, 0, probabilities), width, color=GREEN, label="token")
    axis.vlines([time for time, _ in peaks], 0, 1.05, color=RED, linewidth=0.8)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("probability", fontsize=8)
