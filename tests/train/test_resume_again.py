"""Resuming under changed circumstances: --resume PATH repeated, other held-out speech, 'auto' on another machine."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.train import runs
from tests.train.runs import stop_after
from train import build, checkpoint, identity
from train.config import load
from train.identity import existing_run
from train.kinds import Kind
from train.trainer import Trainer
from train.validation import Validator

CPU = torch.device("cpu")
QUIET = ("optim.steps=6", "run.valid_utterances=0", "run.log_every=100")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_parts, speech_dir):
    return runs.write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_parts, speech_dir)


def interrupted(after: int, monkeypatch, *arguments) -> None:
    """A stage 1 that is stopped during that step."""
    with monkeypatch.context() as patch:
        stop_after(after, patch)
        assert runs.run(1, *arguments) == 0


def steps(out) -> list[int]:
    """Of the checkpoints in a run's directory."""
    return [checkpoint.step_of(path) for path in checkpoint.all_of(out / "checkpoints")]


# -- the same --resume PATH again --------------------------------------------------------------------------------


@pytest.fixture
def first(tmp_path, config, monkeypatch):
    """A run of which there are the checkpoints of steps 2 and 3."""
    out = tmp_path / "first"
    interrupted(2, monkeypatch, config, out, *QUIET, "run.keep=9")
    interrupted(3, monkeypatch, config, out, *QUIET, "run.keep=9")
    return out


def test_a_repeated_path_goes_on(first, tmp_path, config, monkeypatch, capsys):
    """Killed before its first save, stopped, repeated, finished, repeated: as a requeued job would."""
    new, whole = tmp_path / "new", tmp_path / "whole"
    assert runs.run(1, config, whole, *QUIET) == 0
    command = (config, new, *QUIET, "--resume", str(first))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.run(1, *command)
    assert steps(new) == [] and json.loads((new / "identity.json").read_text())["origin"]["step"] == 3
    capsys.readouterr()
    interrupted(4, monkeypatch, *command)
    said = capsys.readouterr().err
    assert f"resuming from {first / 'checkpoints' / 'step-0000003'}" in said
    assert "saved; the same command goes on from here" in said and steps(new) == [4]
    interrupted(5, monkeypatch, *command)
    said = capsys.readouterr().err
    assert f"resuming {new} at step 4" in said and "has changed" not in said and steps(new) == [4, 5]
    shutil.rmtree(first)  # it is not needed any more
    assert runs.run(1, *command) == 0
    assert runs.losses(new) == runs.losses(whole)[3:]
    capsys.readouterr()
    assert runs.run(1, *command) == 0
    assert capsys.readouterr().err == f"{new}: already finished\n"


def test_a_path_that_changed_meanwhile(first, tmp_path, config, monkeypatch, capsys):
    new, command = tmp_path / "new", (config, tmp_path / "new", *QUIET, "--resume", str(first))
    interrupted(4, monkeypatch, *command)
    interrupted(5, monkeypatch, config, first, *QUIET)
    capsys.readouterr()
    interrupted(5, monkeypatch, *command)
    said = capsys.readouterr().err
    assert f"resuming {new} at step 4" in said
    assert f"began at step 3 of it; to start from {first / 'checkpoints' / 'step-0000005'}, change --out" in said


def test_another_path_starts_there(first, tmp_path, config, monkeypatch, capsys):
    """Nothing of the run before is taken for a checkpoint of the new one, even where the new one never saved."""
    new, (older, newer) = tmp_path / "new", checkpoint.all_of(first / "checkpoints")
    interrupted(3, monkeypatch, config, new, *QUIET, "--resume", str(older))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.run(1, config, new, *QUIET, "--resume", str(newer))
    assert steps(new) == []
    capsys.readouterr()
    interrupted(4, monkeypatch, config, new, *QUIET, "--resume", str(newer))
    assert f"resuming from {newer}" in capsys.readouterr().err


def test_a_path_that_cannot_be_loaded_changes_nothing(first, tmp_path, config, monkeypatch):
    new, command = tmp_path / "new", (config, tmp_path / "new", *QUIET, "--resume")
    interrupted(4, monkeypatch, *command, str(first))
    broken = shutil.copytree(first / "checkpoints" / "step-0000002", tmp_path / "step-0000002")
    (broken / "rank0.pt").write_bytes(b"no")
    assert runs.run(1, *command, str(broken)) == 2
    assert steps(new) == [4]
    assert existing_run(load(str(config), 1, {"run.out": str(new)}, QUIET), CPU).came_from(str(first))


def test_a_path_into_the_run_itself_goes_back(first, tmp_path, config, monkeypatch, capsys):
    """Every time; and where the run came from is not forgotten."""
    new, command = tmp_path / "new", (config, tmp_path / "new", *QUIET, "run.keep=9", "--resume")
    interrupted(4, monkeypatch, *command, str(first))
    interrupted(5, monkeypatch, *command, str(first))
    back = str(new / "checkpoints" / "step-0000004")
    for _ in range(2):
        capsys.readouterr()
        interrupted(6, monkeypatch, *command, back)
        said = capsys.readouterr().err
        assert f"resuming from {back}" in said and "; the same command with --resume auto goes on from here" in said
        assert steps(new) == [4, 6]
    assert runs.run(1, *command, str(first)) == 0
    assert f"resuming {new} at step 6" in capsys.readouterr().err


# -- the best checkpoint -----------------------------------------------------------------------------------------

VALIDATED = ("optim.steps=6", "run.valid_utterances=2", "run.valid_every=2", "run.keep=1", "run.log_every=100")


@pytest.fixture
def wers(monkeypatch):
    """What validation is to find, by step."""
    found: dict[int, float] = {}
    monkeypatch.setattr(Validator, "__call__", lambda self, step: {"valid_ctc_wer": found[step]})
    return found


def best(out) -> tuple[int, float]:
    noted = json.loads((out / "checkpoints" / "best.json").read_text())
    assert noted["step"] in steps(out)
    return noted["step"], noted["value"]


def test_moved_speech_keeps_the_best(tmp_path, config, speech_dir, monkeypatch, wers):
    wers.update({2: 0.1, 4: 0.5, 6: 0.4})
    shutil.copytree(speech_dir, tmp_path / "moved")
    out = tmp_path / "out"
    interrupted(3, monkeypatch, config, out, *VALIDATED)
    interrupted(5, monkeypatch, config, out, *VALIDATED, f"data.valid=[{tmp_path / 'moved' / 'valid.jsonl'}]")
    assert best(out) == (2, 0.1)
    rows = len((speech_dir / "valid.jsonl").read_text().splitlines())
    assert rows > 2
    assert runs.run(1, config, out, *VALIDATED, "run.valid_utterances=3") == 0
    assert best(out) == (6, 0.4), "three rows are another measure than two"


def test_other_speech_begins_a_new_best(tmp_path, config, speech_dir, monkeypatch, wers):
    """Also where it was interrupted before its first validation; the old one stays until then."""
    wers.update({2: 0.1, 4: 0.5, 6: 0.6})
    other = f"data.valid=[{speech_dir / 'train.jsonl'}]"
    interrupted(2, monkeypatch, config, tmp_path, *VALIDATED)
    interrupted(3, monkeypatch, config, tmp_path, *VALIDATED, other)
    assert best(tmp_path) == (2, 0.1)
    assert runs.run(1, config, tmp_path, *VALIDATED, other) == 0
    assert best(tmp_path) == (4, 0.5) and steps(tmp_path) == [4, 6]


def test_a_best_that_is_thrown_away_is_forgotten(tmp_path, config, monkeypatch, wers):
    wers.update({2: 0.3, 4: 0.1})
    interrupted(5, monkeypatch, config, tmp_path, *VALIDATED, "run.keep=9")
    back = ("run.keep=9", "--resume", str(tmp_path / "checkpoints" / "step-0000002"))
    interrupted(3, monkeypatch, config, tmp_path, *VALIDATED, *back)
    assert not (tmp_path / "checkpoints" / "best.json").exists()


# -- 'auto' on another machine -----------------------------------------------------------------------------------


def multiplies(dtype: torch.dtype, monkeypatch) -> None:
    """A machine for which model.dtype=auto means that."""
    real = build.frozen_dtype
    monkeypatch.setattr(build, "frozen_dtype", lambda model, at: dtype if model.dtype == "auto" else real(model, at))


def test_another_dtype_is_refused(tmp_path, config, monkeypatch, capsys):
    """On a machine where 'auto' means another; named outright it goes on, and what is finished stays finished."""
    auto = ("model.dtype=auto", *QUIET)
    multiplies(torch.bfloat16, monkeypatch)
    interrupted(2, monkeypatch, config, tmp_path, *auto)
    noted = json.loads((tmp_path / "identity.json").read_text())
    assert noted["resolved"] == {"model.dtype": "bfloat16", "run.compile": False}
    multiplies(torch.float32, monkeypatch)
    capsys.readouterr()
    assert runs.run(1, config, tmp_path, *auto) == 2
    said = "holds a run with different settings: model.dtype auto (bfloat16) -> auto (float32); "
    said += "set model.dtype=bfloat16 to go on with it, --overwrite it or change --out"
    assert said in capsys.readouterr().err
    assert runs.run(1, config, tmp_path, *QUIET, "model.dtype=float32") == 2
    assert "model.dtype auto (bfloat16) -> float32; --overwrite it" in capsys.readouterr().err
    assert runs.run(1, config, tmp_path, *QUIET, "model.dtype=bfloat16") == 0
    assert "different settings" not in capsys.readouterr().err
    multiplies(torch.bfloat16, monkeypatch)
    assert runs.run(1, config, tmp_path, *auto) == 0, "bfloat16 by another name"


def test_what_is_finished_needs_no_dtype(tmp_path, config, monkeypatch, capsys):
    asked = load(str(config), 1, {"run.out": str(tmp_path)}, ["model.dtype=auto"])
    multiplies(torch.bfloat16, monkeypatch)
    identity.write(asked, existing_run(asked, CPU))
    (tmp_path / "done.json").write_text('{"steps": 4}')
    multiplies(torch.float32, monkeypatch)
    assert runs.run(1, config, tmp_path, "model.dtype=auto") == 0
    assert "already finished" in capsys.readouterr().err
    assert runs.run(1, config, tmp_path, "model.dtype=auto", "optim.steps=9") == 2


def test_a_run_of_an_older_version_took_what_there_was(tmp_path, config, monkeypatch):
    asked = load(str(config), 1, {"run.out": str(tmp_path)}, ["model.dtype=auto"])
    multiplies(torch.bfloat16, monkeypatch)
    identity.write(asked, existing_run(asked, CPU))
    notes = json.loads((tmp_path / "identity.json").read_text())
    del notes["resolved"], notes["origin"]
    (tmp_path / "identity.json").write_text(json.dumps(notes))
    multiplies(torch.float32, monkeypatch)
    found = existing_run(asked, CPU)
    assert found.goes_on and not found.changes
    assert not found.with_resolved(asked, {"model.attention": "sdpa"}).changes


def test_other_meanings_are_announced(tmp_path, config):
    """Of settings that round differently; what only has another name now is no change."""
    asked = load(str(config), 2, {"run.out": str(tmp_path)})
    then = {"model.attention": "flash_attention_2", "run.packed": True}
    identity.write(asked, existing_run(asked, CPU).with_resolved(asked, then))
    found = existing_run(asked, CPU).with_resolved(asked, {"model.attention": "sdpa", "run.packed": False})
    assert found.goes_on and [str(change) for change in found.changed(Kind.ROUNDING)] == [
        "model.attention auto (flash_attention_2) -> auto (sdpa)",
        "run.packed auto (true) -> auto (false)",
    ]
    named = load(str(config), 2, {"run.out": str(tmp_path)}, ["run.packed=true", "run.compile=false"])
    assert not existing_run(named, CPU).with_resolved(named, then).changes


def test_stage_2_notes_its_attention(tmp_path, config, monkeypatch, capsys):
    assert runs.run(1, config, tmp_path / "1", *QUIET) == 0
    more = (*QUIET, "--init", str(tmp_path / "1"))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert runs.run(2, config, tmp_path / "2", *more) == 0
    path = tmp_path / "2" / "identity.json"
    notes = json.loads(path.read_text())
    assert notes["resolved"]["model.attention"] == "sdpa" and notes["resolved"]["run.packed"] is False
    notes["resolved"]["model.attention"] = "flash_attention_2"
    path.write_text(json.dumps(notes))
    capsys.readouterr()
    assert runs.run(2, config, tmp_path / "2", *more) == 0
    said = "model.attention auto (flash_attention_2) -> auto (sdpa); from here on the losses may differ by rounding"
    assert said in capsys.readouterr().err
