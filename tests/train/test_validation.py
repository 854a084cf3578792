"""Validation in training: the figures of evaluate, no trace in the run, and the same on two ranks as on one."""

from __future__ import annotations

import dataclasses
import random
import signal

import numpy as np
import pytest
import torch

from soundwave_fast.model import SoundwaveForConditionalGeneration, checkpoint
from tests.model import tiny
from tests.train import runs, validation_on_ranks
from train.config import load
from train.data.manifest import read
from train.evaluate import evaluate
from train.parallel import World
from train.scoring import make_batches, make_jobs
from train.validation import Validator, subset, untouched
from train.validation_figures import summary

ONE = World(0, 1, torch.device("cpu"))
TASKS = {"asr": 1.0, "first_word": 1.0, "slot": 1.0}


@pytest.fixture(scope="module")
def stage(tiny_parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    torch.manual_seed(1)  # the seeds of conftest.py come later than fixtures of a module
    model, processor = tiny.make_model(tiny_parts)
    checkpoint.save_stage_directory(tiny.add_lora(model), folder, processor)
    return folder


@pytest.fixture
def parts(stage, tiny_parts, speech_dir, tmp_path):
    """(config of stage 3 over 5 of the 12 training sounds, model, processor)."""
    from soundwave_fast.model import SoundwaveProcessor

    path = runs.write_config(
        tmp_path / "tiny.yaml", tiny_parts, speech_dir,
        stage3={"data": {"tasks": TASKS, "valid": [str(speech_dir / "train.jsonl")]}},
        run={"threads": 1, "valid_utterances": 5},
    )  # fmt: skip
    model = SoundwaveForConditionalGeneration.from_pretrained(stage)
    return load(str(path), 3), model, SoundwaveProcessor.from_pretrained(stage)


def test_the_figures_are_those_of_evaluate(parts, speech_dir):
    config, model, processor = parts
    validator = Validator(config, 3, model, processor, ONE)
    figures = validator(7)
    rows = subset(read(speech_dir / "train.jsonl"), 5)
    scores = evaluate(model, processor, rows, ("first_word", "slot"), max_new_tokens=validator.max_new_tokens)
    assert figures.pop("valid_s") > 0
    slots = {"valid_slot": scores.answers["slot"][0] / scores.answers["slot"][1]} if "slot" in scores.answers else {}
    assert figures == {
        "valid_ctc_wer": scores.ctc_wer,
        "valid_llm_wer": scores.llm_wer,
        "valid_first_word": scores.answers["first_word"][0] / 5,
        **slots,
        "valid_utterances": 5,
        "valid_skipped": 0,
    }
    assert validator(8)["valid_llm_wer"] == figures["valid_llm_wer"]


def test_stage_1_has_its_ctc_alone(tiny_parts, parts):
    config, _, _ = parts
    model, processor = tiny.make_model(tiny_parts, with_language_model=False)
    figures = Validator(config, 1, model, processor, ONE)(1)
    assert set(figures) == {"valid_ctc_wer", "valid_utterances", "valid_skipped", "valid_s"}
    assert summary(figures) == f"CTC WER {100 * figures['valid_ctc_wer']:.1f} %"


def test_the_subset_is_fixed_and_from_all_over(speech_dir):
    rows = read(speech_dir / "train.jsonl")
    some = subset(rows, 5)
    assert some == subset(rows, 5) and len(some) == 5 and some != rows[:5]
    assert some == sorted(some, key=rows.index) and subset(rows, 12) == rows


def test_nothing_of_the_run_is_touched(parts):
    """Modes module by module, all random states, parameters and gradients: as before."""
    config, model, processor = parts
    model.train()
    model.audio_tower.eval()
    model.alignment_adapter.eval()
    validator = Validator(config, 3, model, processor, ONE)
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    validator(1)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_untouched_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2).eval())
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError), untouched(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules())
        torch.rand(5)
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.equal(torch.rand(1), wanted)


def test_under_autocast(parts):
    """Frozen parts in bfloat16, as on hardware that multiplies it: the arithmetic of the training step."""
    config, model, processor = parts
    model.audio_tower.bfloat16(), model.language_model.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    figures = Validator(half, 3, model, processor, ONE)(1)
    assert figures["valid_utterances"] == 5 and figures["valid_ctc_wer"] > 0 and figures["valid_llm_wer"] > 0


def test_no_manifest_no_figures(parts):
    config, model, processor = parts
    none = dataclasses.replace(config, run=dataclasses.replace(config.run, valid_utterances=0))
    assert Validator(none, 3, model, processor, ONE)(1) == {}


def test_bad_audio_is_counted(parts, speech_dir):
    config, model, processor = parts
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, valid=(str(speech_dir / "broken.jsonl"),))
    )
    figures = Validator(config, 3, model, processor, ONE)(1)
    assert (figures["valid_utterances"], figures["valid_skipped"]) == (2, 3)


def test_cached_frames_give_the_same_figures(parts):
    config, model, processor = parts
    cached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_frames=True))
    plain, keeps = (Validator(c, 3, model, processor, ONE) for c in (config, cached))
    first, again = keeps(1), keeps(2)
    assert len(keeps.cache) == len(keeps.batches)
    for figures in (first, again):
        figures.pop("valid_s")
    wanted = plain(1)
    wanted.pop("valid_s")
    assert first == again == wanted


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_is_the_same_with_and_without(stage, tiny_parts, speech_dir, tmp_path, number, monkeypatch):
    """Losses bit for bit, also where the run is cut after a validation; the figures are in the rows, and drawn."""
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir)
    more = ("optim.steps=6", "run.log_every=100", "run.valid_utterances=2")
    more += ("--init", str(stage)) if number == 2 else ()
    assert runs.run(number, config, tmp_path / "without", *more) == 0
    with monkeypatch.context() as patch:
        runs.stop_after(3, patch, signal.SIGINT)
        assert runs.run(number, config, tmp_path / "with", *more, "run.valid_every=2") == 130
    assert runs.run(number, config, tmp_path / "with", *more, "run.valid_every=2") == 0
    assert runs.losses(tmp_path / "without") == runs.losses(tmp_path / "with")
    for row in runs.rows(tmp_path / "with"):
        figures = {key for key in row if key.startswith("valid_")}
        wanted = {"valid_ctc_wer", "valid_utterances", "valid_skipped", "valid_s"}
        assert figures == ((wanted | ({"valid_llm_wer"} if number == 2 else set())) if row["step"] % 2 == 0 else set())
    assert (tmp_path / "with" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(stage, tiny_parts, speech_dir, tmp_path):
    """Sharded, before its first forward and between steps; batches that do not come out even; the same losses."""
    tree = {"data": {"tasks": TASKS, "valid": [str(speech_dir / "train.jsonl")]}, "optim": {"trainable": runs.LORA}}
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir, stage3=tree)
    settings = [f"run.out={tmp_path / 'out'}", f"run.init={stage}", "run.valid_utterances=5"]
    settings += ["data.batch_size=4", "model.mask_frames=true"]
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", validation_on_ranks.__file__)
    process = runs.start(*command, str(config), str(tmp_path), *settings)
    try:
        _, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, errors[:6000]
    rows = subset(read(speech_dir / "train.jsonl"), 5)
    assert len(make_batches(make_jobs(rows, ("first_word", "slot")), 4)) % 2, "one rank runs an empty batch"
    (plain, rows, figures), other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert rows == plain, "validation leaves no trace"
    _, (first, *_) = validation_on_ranks.losses_and_figures(str(config), settings, ONE, validate=True)
    for measured in (first, *figures, *other[2]):
        assert measured.pop("valid_s") > 0
    assert len(figures) == 3 and len(set(map(str, figures))) > 1, "the steps between them change something"
    assert figures == other[2], "every rank knows them"
    assert figures[0] == first and first["valid_utterances"] == 5
    assert {"valid_llm_wer", "valid_first_word"} <= set(first)
