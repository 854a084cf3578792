"""Config: presets, stage sections, overrides, and mistakes that are named in one line."""

from __future__ import annotations

import dataclasses

import pytest

from soundwave_fast.errors import UserError
from train.config import NANO, NEUTRAL, PRESETS, Config, dump, load, preset_for
from train.data import tasks

YAML = """
model: {whisper: w, llm: l}
optim: {steps: 5}
stage2:
  optim: {steps: 7, trainable: {"lora_": 1e-3}}
"""


@pytest.fixture
def preset(tmp_path) -> str:
    path = tmp_path / "some.yaml"
    path.write_text(YAML)
    return str(path)


def test_a_stage_takes_the_common_part_and_its_own(preset):
    one, two = load(preset, 1), load(preset, 2)
    assert (one.model.whisper, one.optim.steps, one.optim.trainable) == ("w", 5, {})
    assert (two.model.whisper, two.optim.steps, two.optim.trainable) == ("w", 7, {"lora_": 1e-3})


def test_overrides_win_and_are_typed(preset):
    settings = ["optim.steps=9", "data.train=[a.jsonl, b.jsonl]", "optim.warmup=3", "model.drop_blank=false"]
    config = load(preset, 2, None, [*settings, "optim.weight_decay=1e-4", "model.ctc_weight=1", "data.tasks={asr: 2}"])
    assert config.optim.steps == 9 and config.optim.warmup == 3
    assert config.data.train == ("a.jsonl", "b.jsonl")
    assert config.model.drop_blank is False and config.model.mask_frames is None
    assert config.optim.weight_decay == 1e-4, "YAML 1.1 reads 1e-4 as text"
    assert (config.model.ctc_weight, config.data.tasks) == (1.0, {"asr": 2.0})
    both = load(preset, 1, {"data.train": ["x.jsonl"], "optim.steps": 3}, ["optim.steps=4"])
    assert (both.data.train, both.optim.steps) == (("x.jsonl",), 4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.stepz=3", "unknown key optim.stepz; did you mean optim.steps?"),
        ("optimm.steps=3", "unknown key optimm; did you mean optim?"),
        ("run.zzzzzz=1", "unknown key run.zzzzzz; known: out, init,"),
        ("optim.steps=many", "optim.steps: takes int, got 'many'"),
        ("optim.steps=1.5", "optim.steps: takes int, got 1.5"),
        ("optim.steps=true", "optim.steps: takes int, got True"),
        ("optim.clip=high", "optim.clip: takes float, got 'high'"),
        ("model.look_back=1", "model.look_back: takes bool, got 1"),
        ("model.whisper=3", "model.whisper: takes str, got 3"),
        ("optim.betas=[0.9]", "optim.betas: takes 2 values, got [0.9]"),
        ("data.tasks=asr", "data.tasks: takes a mapping, got 'asr'"),
        ("data.tasks={asr: much}", "data.tasks.asr: takes float, got 'much'"),
        ("optim=3", "optim. takes keys, got 3"),
        ("optim.steps", "overrides look like"),
        ("=3", "overrides look like"),
        ("optim.steps=2026-13-45", "is not a YAML value"),
        (f"optim.clip=1{'0' * 400}", "optim.clip: too large a number"),
        (f"optim.steps=1{'0' * 30}", "optim.steps: too large a number"),
        ("run.seed=4294967296", "run.seed: must be at most 4294967295, got 4294967296"),
        ("optim.betas=[2, 0.9]", "optim.betas: must be at least 0 and below 1, got 2.0"),
        ("optim.trainable={lora_: -1e-3}", "optim.trainable: lora_: must be at least 0, got -0.001"),
        ("optim.decay_from=1.1", "optim.decay_from: must be at most 1, got 1.1"),
        ("optim.final_lr=.nan", "optim.final_lr: must be at least 0, got nan"),
        ("optim.steps=[3", "is not a YAML value"),
    ],
)
def test_a_wrong_setting_is_named(preset, setting, message):
    with pytest.raises(UserError) as error:
        load(preset, 1, None, [setting])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {whisper: w", "not valid YAML"),
        ("model: [1, 2]", "model. takes keys, got [1, 2]"),
        ("- 1\n- 2", "the file takes keys"),
        ("5", "the file takes keys"),
        ("stage2: {optim: {step: 3}}", "stage2: unknown key optim.step; did you mean optim.steps?"),
        ("model: {whisper: \udcff}", "not valid YAML"),  # a byte that is not UTF-8
        ("stage2: 7", "stage2: the file takes keys, got 7"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        load(str(path), 2)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_no_such_preset():
    with pytest.raises(UserError, match=r"--config nanoo: no such file or preset \(presets: .*nano"):
        load("nanoo", 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_shipped_presets_load_and_survive_a_round_trip(tmp_path, name, stage):
    config = load(name, stage)
    assert config.optim.trainable and (config.run.out or name == NEUTRAL)
    assert all(task in tasks.NAMES for task in config.data.tasks)
    assert stage == 1 or config.run.init == load(name, stage - 1).run.out, "each stage finds the one before"
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(str(path), stage) == config


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_neutral_preset_is_nobodys(stage):
    """No part, template, manifest or directory of nano's; what trains is the other presets' choice."""
    config, middle, plain = load(NEUTRAL, stage), load("middle", stage), Config()
    model = config.model
    assert (model.whisper, model.llm, model.chat_template) == ("", "", None)
    assert (config.data.train, config.data.valid, config.run.init, config.run.out) == ((), (), "", "")
    assert (config.run.threads, config.data.cache_frames) == (plain.run.threads, False)
    assert config.optim.trainable.keys() == middle.optim.trainable.keys()


@pytest.mark.parametrize(
    ("overrides", "settings", "preset", "why"),
    [
        ({}, [], NANO, ""),
        ({"data.train": ["a.jsonl"], "run.out": "x"}, ["optim.steps=3"], NANO, ""),
        ({"model.llm": "package:smollm2-135m-instruct"}, ["model.whisper=package:whisper-tiny.en"], NANO, ""),
        ({"model.llm": "some/llm"}, [], NEUTRAL, "the LLM is some/llm"),
        ({"model.whisper": "some/whisper"}, [], NEUTRAL, "the Whisper is some/whisper"),
        ({}, ["model.llm=some/llm"], NEUTRAL, "the LLM is some/llm"),
        ({}, ["model={whisper: some/whisper}"], NEUTRAL, "the Whisper is some/whisper"),
        ({"model.llm": "some/llm"}, ["model.llm=package:smollm2-135m-instruct"], NANO, ""),
        ({"model.llm": "some/llm"}, ["data.speed=[0.9]"], NEUTRAL, "the LLM is some/llm"),  # which nano's cache forbids
    ],
)
def test_which_preset_is_taken_where_none_is_named(overrides, settings, preset, why):
    taken, said = preset_for(overrides, settings)
    assert taken == preset and said.endswith(why) and bool(said) == bool(why)
    assert not why or f"train/configs/{preset}.yaml" in said


def test_dump_names_every_key():
    text = dump(Config())
    for section in dataclasses.fields(Config):
        for key in dataclasses.fields(section.default_factory):
            assert f"  {key.name}:" in text
