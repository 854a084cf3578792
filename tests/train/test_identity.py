"""Which changed settings a run accepts: by class, moved and changed files, what auto means, more or fewer steps."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.model.tiny import write_manifest
from tests.train import runs
from tests.train.runs import stop_after, weights
from train import checkpoint, identity, kinds
from train.config import Config, load
from train.fingerprints import fingerprint
from train.identity import Existing, existing_run
from train.kinds import KINDS, Kind
from train.parallel import World
from train.step import rate_factor
from train.trainer import Trainer

CONSTANT = ("optim.warmup=0", "optim.decay_from=1.0", "run.log_every=100")  # the rate does not know the run's length
CPU = torch.device("cpu")
QUIET = ("run.valid_utterances=0", "run.log_every=100")


def existing(config: Config) -> Existing:
    return existing_run(config, CPU)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_parts, speech_dir):
    return runs.write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_parts, speech_dir)


@pytest.fixture
def files(tmp_path):
    """Files that a run names: {setting: path}, two manifests among them."""
    found = {"model.llm": tmp_path / "llm", "run.init": tmp_path / "init", "data.train": tmp_path / "a.jsonl"}
    (found["run.init"] / "lora").mkdir(parents=True)
    found["model.llm"].mkdir()
    (found["model.llm"] / "config.json").write_text('{"hidden_size": 8}')
    (found["model.llm"] / "model.safetensors").write_bytes(bytes(3 << 20))
    (found["run.init"] / "adapters.safetensors").write_bytes(bytes(100))
    for name in ("a", "b"):
        write_manifest(tmp_path / f"{name}.jsonl", [{"id": name, "audio": "x.wav", "duration": 1}])
    return found


@pytest.fixture
def asked(files, tmp_path):
    """The config of a run in `tmp_path`/out with settings added."""
    (tmp_path / "preset.yaml").write_text("optim: {trainable: {a: 1.0e-3, b: 1.0e-3}, steps: 100}\n")
    named = {"run.out": str(tmp_path / "out"), "model.whisper": "hub/whisper"}
    named |= {key: str(path) for key, path in files.items()}
    named["data.train"] = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    return lambda *settings: load(str(tmp_path / "preset.yaml"), 2, named, settings)


@pytest.fixture
def begun(asked, tmp_path):
    """The output directory of a run with that config, which has written its settings and nothing else."""
    config = asked()
    (tmp_path / "out").mkdir()
    identity.write(config, existing(config))
    return tmp_path / "out"


def test_every_setting_is_in_one_class():
    sections = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    keys = {f"{name}.{field.name}" for name, section in sections.items() for field in dataclasses.fields(section)}
    assert KINDS.keys() == keys
    assert len(KINDS) == sum(map(len, kinds.CLASSES.values())), "none is in two"


# -- what a directory holds, without training ------------------------------------------------------------------


def test_an_empty_directory_holds_nothing(asked):
    found = existing(asked())
    assert not found.there and not found.goes_on and not found.refused


def test_the_same_run_goes_on(begun, asked):
    found = existing(asked())
    assert found.goes_on and not found.finished and not found.changes
    (begun / "done.json").write_text('{"steps": 100}')
    assert existing(asked()).finished


@pytest.mark.parametrize(
    ("setting", "kind", "said"),
    [
        ("data.workers=2", Kind.FREE, "data.workers 0 -> 2"),
        ("run.loggers=[wandb]", Kind.FREE, 'run.loggers ["jsonl"] -> ["wandb"]'),
        ("run.compile=true", Kind.ROUNDING, "run.compile auto (false) -> true"),
    ],
)
def test_what_goes_on(begun, asked, setting, kind, said):
    (begun / "done.json").write_text('{"steps": 100}')
    found = existing(asked(setting))
    assert found.goes_on and [str(change) for change in found.changed(kind)] == [said] and len(found.changes) == 1
    assert found.finished, "there is nothing to do for it"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["optim.clip=2"], "optim.clip 1.0 -> 2.0"),
        (["optim.clip=2", "data.workers=2"], "optim.clip 1.0 -> 2.0"),
        (["optim.trainable={a: 0.001, b: 0.1, c: 1}"], "optim.trainable.b 0.001 -> 0.1; optim.trainable.c none -> 1.0"),
        (["model.chat_template=x"], "model.chat_template null -> x"),
        (["model.whisper=hub/other"], "model.whisper hub/whisper -> hub/other"),
        ([f"data.{key}=9" for key in ("batch_size", "buckets", "batch_tokens", "batch_seconds", "max_seconds")],
         "data.batch_seconds 60.0 -> 9.0; data.batch_tokens 0 -> 9; data.batch_size 16 -> 9; data.buckets 8 -> 9 "
         "and 1 more"),
    ],
)  # fmt: skip
def test_another_run_is_refused(begun, asked, settings, said):
    found = existing(asked(*settings))
    assert found.refused == f"{begun} holds a run with different settings: {said}; --overwrite it or change --out"
    assert not found.goes_on and not found.changes


def test_the_order_of_patterns_counts(begun, asked, tmp_path):
    (tmp_path / "preset.yaml").write_text("optim: {trainable: {b: 1.0e-3, a: 1.0e-3}, steps: 100}\n")
    assert "in another order" in existing(asked()).refused


def test_moved_files_are_the_same_files(begun, asked, files, tmp_path):
    (tmp_path / "new").mkdir()
    named = {key: tmp_path / "new" / path.name for key, path in files.items()}
    for key, path in named.items():
        shutil.move(files[key], path)
    shutil.move(tmp_path / "b.jsonl", tmp_path / "new" / "c.jsonl")
    settings = [f"{key}={path}" for key, path in named.items() if key != "data.train"]
    found = existing(asked(*settings, f"data.train=[{named['data.train']}, {tmp_path / 'new' / 'c.jsonl'}]"))
    assert found.goes_on and {change.key for change in found.changes} == set(named)
    assert existing(asked()).goes_on, "that they are gone is for their readers to say"
    swapped = existing(asked(*settings, f"data.train=[{tmp_path / 'new' / 'c.jsonl'}, {named['data.train']}]"))
    assert "holds a run with different settings: data.train " in swapped.refused
    gone = existing(asked("model.llm=nowhere/llm"))
    assert "model.llm " in gone.refused and "-> nowhere/llm" in gone.refused


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("model.llm", "llm/config.json"),
        ("model.llm", "llm/model.safetensors"),
        ("model.llm", "llm/merges.txt"),
        ("run.init", "init/adapters.safetensors"),
        ("run.init", "init/lora/adapter_config.json"),
        ("data.train", "a.jsonl"),
    ],
)
def test_changed_files_are_refused(begun, asked, files, tmp_path, key, file):
    path = tmp_path / file
    path.write_bytes((path.read_bytes()[:-1] if path.exists() else b"") + b"!")
    what = tmp_path / file if key == "data.train" else files[key]
    assert existing(asked()).refused == (
        f"{begun} holds a run that began with different files: {key}: the content of {what} changed since the run "
        "began; --overwrite it or change --out"
    )


def test_what_is_no_part_of_a_model_may_change(begun, asked, files):
    (files["model.llm"] / "README.md").write_text("hello")
    (files["run.init"] / "done.json").write_text("{}")
    assert existing(asked()).goes_on


def test_manifests_are_compared_as_they_lie(tmp_path):
    """A gzipped one by its bytes; lhotse's supervisions with the recordings they are read with."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("{}\n")
    (tmp_path / "x_supervisions.jsonl").write_text("{}\n")
    paths = (str(tmp_path / "a.jsonl.gz"), str(tmp_path / "x_supervisions.jsonl"), str(tmp_path / "none.jsonl"))
    before = fingerprint("data.train", paths)
    assert before[2] is None and len(set(before)) == 3
    (tmp_path / "x_recordings.jsonl").write_text("{}\n")
    after = fingerprint("data.train", paths)
    assert after[0] == before[0] and after[1] != before[1]


def test_a_run_of_an_older_version_is_known_by_its_paths(begun, asked, tmp_path):
    (begun / "identity.json").unlink()
    (tmp_path / "a.jsonl").write_text("other rows")
    assert existing(asked()).goes_on, "nobody noted what they were"
    shutil.copytree(tmp_path / "llm", tmp_path / "copy")
    refused = existing(asked(f"model.llm={tmp_path / 'copy'}")).refused
    assert "holds a run with different settings: model.llm " in refused


def test_settings_of_another_version(begun, asked):
    path = begun / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["run"]["hang_seconds"], tree["model"]["peak_select"]
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert existing(asked()).goes_on, "they had what is the default now"
    tree["model"]["horns"] = 2
    tree["extras"] = {"a": 1}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert "model.horns 2 -> (no such setting); extras" in existing(asked()).refused
    for text in ("{", "[1]", "optim: [1]", "text"):
        path.write_text(text)
        assert "settings that cannot be read (config.yaml)" in existing(asked()).refused


def test_how_long_it_may_become(begun, asked):
    (begun / "checkpoints" / "step-0000040").mkdir(parents=True)
    for steps in (200, 40):
        found = existing(asked(f"optim.steps={steps}"))
        assert [str(change) for change in found.changed(Kind.LENGTH)] == [f"optim.steps 100 -> {steps}"]
    assert existing(asked("optim.steps=39")).refused == (
        f"{begun} holds a run at step 40, past optim.steps=39; --overwrite it or change --out "
        f"(--resume {begun} starts from its state there)"
    )
    (begun / "done.json").write_text('{"steps": 100}')
    shorter = existing(asked("optim.steps=60"))
    assert "a run at step 100, past optim.steps=60" in shorter.refused and shorter.finished
    assert not existing(asked("optim.steps=60", "optim.clip=9.0")).finished
    longer = existing(asked("optim.steps=200"))
    assert longer.goes_on and not longer.finished
    (begun / "checkpoints" / "step-0000040").rmdir()  # older versions kept none of the last step
    assert "a run finished after 100 steps, without a checkpoint" in existing(asked("optim.steps=200")).refused


# -- training on -----------------------------------------------------------------------------------------------


def test_what_cannot_change_a_number_does_not(tmp_path, config, tiny_parts, speech_dir, monkeypatch, capsys):
    """A stage 2 cut twice, gone on with in another way each time, after all its files have moved."""
    shutil.copytree(speech_dir, tmp_path / "speech")
    shutil.copytree(tiny_parts.llm, tmp_path / "llm")
    shutil.copytree(tiny_parts.whisper, tmp_path / "whisper")
    init = tmp_path / "init"
    assert runs.run(1, config, init, *QUIET) == 0
    more = ("optim.steps=6", *QUIET)
    assert runs.run(2, config, tmp_path / "whole", *more, "--init", str(init)) == 0

    cut = tmp_path / "cut"
    moved = ("model.llm", "model.whisper", "data.train", "run.init")
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert runs.run(2, config, cut, *more, "--init", str(init)) == 0
    init.rename(tmp_path / "elsewhere")
    others = ("--init", str(tmp_path / "elsewhere"), "--train", str(tmp_path / "speech" / "train.jsonl"))
    others += (f"model.llm={tmp_path / 'llm'}", f"model.whisper={tmp_path / 'whisper'}", "optim.steps=6")
    first = ("data.workers=1", "data.prefetch=3", "run.log_every=2", "run.valid_utterances=2", "run.valid_every=2")
    first += ("run.save_every=0", "run.keep=1", "run.loggers=[]", "optim.max_bad_steps=3", "data.max_bad_share=0.5")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert runs.run(2, config, cut, *others, *first) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("goes on")]
    assert len(said) == 1 and "data.workers 0 -> 1; data.prefetch 2 -> 3; " in said[0] and "rounding" not in said[0]
    assert not any(key in said[0] for key in moved)
    last = json.loads((cut / "environment.json").read_text())[-1]
    assert last["step"] == 2 and last["changed_settings"]["data.workers"] == [0, 1]
    assert last["changed_settings"].keys() > set(moved)

    assert runs.run(2, config, cut, *others, "run.valid_utterances=0") == 0, "and back, in this process"
    assert runs.losses(cut) == runs.losses(tmp_path / "whole")
    one, other = weights(cut), weights(tmp_path / "whole")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    kept = yaml.safe_load((cut / "config.yaml").read_text())
    assert kept["data"]["workers"] == 0 and kept["model"]["llm"] == str(tmp_path / "llm")
    capsys.readouterr()
    assert runs.run(2, config, cut, *others, *first) == 0
    assert capsys.readouterr().err == f"{cut}: already finished\n"


def test_more_steps(tmp_path, config, monkeypatch, capsys):
    """A finished and an interrupted run become the run that was that long from the start, where the rate allows it."""
    whole, finished, cut = (tmp_path / name for name in ("whole", "finished", "cut"))
    valid = "run.valid_utterances=2"
    assert runs.run(1, config, whole, *CONSTANT, "optim.steps=6", valid) == 0
    assert runs.run(1, config, finished, *CONSTANT, "optim.steps=3", "run.valid_utterances=0") == 0
    assert checkpoint.latest(finished / "checkpoints").name == "step-0000003"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert runs.run(1, config, cut, *CONSTANT, "optim.steps=4", valid) == 0
    for out, was in ((finished, 3), (cut, 4)):
        capsys.readouterr()
        assert runs.run(1, config, out, *CONSTANT, "optim.steps=6", valid) == 0
        assert f"goes on with optim.steps {was} -> 6: after step" in capsys.readouterr().err
        assert runs.losses(out) == runs.losses(whole)
        done, truth = (json.loads((folder / "done.json").read_text()) for folder in (out, whole))
        assert done["steps"] == 6 and done["valid"]["ctc_wer"] == truth["valid"]["ctc_wer"]
        assert all(torch.equal(weights(out)[name], tensor) for name, tensor in weights(whole).items())
        assert runs.rows(out)[-1]["eta_s"] == 0


def test_the_schedule_is_the_new_one_from_there(tmp_path, config, capsys):
    more = (*QUIET, "optim.warmup=1")
    assert runs.run(1, config, tmp_path, *more, "optim.steps=3") == 0
    before = runs.losses(tmp_path)
    capsys.readouterr()
    assert runs.run(1, config, tmp_path, *more, "optim.steps=6") == 0
    short, long = (load(str(config), 1, None, [*more, f"optim.steps={steps}"]).optim for steps in (3, 6))
    expected = [rate_factor(short if step < 3 else long, step) for step in range(6)]
    assert [row["lr_factor"] for row in runs.rows(tmp_path)] == pytest.approx(expected, abs=1e-6)
    assert runs.losses(tmp_path)[:3] == before
    said = f"after step 3 the learning rate is {rate_factor(long, 3):.3g} of its peak, where it would have been 0.05"
    assert said in capsys.readouterr().err


def test_fewer_steps(tmp_path, config, monkeypatch, capsys):
    """As few as it has made already end it there; fewer are refused, unless it is finished, without --overwrite."""
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert runs.run(1, config, tmp_path, *QUIET, "optim.steps=6") == 0
    assert runs.run(1, config, tmp_path, *QUIET, "optim.steps=2") == 2
    assert "holds a run at step 3, past optim.steps=2; --overwrite it" in capsys.readouterr().err
    older = str(tmp_path / "checkpoints" / "step-0000003")
    assert runs.run(1, config, tmp_path / "new", *QUIET, "optim.steps=2", "--resume", older) == 2
    assert "at step 3, past optim.steps=2" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert runs.run(1, config, tmp_path, *QUIET, "optim.steps=3") == 0
    assert json.loads((tmp_path / "done.json").read_text())["steps"] == 3
    capsys.readouterr()
    assert runs.run(1, config, tmp_path, *QUIET, "optim.steps=2") == 0, "finished, and further than asked"
    assert "already finished, with 3 steps" in capsys.readouterr().err
    assert runs.run(1, config, tmp_path, *QUIET, "optim.steps=2", "--overwrite") == 0
    assert [row["step"] for row in runs.rows(tmp_path)] == [1, 2]


def test_rounding_is_said(tmp_path, config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert runs.run(1, config, tmp_path, *QUIET, "optim.steps=2") == 0
    capsys.readouterr()
    assert runs.run(1, config, tmp_path, *QUIET, "optim.steps=2", "run.threads=2") == 0
    said = "goes on with different settings: run.threads 1 -> 2; from here on the losses may differ by rounding"
    assert said in capsys.readouterr().err.splitlines()


def test_a_checkpoint_brings_its_state_not_its_settings(tmp_path, config):
    """--resume PATH into another directory: rates, weight decay, seed and batches are those asked for."""
    assert runs.run(1, config, tmp_path / "a", *QUIET, "optim.steps=2") == 0
    settings = ("optim.weight_decay=0.5", "run.seed=3", "data.batch_size=2", "optim.betas=[0.5, 0.6]")
    asked = load(str(config), 1, {"run.out": str(tmp_path / "b")}, settings)
    (tmp_path / "b").mkdir()
    trainer = Trainer(asked, 1, World(0, 1, CPU), str(tmp_path / "a"))
    trainer.resume()
    assert trainer.step == 2 and trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert all(group["betas"] == (0.5, 0.6) for group in trainer.optimizer.param_groups)
    assert len(next(iter(trainer.loader)).ids) == 2
    assert runs.run(1, config, tmp_path / "b", *QUIET, *settings, "--resume", str(tmp_path / "a")) == 0
    assert [row["step"] for row in runs.rows(tmp_path / "b")] == [3, 4]


def test_a_finished_run_asked_to_go_on_elsewhere_keeps_its_state(tmp_path, config):
    """Nothing is left to train, but the new directory can be gone on with as any other."""
    assert runs.run(1, config, tmp_path / "a", *QUIET, "optim.steps=2") == 0
    assert runs.run(1, config, tmp_path / "b", *QUIET, "optim.steps=2", "--resume", str(tmp_path / "a")) == 0
    assert checkpoint.latest(tmp_path / "b" / "checkpoints").name == "step-0000002"
    assert runs.run(1, config, tmp_path / "b", *QUIET, "optim.steps=3") == 0
    assert Path(tmp_path / "b" / "done.json").is_file()
