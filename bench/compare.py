"""Two commits side by side: the same benchmarks run in turns from two checkouts, with the ratio and its spread.

`python -m bench.compare OLD [NEW] [-k EXPRESSION] [--repeats N]`; NEW defaults to the working tree. The bench files are
those of the working tree in both columns, so only the ops differ. Nothing is judged: noise is shown, not hidden.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from bench.harness import ROOT
from soundwave_fast.errors import ArgumentParser, run_command


def _checkout(commit: str, folder: Path) -> Path:
    """A worktree of `commit` with this tree's bench/ in it.

    Raises ValueError for an unknown commit.
    """
    done = subprocess.run(
        ["git", "worktree", "add", "--detach", str(folder), commit], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{commit}: {done.stderr.strip().splitlines()[-1]}")
    shutil.rmtree(folder / "bench", ignore_errors=True)
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _run(tree: Path, expression: str, scratch: Path) -> dict[str, float]:
    """Median seconds of our provider in every selected row of one checkout."""
    target = scratch / "rows.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", f"--benchmark-json={target}", "-q"]
    command += ["--no-memory", "--no-conformance", "-p", "no:cacheprovider", "--rootdir", str(tree)]
    command += ["-k", f"ours and ({expression})" if expression else "ours"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(tree)  # before the installed package
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if not target.exists():
        raise ValueError(f"{tree.name}: {(done.stdout + done.stderr).strip()[-800:]}")
    rows = json.loads(target.read_text())["benchmarks"]
    return {row["name"]: row["stats"]["median"] for row in rows}


def _compare(argv: list[str]) -> None:
    parser = ArgumentParser(prog="bench.compare", description=__doc__)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", nargs="?", metavar="NEW")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="rows to run, as pytest's -k")
    parser.add_argument("--repeats", type=int, default=3, help="turns of old, new (default 3)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    scratch = Path(tempfile.mkdtemp(prefix="bench-compare-"))
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        old = _checkout(args.old, scratch / "old")
        new = _checkout(args.new, scratch / "new") if args.new else ROOT
        for turn in range(args.repeats):
            print(f"turn {turn + 1} of {args.repeats}", file=sys.stderr, flush=True)
            before, after = _run(old, args.k, scratch), _run(new, args.k, scratch)
            for name in before.keys() & after.keys():
                samples[name].append((before[name], after[name]))
    finally:
        for name in ("old", "new"):
            subprocess.run(["git", "worktree", "remove", "--force", str(scratch / name)], cwd=ROOT, capture_output=True)
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{'old ms':>10} {'new ms':>10} {'old/new':>8}  low ... high  row")
    for name, pairs in sorted(samples.items()):
        ratios = sorted(before / after for before, after in pairs)
        old_ms, new_ms = (1e3 * statistics.median(column) for column in zip(*pairs))
        middle = statistics.median(ratios)
        print(f"{old_ms:10.3f} {new_ms:10.3f} {middle:8.2f}  {ratios[0]:.2f} ... {ratios[-1]:.2f}  {name}")


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("compare", _compare, argv)


if __name__ == "__main__":
    sys.exit(main())
