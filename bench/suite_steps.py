"""The steps of bench/gpu_suite.py: what each runs, how long it may take, and the lines it adds to the summary.

Every step is a process of its own and leaves files in the suite's folder; a summary reads whatever is there.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.suite_tunables import TUNABLES

OPS = ("ctc_loss", "linear_ctc_loss", "linear_argmax", "peak_gather", "splice", "varlen_cross_attention")
ADAPTERS = ("alignment_adapter", "shrinking_adapter")
MODELS = ("adapters", "train_step", "generate")  # hold an 8B model
TESTS = {
    "truth": (["tests/gpu/test_truth.py"], 5.0),
    "behaviour": (["tests/gpu/test_behaviour.py"], 4.0),
    "ranks": (["tests/gpu/test_ranks.py"], 1.5),
    "ops": (["tests/ops", "tests/model"], 4.0),
    "conformance": (["tests/ops"], 6.0),  # all tests of the ops, most of which a CPU runs as well
    "sanitizers": (["tests/gpu/test_sanitizers.py"], 8.0),
}


@dataclass(frozen=True)
class Step:
    """One process. `minutes` is the most it may take; `stage` what --stages selects.

    A step with several `tries` goes on where it failed: the tuner, whose candidates may take the process with them.
    """

    stage: int
    name: str
    command: tuple[str, ...]
    minutes: float
    tries: int = 1


def steps(out: Path, rehearsal: bool) -> list[Step]:
    """All steps in the order they run: what others stand on first, what takes longest for one fact last."""
    python = sys.executable
    dry = ("--dry-run",) if rehearsal else ()
    found = [Step(1, "ceilings", (python, "-m", "bench.ceilings", "--out", f"{out}/ceilings.json", *dry), 3.0)]
    for name in ("truth", "behaviour", "ranks", *(() if rehearsal else ("ops",))):
        found.append(_tests(name, out))
    found += _rehearsed_benches(out) if rehearsal else [_bench((name,), name, out) for name in (*OPS, *ADAPTERS)]
    for stage in (1, 2, 3):
        command = (python, "-m", "bench.profile_step", "--stage", str(stage), "--out", f"{out}/train_stage{stage}.json")
        found.append(
            Step(3, f"train step, stage {stage}", (*command, *dry, *(("--steps", "1") if rehearsal else ())), 4.0)
        )
    if not rehearsal:
        found += [_bench((name,), name, out) for name in MODELS]
    tune = (python, "-m", "bench.tune", "--out", f"{out}/tune", "--minutes", "7", *dry)
    found.append(Step(4, "tune", tune + (("--jobs", "1") if rehearsal else ()), 9.0, tries=3))
    if not rehearsal:
        found += [_tests("conformance", out, "not slow and not gpu"), _tests("sanitizers", out)]
    return found


def _tests(name: str, out: Path, marked: str = "gpu") -> Step:
    where, minutes = TESTS[name]
    command = (sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", "--maxfail=40")
    more = ("--continue-on-collection-errors", f"--junitxml={out}/tests_{name}.xml", "-o", "junit_family=xunit2")
    return Step(2, f"tests: {name}", (*command, *more, *where), minutes)


def _bench(modules: tuple[str, ...], name: str, out: Path, *more: str) -> Step:
    files = [f"bench/bench_{module}.py" for module in modules]
    command = (sys.executable, "-m", "pytest", *files, "-q", "--benchmark-only", "--no-conformance")
    json_file = f"--benchmark-json={out}/bench_{name}.json"
    minutes = 6.0 if name in MODELS else 4.0  # what is compiled there takes a minute each
    return Step(3, f"bench: {name}", (*command, "-p", "no:cacheprovider", json_file, *more), minutes)


def _rehearsed_benches(out: Path) -> list[Step]:
    small = ("--no-memory", "-p", "bench.suite_rehearsal")
    return [_bench((*OPS, *ADAPTERS), "ops", out, *small), _bench(MODELS, "models", out, *small)]


# -- the summary ---------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict:
    """A JSON file; {} where it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def merged(out: Path) -> dict:
    """All rows of the bench steps as one results file of pytest-benchmark, which bench/report.py reads."""
    whole: dict = {}
    for path in sorted(out.glob("bench_*.json")):
        part = _read(path)
        if part:
            whole = whole or {**part, "benchmarks": []}
            whole["benchmarks"] += part["benchmarks"]
    return whole


def summary(out: Path, state: dict) -> dict:
    """Everything the steps left, in one document."""
    tests = {}
    for name in TESTS:
        path = out / f"tests_{name}.xml"
        if path.exists():
            tests[name] = _counts(path.read_text(errors="replace"))
    tune = _read(out / "tune" / "tune.json").get("results", {})
    return {
        "steps": state,
        "ceilings": _read(out / "ceilings.json"),
        "tests": tests,
        "rows": [row["extra_info"] | {"median": row["stats"]["median"]} for row in merged(out).get("benchmarks", [])],
        "train_steps": [step for i in (1, 2, 3) if (step := _read(out / f"train_stage{i}.json"))],
        "tuned": tune,
    }


def _counts(xml: str) -> dict:
    suite = re.search(r"<testsuite\b[^>]*>", xml)
    numbers = dict(re.findall(r'(tests|failures|errors|skipped)="(\d+)"', suite.group(0) if suite else ""))
    failed = re.findall(r'<testcase[^>]*?name="([^"]*)"[^>]*>\s*<(?:failure|error)\b', xml)
    return {name: int(number) for name, number in numbers.items()} | {"failed": failed}


def table(document: dict) -> list[str]:
    """The last thing the suite prints: a screen of text."""
    lines = ["", "== steps"]
    for name, step in document["steps"].items():
        lines.append(f"{name:28} {step['state']:12} {step.get('seconds', 0):7.1f} s  {step.get('note', '')}".rstrip())
    lines.append("== ceilings")
    for name, rate in document["ceilings"].get("rates", {}).items():
        lines.append(f"{name:45} {rate / 1e12:9.3f} {'TB/s' if name == 'copy' else 'TFLOP/s'}")
    lines.append("== tests")
    for name, counts in document["tests"].items():
        bad = counts.get("failures", 0) + counts.get("errors", 0)
        lines.append(f"{name:28} {counts.get('tests', 0):4} run, {bad} failed, {counts.get('skipped', 0)} skipped")
        lines += [f"    FAILED {test}" for test in counts["failed"][:12]]
    lines.append("== ours against the baseline")
    for row in document["rows"]:
        if row["provider"] == "ours":
            shape = " ".join(f"{k}{v}" for k, v in row["shape"].items())
            floor = f"{100 * row['of_floor']:4.0f} % of floor" if "of_floor" in row else ""
            name = f"{row['op']}, {row['variant']}"
            lines.append(f"{name:48} {shape:32} {1e3 * row['median']:9.3f} ms  x{row['ratio']:.2f}  {floor}".rstrip())
    lines.append("== training step")
    for step in document["train_steps"]:
        mfu = "" if step["mfu"] is None else f", MFU {100 * step['mfu']:.1f} %"
        peak = "" if step["peak_gib"] is None else f", {step['peak_gib']:.1f} GiB"
        lines.append(
            f"stage {step['stage']}, batch {step['batch']}{'' if step['lora'] or step['stage'] == 1 else ', no LoRA'}: "
            f"{1e3 * step['seconds']:.0f} ms, {step['tokens_per_second']:.0f} tokens/s{mfu}{peak}"
        )
        worst = sorted(step["shares"].items(), key=lambda item: -item[1])[:5]
        lines.append("    " + ", ".join(f"{part} {100 * share:.0f} %" for part, share in worst))
    won = [name for name, result in document["tuned"].items() if result["winner"]]
    lines.append(f"== tuned: {len(document['tuned'])} of {len(TUNABLES)}, {len(won)} beat their default")
    lines += [f"    {name}: x{document['tuned'][name]['gain']:.2f}" for name in won]
    return lines
