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
INFEASIBLE = 1_000_000
# how the model is sharded, and what is done to its layers: none of it may change a loss or a gradient, but for the
# rounding of bfloat16, where FSDP's policy also rounds what autocast leaves in float32
VARIANTS = {
    "sharded": [],
    "cached": ["data.cache_frames=true"],
    "replicated": ["run.replicate=2"],
    "checkpointed and packed": ["run.activation_checkpointing=true", "run.packed=true"],
    "bfloat16": ["model.dtype=bfloat16"],
}
Item = tuple[Utterance, str, int]


def scenarios(speech: Path) -> dict[str, list[list[Item]]]:
    """Name -> what each of two ranks has; 'silent': the second rank's audio is all broken.

    'infeasible': the first transcript of the second rank, marked by its draw, gets more tokens than it has frames.
    """
    good = [(row, task, draw) for draw, (row, task) in enumerate(zip(read(speech / "train.jsonl"), TASKS))]
    bad = [(row, "asr", 0) for row in read(speech / "broken.jsonl")[2:]]
    long = [(row, task, INFEASIBLE if draw == 2 else draw) for row, task, draw in good]
    return {
        "uneven": [good[:1], good[1:]],
        "halves": [good[:2], good[2:]],
        "silent": [good, bad],
        "infeasible": [long[:2], long[2:]],
    }


def configuration(path: str, out: Path, init: str, variant: str) -> Config:
    settings = [f"run.out={out}", f"run.init={init}", "model.lora_dropout=0", "model.adapter_dropout=0"]
    return load(path, 3, None, [*settings, *VARIANTS[variant]])


def measure(trainer: Trainer, items: list[Item]) -> dict[str, Tensor]:
    """Global loss sums and the gradient of every trained parameter, in full on every rank."""
    batch = trainer.loader.dataset.collate(items)
    for index, (*_, draw) in enumerate(items):
        if draw == INFEASIBLE:
            batch.ctc_targets = torch.nn.functional.pad(batch.ctc_targets, (0, 300), value=5)
            batch.ctc_target_lengths[index] = 300
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
    for variant in VARIANTS:
        folder = Path(out) / variant
        trainer = prepare(configuration(path, folder, init, variant), world)
        for name, parts in scenarios(Path(speech)).items():
            results[name, variant] = measure(trainer, parts[world.rank])
        trainer._finish()  # nothing was trained: what is written must be what was read
    if world.main:
        torch.save(results, Path(out) / "gradients.pt")
    parallel.barrier()
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
