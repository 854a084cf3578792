"""How cost grows with the work: time and peak memory against T, B, V, D and S, into a JSON file and a log-log plot.

`python -m bench.sweep [--only OP ...] [--rounds N]` walks the SWEEP of every bench module (one dimension changes, the
others stay at BASE), writes bench/results/scaling/<device>.json after every point, so that it can be stopped and given
again, and draws <device>_<op>.png beside it. `python -m bench.report` puts the plots and the exponents in RESULTS.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import re
import statistics
import sys
from pathlib import Path

from tqdm import tqdm

from bench import harness, plots, records
from bench.conformance import nonconforming
from bench.machine import describe_machine
from soundwave_fast import cost_model
from soundwave_fast.errors import ArgumentParser, run_command

RESULTS = harness.ROOT / "bench" / "results" / "scaling"


def modules() -> list[str]:
    """Names of the bench modules that have something to sweep."""
    names = sorted(path.stem for path in (harness.ROOT / "bench").glob("bench_*.py"))
    return [f"bench.{name}" for name in names if hasattr(importlib.import_module(f"bench.{name}"), "SWEEP")]


def _points(module: str, along: str, value: int, case: harness.Case, memory: bool, machine: dict) -> list[dict]:
    """The providers at one value.

    Raises:
        ValueError: a provider's results are not the baseline's.
    """
    measured = harness.measure(case)
    for provider, difference in measured.difference.items():
        if difference > case.budget:
            raise ValueError(f"{case.op} {case.id}: {provider} differs from the baseline by {difference:.3g}")
    chip = harness.chip()
    floor = None
    if case.cost is not None and chip is not None and case.dtype in chip.flops:
        floor = cost_model.floor_seconds(case.cost, chip, case.dtype)
    return [
        {
            "op": f"{case.op} {case.variant}",
            "date": datetime.date.today().isoformat(),
            "commit": machine["commit"],
            "versions": machine["versions"],
            "files": case.files,
            "baseline": next(iter(measured.seconds)),
            "along": along,
            "value": value,
            "provider": provider,
            "seconds": statistics.median(samples),
            "floor_seconds": floor,
            "extra_peak_mib": harness.extra_peak(module, case, provider)
            if memory and harness.has_memory_row(provider)
            else None,
        }
        for provider, samples in measured.seconds.items()
    ]


def _write(path: Path, document: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def _file(folder: Path, machine: dict) -> Path:
    """<type>.json, or <type>-<name of the device>.json where the first holds another device's points."""
    path = folder / f"{harness.device().type}.json"
    if path.exists():
        other = json.loads(path.read_text())["machine"]
        if any(other[key] != machine[key] for key in ("device", "threads")):
            name = f"{machine['device']} {machine['threads']} threads"
            return folder / f"{path.stem}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    return path


def _key(point: dict) -> tuple:
    return point["op"], point["along"], point["value"]


def _still_holds(point: dict, machine: dict, memory: bool) -> bool:
    """Whether a point need not be measured again: same code, same versions, and its memory is known if wanted."""
    files = [name for name in point["files"] if "cuda" in machine or name.rstrip("/") + "/" != records.KERNELS]
    if point.get("versions") != machine["versions"] or records.changed(point["commit"], tuple(files)) != ():
        return False
    return not memory or point["extra_peak_mib"] is not None or not harness.has_memory_row(point["provider"])


def _run(argv: list[str]) -> int:
    parser = ArgumentParser(prog="bench.sweep", description=__doc__)
    names = modules()
    parser.add_argument("--only", nargs="+", choices=[name.removeprefix("bench.bench_") for name in names])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-conformance", action="store_true", help="do not run the ops' tests first")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    machine = describe_machine()
    args.out.mkdir(parents=True, exist_ok=True)
    path = _file(args.out, machine)
    # Points whose op has changed stay until they are measured again, so that one call may be about one op.
    document = {"machine": machine, "points": json.loads(path.read_text())["points"] if path.exists() else []}
    wanting = {_key(p) for p in document["points"] if not _still_holds(p, machine, not args.no_memory)}
    done = set(map(_key, document["points"])) - wanting
    todo = [
        (name, along, value, dataclasses.replace(case, rounds=args.rounds))
        for name in names
        if not args.only or name.removeprefix("bench.bench_") in args.only
        for along, value, case in harness.sweep_cases(importlib.import_module(name))
        if (f"{case.op} {case.variant}", along, value) not in done
    ]
    if not args.no_conformance:
        for said in filter(None, nonconforming([case for _, _, _, case in todo]).values()):
            print(f"sweep: {said}", file=sys.stderr)
            return 1
    try:
        for name, along, value, case in tqdm(todo, unit="point", disable=not sys.stderr.isatty()):
            new = _points(name, along, value, case, not args.no_memory, machine)
            document["points"] = [p for p in document["points"] if _key(p) != _key(new[0])] + new
            _write(path, document)
    except ValueError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 1
    pictures = plots.scaling(document["points"], machine, path)
    print(f"wrote {path} and {len(pictures)} plots beside it: {len(document['points'])} points")
    return 0


def main(argv: list[str] | None = None) -> int:
    """0; 1 where an op's results are wrong; else the exit code is `run_command`'s."""
    return run_command("sweep", _run, argv, interrupted="interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
