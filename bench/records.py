"""What was measured, read back: rows of bench/results/*.json with date, commit and command, and what changed since.

A figure is a record. It is true of the commit it was taken at; a later change of the code neither removes nor forbids
it. What changed since is looked up in git when `python -m bench.report` writes (`look_at_changes`), kept beside the
figures in bench/results/changes.json, and shown; so rendering needs the committed files alone.
"""

from __future__ import annotations

import ast
import datetime
import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.harness import ROOT

RESULTS = ROOT / "bench" / "results"
AOT, CHANGES = "aot.json", "changes.json"  # in RESULTS, beside the files of pytest-benchmark
KERNELS = "csrc_triton/"


@dataclass(frozen=True)
class Run:
    """One call of `pytest bench/`, as its JSON file tells it."""

    path: Path
    time: str  # ISO 8601, UTC
    machine: dict

    @property
    def date(self) -> str:
        return self.time[:10]

    @property
    def device(self) -> str:
        """What stands before the first _ of the file's name: <device>_<date>_<commit>.json."""
        return self.path.name.split("_")[0]

    @property
    def is_gpu(self) -> bool:
        return "cpu" not in self.device

    @property
    def command(self) -> str:
        name = self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name
        return f"{' '.join(self.machine['command'])} --benchmark-json={name}"


def load(path: Path) -> tuple[Run, list[dict]]:
    """A pytest-benchmark JSON file: its run, and a row per case and provider.

    Returns:
        The run, and rows of `extra_info` with p20, p50, p80 in seconds, the test's name, date and commit.

    Raises:
        ValueError: the file is not one.
    """
    try:
        document = json.loads(path.read_text())
        run = Run(path, document["datetime"], document["machine_info"])
        entries = [entry for entry in document["benchmarks"] if "op" in entry["extra_info"]]
        return run, [_row(entry, run) for entry in entries]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a results file of pytest-benchmark ({error!r})") from None


def _quantile(ordered: list[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _row(entry: dict, run: Run) -> dict:
    samples = sorted(entry["stats"]["data"])
    times = {f"p{q}": _quantile(samples, q / 100) for q in (20, 50, 80)}
    measured = {"date": run.date, "commit": run.machine["commit"], "run": run}
    return {**entry["extra_info"], **times, **measured, "test": entry["fullname"]}


def case_of(row: dict) -> tuple:
    return row["op"], row["variant"], tuple(row["shape"].items())


def newest_of_each_case(paths: list[Path]) -> dict[str, list[dict]]:
    """Rows by device, GPUs first: of each case all providers of the newest run that has it.

    Providers are compared within a run, so a case is taken whole; a run of a few ops leaves the others' rows standing.

    Raises:
        ValueError: a file that is no results file.
    """
    devices: dict[str, dict[tuple, list[dict]]] = {}
    for run, rows in sorted(map(load, paths), key=lambda loaded: (loaded[0].time, loaded[0].path.name)):
        fresh: dict[tuple, list[dict]] = {}
        for row in rows:
            fresh.setdefault(case_of(row), []).append(row)
        devices.setdefault(run.device, {}).update(fresh)
    order = sorted(devices, key=lambda device: ("cpu" in device, device))
    return {device: [row for case in devices[device].values() for row in case] for device in order}


def result_files() -> list[Path]:
    """All files of pytest-benchmark in bench/results."""
    return sorted(path for path in RESULTS.glob("*.json") if path.name not in (AOT, CHANGES))


def aot_record() -> dict | None:
    """What `make aot` recorded last, or None."""
    path = RESULTS / AOT
    return json.loads(path.read_text()) if path.is_file() else None


# -- what changed since ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What the code was compared with, and when; and files whose code differs, per commit that figures were taken at.

    A commit that git did not know (a shallow checkout, figures from elsewhere) maps to None.
    """

    date: str
    commit: str
    dirty: bool
    files: dict[str, list[str] | None]

    def of(self, commit: str, files: list[str], kernels: bool = True) -> str:
        """What to say of a figure: "changed", "unknown", or "" where none of its files differs.

        Args:
            commit: what it was taken at.
            files: what it depends on; a folder stands for all in it.
            kernels: False for a figure taken on a CPU, which runs nothing of csrc_triton.
        """
        differing = self.files.get(commit)
        if differing is None:
            return "unknown" if self.date else ""
        folders = tuple(f"{name.rstrip('/')}/" for name in files)
        counting = [name for name in differing if kernels or not name.startswith(KERNELS)]
        return "changed" if any(name in files or name.startswith(folders) for name in counting) else ""


NOTHING_KNOWN = Changes("", "", False, {})


def changes() -> Changes:
    """What bench/results/changes.json says; nothing changed where there is no such file."""
    path = RESULTS / CHANGES
    return Changes(**json.loads(path.read_text())) if path.is_file() else NOTHING_KNOWN


def look_at_changes(figures: list[tuple[str, list[str]]]) -> Changes | None:
    """Compare the working tree with the commits that figures were taken at.

    Args:
        figures: (commit, files that the figure depends on) of each.

    Returns:
        What differs, or None where there is no repository to ask.
    """
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    wanted: dict[str, set[str]] = {}
    for commit, files in figures:
        wanted.setdefault(commit, set()).update(files)
    everything = tuple(sorted(set().union(*wanted.values())))
    found = {commit: changed(commit, tuple(sorted(files))) for commit, files in sorted(wanted.items())}
    return Changes(
        datetime.date.today().isoformat(),
        head.strip(),
        changed(head.strip(), everything) != (),
        {commit: None if names is None else list(names) for commit, names in found.items()},
    )


def write(changes: Changes) -> None:
    """Write bench/results/changes.json, all of it or nothing."""
    path = RESULTS / CHANGES
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(vars(changes), indent=1) + "\n")
    os.replace(temporary, path)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


@functools.cache
def changed(commit: str, files: tuple[str, ...]) -> tuple[str, ...] | None:
    """Those of the files whose code is not what it was at `commit`; comments, docstrings and layout do not count.

    Args:
        files: relative to the checkout; a folder stands for all in it. A file that is gone has changed.

    Returns:
        Names in order, or None where git does not know the commit.
    """
    listed = _git("diff", "--name-only", "--no-renames", commit, "--", *files)
    if listed is None:
        return None
    new = _git("ls-files", "--others", "--exclude-standard", "--", *files) or ""
    names = sorted({*listed.splitlines(), *new.splitlines()})
    return tuple(name for name in names if _code(_git("show", f"{commit}:{name}")) != _code(_now(name)))


def _now(name: str) -> str | None:
    path = ROOT / name
    return path.read_text() if path.is_file() else None


def _code(source: str | None) -> str | None:
    """What Python makes of a source, docstrings left out; another kind of file as it is."""
    if source is None:
        return None
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            body.pop(0)
    return ast.dump(tree)
