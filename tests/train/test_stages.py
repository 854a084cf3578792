"""The three stages end to end on tiny parts: what they leave behind, what they train, and bad audio on the way."""

from __future__ import annotations

import json

import pytest
import torch

from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor
from tests.model import tiny
from tests.train import runs
from tests.train.runs import weights
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
        assert row["audio_h_per_h"] == pytest.approx(row["audio_s"] / (row["step_s"] + row["data_s"]), rel=1e-2)
        assert row["tokens_s"] == pytest.approx(row["tokens"] / (row["step_s"] + row["data_s"]), rel=1e-2)
        assert row["tflops"] > 0 and 0.05 < row["peak_gib"] < 64 and "mfu" not in row, "a CPU is no known chip"
        assert ("eta_s" in row) == (row["step"] > 1)
    assert runs.rows(out)[-1]["eta_s"] == 0
    assert json.loads((out / "environment.json").read_text())[-1]["packages"]["transformers"]


def test_stage_3_asks_its_tasks(stages):
    asked = {task for row in runs.rows(stages[3]) for task in row["tasks"]}
    assert len(asked) > 1 and asked <= {"asr", "first_word", "slot", "then_slot"}


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
    assert "skipped: {" in said and "audio: missing" in said


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
