"""RESULTS.md, its plots and the README's table, generated from bench/results/*.json; nothing in them is typed by hand.

`python -m bench.report [FILE ...]` takes the newest file of each device by default. A row whose op has changed since
the commit it was measured at is refused: it is listed by name instead of shown. `--check` writes nothing and exits
with 1 if what is committed differs from what would be written.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from bench import plots
from bench.harness import ROOT

RESULTS = ROOT / "bench" / "results"
SCALING = RESULTS / "scaling"  # bench/sweep.py's
MARKDOWN = ROOT / "bench" / "RESULTS.md"
BEGIN, END = "<!-- results: begin (python -m bench.report) -->", "<!-- results: end -->"


def load(path: Path) -> tuple[dict, list[dict]]:
    """The machine and the rows of one pytest-benchmark JSON file.

    Raises ValueError for a file that is not one.
    """
    try:
        document = json.loads(path.read_text())
        rows = [_row(entry) for entry in document["benchmarks"] if "op" in entry["extra_info"]]
        return document["machine_info"], rows
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a results file of pytest-benchmark ({error!r})") from None


def _quantile(ordered: list[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _row(entry: dict) -> dict:
    samples = sorted(entry["stats"]["data"])
    times = {f"p{q}": _quantile(samples, q / 100) for q in (20, 50, 80)}
    return {**entry["extra_info"], **times, "test": entry["fullname"]}


@functools.cache
def stale(commit: str, files: tuple[str, ...]) -> bool:
    """Whether one of the op's files differs from `commit` in the working tree (or the commit is unknown here)."""
    done = subprocess.run(["git", "diff", "--quiet", commit, "--", *files], cwd=ROOT, capture_output=True)
    return done.returncode != 0


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _mib(row: dict) -> str:
    return "" if row.get("extra_peak_mib") is None else f"{row['extra_peak_mib']:.0f}"


def _case(row: dict) -> tuple:
    return row["op"], row["variant"], tuple(row["shape"].items())


def _times_faster(row: dict, kind: str) -> str:
    """"1.50 (1.40 ... 1.60)" against the fastest eager row ("eager_") or the baseline ("")."""
    low, high = (row[f"{kind or 'ratio_'}{end}"] for end in ("low", "high"))
    return f"{row[f'{kind}ratio']:.2f} ({low:.2f} ... {high:.2f})"


def table(rows: list[dict]) -> list[str]:
    """One table an op: ratios first, then absolute times, memory and share of the floor."""
    lines: list[str] = []
    by_op = defaultdict(list)
    for row in rows:
        by_op[row["op"]].append(row)
    for op, mine in by_op.items():
        lines += [f"### {op}", ""]
        lines += [
            "| case | provider | times faster than the fastest eager row | than the baseline | p20 / p50 / p80 ms "
            "| extra peak MiB | % of floor |",
            "|---|---|---|---|---|---|---|",
        ]
        seen = None
        for row in mine:
            case = f"{row['variant']}, " + " ".join(f"{k} {v}" for k, v in row["shape"].items())
            label, seen = ("" if case == seen else case), case
            eager = "fastest eager" if row["provider"] == row["eager"] else f"**{_times_faster(row, 'eager_')}**"
            ratio = "baseline" if row["provider"] == row["baseline"] else _times_faster(row, "")
            times = " / ".join(_ms(row[name]) for name in ("p20", "p50", "p80"))
            floor = f"{100 * row['of_floor']:.0f} %" if "of_floor" in row else ""
            lines.append(f"| {label} | {row['provider']} | {eager} | {ratio} | {times} | {_mib(row)} | {floor} |")
        lines.append("")
        notes = _notes(mine)
        lines += notes + [""] * bool(notes)
    return lines


def _level(mine: dict, best: dict) -> str:
    """Says so where the rounds do not agree on which of the two is faster, and the median is within 5 %."""
    low, high = mine["eager_low"], mine["eager_high"]
    if mine["eager"] != best["provider"] or not (mine["eager_ratio"] >= 0.95 and low <= 1 <= high):
        return ""
    return f", which is level: ours is {low:.2f} to {high:.2f} times as fast, from round to round"


def _notes(rows: list[dict]) -> list[str]:
    """A line a case that has a note, or where something is faster than ours; and the rates of generation."""
    cases = defaultdict(dict)
    for row in rows:
        cases[_case(row)][row["provider"]] = row
    lines = []
    for (_, variant, shape), providers in cases.items():
        mine = providers.get("ours")
        others = [row for name, row in providers.items() if not name.startswith("ours")]
        said = [row["note"] for row in providers.values() if row.get("note")][:1]
        if mine is not None and others:
            best = max(others, key=lambda row: row["ratio"])
            if best["ratio"] > mine["ratio"]:
                share = f"{best['provider']} takes {mine['ratio'] / best['ratio']:.2f} of our time"
                said.insert(0, share + _level(mine, best))
        said += [
            f"{name} {row['tokens_per_second']:.1f} new tokens/s, the first after "
            f"{1e3 * row['first_token_seconds']:.0f} ms, real-time factor {row['real_time_factor']:.3f}"
            for name, row in providers.items()
            if "tokens_per_second" in row
        ]
        if said:
            lines.append(f"- {variant}, {' '.join(f'{k} {v}' for k, v in shape)}: {'; '.join(said)}.")
    return lines


def ours(rows: list[dict]) -> list[tuple[dict, dict | None]]:
    """(our row, the baseline's) of the first case of every op and variant: what the README shows."""
    cases, found = defaultdict(dict), {}
    for row in rows:
        cases[_case(row)][row["provider"]] = row
    for (op, variant, _), providers in cases.items():
        mine = providers.get("ours")
        if mine is not None:
            found.setdefault((op, variant), (mine, providers.get(mine["baseline"])))
    return list(found.values())


def headline(machine: dict, rows: list[dict], plot: str) -> list[str]:
    """A line a case for the README: ours against the fastest eager code and the baseline, in time and memory."""
    lines = [f"![ours against eager]({plot})", ""]
    lines += [
        "| op | case | times faster than the fastest eager code | than the baseline | MiB, ours / baseline |",
        "|---|---|---|---|---|",
    ]
    for mine, baseline in ours(rows):
        memory = "" if baseline is None or not _mib(mine) else f"{_mib(mine)} / {_mib(baseline)}"
        case = f"{mine['variant']}, " + " ".join(f"{k} {v}" for k, v in mine["shape"].items())
        eager, than = f"**{mine['eager_ratio']:.2f}** ({mine['eager']})", f"{mine['ratio']:.2f} ({mine['baseline']})"
        lines.append(f"| `{mine['op']}` | {case} | {eager} | {than} | {memory} |")
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['versions'].get('torch', '?')}"
    note = "forward and backward but for hearing, `linear_argmax` and `generate`; every row, with spread, peers and "
    note += "where ours is slower"
    lines += ["", f"Measured on {where}, commit `{machine['commit'][:7]}`: {note}: `bench/RESULTS.md`."]
    points = SCALING / f"{'cuda' if 'cuda' in machine else 'cpu'}.json"
    if points.exists():  # its plots are drawn after this
        picture = points.with_name(f"{points.stem}_linear_ctc_loss.png").relative_to(ROOT)
        lines += ["", f"![linear_ctc_loss as T, B, V and D grow]({picture})"]
    return lines


def compose(paths: list[Path]) -> tuple[str, str | None, list[tuple[Path, dict, list[dict]]]]:
    """RESULTS.md's text, the README's block (of the first file) and the rows kept of each file."""
    lines = [
        "# Results",
        "",
        "Generated by `python -m bench.report` from the JSON files in `bench/results/`. All providers of a case were",
        "timed in turns in one process; a ratio is the median of the rounds' own ratios, with the lowest and the",
        "highest: first to the fastest eager code of the case, then to the baseline, its first row. Extra peak is the",
        "growth of memory over one call, in a process of its own. % of floor is the least time the work could take",
        "(`soundwave_fast/cost_model.py`) over the median. On a CPU freed memory is kept, large tensors lie in huge",
        "pages, and the first case of an op alone has compiled rows (`bench/harness.py` says why).",
        "",
        *([] if any(is_gpu(path) for path in paths) else ["**No GPU row exists yet.**", ""]),
    ]
    block, kept = None, []
    for path in paths:
        machine, rows = load(path)
        fresh = [row for row in rows if not stale(machine["commit"], tuple(row["files"]))]
        gone = sorted({f"{row['op']} {row['variant']}" for row in rows if row not in fresh})
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        lines += [
            f"## {machine['device']}",
            "",
            f"Commit `{machine['commit']}`{' with uncommitted changes' if machine['dirty'] else ''}, "
            f"{machine['threads']} threads of {machine['cpu_count']}, {versions}. "
            f"`{' '.join(machine['command'])} --benchmark-json={name}`",
            "",
        ]
        if fresh:
            lines += [f"![{machine['device']}](results/{path.stem}.png)", ""]
        lines += table(fresh)
        if gone:
            lines += ["Refused, because the op has changed since: " + "; ".join(gone) + ".", ""]
        block = block or "\n".join(headline(machine, fresh, f"bench/results/{path.stem}_ours.png"))
        kept.append((path, machine, fresh))
    for path in sorted(SCALING.glob("*.json")):
        lines += scaling(path)[0]
    return "\n".join(lines), block, kept


def scaling(path: Path) -> tuple[list[str], list[dict]]:
    """RESULTS.md's section on a file of bench/sweep.py, and the points that still count."""
    document = json.loads(path.read_text())
    machine, points = document["machine"], document["points"]
    fresh = [point for point in points if not stale(point["commit"], tuple(point["files"]))]
    commits = ", ".join(sorted({f"`{point['commit']}`" for point in fresh}))
    lines = [
        f"## Scaling on {machine['device']}",
        "",
        f"Commit {commits}, {machine['threads']} threads, `python -m bench.sweep`.",
        "One dimension grows, the others stay at the shape of the tables above; time and memory grow with the power",
        "given, fitted on logarithmic axes.",
        "",
        "| op | along | provider | ms, least ... most | time ~ | extra peak MiB, least ... most | memory ~ |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, along in dict.fromkeys((point["op"], point["along"]) for point in fresh):
        here = [point for point in fresh if (point["op"], point["along"]) == (op, along)]
        values = f"{op} | {along} {min(p['value'] for p in here)} ... {max(p['value'] for p in here)}"
        for provider in (here[0]["baseline"], "ours"):
            line = sorted((p for p in here if p["provider"] == provider), key=lambda p: p["value"])
            grows = plots.exponent([(p["value"], p["seconds"]) for p in line])
            memory = plots.memory_points(line)
            peaks = f"{memory[0][1]:.0f} ... {memory[-1][1]:.0f}" if memory else ""
            power = f"{along}^{plots.exponent(memory):.2f}" if memory else ""
            times = f"{_ms(line[0]['seconds'])} ... {_ms(line[-1]['seconds'])}"
            lines.append(f"| {values} | {provider} | {times} | {along}^{grows:.2f} | {peaks} | {power} |")
            values = " | "
    gone = sorted({point["op"] for point in points if point not in fresh})
    if gone:
        lines += ["", "Refused, because the op has changed since: " + "; ".join(gone) + "."]
    for op in dict.fromkeys(point["op"] for point in fresh):
        lines += ["", f"![{op}](results/scaling/{path.stem}_{op.split()[0]}.png)"]
    return [*lines, ""], fresh


def is_gpu(path: Path) -> bool:
    return "cpu" not in path.name


def newest() -> list[Path]:
    """The newest results file of every device (names are <device>_<date>_<commit>.json), GPUs first."""
    latest: dict[str, Path] = {}
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: json.loads(path.read_text())["datetime"]):
        latest[path.name.split("_")[0]] = path
    return sorted(latest.values(), key=lambda path: (not is_gpu(path), path.name))


def with_block(readme: str, block: str) -> str:
    """README with the text between the two markers replaced."""
    if BEGIN not in readme or END not in readme:
        return readme
    before, rest = readme.split(BEGIN, 1)
    return before + BEGIN + "\n" + block + "\n" + END + rest.split(END, 1)[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    paths = [path.resolve() for path in args.files] or newest()
    if not paths:
        print("report: no results in bench/results; run pytest bench/ --benchmark-only --benchmark-json=FILE")
        return 2
    try:
        text, block, kept = compose(paths)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    wanted = {MARKDOWN: text, readme: with_block(readme.read_text(), block)}
    if args.check:
        wrong = [path.name for path, content in wanted.items() if not path.exists() or path.read_text() != content]
        if wrong:
            print(f"report: {', '.join(wrong)} differ from bench/results: run python -m bench.report")
        return int(bool(wrong))
    for path, content in wanted.items():
        path.write_text(content)
    for path, machine, rows in kept:
        if rows:
            plots.ratios(rows, machine, RESULTS / f"{path.stem}.png")
            plots.ratios([mine for mine, _ in ours(rows)], machine, RESULTS / f"{path.stem}_ours.png")
    for path in sorted(SCALING.glob("*.json")):
        if points := scaling(path)[1]:
            plots.scaling(points, json.loads(path.read_text())["machine"], path)
    print(f"wrote {MARKDOWN.relative_to(ROOT)}: {sum(len(rows) for _, _, rows in kept)} rows of {len(kept)} machines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
