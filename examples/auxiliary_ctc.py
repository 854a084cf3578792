"""Add linear_ctc_loss over a large vocabulary as an auxiliary loss to any encoder.

`python examples/auxiliary_ctc.py` trains a small transformer encoder with a frame classifier as its main task and CTC
over 32,000 classes beside it. The (B, T, V) logits never exist; the greedy tokens come from the same pass.
"""

from __future__ import annotations

import torch
from torch import nn

from soundwave_fast.ops import LinearCTCLoss

B, T, D, V, S = 4, 60, 64, 32_000, 8


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 4, 2 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.main_head = nn.Linear(D, 5)
        self.ctc = LinearCTCLoss(D, V, return_argmax=True)


def train(steps: int = 30) -> list[tuple[float, float]]:
    """(main loss, CTC loss) of every step."""
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    features, classes = torch.randn(B, T, D), torch.randint(0, 5, (B,))
    targets = torch.randint(1, V, (B, S))
    input_lengths, target_lengths = torch.tensor([60, 55, 40, 30]), torch.tensor([8, 8, 6, 4])
    losses = []
    for _ in range(steps):
        hidden = model.layers(features)
        main = nn.functional.cross_entropy(model.main_head(hidden.mean(1)), classes)
        ctc, _tokens = model.ctc(hidden, targets, input_lengths, target_lengths)
        (main + 0.3 * ctc).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((main.item(), ctc.item()))
    return losses


if __name__ == "__main__":
    losses = train()
    print("main loss {:.3f}, CTC loss {:.3f}".format(*losses[0]))
    print("main loss {:.3f}, CTC loss {:.3f}".format(*losses[-1]))
