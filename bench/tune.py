"""Finds the fastest block sizes, warps and chunk widths on this chip, and writes the table that launchers read.

`python -m bench.tune [--only NAME ...] [--out DIR] [--table FILE] [--minutes M] [--dry-run]`. Every candidate is first
compiled in parallel processes, which drops those that spill or need more shared memory than there is and fills
Triton's cache; then its result is compared with the default's; then all are timed in turns. The best goes into the
table where it beats the default by more than 3 % in each of two repeats, else the default stays. "attention" is tried
on other backends, of which those that are not installed run as the default. DIR/tune.json holds all times after every
launcher, and the same command goes on from there. `--dry-run` does all of it on a CPU, with Triton's interpreter, tiny
shapes and one candidate each; its table is DIR/tuned.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path

import torch

from bench import harness
from bench.suite_tunables import TUNABLES, Fill, Sizes, Step, Tunable
from soundwave_fast.errors import ArgumentParser, run_command

GAIN = 1.03  # what a candidate must win by, twice
SCREENING, FINAL, FINALISTS = 5, 21, 3
TABLE = harness.ROOT / "csrc_triton" / "tuned.json"
REHEARSED = ("recursions, S 100", "rows of splice")  # what a rehearsal compiles ahead of time: it takes seconds each


class Keys(dict):
    """Entries of one kernel: `sizes` whatever key it asks for, and the keys it asked for. None: its default."""

    def __init__(self, sizes: Sizes | None) -> None:
        super().__init__()
        self.sizes, self.asked = sizes, []

    def get(self, key, default=None):
        self.asked.append(key)
        return self.sizes


def write(path: Path, document: dict) -> None:
    """JSON, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


# -- ahead of time -------------------------------------------------------------------------------------------------


def compiled_needs(tunable: Tunable, sizes: Sizes | None, target: str, tiny: bool) -> tuple[int, int]:
    """Most bytes of shared memory and most bytes spilled of what one step launches on `target`."""
    from bench import aot
    from csrc_triton import tuning

    fill = Fill(torch.device("cpu"), touch=False)
    with aot.compiling(target) as compiled, tuning.use_table({tunable.kernel: Keys(sizes)}):
        tunable.make(fill, **(tunable.tiny if tiny else tunable.shape))()
    kernels = [kernel for _, kernel in compiled.values()]
    try:
        spills = [aot._resources(kernel, target)[1] for kernel in kernels]
    except (OSError, subprocess.CalledProcessError, AttributeError):  # no assembler to ask: the clock will tell
        spills = []
    return max((kernel.metadata.shared for kernel in kernels), default=0), max(spills, default=0)


def refusal(name: str, sizes: Sizes, target: str, tiny: bool) -> str | None:
    """In a process of its own: why these sizes are not worth a try on the target, or None."""
    os.environ.pop("TRITON_INTERPRET", None)
    from bench import aot

    tunable = next(tunable for tunable in TUNABLES if tunable.name == name)
    try:
        _, usual = compiled_needs(tunable, None, target, tiny)
        shared, spills = compiled_needs(tunable, sizes, target, tiny)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    limit = aot.SHARED_BYTES[int(target[3:]) if target.startswith("sm_") else target]
    if shared > limit or spills > max(aot.SPILL_BYTES, usual):
        return f"{shared} bytes of shared memory, {spills} spilled"
    return None


class Pruning:
    """Compiles candidates in the background, in the order in which they will be wanted."""

    def __init__(self, pool: ProcessPoolExecutor | None, target: str, tiny: bool) -> None:
        self.pool, self.target, self.tiny = pool, target, tiny
        self.futures: dict[tuple[str, int], Future] = {}

    def start(self, tunable: Tunable, candidates: tuple[Sizes, ...]) -> None:
        rehearsed = not self.tiny or tunable.name in REHEARSED
        if self.pool is not None and tunable.compiles and rehearsed:
            for i, sizes in enumerate(candidates):
                self.futures[tunable.name, i] = self.pool.submit(refusal, tunable.name, sizes, self.target, self.tiny)

    def refused(self, tunable: Tunable, i: int) -> str | None:
        future = self.futures.get((tunable.name, i))
        if future is None:
            return None
        try:
            return future.result(timeout=180)
        except Exception as error:  # a worker that died says nothing about the sizes: they are tried
            print(f"tune: {tunable.name}: not compiled ahead of time ({type(error).__name__})", file=sys.stderr)
            return None


# -- one launcher --------------------------------------------------------------------------------------------------


def difference(ours: tuple, usual: tuple) -> float:
    """Largest difference relative to the default's largest value; infinite where NaN or inf sits elsewhere."""
    worst = 0.0
    for x, y in zip(ours, usual, strict=True):
        if x.shape != y.shape:
            return float("inf")
        x, y = x.double(), y.double()
        finite = y.isfinite()
        if not torch.equal(x.isfinite(), finite):
            return float("inf")
        if finite.any():
            x, y = x[finite], y[finite]
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)))
    return worst


def poison(results: tuple) -> None:
    """Leave NaN in memory of the results' sizes, so that an element nobody writes is seen."""
    blocks = [torch.full_like(x, float("nan") if x.is_floating_point() else 77) for x in results]
    del blocks


class Contest:
    """The default and its candidates for one launcher, on the same inputs."""

    def __init__(self, tunable: Tunable, where: torch.device, tiny: bool, so_far: dict) -> None:
        self.tunable, self.so_far = tunable, so_far
        torch.manual_seed(0)
        with self.using(None) as keys:
            self.step: Step = tunable.make(Fill(where), **(tunable.tiny if tiny else tunable.shape))
            keys.asked.clear()
            self.usual = self.step()
        self.key: str = keys.asked[0]
        self.flush = torch.empty(harness.FLUSH_BYTES, dtype=torch.int8, device=where) if where.type == "cuda" else None

    def using(self, sizes: Sizes | None) -> AbstractContextManager[Keys]:
        from contextlib import contextmanager

        from csrc_triton import tuning

        @contextmanager
        def inside():
            keys = Keys(sizes)
            with tuning.use_table({**self.so_far, self.tunable.kernel: keys}):
                yield keys

        return inside()

    def objection(self, sizes: Sizes) -> str | None:
        """Why a candidate is out: it does not run, or computes something else."""
        try:
            with self.using(sizes):
                poison(self.usual)
                results = self.step()
                far = difference(results, self.usual)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]
        return None if far <= self.tunable.budget else f"differs from the default's result by {far:.3g}"

    def times(self, contenders: dict[str, Sizes | None], rounds: int) -> dict[str, list[float]]:
        """Seconds of all contenders, timed in turns."""
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for round_ in range(1 + rounds):
            for name, sizes in contenders.items():
                with self.using(sizes):
                    clock = harness._clock_cpu(self.step) if self.flush is None else self._cuda()
                if round_:
                    seconds[name].append(clock)
        return seconds

    def _cuda(self) -> float:
        return harness._clock_cuda(self.step, self.flush)


def tune(contest: Contest, candidates: dict[str, Sizes], rehearsal: bool) -> dict:
    """{best or None, gain, milliseconds by contender}: a screening of all, then two finals of the best few."""
    middle = statistics.median
    screening, final = (1, 1) if rehearsal else (SCREENING, FINAL)
    first = contest.times({"default": None, **candidates}, screening)
    order = sorted(candidates, key=lambda name: middle(first[name]))[:FINALISTS]
    finals = [
        contest.times({"default": None, **{name: candidates[name] for name in order}}, final) for _ in range(2)
    ]  # fmt: skip
    gains = {name: min(middle(run["default"]) / middle(run[name]) for run in finals) for name in order}
    best = max(gains, key=gains.get, default=None)
    wins = best is not None and gains[best] > GAIN
    return {
        "winner": candidates[best] if wins else None,
        "gain": gains[best] if best is not None else 1.0,
        "default_ms": 1e3 * min(middle(run["default"]) for run in finals),
        "best_ms": 1e3 * min(middle(run[best]) for run in finals) if best is not None else None,
        "screening_ms": {name: 1e3 * middle(samples) for name, samples in first.items()},
    }


# -- all of them ---------------------------------------------------------------------------------------------------


def label(sizes: Sizes) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')} {value}" for name, value in sizes.items())


def run(todo: list[Tunable], log: Path, table: Path, args: argparse.Namespace, chip: str) -> None:
    """Tune one after the other; the log and the table are written after each."""
    where, started = harness.device(), time.monotonic()
    document = read(log)
    pool = None if args.no_prune else ProcessPoolExecutor(max(args.jobs, 1), get_context("spawn"))
    pruning = Pruning(pool, chip, args.dry_run)
    offered = {tunable.name: tunable.candidates[: 1 if args.dry_run else None] for tunable in todo}
    for tunable in todo:
        pruning.start(tunable, offered[tunable.name])
    try:
        for tunable in todo:
            if time.monotonic() - started > 60 * args.minutes:
                print(f"tune: {args.minutes:g} minutes are over; the same command goes on with {tunable.name}")
                return
            crashed = document.get("trying", {}) if document.get("trying", {}).get("name") == tunable.name else {}
            contest = Contest(tunable, where, args.dry_run, read(table).get(chip, {}))
            out, good = dict(crashed.get("out", {})), {}
            if crashed:
                out[crashed["sizes"]] = "ended the process that tried it"
            for i, sizes in enumerate(offered[tunable.name]):
                if label(sizes) in out:
                    continue
                document["trying"] = {"name": tunable.name, "sizes": label(sizes), "out": out}
                write(log, document)
                reason = pruning.refused(tunable, i) or contest.objection(sizes)
                if reason and "CUDA error" in reason:
                    raise SystemExit(f"tune: {tunable.name}, {label(sizes)}: {reason}; run the same command again")
                if reason:
                    out[label(sizes)] = reason
                else:
                    good[label(sizes)] = sizes
            result = tune(contest, good, args.dry_run)
            result.update(kernel=tunable.kernel, key=contest.key, out=out, shape=tunable.shape)
            document.pop("trying", None)
            document.setdefault("results", {})[tunable.name] = result
            _enter(table, chip, tunable.kernel, contest.key, result["winner"])
            write(log, document)
            verdict = label(result["winner"]) if result["winner"] else "default stays"
            print(f"{tunable.name:45} {result['default_ms']:9.4f} ms  x{result['gain']:.2f}  {verdict}", flush=True)
            del contest
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _enter(path: Path, chip: str, kernel: str, key: str, winner: Sizes | None) -> None:
    """Put a winner into the table, or take out what stood there."""
    tables = read(path)
    entries = tables.setdefault(chip, {}).setdefault(kernel, {})
    if winner is None:
        entries.pop(key, None)
    else:
        entries[key] = winner
    tables[chip] = {name: entries for name, entries in tables[chip].items() if entries}
    write(path, {name: entries for name, entries in tables.items() if entries})


def _command(argv: list[str]) -> None:
    names = [tunable.name for tunable in TUNABLES]
    parser = ArgumentParser(prog="bench.tune", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of: {'; '.join(names)}")
    parser.add_argument("--out", type=Path, default=harness.ROOT / "runs" / "tune", metavar="DIR")
    parser.add_argument("--table", type=Path, metavar="FILE", help=f"default {TABLE.relative_to(harness.ROOT)}")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further launcher after so long")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="compiling processes")
    parser.add_argument("--no-prune", action="store_true", help="compile nothing ahead of time")
    parser.add_argument("--again", action="store_true", help="measure what DIR/tune.json has already, too")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU")
    args = parser.parse_args(argv)
    on_gpu = harness.device().type == "cuda"
    if not on_gpu and not args.dry_run:
        parser.error("there is no GPU to tune for; --dry-run rehearses on a CPU")
    if on_gpu and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 would time the interpreter; unset it")
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from csrc_triton.launch import chip
    from soundwave_fast.ops.backend import use_backend

    table = args.table or (args.out / "tuned.json" if args.dry_run else TABLE)
    log = args.out / "tune.json"
    document = {} if args.again else read(log)
    place = {"chip": chip(), "device": torch.cuda.get_device_name() if on_gpu else "interpreter"}
    if document.get("place", place) != place:
        parser.error(f"{log} is of {document['place']['device']}; give another --out, or --again")
    write(log, {**document, "place": place})
    done = document.get("results", {})
    todo = [t for t in TUNABLES if t.name not in done and (not args.only or t.name in args.only)]
    with use_backend("triton"):
        run(todo, log, table, args, chip())
    results = read(log).get("results", {})
    won = sum(result["winner"] is not None for result in results.values())
    print(f"tuned {len(results)} of {len(TUNABLES)} launchers, {won} beat their default; table {table}")


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("tune", _command, argv, interrupted="interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
