"""A configuration of all three stages that takes seconds on the tiny parts, and how the tests start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.model.tiny import Parts
from train import stage
from train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = {r"alignment_adapter\.": 3e-3, r"ctc_head\.": 3e-3}
LORA = {r"shrinking_adapter\.": 1e-3, r"language_model\..*lora_": 1e-3}


def write_config(path: Path, parts: Parts, speech: Path, **more: dict) -> Path:
    """YAML with stages of four steps; `more` is merged into its sections."""
    tree = {
        "model": {"whisper": parts.whisper, "llm": parts.llm, "dtype": "float32", "lora_rank": 4, "lora_alpha": 8},
        "data": {
            "train": [str(speech / "train.jsonl")],
            "valid": [str(speech / "valid.jsonl")],
            "batch_seconds": 8,
            "batch_size": 4,
            "buckets": 2,
        },
        "optim": {"steps": 4, "warmup": 2},
        "run": {"threads": 1, "valid_utterances": 2, "save_every": 3600},
        "stage1": {"optim": {"trainable": ADAPTERS}},
        "stage2": {"optim": {"trainable": {**ADAPTERS, **LORA}}},
        "stage3": {
            "optim": {"trainable": LORA},
            "data": {"tasks": {"asr": 1.0, "first_word": 1.0, "slot": 2.0, "then_slot": 1.0}},
        },
    }
    for section, values in more.items():
        tree[section] = {**tree.get(section, {}), **values}
    path.write_text(yaml.safe_dump(tree))
    return path


def run(number: int, config: Path, out: Path, *arguments: str) -> int:
    """A stage in this process, with the signal handlers as they were before."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return stage.main(number, ["--config", str(config), "--out", str(out), *arguments])
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)


def stop_after(steps: int, monkeypatch, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during the given step of the next run."""
    real = Trainer._train_step

    def step(self, batches):
        if self.step + 1 == steps:
            os.kill(os.getpid(), number)
        return real(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", step)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple]:
    """Step, losses and gradient norm of every row: what a resumed run must repeat to the last digit."""
    return [(row["step"], row["ce"], row["ctc"], row["grad_norm"]) for row in rows(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What a stage directory holds: adapters and LoRA."""
    lora = out / "lora" / "adapter_model.safetensors"
    return {**load_file(out / "adapters.safetensors"), **(load_file(lora) if lora.exists() else {})}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def start(*command: str) -> subprocess.Popen:
    """A script of ours in its own process, from the checkout."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
