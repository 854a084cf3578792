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


def table(rows: list[dict]) -> list[str]:
    """One table an op: ratio first, then absolute times, memory and share of the floor."""
    lines: list[str] = []
    by_op = defaultdict(list)
    for row in rows:
        by_op[row["op"]].append(row)
    for op, mine in by_op.items():
        lines += [f"### {op}", ""]
        lines += [
            "| case | provider | times faster than the baseline (low ... high) | p20 / p50 / p80 ms | extra peak MiB "
            "| % of floor |",
            "|---|---|---|---|---|---|",
        ]
        seen = None
        for row in mine:
            case = f"{row['variant']}, " + " ".join(f"{k} {v}" for k, v in row["shape"].items())
            label, seen = ("" if case == seen else case), case
            ratio = f"**{row['ratio']:.2f}** ({row['ratio_low']:.2f} ... {row['ratio_high']:.2f})"
            if row["provider"] == row["baseline"]:
                ratio = "baseline"
            times = " / ".join(_ms(row[name]) for name in ("p20", "p50", "p80"))
            floor = f"{100 * row['of_floor']:.0f} %" if "of_floor" in row else ""
            lines.append(f"| {label} | {row['provider']} | {ratio} | {times} | {_mib(row)} | {floor} |")
        lines.append("")
        notes = _notes(mine)
        lines += notes + [""] * bool(notes)
    return lines


def _notes(rows: list[dict]) -> list[str]:
    """A line a case that has a note, or where something is faster than ours."""
    cases = defaultdict(dict)
    for row in rows:
        cases[_case(row)][row["provider"]] = row
    lines = []
    for (_, variant, shape), providers in cases.items():
        mine = providers.get("ours")
        best = max(providers.values(), key=lambda row: row["ratio"])
        said = [row["note"] for row in providers.values() if row.get("note")][:1]
        if mine is not None and not best["provider"].startswith("ours"):
            said.insert(0, f"{best['provider']} takes {mine['ratio'] / best['ratio']:.2f} of our time")
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
    """A line a case for the README: ours against the baseline, in time and memory."""
    lines = [f"![ours against eager]({plot})", ""]
    lines += ["| op | case | times faster | extra peak MiB, ours / baseline | baseline |", "|---|---|---|---|---|"]
    for mine, baseline in ours(rows):
        memory = "" if baseline is None or not _mib(mine) else f"{_mib(mine)} / {_mib(baseline)}"
        case = f"{mine['variant']}, " + " ".join(f"{k} {v}" for k, v in mine["shape"].items())
        lines.append(f"| `{mine['op']}` | {case} | {mine['ratio']:.2f} | {memory} | {mine['baseline']} |")
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['versions'].get('torch', '?')}"
    note = "forward and backward but for `generate`; every row, with spread, peers and where ours is slower"
    return [*lines, "", f"Measured on {where}, commit `{machine['commit'][:7]}`: {note}: `bench/RESULTS.md`."]


def compose(paths: list[Path]) -> tuple[str, str | None, list[tuple[Path, dict, list[dict]]]]:
    """RESULTS.md's text, the README's block (of the first file) and the rows kept of each file."""
    lines = [
        "# Results",
        "",
        "Generated by `python -m bench.report` from the JSON files in `bench/results/`. All providers of a case were",
        "timed in turns in one process; the ratio is the median of the rounds' own ratios, with the lowest and the",
        "highest. Extra peak is the growth of memory over one call, in a process of its own. % of floor is the least",
        "time the work could take (`soundwave_fast/cost_model.py`) over the median.",
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
            f"`pytest bench/ --benchmark-only --benchmark-json={name}`",
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
    fresh = [point for point in points if not stale(machine["commit"], tuple(point["files"]))]
    lines = [
        f"## Scaling on {machine['device']}",
        "",
        f"Commit `{machine['commit']}`, {machine['threads']} threads, `python -m bench.sweep`.",
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
            memory = [(p["value"], max(p["extra_peak_mib"] or 0, 0.1)) for p in line]
            lines.append(
                f"| {values} | {provider} | {_ms(line[0]['seconds'])} ... {_ms(line[-1]['seconds'])} "
                f"| {along}^{grows:.2f} | {memory[0][1]:.0f} ... {memory[-1][1]:.0f} "
                f"| {along}^{plots.exponent(memory):.2f} |"
            )
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
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.name.split("_")[1:2]):
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
