"""Run under torchrun by test_ranks.py: stage 1 in which one rank falls asleep in the middle of the run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train import stage
from train.trainer import Trainer


def fall_asleep(rank: int, step: int) -> None:
    """From now on `rank` sleeps where it should count its bad audio, after `step` steps."""
    real = Trainer._count

    def count(self, group):
        if self.world.rank == rank and self.step == step:
            time.sleep(600)
        real(self, group)

    Trainer._count = count


if __name__ == "__main__":
    fall_asleep(rank=1, step=2)
    sys.exit(stage.main(1, sys.argv[1:]))
