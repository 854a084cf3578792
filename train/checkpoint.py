"""Resumable state of a run: trainable parameters, optimizer, data position and RNG; atomic, resharded on load."""

from __future__ import annotations

import copy
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from train.config import disk_errors
from train.parallel import World

_OPTIONS = {"ignore_frozen_params": True}


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint; half-written ones (.tmp) do not count."""
    found = sorted(folder.glob("step-*[0-9]"))
    return found[-1] if found else None


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: Any, extra: dict, world: World) -> Path:
    """Write `step-N` beside the older ones, then drop them; a collective. Killed at any moment, one is whole.

    Args:
        extra: this rank's own state (data position, counters), pickled as it is.
    """
    target = folder / f"step-{step:07d}"
    temporary = folder / f"step-{step:07d}.tmp"
    with disk_errors(folder):
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        _barrier()
        parameters, moments = get_state_dict(model, optimizer, options=StateDictOptions(**_OPTIONS))
        dcp.save({"model": parameters, "optimizer": moments}, checkpoint_id=temporary, no_dist=world.size == 1)
        rng = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        torch.save({"rng": rng, "world": world.size, **extra}, temporary / f"rank{world.rank}.pt")
        _barrier()
        if world.main:
            os.replace(temporary, target)
            for old in folder.glob("step-*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
        _barrier()
    return target


def load(path: Path, model: torch.nn.Module, optimizer: Any, world: World) -> dict:
    """Restore model and optimizer in place; returns this rank's `extra`.

    With another number of ranks than at the save, the weights and moments are resharded; data position and RNG are
    not this rank's then and `extra` says so by `same_world`.
    """
    parameters, moments = get_state_dict(model, optimizer, options=StateDictOptions(**_OPTIONS))
    state = {"model": parameters, "optimizer": moments}
    dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False, **_OPTIONS),
    )
    own = path / f"rank{world.rank}.pt"
    extra = torch.load(own if own.exists() else path / "rank0.pt", weights_only=False)
    extra["same_world"] = extra["world"] == world.size
    if extra["same_world"]:
        torch.set_rng_state(extra["rng"]["torch"])
        random.setstate(extra["rng"]["python"])
        if "cuda" in extra["rng"]:
            torch.cuda.set_rng_state(extra["rng"]["cuda"])
    return copy.deepcopy(extra)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
