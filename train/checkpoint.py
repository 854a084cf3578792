"""Resumable state of a run: written in the background, atomic, the newest k and the best kept, resharded on load."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from soundwave_fast.errors import UserError, disk_error, disk_errors
from train.parallel import World

BEST = "best.json"
_OPTIONS = {"ignore_frozen_params": True}


def all_of(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; half-written ones (.tmp) do not count."""
    return sorted(path for path in folder.glob("step-*[0-9]") if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = all_of(folder)
    return found[-1] if found else None


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def named_step(path: Path | None) -> int | None:
    """The step a checkpoint is of by its name: 0 for none at all, None where somebody gave it another name."""
    if path is None:
        return 0
    return step_of(path) if path.name.startswith("step-") and path.name[5:].isdecimal() else None


def find(name: str) -> Path:
    """The checkpoint a user names: a `step-N` folder, or a run's directory (its newest one).

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if (path / ".metadata").is_file() and (path / "rank0.pt").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        newest = latest(folder)
        if newest is not None:
            return newest
    raise UserError(f"--resume {name}: no checkpoint there")


class Checkpoints:
    """The `checkpoints` folder of a run. `save` copies the state and returns; the writing goes on in a thread.

    A checkpoint is written to `step-N.tmp` and renamed once every rank's part is on disk, so that a run killed at any
    moment finds whole ones alone. At most one is being written. The newest `keep` stay, and the one `best.json` names.

    Args:
        folder: made at the first save.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, world: World, keep: int = 2) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        # its own: the writing thread's collectives must not come between those of the training
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.pending: Future | None = None

    @property
    def best(self) -> dict | None:
        """{step, metric, value, measure} of the best checkpoint by validation, or None."""
        try:
            noted = json.loads((self.folder / BEST).read_text())
            return noted if (self.folder / _name(noted["step"])).is_dir() else None
        except (OSError, ValueError, KeyError):
            return None

    def save(self, step: int, model: torch.nn.Module, optimizer: Any, extra: dict, best: dict | None = None) -> None:
        """Begin to write `step-N`; a collective. Waits for the one before, if that is still being written.

        Args:
            extra: this rank's own state (data position, counters), pickled as it is.
            best: {metric, value, measure}, where validation found this the best step so far.

        Raises:
            UserError: no space or no right to write, now or while the one before was written.
        """
        self.wait()
        temporary = self.folder / (_name(step) + ".tmp")
        rng = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self.world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        own = {"rng": rng, "world": self.world.size, "step": step, **extra}
        self._together(lambda: self._make(temporary), temporary)
        self._together(lambda: _write(own, temporary / f"rank{self.world.rank}.pt"), temporary)
        parameters, moments = get_state_dict(model, optimizer, options=StateDictOptions(**_OPTIONS))
        state = {"model": parameters, "optimizer": moments}
        done: Future = Future()
        writing = dcp.async_save(state, checkpoint_id=temporary, process_group=self.group, no_dist=self.world.size == 1)
        writing.add_done_callback(lambda future: self._complete(future, done, temporary, step, best))
        self.pending = done

    def _make(self, temporary: Path) -> None:
        if self.world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for half in self.folder.glob("*.tmp"):
                shutil.rmtree(half) if half.is_dir() else half.unlink()
            temporary.mkdir()

    def _together(self, act: Callable[[], None], temporary: Path) -> None:
        """`act` on every rank; where it fails on one, all raise instead of waiting for it in the next collective.

        A rank that could itself write says of another which one could not, and why: it may be the first to speak.
        """
        failed: Exception | None = None
        try:
            with disk_errors(self.folder):
                act()
        except Exception as error:
            failed = error
        own = None if failed is None else str(failed) if isinstance(failed, UserError) else _line(failed)
        why: list[str | None] = [own] * self.world.size
        if self.group is not None:
            dist.all_gather_object(why, own, group=self.group)
        if not any(why):
            return
        if self.world.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise failed or next(UserError(f"rank {rank}: {text}") for rank, text in enumerate(why) if text)

    def _complete(self, writing: Future, done: Future, temporary: Path, step: int, best: dict | None) -> None:
        """In the writing thread, when all ranks' parts are on disk or one has failed."""
        error = writing.exception()
        try:
            if error is None and self.world.main:
                os.replace(temporary, self.folder / _name(step))
                if best is not None:
                    note = self.folder / (BEST + ".tmp")
                    note.write_text(json.dumps({"step": step, **best}))
                    os.replace(note, self.folder / BEST)
                self._prune()
        except Exception as other:
            error = other
        if error is None:
            done.set_result(None)
            return
        if self.world.main:
            shutil.rmtree(temporary, ignore_errors=True)
        done.set_exception(_told(error, self.folder, self.world.rank))

    def _prune(self) -> None:
        found, best = all_of(self.folder), self.best
        for old in found[: -self.keep]:
            if best is None or step_of(old) != best["step"]:
                shutil.rmtree(old, ignore_errors=True)

    @property
    def failed(self) -> bool:
        """Whether the writing has failed, as far as this rank knows by now; `wait` raises it."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            UserError: it could not be written; the checkpoints before it are intact.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def drop_after(self, step: int) -> None:
        """Throw away what a run that goes on from `step` would make again. Rank 0 calls it."""
        best = self.best
        if best is not None and best["step"] > step:  # or the next checkpoint of that step would be taken for it
            (self.folder / BEST).unlink()
        for path in all_of(self.folder):
            if step_of(path) > step:
                shutil.rmtree(path)


def load(path: Path, model: torch.nn.Module, optimizer: Any, world: World) -> dict:
    """Restore model and optimizer in place; returns this rank's `extra`.

    With another number of ranks than at the save, the weights and moments are resharded; data position and RNG are
    not this rank's then and `extra` says so by `same_world`.

    Raises:
        UserError: a damaged checkpoint, or one of another model.
    """
    parameters, moments = get_state_dict(model, optimizer, options=StateDictOptions(**_OPTIONS))
    state = {"model": parameters, "optimizer": moments}
    own = path / f"rank{world.rank}.pt"
    try:
        dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
        extra = torch.load(own if own.exists() else path / "rank0.pt", weights_only=False)
        if not isinstance(extra, dict) or not extra.keys() >= {"rng", "world", "step"}:
            raise ValueError("no state of a rank")
    except (dcp.api.CheckpointException, OSError, ValueError, RuntimeError, *_DAMAGED) as error:
        raise UserError(f"{path}: does not fit this run, or is damaged ({_line(_cause(error))})") from None
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False, **_OPTIONS),
    )
    extra["same_world"] = extra["world"] == world.size
    if extra["same_world"]:
        torch.set_rng_state(extra["rng"]["torch"])
        random.setstate(extra["rng"]["python"])
        if "cuda" in extra["rng"] and world.device.type == "cuda":
            torch.cuda.set_rng_state(extra["rng"]["cuda"])
    return copy.deepcopy(extra)


# what pickle says of bytes that are not, or no longer, its own
_DAMAGED = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, ImportError, TypeError)


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _write(value: Any, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's writer reports a full disk as its own loss of count
        raise _cause(error) from None


def _cause(error: BaseException) -> BaseException:
    """What went wrong at the bottom: DCP wraps each rank's error, torch's zip writer wraps the disk's."""
    if isinstance(error, dcp.api.CheckpointException):
        return _cause(next(iter(error.failures.values()))[0])
    below = error.__cause__ or error.__context__
    return _cause(below) if isinstance(error, RuntimeError) and below is not None else error


def _told(error: BaseException, folder: Path, rank: int) -> UserError:
    """What rank `rank` says of a checkpoint that could not be written there or on another one."""
    cause = _cause(error)
    failed = error.failures if isinstance(error, dcp.api.CheckpointException) else {}
    where = f"rank {next(iter(failed))}: " if failed and rank not in failed else ""
    if isinstance(cause, OSError) and (known := disk_error(folder, cause)) is not None:
        return UserError(f"{where}{known}")
    return UserError(f"{where}{folder}: the checkpoint could not be written ({_line(cause)}); the last one is intact")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
