"""Swap F.ctc_loss in a Hugging Face Wav2Vec2ForCTC training step, without touching its code.

`python examples/swap_ctc_loss.py` trains a small random Wav2Vec2 twice from the same weights, with torch's loss and
with ours, and calls ours in bf16 too, where torch has no CTC on the CPU.
"""

from __future__ import annotations

import contextlib

import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from soundwave_fast import ops


@contextlib.contextmanager
def fast_ctc_loss():
    """Inside, everything that calls torch.nn.functional.ctc_loss calls soundwave_fast.ops.ctc_loss."""
    before = torch.nn.functional.ctc_loss
    torch.nn.functional.ctc_loss = ops.ctc_loss
    try:
        yield
    finally:
        torch.nn.functional.ctc_loss = before


def make_model() -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 4, 4),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        final_dropout=0.0,
        activation_dropout=0.0,
        apply_spec_augment=False,
        ctc_loss_reduction="mean",
    )
    return Wav2Vec2ForCTC(config)


def train(steps: int = 20) -> list[float]:
    """Losses of a few steps on two noises with fixed transcripts."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(2, 8000, generator=generator)
    labels = torch.randint(1, 32, (2, 12), generator=generator)
    losses = []
    for _ in range(steps):
        loss = model(audio, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    theirs = train()
    with fast_ctc_loss():
        ours = train()
    print(f"F.ctc_loss              {theirs[0]:.4f} -> {theirs[-1]:.4f}")
    print(f"soundwave_fast.ctc_loss {ours[0]:.4f} -> {ours[-1]:.4f}")
    half = torch.randn(50, 2, 32).log_softmax(-1).bfloat16()
    lengths = torch.tensor([50, 50]), torch.tensor([10, 10])
    print(f"in bfloat16             {ops.ctc_loss(half, torch.randint(1, 32, (2, 10)), *lengths):.4f}")
