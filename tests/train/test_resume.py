"""Stopping and resuming a stage: signals, kill -9 (during a save too), a full disk; the losses do not tell."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time

import pytest
import torch

from tests.train import runs
from tests.train.runs import stop_after, weights
from train import checkpoint, stage
from train.trainer import Trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_parts, speech_dir):
    return runs.write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_parts, speech_dir)


@pytest.fixture(scope="module")
def stages(tmp_path_factory, config):
    """Output directory of stage 1, to start stage 2 from."""
    out = tmp_path_factory.mktemp("runs") / "stage1"
    assert runs.run(1, config, out, "run.valid_utterances=0") == 0
    return {1: out}


LONG = ("optim.steps=6", "run.valid_utterances=0", "run.log_every=100")


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
        assert runs.run(number, config, cut, *more) == 0, "a scheduler's SIGTERM is no failure"
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
        assert runs.run(1, config, killed, *LONG) == 0
    shutil.copytree(killed / "checkpoints" / "step-0000003", killed / "checkpoints" / "step-0000005.tmp")
    for path in (killed / "checkpoints" / "step-0000005.tmp").iterdir():
        path.write_bytes(path.read_bytes()[:10])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**runs.rows(killed)[-1], "step": 4}) + '\n{"step": 5, "ce')
    capsys.readouterr()
    assert runs.run(1, config, killed, *LONG) == 0
    assert "at step 3" in capsys.readouterr().err
    assert runs.losses(killed) == runs.losses(whole)


def kill_while_saving(config, out, more) -> bool:
    """Start the stage in its own process and kill it hard while it saves for at least the second time.

    Returns whether the save was still going on, so that half a checkpoint is left behind.
    """
    process = runs.start("train/stage1.py", "--config", str(config), "--out", str(out), *more)
    folder = out / "checkpoints"
    try:
        deadline = time.monotonic() + 120
        while checkpoint.latest(folder) is None or not list(folder.glob("*.tmp")):
            assert process.poll() is None and time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate()
    return bool(list(folder.glob("*.tmp")))


@pytest.mark.slow
def test_killed_while_saving(tmp_path, config):
    """A real process that saves after every step is killed hard during a save; the losses do not tell."""
    more = ("optim.steps=40", "run.valid_utterances=0", "run.log_every=100", "run.save_every=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for _ in range(4):
        if kill_while_saving(config, killed, more):
            break
    else:
        pytest.fail("no kill came during a save")
    assert not (killed / "done.json").exists()
    assert runs.run(1, config, killed, *more) == 0
    assert not list(killed.rglob("*.tmp"))
    assert runs.run(1, config, whole, *more[:-1]) == 0
    assert runs.losses(killed) == runs.losses(whole)


def test_the_disk_fills_up(tmp_path, config, monkeypatch, capsys):
    """The save of step 3 fails: the run ends with one line, and goes on from step 2 once there is room."""
    more, whole, full = (*LONG, "run.save_every=0"), tmp_path / "whole", tmp_path / "full"
    assert runs.run(1, config, whole, *more) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = Trainer._save

    def save(self, best=None):
        if self.step == 3:  # any file may grow to 20 kB from now on
            self.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        real(self, best)

    capsys.readouterr()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_save", save)
            assert runs.run(1, config, full, *more) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stage 1: {full / 'checkpoints'}: file too large; the last checkpoint is intact"
    assert checkpoint.latest(full / "checkpoints").name == "step-0000002"
    assert not list(full.rglob("*.tmp"))
    assert runs.run(1, config, full, *more) == 0
    assert runs.losses(full) == runs.losses(whole)


def test_resume_from_an_older_checkpoint(tmp_path, config, capsys):
    """--resume PATH: into a new directory with different settings, and back within the same one."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert runs.run(1, config, first, *LONG, "run.save_every=0", "run.keep=9") == 0
    older = first / "checkpoints" / "step-0000002"
    more = (*LONG, "run.log_every=50", "--resume", str(older))
    assert runs.run(1, config, second, *more) == 0
    assert f"resuming from {older}" in capsys.readouterr().err
    assert runs.losses(second) == runs.losses(first)[2:]
    (first / "done.json").unlink()
    back = (*LONG, "run.save_every=0", "run.keep=9", "--resume", str(older), "optim.clip=2")
    assert runs.run(1, config, first, *back) == 2, "different settings"
    assert runs.run(1, config, first, *back, "--overwrite") == 2
    assert "--overwrite would throw away" in capsys.readouterr().err
    before = runs.losses(first)
    assert runs.run(1, config, first, *back[:-1]) == 0
    assert runs.losses(first) == before and len(checkpoint.all_of(first / "checkpoints")) == 6


def test_resume_never_starts_afresh(tmp_path, config):
    assert runs.run(1, config, tmp_path, *LONG, "run.save_every=0") == 0
    (tmp_path / "stray.txt").write_text("of the run before")
    before = runs.losses(tmp_path)
    assert runs.run(1, config, tmp_path, *LONG, "run.save_every=0", "--resume", "never") == 0
    assert runs.losses(tmp_path) == before and not (tmp_path / "stray.txt").exists()


def test_the_best_by_validation_stays(stages, tmp_path, config):
    more = (*LONG[:1], "run.valid_utterances=2", "run.valid_every=2", "run.save_every=3600", "run.keep=1")
    assert runs.run(1, config, tmp_path, *more) == 0
    scored = {row["step"]: row["valid_ctc_wer"] for row in runs.rows(tmp_path) if "valid_ctc_wer" in row}
    assert list(scored) == [2, 4, 6]
    best = min(scored, key=lambda step: (scored[step], step))
    noted = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert len(noted.pop("measure")) == 64
    assert noted == {"step": best, "metric": "valid_ctc_wer", "value": scored[best]}
    assert (tmp_path / "checkpoints" / f"step-{best:07d}").is_dir()


def test_what_it_ran_on_is_noted_every_time(tmp_path, config, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert runs.run(1, config, tmp_path, *LONG) == 0
    assert runs.run(1, config, tmp_path, *LONG) == 0
    entries = json.loads((tmp_path / "environment.json").read_text())
    assert len(entries) == 2 and entries[0]["ranks"] == 1 and entries[1]["packages"]["torch"]


def test_overwriting_an_interrupted_run_starts_afresh(stages, tmp_path, config, monkeypatch):
    """Nothing of the thrown-away checkpoint is used: neither its state, nor 'there is one' for stage 2's first fit."""
    fresh, again, more = tmp_path / "fresh", tmp_path / "again", (*LONG, "--init", str(stages[1]))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert runs.run(2, config, again, *more, "run.seed=7") == 0
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
