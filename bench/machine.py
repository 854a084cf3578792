"""The machine of a measurement: commit, device, clocks, threads and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata

import torch

from bench.harness import ROOT, device

PEERS = ("torch", "triton", "transformers", "peft", "flash-attn", "xformers", "liger-kernel", "cut-cross-entropy")


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
    info["huge_pages"] = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
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
