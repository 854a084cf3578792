"""TensorBoard and Weights & Biases beside the JSONL, by `run.loggers`; neither is imported unless asked for."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from soundwave_fast.errors import UserError

KNOWN = ("jsonl", "tensorboard", "wandb")


class Logger(Protocol):
    def add(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def check(names: Iterable[str]) -> None:
    """Whether the loggers named can be had; the same on all ranks of a node.

    Args:
        names: of loggers, as in `run.loggers`.

    Raises:
        UserError: there is no such logger, or it is not installed.
    """
    for name in names:
        if name not in KNOWN:
            raise UserError(f"run.loggers: {name!r} is not one of {', '.join(KNOWN)}")
        if name != "jsonl" and importlib.util.find_spec(name) is None:
            raise UserError(f"run.loggers: {name} is not installed (pip install {name})")


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a metrics row; counts by task or cause under 'tasks/NAME', 'skipped/CAUSE'."""
    flat = {key: float(value) for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
    for group in ("tasks", "skipped"):
        flat |= {f"{group}/{name}": float(count) for name, count in (row.get(group) or {}).items()}
    return flat


class TensorBoard:
    """Event files in `folder`/tensorboard; what a killed run wrote past `step` is purged."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One run of the project 'soundwave_fast', gone on with under the id kept in `folder`/wandb_id.

    Steps past the checkpoint that a killed run had sent already stay as they were sent: wandb takes a step once.
    """

    def __init__(self, folder: Path, step: int) -> None:
        import wandb

        kept = folder / "wandb_id"
        if not (step and kept.is_file()):
            kept.write_text(uuid.uuid4().hex[:12])
        name = "/".join(folder.absolute().parts[-2:])
        self.run = wandb.init(project="soundwave_fast", name=name, id=kept.read_text(), resume="allow", dir=str(folder))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log(scalars, step=step)

    def close(self) -> None:
        self.run.finish()


def start(names: Iterable[str], folder: Path, step: int) -> list[Logger]:
    """The loggers named, going on after `step`.

    Raises:
        UserError: one of them cannot start.
    """
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    started: list[Logger] = []
    for name in names:
        if name in kinds:
            try:
                started.append(kinds[name](folder, step))
            except Exception as error:  # wandb has many of its own, and none of them is worth a traceback
                raise UserError(f"run.loggers: {name}: {' '.join(str(error).split())[:200]}") from None
    return started
