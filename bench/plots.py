"""Plots of benchmark results: ratios at a glance, and how time and memory grow with one dimension."""

from __future__ import annotations

import math
from pathlib import Path

from soundwave_fast.plots import BLUE, GREEN, INK, RED, new_figure, save_figure

OURS, OTHER = BLUE, "#a0aec0"
OTHERS = ("#718096", RED, GREEN, "#b7791f", "#6b46c1", "#d53f8c", "#00a3c4", "#975a16")


def ratios(rows: list[dict], title: str, path: Path) -> None:
    """A bar per provider and case: how many times faster than the fastest eager code, the rounds' range as a whisker; a
    diamond where the released way is the yardstick."""
    shown = [row for row in rows if row["provider"] != row["eager"]]
    labels = [f"{row['op']}\n{row['variant']}" for row in shown]
    figure, axes = new_figure(8.0, 0.36 * len(shown) + 1.2)
    axis = axes[0, 0]
    at = list(range(len(shown)))[::-1]
    for y, row in zip(at, shown):
        colour = OURS if row["provider"] == "ours" else OTHER
        axis.barh(y, row["eager_ratio"], color=colour, height=0.72)
        axis.plot([row["eager_low"], row["eager_high"]], [y, y], color=INK, linewidth=0.8)
        axis.plot(row["ratio"], y, marker="D", color=INK, markerfacecolor="white", markersize=4)
        end = max(row["eager_high"], row["ratio"])
        axis.text(end, y, f"   {row['eager_ratio']:.2f}x {row['provider']}", va="center", fontsize=7, color=INK)
    axis.axvline(1.0, color=INK, linewidth=1)
    axis.set_yticks(at, [label.replace("\n", ", ") for label in labels], fontsize=7)
    says = "times faster than the fastest eager code (bar: median, line: range) and than the released way (diamond)"
    axis.set_xlabel(says, fontsize=8, loc="right")
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlim(0, max(max(row["eager_high"], row["ratio"]) for row in shown) * 1.25)
    axis.grid(axis="y", visible=False)
    save_figure(figure, path)


def exponent(points: list[tuple[float, float]]) -> float:
    """The e of y ~ x^e that fits the points best on logarithmic axes; NaN of fewer than two."""
    if len(points) < 2:
        return math.nan
    x, y = ([math.log(value) for value in side] for side in zip(*points))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y)) / spread


def memory_points(line: list[dict]) -> list[tuple[float, float]]:
    """(value, extra peak MiB) where it was measured; a tenth of a MiB stands for nothing."""
    return [(p["value"], max(p["extra_peak_mib"], 0.1)) for p in line if p["extra_peak_mib"] is not None]


def scaling(points: list[dict], machine: dict, path: Path) -> dict[str, Path]:
    """A picture per op, named after `path`: time and extra peak memory against each swept dimension, log-log.

    Ours is thick, the floor dashed; the legend gives the exponent each grows with.
    """
    pictures = {}
    for op in dict.fromkeys(point["op"] for point in points):
        mine = [point for point in points if point["op"] == op]
        pictures[op] = path.with_name(f"{path.stem}_{op.split()[0]}.png")
        _scaling_of(op, mine, machine, pictures[op])
    return pictures


def _scaling_of(op: str, points: list[dict], machine: dict, path: Path) -> None:
    dimensions = list(dict.fromkeys(point["along"] for point in points))
    providers = list(dict.fromkeys(point["provider"] for point in points))
    others = iter(OTHERS)
    style = {name: (OURS, 2.2) if name == "ours" else (next(others), 1.0) for name in providers}
    figure, axes = new_figure(4.4 * len(dimensions), 5.4, rows=2, columns=len(dimensions))
    for along, (time_axis, memory_axis) in zip(dimensions, axes.T):
        here = [point for point in points if point["along"] == along]
        for provider, (colour, width) in style.items():
            line = [point for point in here if point["provider"] == provider]
            for axis, values in (
                (time_axis, [(p["value"], 1e3 * p["seconds"]) for p in line]),
                (memory_axis, memory_points(line)),
            ):
                if not values:
                    continue
                label = f"{provider}  ~{along}^{exponent(values):.1f}"
                axis.loglog(*zip(*values), "o-", color=colour, linewidth=width, markersize=3, label=label)
        floor = {p["value"]: 1e3 * p["floor_seconds"] for p in here if p["floor_seconds"]}.items()
        if floor:
            label = f"floor  ~{along}^{exponent(list(floor)):.1f}"
            time_axis.loglog(*zip(*floor), "--", color=INK, linewidth=0.8, label=label)
        ticks = sorted({point["value"] for point in here})
        for axis in (time_axis, memory_axis):
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            if not axis.lines:  # no memory was measured
                continue
            bottom, top = axis.get_ylim()
            axis.set_ylim(top=top * (top / bottom) ** 0.5)  # room for the legend
            axis.legend(fontsize=6, frameon=False, loc="upper left", ncols=2)
        memory_axis.set_xlabel(along, fontsize=9)
    axes[0, 0].set_ylabel("ms", fontsize=9)
    axes[1, 0].set_ylabel("extra peak MiB", fontsize=9)
    commits = ", ".join(dict.fromkeys(point["commit"][:7] for point in points))
    figure.suptitle(f"{op}: {machine['device']}, commit {commits}", fontsize=9)
    save_figure(figure, path)
