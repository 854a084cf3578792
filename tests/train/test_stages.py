"""The three stages end to end on tiny parts: what they leave behind, resuming after a stop, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
import torch

from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor
from tests.model import tiny
from tests.train import runs
from train import checkpoint, stage
from train.trainer import Trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_parts, speech_dir):
    return runs.write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_parts, speech_dir)


@pytest.fixture(scope="module")
def stages(tmp_path_factory, config):
    """Output directories of stages 1, 2 and 3, each started from the one before."""
    out = tmp_path_factory.mktemp("runs")
    for number in (1, 2, 3):
        more = ["--init", str(out / f"stage{number - 1}")] if number > 1 else []
        assert runs.run(number, config, out / f"stage{number}", *more) == 0
    return {number: out / f"stage{number}" for number in (1, 2, 3)}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_a_stage_leaves_behind(stages, number):
    out = stages[number]
    done = json.loads((out / "done.json").read_text())
    assert done["steps"] == 4 and done["step_s_median"] > 0
    assert done["valid"]["utterances"] == 2 and done["valid"]["ctc_wer"] >= 0
    assert ("llm_wer" in done["valid"]) == (number > 1)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in runs.rows(out)] == [1, 2, 3, 4]
    assert (out / "lora" / "adapter_config.json").is_file() == (number > 1)
    assert not list(out.rglob("*.tmp"))
    for row in runs.rows(out):
        assert row["ctc"] > 0 and row["grad_norm"] > 0 and not row["skipped_step"]
        assert (row["ce"] > 0) == (number > 1)
        assert sum(row["tasks"].values()) <= 4


def test_stage_3_asks_its_tasks(stages):
    asked = {task for row in runs.rows(stages[3]) for task in row["tasks"]}
    assert len(asked) > 1 and asked <= {"asr", "first_word", "slot", "then_slot"}


def weights(out) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    lora = out / "lora" / "adapter_model.safetensors"
    return {**load_file(out / "adapters.safetensors"), **(load_file(lora) if lora.exists() else {})}


def test_each_stage_trains_its_parts_and_keeps_the_others(stages):
    one, two, three = (weights(stages[number]) for number in (1, 2, 3))
    moved = {name for name in two if name not in one or not torch.equal(one[name], two[name])}
    assert moved == set(two), "stage 2 trains everything"
    moved = {name for name in three if not torch.equal(two[name], three[name])}
    assert moved == {name for name in three if name.startswith("shrinking_adapter") or "lora" in name}
    assert any("lora_B" in name and tensor.any() for name, tensor in three.items())


def test_a_finished_stage_is_not_run_again(stages, config, capsys):
    before = (stages[1] / "adapters.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert runs.run(1, config, stages[1]) == 0
    assert capsys.readouterr().err == f"{stages[1]}: already finished\n"
    assert (stages[1] / "adapters.safetensors").stat().st_mtime_ns == before


def test_the_result_speaks(stages):
    model = SoundwaveForConditionalGeneration.from_pretrained(stages[3])
    processor = SoundwaveProcessor.from_pretrained(stages[3])
    wave = tiny.make_wave(3, 1.0)
    tokens = model.generate(**processor(text=processor.prompt("What?"), audio=wave), max_new_tokens=5, do_sample=False)
    assert 1 <= tokens.shape[1] <= 5


def test_stage_1_learns(tmp_path, config):
    assert runs.run(1, config, tmp_path / "out", "optim.steps=60", "run.valid_utterances=0", "run.log_every=100") == 0
    ctc = [row["ctc"] for row in runs.rows(tmp_path / "out")]
    assert sum(ctc[-5:]) < 0.7 * sum(ctc[:5])


@pytest.mark.parametrize("setting", ["optim.ctc_candidates=20", "data.cache_frames=true", "optim.accumulate=2"])
def test_settings_of_the_presets(tmp_path, config, setting):
    assert runs.run(1, config, tmp_path / "out", setting, "optim.steps=2", "run.valid_utterances=0") == 0
    assert len(runs.rows(tmp_path / "out")) == 2


def test_accumulated_batches_are_one_batch(tmp_path, config):
    """Two batches of 2 at accumulate=2 give the sums of both, divided by the counts of both."""
    more = ("run.valid_utterances=0", "model.adapter_dropout=0", "optim.steps=1", "data.batch_size=2")
    assert runs.run(1, config, tmp_path / "one", *more, "optim.accumulate=2") == 0
    assert runs.run(1, config, tmp_path / "two", *more) == 0
    (both,), (first,) = runs.rows(tmp_path / "one"), runs.rows(tmp_path / "two")
    assert both["tasks"]["asr"] == 4 and first["tasks"]["asr"] == 2
    assert both["frames"] > first["frames"]
    assert both["ctc"] < 1.5 * first["ctc"], "a mean over utterances, not a sum over batches"


# -- bad audio -------------------------------------------------------------------------------------------------


def test_bad_audio_is_skipped_not_fatal(tmp_path, config, speech_dir, capsys):
    manifest = str(speech_dir / "broken.jsonl")
    assert runs.run(1, config, tmp_path / "out", "--train", manifest, "run.valid_utterances=0") == 0
    said = capsys.readouterr().err
    assert "skipped: {" in said and "audio: FileNotFoundError" in said


def test_too_much_bad_audio_stops_the_run(tmp_path, config, speech_dir, capsys):
    manifest = str(speech_dir / "broken.jsonl")
    more = ("--train", manifest, "optim.steps=100", "run.valid_utterances=0", "run.log_every=1000")
    assert runs.run(1, config, tmp_path / "out", *more) == 2
    assert "utterances could not be used" in capsys.readouterr().err.splitlines()[-1]


def test_bad_validation_audio_does_not_lose_the_run(tmp_path, config, speech_dir):
    out = tmp_path / "out"
    more = ("--valid", str(speech_dir / "broken.jsonl"), "run.valid_utterances=5", "optim.steps=1")
    assert runs.run(1, config, out, *more) == 0
    assert json.loads((out / "done.json").read_text())["valid"]["utterances"] == 2


def test_a_loss_that_is_not_finite_skips_the_step_and_then_stops(tmp_path, config, monkeypatch, capsys):
    real = Trainer._forward_backward

    def poisoned(self, batch, counts):
        sums = real(self, batch, counts)
        sums[1] = float("nan") if self.step >= 2 else sums[1]
        return sums

    monkeypatch.setattr(Trainer, "_forward_backward", poisoned)
    more = ("optim.steps=20", "optim.max_bad_steps=3", "run.valid_utterances=0")
    assert runs.run(1, config, tmp_path / "out", *more) == 2
    assert "loss or gradient not finite 4 times in a row" in capsys.readouterr().err.splitlines()[-1]
    good = [row["skipped_step"] for row in runs.rows(tmp_path / "out")]
    assert good == [False, False, True, True, True]


# -- stopping and resuming -------------------------------------------------------------------------------------

LONG = ("optim.steps=6", "run.valid_utterances=0", "run.log_every=100")


def stop_after(steps: int, monkeypatch, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during the given step of the next run."""
    real = Trainer._train_step

    def step(self, batches):
        if self.step + 1 == steps:
            os.kill(os.getpid(), number)
        return real(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", step)


RESUMED = [
    (1, ()),
    (1, ("data.workers=1",)),
    (1, ("data.cache_frames=true", "optim.ctc_candidates=20")),
    (2, ()),
    (2, ("data.cache_frames=true", "optim.accumulate=2")),
]


@pytest.mark.parametrize(("number", "settings"), RESUMED, ids=str)
def test_resuming_repeats_the_losses_bit_for_bit(stages, tmp_path, config, number, settings, monkeypatch, capsys):
    more = (*LONG, *settings, *(("--init", str(stages[1])) if number == 2 else ()))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert runs.run(number, config, whole, *more) == 0
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert runs.run(number, config, cut, *more) == 130
    assert "interrupted at step 3, saved" in capsys.readouterr().err
    assert not (cut / "done.json").exists() and not (cut / "adapters.safetensors").exists()
    assert runs.run(number, config, cut, *more) == 0
    assert f"resuming {cut} at step 3" in capsys.readouterr().err
    assert runs.losses(cut) == runs.losses(whole)
    one, other = weights(whole), weights(cut)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_saves(tmp_path, config, monkeypatch):
    stop_after(2, monkeypatch, signal.SIGINT)
    assert runs.run(1, config, tmp_path, *LONG) == 130
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-0000002"


def test_after_a_kill_the_last_whole_checkpoint_counts(tmp_path, config, monkeypatch, capsys):
    """Half a checkpoint, metrics past the last whole one and a line cut short: all forgotten."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run(1, config, whole, *LONG) == 0
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert runs.run(1, config, killed, *LONG) == 130
    shutil.copytree(killed / "checkpoints" / "step-0000003", killed / "checkpoints" / "step-0000005.tmp")
    for path in (killed / "checkpoints" / "step-0000005.tmp").iterdir():
        path.write_bytes(path.read_bytes()[:10])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**runs.rows(killed)[-1], "step": 4}) + '\n{"step": 5, "ce')
    capsys.readouterr()
    assert runs.run(1, config, killed, *LONG) == 0
    assert "at step 3" in capsys.readouterr().err
    assert runs.losses(killed) == runs.losses(whole)


def test_sigkill(tmp_path, config):
    """A real process, saving after every step, killed hard once it has saved; run again, it repeats the losses."""
    more = ("optim.steps=15", "run.valid_utterances=0", "run.log_every=100", "run.save_every=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = runs.start("train/stage1.py", "--config", str(config), "--out", str(killed), *more)
    try:
        deadline = time.monotonic() + 120
        while checkpoint.latest(killed / "checkpoints") is None:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert not (killed / "done.json").exists()
    assert runs.run(1, config, killed, *more) == 0
    assert runs.run(1, config, whole, *more[:-1]) == 0
    assert runs.losses(killed) == runs.losses(whole)


def test_overwriting_an_interrupted_run_starts_afresh(stages, tmp_path, config, monkeypatch):
    """Nothing of the thrown-away checkpoint is used: neither its state, nor 'there is one' for stage 2's first fit."""
    fresh, again, more = tmp_path / "fresh", tmp_path / "again", (*LONG, "--init", str(stages[1]))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert runs.run(2, config, again, *more, "run.seed=7") == 130
    assert runs.run(2, config, again, *more, "--overwrite") == 0
    assert runs.run(2, config, fresh, *more) == 0
    assert runs.losses(again) == runs.losses(fresh)


def test_signals_are_given_back(tmp_path, config):
    """After a run, Ctrl-C is the caller's again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        arguments = ["--config", str(config), "--out", str(tmp_path), "optim.steps=1", "run.valid_utterances=0"]
        assert stage.main(1, arguments) == 0
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
