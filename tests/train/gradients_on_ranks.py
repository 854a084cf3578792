"""Run under torchrun by test_ranks.py: losses and gathered gradients of batches of which each rank has a part."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from train import parallel
from train.config import Config, load
from train.data.manifest import Utterance, read
from train.parallel import World
from train.trainer import Trainer

TASKS = ("asr", "first_word", "capitals", "asr")
Item = tuple[Utterance, str, int]


def scenarios(speech: Path) -> dict[str, list[list[Item]]]:
    """Name -> what each of two ranks has; 'silent': the second rank's audio is all broken."""
    good = [(row, task, draw) for draw, (row, task) in enumerate(zip(read(speech / "train.jsonl"), TASKS))]
    bad = [(row, "asr", 0) for row in read(speech / "broken.jsonl")[2:]]
    return {"uneven": [good[:1], good[1:]], "halves": [good[:2], good[2:]], "silent": [good, bad]}


def configuration(path: str, out: Path, init: str, cache: bool) -> Config:
    settings = [f"run.out={out}", f"run.init={init}", f"data.cache_frames={str(cache).lower()}", "model.lora_dropout=0"]
    return load(path, 3, None, [*settings, "model.adapter_dropout=0"])


def measure(trainer: Trainer, items: list[Item]) -> dict[str, Tensor]:
    """Global loss sums and the gradient of every trained parameter, in full on every rank."""
    batch = trainer.loader.dataset.collate(items)
    counts = parallel.sum_over_ranks(batch.counts)
    sums = parallel.sum_over_ranks(trainer._forward_backward(batch, counts))
    out = {"ce": sums[0] / counts[0], "ctc": sums[1] / counts[1]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            out[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
    trainer.optimizer.zero_grad()
    return out


def prepare(config: Config, world: World) -> Trainer:
    trainer = Trainer(config, 3, world)
    trainer.model.train()
    trainer.model.audio_tower.eval()
    return trainer


def main(path: str, init: str, speech: str, out: str) -> None:
    world = parallel.start()
    results = {}
    for cache in (False, True):
        folder = Path(out) / f"cache-{cache}"
        trainer = prepare(configuration(path, folder, init, cache), world)
        for name, parts in scenarios(Path(speech)).items():
            results[name, cache] = measure(trainer, parts[world.rank])
        trainer._finish()  # nothing was trained: what is written must be what was read
    if world.main:
        torch.save(results, Path(out) / "gradients.pt")
    parallel.barrier()
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
