"""The gate of the benchmarks: an op whose tests marked `conformance` fail is not timed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from bench.harness import ROOT, Case, device


def _digest(tests: str, cases: list[Case]) -> str:
    """Of the tests and of everything that one of the cases they stand for depends on."""
    digest = hashlib.sha256(f"{torch.__version__} {device().type}".encode())
    names = {name for case in cases for name in case.files if not name.startswith("bench/")}
    for name in (*sorted(names), tests):
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def nonconforming(cases: Iterable[Case], cache: pytest.Cache | None = None) -> dict[str, str]:
    """By test file: what the conformance tests of the cases' ops say when they fail; "" where they pass.

    One process runs them all, on a CPU without the kernels, which no row times there. Passes are remembered in the
    cache.
    """
    by_tests: dict[str, list[Case]] = {}
    for case in cases:
        by_tests.setdefault(case.conformance, []).append(case)
    keys = {x: f"bench/conformance/{Path(x).stem}-{_digest(x, of)[:12]}" for x, of in by_tests.items()}
    todo = [tests for tests, key in keys.items() if cache is None or not cache.get(key, False)]
    said = dict.fromkeys(by_tests, "")
    if not todo:
        return said
    command = [sys.executable, "-m", "pytest", "-q", "-rpfE", "-m", "conformance", "-p", "no:cacheprovider", *todo]
    command += ["--continue-on-collection-errors"]
    command += [] if device().type == "cuda" else ["-k", "not triton"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) (\S+?)(?:::| |$)", done.stdout, re.MULTILINE)
    for tests in todo:
        results = {outcome for outcome, file in outcomes if (ROOT / file).resolve() == (ROOT / tests).resolve()}
        if results != {"PASSED"} or done.returncode not in (0, 1):  # 1: tests failed, these or others
            why = "fails" if results else "has no conformance test that passes"
            ops = ", ".join(sorted({case.op for case in by_tests[tests]}))
            said[tests] = f"{tests} {why}, so {ops} is not timed:\n{done.stdout[-3000:]}"
        elif cache is not None:
            cache.set(keys[tests], True)
    return said
