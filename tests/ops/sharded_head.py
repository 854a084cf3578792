"""Run by torchrun: a head that fully_shard splits over two ranks, one utterance a rank; rank 0 writes the result.

Every rank also hands its DTensor to the op directly and records what it was told.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from soundwave_fast.ops import linear_ctc_loss

T, D, V = 12, 16, 37


def utterances() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, T, D, generator=generator), torch.randint(1, V, (2, 4), generator=generator)


class Head(nn.Module):
    """Owns the weight, so that FSDP hands it over whole in its forward."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(V, D, generator=generator))

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((len(hidden),), T), torch.full((len(hidden),), 4)
        return linear_ctc_loss(hidden, self.weight, targets, *lengths, reduction="sum")


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    head = Head()
    fully_shard(head)
    hidden, targets = (x[rank : rank + 1] for x in utterances())
    hidden.requires_grad_()
    loss = head(hidden, targets)
    loss.backward()
    refused = ""
    try:
        linear_ctc_loss(hidden, head.weight, targets, [T], [4])
    except TypeError as error:
        refused = str(error)
    results = {"loss": loss.detach(), "hidden": hidden.grad, "refused": refused}
    gathered: list = [None, None]
    dist.all_gather_object(gathered, results)
    weight = 2 * head.weight.grad.full_tensor()  # FSDP averages over the ranks
    if rank == 0:
        torch.save({"ranks": gathered, "weight": weight}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
