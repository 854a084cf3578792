"""Checkpoints of a run: exact restoring, atomic replacement, a disk that refuses, metrics cut short."""

from __future__ import annotations

import errno
import json
import random
from collections import Counter

import pytest
import torch
from torch import nn

from train import checkpoint, metrics
from train.config import UserError, disk_errors
from train.parallel import World

ONE = World(0, 1, torch.device("cpu"))


def trained(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of which one layer trains, after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": model[1].parameters(), "lr": 0.1, "peak": 0.1}])
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_everything_comes_back(tmp_path):
    model, optimizer = trained(0, 3)
    checkpoint.save(tmp_path, 3, model, optimizer, {"step": 3, "skipped": Counter(a=2)}, ONE)
    expected = torch.rand(4), random.random()
    other, other_optimizer = trained(1, 1)
    other[0].load_state_dict(model[0].state_dict())  # the frozen part comes from elsewhere
    extra = checkpoint.load(checkpoint.latest(tmp_path), other, other_optimizer, ONE)
    assert (extra["step"], extra["skipped"], extra["same_world"]) == (3, Counter(a=2), True)
    assert torch.equal(torch.rand(4), expected[0]) and random.random() == expected[1]
    for net, optim in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(5)
        net(torch.randn(5, 3)).square().sum().backward()
        optim.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_only_what_trains_is_stored(tmp_path):
    model, optimizer = trained(0, 1)
    folder = checkpoint.save(tmp_path, 1, model, optimizer, {}, ONE)
    other, other_optimizer = trained(1, 1)
    frozen = other[0].weight.clone()
    checkpoint.load(folder, other, other_optimizer, ONE)
    assert torch.equal(other[0].weight, frozen) and torch.equal(other[1].weight, model[1].weight)


def test_the_newest_whole_one_counts(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for name in ("step-0000007", "step-0000010", "step-0000100.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-0000010"


def test_a_save_replaces_older_ones_and_half_ones(tmp_path):
    model, optimizer = trained(0, 1)
    (tmp_path / "step-0000001.tmp").mkdir()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, optimizer, {}, ONE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002"]


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    model, optimizer = trained(0, 1)
    checkpoint.save(tmp_path, 1, model, optimizer, {}, ONE)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(UserError, match="no space left on device; the last checkpoint is intact"):
        checkpoint.save(tmp_path, 2, model, optimizer, {}, ONE)
    assert checkpoint.latest(tmp_path).name == "step-0000001"


def test_other_errors_are_not_hidden(tmp_path):
    with pytest.raises(OSError), disk_errors(tmp_path):
        raise OSError(errno.EIO, "Input/output error")


def test_metrics_cut_short_by_a_kill(tmp_path):
    path = tmp_path / metrics.FILE
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "c')
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3]
    metrics.Metrics(tmp_path, main=True, steps=9).resume(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert metrics.read(tmp_path / "nothing") == []
