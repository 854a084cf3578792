"""The three stages on the simulated device: the CPU's losses, step by step, and no wait within a step but its own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.simulated_cuda.device import DEVICE
from tests.train import runs
from train import parallel
from train.step import TrainStep


def stages(config, out, before) -> None:
    """The three, each from what its predecessor left under `before`."""
    for number in (1, 2, 3):
        more = ["--init", str(before / f"stage{number - 1}")] if number > 1 else []
        assert runs.run(number, config, out / f"stage{number}", *more) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.08)])
def test_losses_are_the_cpus_and_a_step_waits_where_it_says(
    tmp_path, waits, tiny_parts, speech_dir, monkeypatch, dtype, tolerance
):
    model = {"dtype": dtype, "adapter_dropout": 0.0, "lora_dropout": 0.0}
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir, model=model)
    stages(config, tmp_path / "cpu", tmp_path / "cpu")
    for name, value in (("get_device_name", "none"), ("max_memory_allocated", 2**30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    monkeypatch.setattr(parallel, "start", lambda: parallel.World(0, 1, DEVICE))
    plain, steps = TrainStep._train_step, []

    def counted(self, batches):
        before = len(waits)
        row = plain(self, batches)
        steps.append((self.stage, Counter(w.where.split(":")[0] for w in waits[before:] if w.ours)))
        return row

    monkeypatch.setattr(TrainStep, "_train_step", counted)
    stages(config, tmp_path / "cuda", tmp_path / "cpu")
    read, peaks, counts = "train/step.py", "soundwave_fast/ops/peak_gather.py", "soundwave_fast/ops/prompt_counts.py"
    assert len(steps) == 12
    for stage, seen in steps:
        assert seen == ({read: 1} if stage == 1 else {read: 1, peaks: 1, counts: 2}), f"stage {stage}"
    for number in (1, 2, 3):
        truth, ours = (runs.rows(tmp_path / where / f"stage{number}") for where in ("cpu", "cuda"))
        for a, b in zip(truth, ours, strict=True):
            for name in ("ctc", "ce", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=tolerance), f"stage {number}, {name}"
            assert dtype == "bfloat16" or (a["audio_tokens"], a["frames"]) == (b["audio_tokens"], b["frames"])
