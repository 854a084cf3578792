"""Checkpoints of a run: exact restoring, atomic replacement, a disk that refuses, metrics cut short."""

from __future__ import annotations

import errno
import json
import pickle
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import StackSummary

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from soundwave_fast.errors import UserError, disk_errors
from train import checkpoint, metrics
from train.checkpoint import Checkpoints
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


def save(folder: Path, step: int, model, optimizer, extra: dict | None = None, **more) -> Path:
    """A checkpoint, waited for."""
    checkpoints = Checkpoints(folder, ONE, keep=more.pop("keep", 1))
    checkpoints.save(step, model, optimizer, extra or {}, **more)
    checkpoints.wait()
    return folder / f"step-{step:07d}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back(tmp_path):
    model, optimizer = trained(0, 3)
    save(tmp_path, 3, model, optimizer, {"step": 3, "skipped": Counter(a=2)})
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
    folder = save(tmp_path, 1, model, optimizer)
    other, other_optimizer = trained(1, 1)
    frozen = other[0].weight.clone()
    checkpoint.load(folder, other, other_optimizer, ONE)
    assert torch.equal(other[0].weight, frozen) and torch.equal(other[1].weight, model[1].weight)


def test_training_goes_on_while_it_is_written(tmp_path):
    """What is saved is the state at the call, whatever happens to the weights while the thread writes."""
    model, optimizer = trained(0, 1)
    truth, moment = model[1].weight.detach().clone(), optimizer.state[model[1].weight]["exp_avg"].clone()
    checkpoints = Checkpoints(tmp_path, ONE)
    checkpoints.save(1, model, optimizer, {})
    with torch.no_grad():
        for tensor in (*model.parameters(), *(s["exp_avg"] for s in optimizer.state.values())):
            tensor.fill_(7.0)
    checkpoints.wait()
    other, other_optimizer = trained(1, 1)
    checkpoint.load(checkpoint.latest(tmp_path), other, other_optimizer, ONE)
    assert torch.equal(other[1].weight, truth)
    assert torch.equal(other_optimizer.state[other[1].weight]["exp_avg"], moment)


def test_the_newest_whole_one_counts(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for name in ("step-0000007", "step-0000010", "step-0000100.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-0000010"


def test_a_save_replaces_older_ones_and_half_ones(tmp_path):
    model, optimizer = trained(0, 1)
    (tmp_path / "step-0000001.tmp").mkdir()
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
    assert names(tmp_path) == ["step-0000002"]


def test_the_newest_and_the_best_stay(tmp_path):
    model, optimizer = trained(0, 1)
    checkpoints = Checkpoints(tmp_path, ONE, keep=2)
    assert checkpoints.best is None
    for step in range(1, 7):
        best = {"metric": "wer", "value": 0.1} if step == 2 else None
        checkpoints.save(step, model, optimizer, {}, best)
    checkpoints.wait()
    assert names(tmp_path) == ["best.json", "step-0000002", "step-0000005", "step-0000006"]
    assert checkpoints.best == {"step": 2, "metric": "wer", "value": 0.1}
    checkpoints.drop_after(5)
    assert checkpoint.latest(tmp_path).name == "step-0000005"


def test_what_a_user_may_name(tmp_path):
    model, optimizer = trained(0, 1)
    folder = save(tmp_path / "checkpoints", 4, model, optimizer)
    assert all(checkpoint.find(str(p)) == folder for p in (folder, folder.parent, tmp_path))
    with pytest.raises(UserError, match="--resume .*nothing: no checkpoint there"):
        checkpoint.find(str(tmp_path / "nothing"))


@pytest.mark.parametrize("broken", ["__0_0.distcp", ".metadata", "rank0.pt"])
def test_a_damaged_one_is_named(tmp_path, broken):
    model, optimizer = trained(0, 1)
    folder = save(tmp_path, 1, model, optimizer)
    (folder / broken).write_bytes((folder / broken).read_bytes()[:20])
    with pytest.raises(UserError, match="step-0000001: does not fit this run, or is damaged"):
        checkpoint.load(folder, model, optimizer, ONE)


@pytest.mark.parametrize(
    "state",
    [b"no pickle at all", b"\x80\x04.", b"csys\nnothing\n.", b"cno_module\nx\n.", pickle.dumps([]), pickle.dumps({})],
)
def test_a_ranks_own_state_that_is_none_is_named(tmp_path, state):
    model, optimizer = trained(0, 1)
    folder = save(tmp_path, 1, model, optimizer)
    (folder / "rank0.pt").write_bytes(state)
    with pytest.raises(UserError, match="step-0000001: does not fit this run, or is damaged"):
        checkpoint.load(folder, model, optimizer, ONE)
    torch.save(pickle.loads(state) if state[-2:] in (b"].", b"}.") else 5, folder / "rank0.pt")
    with pytest.raises(UserError, match="no state of a rank"):
        checkpoint.load(folder, model, optimizer, ONE)


def test_one_of_another_model_is_named(tmp_path):
    model, optimizer = trained(0, 1)
    folder = save(tmp_path, 1, model, optimizer)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    other[0].requires_grad_(False)
    groups = [{"params": other[1].parameters(), "lr": 0.1, "peak": 0.1}]
    with pytest.raises(UserError, match="does not fit this run"):
        checkpoint.load(folder, other, torch.optim.AdamW(groups), ONE)


# -- a disk that refuses ---------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow past `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 3000], ids=["a rank's own file", "weights, in the writing thread"])
def test_no_space(tmp_path, size):
    torch.manual_seed(0)
    model = nn.Linear(40, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    save(tmp_path, 1, model, optimizer)
    checkpoints = Checkpoints(tmp_path, ONE)
    extra = {"much": b"x" * 1000} if size == 100 else {}
    with files_of_at_most(size if size == 100 else 9000), pytest.raises(UserError) as error:
        checkpoints.save(2, model, optimizer, extra)
        while not checkpoints.pending.done():
            time.sleep(0.01)
        assert checkpoints.failed
        checkpoints.wait()
    assert str(error.value) == f"{tmp_path}: file too large; the last checkpoint is intact"
    assert names(tmp_path) == ["step-0000001"], "the half of the new one takes no space"
    assert checkpoint.load(checkpoint.latest(tmp_path), model, optimizer, ONE)["step"] == 1
    save(tmp_path, 2, model, optimizer)  # there is room again
    assert names(tmp_path) == ["step-0000002"]


def test_the_rank_that_could_not_write_is_named():
    full = OSError(errno.ENOSPC, "No space left on device")
    failed = dcp.api.CheckpointException("write", {1: (full, StackSummary())})
    line = "out: no space left on device; the last checkpoint is intact"
    assert [str(checkpoint._told(failed, Path("out"), rank)) for rank in (0, 1)] == [f"rank 1: {line}", line]
    assert str(checkpoint._told(full, Path("out"), 0)) == line


def test_a_folder_that_cannot_be_made(tmp_path):
    model, optimizer = trained(0, 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="not a directory; the last checkpoint is intact"):
        Checkpoints(tmp_path / "file" / "checkpoints", ONE).save(1, model, optimizer, {})


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
