"""RESULTS.md, its plots and the README's table, generated from bench/results/*.json; nothing in them is typed by hand.

`python -m bench.report` looks up which ops have changed since they were measured (bench/results/changes.json), then
writes. Nothing is dropped: a row whose op has changed says so. `--check` writes nothing, looks at no code, and exits
with 1 if the committed pages are not what the committed JSON gives.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from bench import kernel_tables, plots, records
from bench.harness import ROOT
from bench.records import RESULTS, Changes, Run, case_of
from soundwave_fast.errors import ArgumentParser, run_command

SCALING = RESULTS / "scaling"  # bench/sweep.py's
MARKDOWN = ROOT / "bench" / "RESULTS.md"
KERNELS = RESULTS / "aot.md"
BEGIN, END = "<!-- results: begin (python -m bench.report) -->", "<!-- results: end -->"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _mib(row: dict) -> str:
    return "" if row.get("extra_peak_mib") is None else f"{row['extra_peak_mib']:.0f}"


def _times_faster(row: dict, kind: str) -> str:
    """ "1.50 (1.40 ... 1.60)" against the fastest eager row ("eager_") or the baseline ("")."""
    low, high = (row[f"{kind or 'ratio_'}{end}"] for end in ("low", "high"))
    return f"{row[f'{kind}ratio']:.2f} ({low:.2f} ... {high:.2f})"


def _measured(date: str, commit: str) -> str:
    return f"{date}, `{commit[:7]}`"


def _since(changes: Changes, row: dict) -> str:
    return changes.of(row["commit"], row["files"], row["run"].is_gpu)


def table(rows: list[dict], runs: dict[Path, int], changes: Changes) -> list[str]:
    """One table per op: ratios first, then times, memory, share of the floor, and when and how it was measured.

    Args:
        rows: of one device, as `records.newest_of_each_case` gives them.
        runs: number of each run, by its file.
    """
    lines: list[str] = []
    by_op = defaultdict(list)
    for row in rows:
        by_op[row["op"]].append(row)
    for op, mine in sorted(by_op.items()):
        files = " ".join(dict.fromkeys(row["test"].split("::")[0] for row in mine))
        lines += [f"### {op}", "", f"Measured again by `pytest {files} --benchmark-only`.", ""]
        lines += [
            "| case | provider | times faster than the fastest eager row | than the baseline | p20 / p50 / p80 ms "
            "| extra peak MiB | % of floor | measured | run | changed since? |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        seen = None
        for row in mine:
            case = f"{row['variant']}, " + " ".join(f"{k} {v}" for k, v in row["shape"].items())
            label, seen = ("" if case == seen else case), case
            eager = "fastest eager" if row["provider"] == row["eager"] else f"**{_times_faster(row, 'eager_')}**"
            ratio = "baseline" if row["provider"] == row["baseline"] else _times_faster(row, "")
            times = " / ".join(_ms(row[name]) for name in ("p20", "p50", "p80"))
            floor = f"{100 * row['of_floor']:.0f} %" if "of_floor" in row else ""
            when = _measured(row["date"], row["commit"])
            run, since = f"[{runs[row['run'].path]}](#runs)", _since(changes, row)
            lines.append(
                f"| {label} | {row['provider']} | {eager} | {ratio} | {times} | {_mib(row)} | {floor} "
                f"| {when} | {run} | {since} |"
            )
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
    """A line per case that has a note, or where something is faster than ours; and the rates of generation."""
    cases = defaultdict(dict)
    for row in rows:
        cases[case_of(row)][row["provider"]] = row
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
        cases[case_of(row)][row["provider"]] = row
    for (op, variant, _), providers in cases.items():
        mine = providers.get("ours")
        if mine is not None:
            found.setdefault((op, variant), (mine, providers.get(mine["baseline"])))
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def headline(device: str, rows: list[dict], changes: Changes) -> list[str]:
    """A line per case for the README: ours against the fastest eager code and the baseline, in time and memory."""
    lines = [f"![ours against eager](bench/results/{device}_ours.png)", ""]
    lines += [
        "| op | case | times faster than the fastest eager code | than the baseline | MiB, ours / baseline "
        "| measured |",
        "|---|---|---|---|---|---|",
    ]
    for mine, baseline in ours(rows):
        memory = "" if baseline is None or not _mib(mine) else f"{_mib(mine)} / {_mib(baseline)}"
        case = f"{mine['variant']}, " + " ".join(f"{k} {v}" for k, v in mine["shape"].items())
        eager, than = f"**{mine['eager_ratio']:.2f}** ({mine['eager']})", f"{mine['ratio']:.2f} ({mine['baseline']})"
        since = {"changed": "; op changed since", "unknown": "; whether it changed is unknown"}
        when = _measured(mine["date"], mine["commit"]) + since.get(_since(changes, mine), "")
        lines.append(f"| `{mine['op']}` | {case} | {eager} | {than} | {memory} | {when} |")
    machines = [run.machine for run in {row["run"].path: row["run"] for row in rows}.values()]
    names = (f"{m['device']}, {m['threads']} threads, torch {m['versions'].get('torch', '?')}" for m in machines)
    where = "; ".join(dict.fromkeys(names))
    note = "forward and backward but for hearing, `linear_argmax` and `generate`; every row, with command, spread,"
    note += " peers and where ours is slower"
    lines += ["", f"Measured on {where}: {note}: [bench/RESULTS.md](bench/RESULTS.md)."]
    points = SCALING / f"{'cuda' if 'cuda' in machines[0] else 'cpu'}.json"
    if points.exists():  # its plots are drawn after this
        picture = points.with_name(f"{points.stem}_linear_ctc_loss.png").relative_to(ROOT)
        lines += ["", f"![linear_ctc_loss as T, B, V and D grow]({picture})"]
    return lines


def _runs(runs: list[Run]) -> list[str]:
    """The runs that the rows come from: machine, versions and the whole command of each."""
    lines = ["## Runs", "", "| run | date | commit | machine | versions | command |", "|---|---|---|---|---|---|"]
    for number, run in enumerate(runs, 1):
        machine = run.machine
        commit = f"`{machine['commit']}`{' with uncommitted changes' if machine['dirty'] else ''}"
        where = f"{machine['device']}, {machine['threads']} threads of {machine['cpu_count']}"
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        lines.append(f"| {number} | {run.date} | {commit} | {where} | {versions} | `{run.command}` |")
    return [*lines, ""]


def compose(paths: list[Path], changes: Changes) -> tuple[str, str | None, dict[str, list[dict]]]:
    """Everything that is shown of pytest-benchmark's files.

    Args:
        paths: the files; of each case the newest counts.
        changes: what to say of ops that changed.

    Returns:
        RESULTS.md's text, the README's block (of the first device, GPUs first) and the rows of each device.

    Raises:
        ValueError: a file that is no results file.
    """
    devices = records.newest_of_each_case(paths)
    runs = list({row["run"].path: row["run"] for rows in devices.values() for row in rows}.values())
    numbers = {run.path: number for number, run in enumerate(runs, 1)}
    dirty = " with uncommitted changes" if changes.dirty else ""
    looked = f" Compared with {_measured(changes.date, changes.commit)}{dirty}." if changes.date else ""
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
        "A figure is a record of its commit. Where code that it depends on is another now (comments aside), the last",
        f"column says so: the figure stands, but was not measured on today's code.{looked}",
        "",
        *([] if any(run.is_gpu for run in runs) else ["**No GPU row exists yet.**", ""]),
        *_runs(runs),
    ]
    block = None
    for device, rows in devices.items():
        title = f"{rows[0]['run'].machine['device']}"
        lines += [f"## {title}", "", f"![{title}](results/{device}.png)", ""]
        lines += table(rows, numbers, changes)
        block = block or "\n".join(headline(device, rows, changes))
    for path in sorted(SCALING.glob("*.json")):
        lines += scaling(path, changes)
    if (document := records.aot_record()) is not None:
        lines += compiled(document, changes)
    return "\n".join(lines), block, devices


def scaling(path: Path, changes: Changes) -> list[str]:
    """RESULTS.md's section on a file of bench/sweep.py."""
    document = json.loads(path.read_text())
    machine, points = document["machine"], document["points"]
    lines = [
        f"## Scaling on {machine['device']}",
        "",
        f"{machine['threads']} threads, `python -m bench.sweep`.",
        "One dimension grows, the others stay at the shape of the tables above; time and memory grow with the power",
        "given, fitted on logarithmic axes.",
        "",
        "| op | along | provider | ms, least ... most | time ~ | extra peak MiB, least ... most | memory ~ | measured "
        "| changed since? |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for op, along in dict.fromkeys((point["op"], point["along"]) for point in points):
        here = [point for point in points if (point["op"], point["along"]) == (op, along)]
        values = f"{op} | {along} {min(p['value'] for p in here)} ... {max(p['value'] for p in here)}"
        when = "; ".join(dict.fromkeys(_measured(p["date"], p["commit"]) for p in here))
        since = max(changes.of(p["commit"], p["files"], "cuda" in machine) for p in here)  # "", "changed", "unknown"
        for provider in (here[0]["baseline"], "ours"):
            line = sorted((p for p in here if p["provider"] == provider), key=lambda p: p["value"])
            grows = plots.exponent([(p["value"], p["seconds"]) for p in line])
            memory = plots.memory_points(line)
            peaks = f"{memory[0][1]:.0f} ... {memory[-1][1]:.0f}" if memory else ""
            power = f"{along}^{plots.exponent(memory):.2f}" if memory else ""
            times = f"{_ms(line[0]['seconds'])} ... {_ms(line[-1]['seconds'])}"
            lines.append(
                f"| {values} | {provider} | {times} | {along}^{grows:.2f} | {peaks} | {power} | {when} | {since} |"
            )
            values = " | "
    for op in dict.fromkeys(point["op"] for point in points):
        lines += ["", f"![{op}](results/scaling/{path.stem}_{op.split()[0]}.png)"]
    return [*lines, ""]


def compiled(document: dict, changes: Changes) -> list[str]:
    """RESULTS.md's section on bench/aot.py's record."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    since = changes.of(document["commit"], document["files"]) == "changed"
    commit = _measured(document["date"], document["commit"]) + " with uncommitted changes" * document["dirty"]
    return [
        "## Kernels compiled ahead of time",
        "",
        f"{commit}, {versions}, `{document['command']}`"
        f"{'; kernels have changed since' if since else ''}. Compiled, not run: no chip is needed for it. Every kernel",
        "and variant is in [results/aot.md](results/aot.md).",
        "",
        *kernel_tables.summary(document),
        "",
    ]


def with_block(readme: str, block: str) -> str:
    """README with the text between the two markers replaced."""
    if BEGIN not in readme or END not in readme:
        return readme
    before, rest = readme.split(BEGIN, 1)
    return before + BEGIN + "\n" + block + "\n" + END + rest.split(END, 1)[1]


def _figures(paths: list[Path]) -> list[tuple[str, list[str]]]:
    """(commit, files) of every figure there is."""
    found = [(row["commit"], row["files"]) for rows in records.newest_of_each_case(paths).values() for row in rows]
    for path in SCALING.glob("*.json"):
        found += [(point["commit"], point["files"]) for point in json.loads(path.read_text())["points"]]
    if (document := records.aot_record()) is not None:
        found.append((document["commit"], document["files"]))
    return found


def _pages(paths: list[Path], changes: Changes) -> tuple[dict[Path, str], dict[str, list[dict]]]:
    """Text of every generated page, by its path, and the rows of each device."""
    text, block, devices = compose(paths, changes)
    readme = ROOT / "README.md"
    pages = {MARKDOWN: text, readme: with_block(readme.read_text(), block or "")}
    if (document := records.aot_record()) is not None:
        pages[KERNELS] = kernel_tables.table(document)
    return pages, devices


def _body(argv: list[str]) -> int:
    parser = ArgumentParser(prog="bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="[all of bench/results]")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would change")
    args = parser.parse_args(argv)
    paths = [path.resolve() for path in args.files] or records.result_files()
    if not paths:
        print("report: no results in bench/results; run pytest bench/ --benchmark-only --benchmark-json=FILE")
        return 2
    if args.check:
        pages, _ = _pages(paths, records.changes())
        wrong = [path.name for path, content in pages.items() if not path.exists() or path.read_text() != content]
        if wrong:
            print(f"report: {', '.join(wrong)} differ from bench/results: run python -m bench.report")
        return int(bool(wrong))
    found = records.look_at_changes(_figures(paths))
    if found is None:
        print("report: git cannot say what has changed since; changes.json stays as it was", file=sys.stderr)
    changes = found or records.changes()
    pages, devices = _pages(paths, changes)
    if found is not None:
        records.write(found)
    for path, content in pages.items():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(content)
        os.replace(temporary, path)
    for device, rows in devices.items():
        commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in rows))
        title = f"{rows[0]['run'].machine['device']}, commit {commits}"
        plots.ratios(rows, title, RESULTS / f"{device}.png")
        plots.ratios([mine for mine, _ in ours(rows)], title, RESULTS / f"{device}_ours.png")
    for path in sorted(SCALING.glob("*.json")):
        document = json.loads(path.read_text())
        if document["points"]:
            plots.scaling(document["points"], document["machine"], path)
    print(f"wrote {MARKDOWN.relative_to(ROOT)}: {sum(map(len, devices.values()))} rows of {len(devices)} machines")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s, or 1 where `--check` finds a difference."""
    return run_command("report", _body, argv)


if __name__ == "__main__":
    sys.exit(main())
