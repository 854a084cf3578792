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


OPS = "soundwave_fast/ops"
NANO = {"optim": {"steps": 4, "warmup": 2, "accumulate": 2, "ctc_candidates": 20}, "data": {"cache_frames": True}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance", "more"), [("float32", 1e-4, {}), ("bfloat16", 0.08, {}), ("float32", 1e-4, NANO)], ids=str
)
def test_losses_are_the_cpus_and_a_step_waits_where_it_says(
    tmp_path, waits, tiny_parts, speech_dir, monkeypatch, dtype, tolerance, more
):
    model = {"dtype": dtype, "adapter_dropout": 0.0, "lora_dropout": 0.0}
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir, model=model, **more)
    stages(config, tmp_path / "cpu", tmp_path / "cpu")
    for name, value in (("get_device_name", "none"), ("max_memory_allocated", 2**30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    monkeypatch.setattr(parallel, "start", lambda: parallel.World(0, 1, DEVICE))
    plain, steps = TrainStep._train_step, []

    def counted(self, batches):
        before, cached = len(waits), len(self.cache)
        row = plain(self, batches)
        seen = Counter(w.where.split(":")[0] for w in waits[before:] if w.ours)
        steps.append((self.stage, seen, len(batches), len(self.cache) - cached))
        return row

    monkeypatch.setattr(TrainStep, "_train_step", counted)
    stages(config, tmp_path / "cuda", tmp_path / "cpu")
    assert len(steps) == 12
    for stage, seen, batches, encoded in steps:
        assert batches == (2 if more else 1)
        expected = {"train/step.py": 1 + encoded}  # the losses; and frames that are to be kept on the host
        if stage > 1:
            expected |= {f"{OPS}/peak_gather.py": batches, f"{OPS}/prompt_counts.py": 2 * batches}
        elif more:
            expected |= {"soundwave_fast/model/ctc_head.py": batches}  # is every target among the candidates?
        assert seen == expected, f"stage {stage}"
    for number in (1, 2, 3):
        truth, ours = (runs.rows(tmp_path / where / f"stage{number}") for where in ("cpu", "cuda"))
        for a, b in zip(truth, ours, strict=True):
            for name in ("ctc", "ce", "grad_norm"):
                # in bfloat16 a peak may flip by rounding, which the gradients of a random model feel most
                within = 3 * tolerance if (dtype, name) == ("bfloat16", "grad_norm") else tolerance
                assert b[name] == pytest.approx(a[name], rel=within), f"stage {number}, {name}"
            assert dtype == "bfloat16" or (a["audio_tokens"], a["frames"]) == (b["audio_tokens"], b["frames"])
