"""Options, the conformance gate and the machine's description for `pytest bench/ --benchmark-only`."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from bench.harness import ROOT, Case, device

PEERS = ("torch", "triton", "transformers", "peft", "flash-attn", "xformers", "liger-kernel", "cut-cross-entropy")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soundwave_fast")
    group.addoption("--no-memory", action="store_true", help="do not measure peak memory (a fresh process a row)")
    group.addoption("--smoke", action="store_true", help="two rounds of the first case of each file, nothing else")
    group.addoption("--no-conformance", action="store_true", help="time ops without running their tests first")


def _digest(case: Case) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {device().type}".encode())
    for name in (*(name for name in case.files if not name.startswith("bench/")), case.conformance):
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def nonconforming(case: Case, cache: pytest.Cache | None = None) -> str:
    """What the op's conformance tests say when they fail; "" where they pass. Passes are remembered in the cache."""
    key = f"bench/conformance/{Path(case.conformance).stem}-{_digest(case)[:12]}"
    if cache is not None and cache.get(key, False):
        return ""
    command = [sys.executable, "-m", "pytest", "-qx", "-m", "conformance", "-p", "no:cacheprovider", case.conformance]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"{case.conformance} fails, so {case.op} is not timed:\n{done.stdout[-1500:]}"
    if cache is not None:
        cache.set(key, True)
    return ""


@pytest.fixture(autouse=True)
def conformance(request: pytest.FixtureRequest) -> None:
    """An op whose tests fail is not timed. A pass is remembered until the op, its tests or torch change."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case is None or request.config.getoption("--no-conformance") or request.config.getoption("--smoke"):
        return
    if said := nonconforming(case, request.config.cache):
        pytest.fail(said, pytrace=False)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here: a copy of the tree on some other machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu(field: str) -> str:
    """One field of the first core in /proc/cpuinfo; "" where there is none."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return ""


def describe_machine() -> dict:
    """Commit, device, clocks, threads and versions: what a figure needs beside it to be believed."""
    info = {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "-uno"))}
    info.update(threads=torch.get_num_threads(), cpu_count=os.cpu_count(), versions={})
    for name in PEERS:
        try:
            info["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device().type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info.update(
            device=properties.name, memory_gib=round(properties.total_memory / 2**30, 1), cuda=torch.version.cuda
        )
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit,driver_version", "--format=csv,noheader"]
        try:
            info["clocks"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            info["clocks"] = ""
    else:
        info["device"] = _cpu("model name") or platform.processor() or platform.machine()
        megahertz = _cpu("cpu MHz")
        info["clocks"] = f"{float(megahertz):.0f} MHz" if megahertz else ""
    return info


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for private in ("node", "cpu"):  # a host's name and its full cpuid table are nobody's business
        machine_info.pop(private, None)
    machine_info.update(describe_machine())
    given = [str(x) for x in config.invocation_params.args]
    machine_info["command"] = ["pytest", *(x for x in given if not x.startswith("--benchmark-json"))]


def pytest_terminal_summary(terminalreporter) -> None:
    """The ratios, which are what counts, under pytest-benchmark's absolute times."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", ()) if "ratio" in bench.extra_info]
    if rows:
        terminalreporter.section("times faster than the baseline: median (lowest ... highest of the rounds)")
    for bench in rows:
        info = bench.extra_info
        ratio = f"{info['ratio']:6.2f} ({info['ratio_low']:.2f} ... {info['ratio_high']:.2f})"
        case = f"{info['op']}, {info['variant']}, " + " ".join(f"{k} {v}" for k, v in info["shape"].items())
        terminalreporter.write_line(f"{ratio}  {info['provider']:<28} {case}")
