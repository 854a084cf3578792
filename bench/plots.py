"""Plots of benchmark results: ratios at a glance, and how time and memory grow with one dimension."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from soundwave_fast.plots import BLUE, GREEN, INK, RED, new_figure, save_figure

OURS, OTHER = BLUE, "#a0aec0"
COLOURS = (BLUE, OTHER, RED, GREEN, "#b7791f", "#6b46c1")


def ratios(rows: list[dict], machine: dict, path: Path) -> None:
    """A bar a provider and case: how many times faster than the baseline, the rounds' range as a whisker."""
    shown = [row for row in rows if row["provider"] != row["baseline"]]
    labels = [f"{row['op']}\n{row['variant']}" for row in shown]
    figure, axes = new_figure(8.0, 0.36 * len(shown) + 1.2)
    axis = axes[0, 0]
    at = list(range(len(shown)))[::-1]
    for y, row in zip(at, shown):
        colour = OURS if row["provider"] == "ours" else OTHER
        axis.barh(y, row["ratio"], color=colour, height=0.72)
        axis.plot([row["ratio_low"], row["ratio_high"]], [y, y], color=INK, linewidth=0.8)
        axis.text(row["ratio_high"], y, f"  {row['ratio']:.2f}x {row['provider']}", va="center", fontsize=7, color=INK)
    axis.axvline(1.0, color=INK, linewidth=1)
    axis.set_yticks(at, [label.replace("\n", ", ") for label in labels], fontsize=7)
    axis.set_xlabel("times faster than the baseline, timed in turns (bar: median, line: range)")
    axis.set_title(f"{machine['device']}, commit {machine['commit'][:7]}", fontsize=9, loc="left")
    axis.set_xlim(0, max(row["ratio_high"] for row in shown) * 1.25)
    axis.grid(axis="y", visible=False)
    save_figure(figure, path)


def scaling(points: list[dict], machine: dict, path: Path) -> None:
    """Time and extra peak memory against each swept dimension, log-log, a row of panels an op, the floor dashed."""
    ops = list(dict.fromkeys((p["op"], p["along"]) for p in points))
    figure, axes = new_figure(8.0, 2.6 * len(ops), rows=len(ops), columns=2)
    for (op, along), (time_axis, memory_axis) in zip(ops, axes):
        lines = defaultdict(list)
        for point in points:
            if (point["op"], point["along"]) == (op, along):
                lines[point["provider"]].append(point)
        for colour, (provider, line) in zip(COLOURS, lines.items()):
            x = [point["value"] for point in line]
            time_axis.loglog(x, [1e3 * p["seconds"] for p in line], "o-", color=colour, label=provider, markersize=3)
            memory = [(p["value"], max(p["extra_peak_mib"], 0.1)) for p in line if p["extra_peak_mib"] is not None]
            if memory:
                memory_axis.loglog(*zip(*memory), "o-", color=colour, label=provider, markersize=3)
        floor = [(p["value"], 1e3 * p["floor_seconds"]) for p in next(iter(lines.values())) if p.get("floor_seconds")]
        if floor:
            time_axis.loglog(*zip(*floor), "--", color=INK, linewidth=0.8, label="floor")
        time_axis.set_ylabel(f"{op}\nms", fontsize=8)
        memory_axis.set_ylabel("extra peak MiB", fontsize=8)
        for axis in (time_axis, memory_axis):
            axis.set_xlabel(along, fontsize=8)
        time_axis.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{machine['device']}, commit {machine['commit'][:7]}", fontsize=9)
    save_figure(figure, path)
