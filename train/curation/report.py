"""One self-contained HTML page of a selection: hours by reason and source, WER histogram, the worst twenty."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np

from soundwave_fast.plots import BLUE, INK, RED, new_figure, save_figure
from train.curation.reasons import REASONS, Limits
from train.curation.selection import BINS, Tally
from train.curation.shards import write_text

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:left;vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}"
    "tr.kept{font-weight:600}img{max-width:100%}code{font-size:.9em}h2{margin-top:2.2rem}"
)


def write_report(tally: Tally, limits: Limits, settings: dict, to: Path) -> Path:
    """Write `to`/report.html, `to`/wer.png and `to`/report.json; returns the page."""
    picture = to / "wer.png"
    histogram(tally, limits.max_wer, picture)
    figures = {**tally.summary(), "limits": asdict(limits), "transcription": settings}
    write_text(to / "report.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    image = base64.b64encode(picture.read_bytes()).decode()
    kept, total = figures["hours"].get("kept", 0.0), sum(figures["hours"].values())
    wer = "" if figures["wer"] is None else f" WER of the {tally.words:,} words judged: {100 * figures['wer']:.1f} %."
    body = [
        "<h1>Curation report</h1>",
        f"<p>{figures['kept']:,} of {tally.rows:,} utterances kept: <b>{_hours(kept)} of {_hours(total)} hours</b> "
        f"({100 * kept / max(total, 1e-9):.1f} %).{wer}</p>",
        "<h2>Hours by reason and source</h2>",
        _reasons(tally),
        "<h2>Word error rate</h2>",
        f'<img alt="histogram of word error rates" src="data:image/png;base64,{image}">',
        f"<h2>The {len(tally.worst)} worst</h2>",
        _worst(tally.worst),
        f"<h2>The {len(tally.worst_kept)} worst kept</h2>",
        _worst(tally.worst_kept),
        "<h2>Settings</h2>",
        _settings({**settings, **asdict(limits)}),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Curation report</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write_text(to / "report.html", page)
    return to / "report.html"


def histogram(tally: Tally, threshold: float, path: Path) -> None:
    """PNG: utterances by WER (what other reasons drop is left out), and the hours each threshold would keep."""
    figure, axes = new_figure(9.0, 3.2, 1, 2)
    left, right = axes.flat
    edges = np.linspace(0, 1, BINS + 1)
    left.bar(edges[:-1], tally.histogram, 1 / BINS, align="edge", color=BLUE)
    left.set_yscale("symlog", linthresh=1)
    left.set_xlabel("WER (the last bar: 1 and above)", fontsize=8, color=INK)
    left.set_ylabel("utterances", fontsize=8, color=INK)
    right.step(edges[1:], np.cumsum(tally.histogram_hours), color=BLUE, where="post")
    right.set_xlabel("threshold", fontsize=8, color=INK)
    right.set_ylabel("hours at or below it, duplicates included", fontsize=8, color=INK)
    for axis in (left, right):
        axis.axvline(min(threshold, 1), color=RED, linewidth=1, label=f"threshold {threshold:g}")
        axis.set_xlim(0, 1)
        axis.legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.3f}"


def _reasons(tally: Tally) -> str:
    names = sorted(tally.hours)
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in names)
    lines = [f'<tr><th></th>{head}<th class="n">all</th><th class="n">utterances</th></tr>']
    for key in ("kept", *REASONS):
        if not tally.total(tally.counts, key):
            continue
        cells = "".join(f'<td class="n">{_hours(tally.hours[name].get(key, 0.0))}</td>' for name in names)
        lines.append(
            f'<tr class="{key}"><td>{key.replace("_", " ")}</td>{cells}'
            f'<td class="n">{_hours(tally.total(tally.hours, key))}</td>'
            f'<td class="n">{int(tally.total(tally.counts, key)):,}</td></tr>'
        )
    return f"<table>{''.join(lines)}</table>"


def _worst(items: list[tuple]) -> str:
    lines = ['<tr><th class="n">WER</th><th>reference / hypothesis</th><th>reason</th><th>source / id</th></tr>']
    for wer, _, _, row in sorted(items, reverse=True, key=lambda item: item[:3]):
        lines.append(
            f'<tr><td class="n">{100 * wer:.0f} %</td><td>{escape(_short(row.get("text", "")))}<br>'
            f"<i>{escape(_short(row['hypothesis']))}</i></td><td>{escape(row['reason'].replace('_', ' '))}</td>"
            f"<td>{escape(row['source'])}<br>{escape(row['id'])}</td></tr>"
        )
    return f"<table>{''.join(lines)}</table>" if items else "<p>None.</p>"


def _short(text: str, most: int = 400) -> str:
    return text if len(text) <= most else text[:most] + " ..."


def _settings(settings: dict) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td><code>{escape(str(v))}</code></td></tr>" for k, v in settings.items()
    )
    return f"<table>{rows}</table>"
