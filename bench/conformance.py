"""The gate of the benchmarks: an op whose tests marked `conformance` fail is not timed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.harness import ROOT, Case, device


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
