"""Run under torchrun by test_validation: figures before and between steps of a sharded model, and the steps' losses."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from train import parallel
from train.config import load
from train.parallel import World
from train.trainer import Trainer
from train.validation import Validator

STEPS = 2


def losses_and_figures(path: str, settings: list[str], world: World, validate: bool) -> tuple[list, list]:
    """((ce, ctc, gradient norm) of each step, figures before each step and after the last)."""
    trainer = Trainer(load(path, 3, None, settings), 3, world)
    trainer.model.train()
    trainer.model.audio_tower.eval()
    validator = Validator(trainer.config, 3, trainer.model, trainer.processor, world)
    batches = iter(trainer.loader)
    rows, figures = [], []
    for step in range(STEPS + 1):
        if validate:
            figures.append(validator(step))
        if step < STEPS:
            row = trainer._train_step([next(batches)])
            rows.append((row["ce"], row["ctc"], row["grad_norm"]))
    return rows, figures


def main(path: str, out: str, *settings: str) -> None:
    world = parallel.start()
    plain, _ = losses_and_figures(path, list(settings), world, validate=False)
    rows, figures = losses_and_figures(path, list(settings), world, validate=True)
    torch.save((plain, rows, figures), Path(out) / f"rank{world.rank}.pt")
    parallel.barrier()
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
