"""What a run ran on: versions, commit, device and world, written beside the resolved config."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from train.parallel import World

FILE = "environment.json"
PACKAGES = ("soundwave-fast", "torch", "triton", "transformers", "peft", "lhotse", "torchdata", "numpy")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(world: World) -> dict:
    """JSON-ready facts about this process."""
    cuda = world.device.type == "cuda"
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "host": platform.node(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": world.size,
    }


def write(folder: Path, world: World, step: int = 0, changed: dict[str, list] | None = None) -> None:
    """`environment.json`: one entry for each time the run was started or resumed, newest last.

    Args:
        step: the one it goes on from.
        changed: settings that differed before: key -> [before, now].
    """
    path = folder / FILE
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        entries = []
    temporary = path.with_suffix(".tmp")
    entry = {**describe(world), "step": step, "changed_settings": changed or {}}
    temporary.write_text(json.dumps([*entries, entry], indent=1))
    os.replace(temporary, path)
