"""One call on a machine with a GPU: environment, ceilings, tests, benchmarks, training steps, tuning, summary.

`python -m bench.gpu_suite [--stages 1 2 3 4] [--out DIR] [--minutes 25] [--again [STEP ...]] [--wheels DIR]
[--dry-run]`

Stage 1 measures the ceilings, 2 runs the tests that need a GPU, 3 benches every group and a step of each training
stage, 4 tunes; the summary comes after whatever ran. Every step is a process with a time limit of its own: one that
fails or hangs is written down and the next begins. DIR/suite.json is saved after each, and the same command goes on
where it stopped; steps that ended are not run again but for --again. Needs torch, triton, transformers, pytest and
pytest-benchmark; wheels of more (peft) are unpacked from --wheels into DIR/site. --dry-run rehearses all of it on a
CPU with tiny shapes and interpreted kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without installation

from soundwave_fast.errors import ArgumentParser, run_command

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "transformers", "pytest", "pytest_benchmark")
ENDED = ("ok", "failed")  # these are not run again; a step that was killed or never begun is


def write(path: Path, document: dict) -> None:
    """JSON, all of it or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def environment(out: Path, rehearsal: bool) -> dict[str, str]:
    """Of every step: no network, kernels interpreted in a rehearsal and only there, wheels before what is installed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = {**inherited, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    places = [str(ROOT), *([str(out / "site")] if (out / "site").is_dir() else []), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    env["TRITON_INTERPRET"] = "1" if rehearsal else "0"
    if rehearsal:
        env.update(SOUNDWAVE_REHEARSE="1", CUDA_VISIBLE_DEVICES="")
    else:
        env.pop("SOUNDWAVE_REHEARSE", None)
    return env


def unpack(wheels: Path, out: Path) -> None:
    """`pip install --no-index` of all wheels of a folder, without their dependencies, into DIR/site.

    Raises ValueError where there are none or pip refuses.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise ValueError(f"--wheels {wheels}: no wheel there")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
    done = subprocess.run([*command, "--target", str(out / "site"), *files], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--wheels {wheels}: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")


def run(command: tuple[str, ...], log: Path, seconds: float, env: dict[str, str]) -> tuple[str, int | None]:
    """(state, exit code) of one step; its whole process group ends with it, also where we are interrupted."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            code = child.wait(seconds)
            return ("ok" if code == 0 else "failed"), code
        except subprocess.TimeoutExpired:
            return "timeout", None
        finally:
            _end(child)


def _die_with_parent() -> None:
    """Linux: a step does not outlive a suite that is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(child: subprocess.Popen) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, how)
        except ProcessLookupError:
            break
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.1)
    child.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def claim(out: Path, rehearsal: bool) -> None:
    """Make the folder, or go on in it. Raises ValueError where it holds the other kind of run."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    kind, marker = "rehearsal" if rehearsal else "run on a GPU", out / "kind"
    if marker.exists() and marker.read_text() != kind:
        raise ValueError(f"--out {out} holds a {marker.read_text()}, this is a {kind}: give another folder")
    marker.write_text(kind)


def carry_out(args: argparse.Namespace, out: Path) -> dict:
    """Run what is to be run; returns the state of all steps, which is on disk after each."""
    from bench.suite_steps import steps

    state_file = out / "suite.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    deadline = time.monotonic() + 60 * args.minutes
    env = environment(out, args.dry_run)
    for step in steps(out, args.dry_run):
        again = args.again is not None and (not args.again or step.name in args.again)
        if step.stage not in args.stages or (state.get(step.name, {}).get("state") in ENDED and not again):
            continue
        left = deadline - time.monotonic()
        if left < (1 if args.dry_run else 20):
            state[step.name] = {"state": "no time", "note": "the same command goes on here"}
            write(state_file, state)
            continue
        log = out / "logs" / f"{step.name.replace(': ', '_').replace(', ', '_').replace(' ', '_')}.log"
        print(f"[{time.strftime('%H:%M:%S')}] {step.name} ...", flush=True)
        state[step.name] = {"state": "running", "stage": step.stage}
        write(state_file, state)
        started = time.monotonic()
        more = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if step.stage == 3 else {}
        for _ in range(step.tries):
            left = deadline - time.monotonic()
            outcome, code = run(step.command, log, min(60 * step.minutes, max(left, 1)), {**env, **more})
            if outcome != "failed":
                break
        state[step.name] = {
            "state": outcome,
            "stage": step.stage,
            "code": code,
            "seconds": round(time.monotonic() - started, 1),
            "note": "" if outcome == "ok" else _last_line(log),
        }
        write(state_file, state)
        print(f"    {outcome}, {state[step.name]['seconds']} s {state[step.name]['note']}", flush=True)
    return state


def finish(out: Path, state: dict, rehearsal: bool, commit: str) -> None:
    """summary.json, <device>_<date>_<commit>.json for bench/results, the tuned table; the short table on stdout."""
    from bench.suite_steps import merged, summary, table

    document = summary(out, state)
    write(out / "summary.json", document)
    rows = merged(out)
    if rows:
        machine = rows["machine_info"]
        machine["commit"] = machine["commit"] or commit
        device = "-".join(machine["device"].lower().replace("_", " ").replace("/", " ").split())
        write(out / f"{device}_{time.strftime('%Y-%m-%d')}_{machine['commit'][:7]}.json", rows)
    if not rehearsal:
        shutil.copy(ROOT / "csrc_triton" / "tuned.json", out / "tuned.json")
    print("\n".join(table(document)), flush=True)


def _command(argv: list[str]) -> int:
    parser = ArgumentParser(prog="bench.gpu_suite", description=__doc__)
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4], metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default runs/gpu_suite, or -rehearsal")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all steps of this call [%(default)g]")
    parser.add_argument("--again", nargs="*", metavar="STEP", help="run these again (all of them where none is named)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="more packages, put before those installed")
    parser.add_argument("--commit", default="", metavar="HASH", help="of this tree, where git cannot tell")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU")
    args = parser.parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}")
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run rehearses on a CPU")
    from bench.interpreter import interpreter_error

    if args.dry_run and (error := interpreter_error()):
        parser.error(error)
    out = (args.out or ROOT / "runs" / f"gpu_suite{'-rehearsal' if args.dry_run else ''}").resolve()
    claim(out, args.dry_run)
    if args.wheels:
        unpack(args.wheels, out)
    state = carry_out(args, out)
    finish(out, state, args.dry_run, args.commit)
    return int(any(step["state"] != "ok" for step in state.values()))


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a step failed; else the exit code is `run_command`'s."""
    return run_command("gpu_suite", _command, argv, interrupted="interrupted; the same command goes on from here")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    sys.exit(main())
