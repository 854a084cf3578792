"""The frozen Whisper encoder on a batch of short utterances: padded to 30 s as released, or to the longest of them.

The weights are the same; the results are not, because Whisper was trained on padded 30 s. What that costs in accuracy
is measured on a trained model: docs/parity.md has the command.
"""

from __future__ import annotations

import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from bench import parts
from bench.harness import Case, device, record, rows
from soundwave_fast.model.whisper import EDGE_MELS, encode_frames

GPU = device().type == "cuda"
WINDOW = 3000  # mel frames in 30 s


def _setup(case: Case, where: torch.device, seed: int):
    """(encoder, log-mel of 30 s, lengths): utterances of half to all of `seconds`, the first of all of them."""
    size = parts.size(where)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(where):
        encoder = WhisperEncoder._from_config(parts.config(size).audio_config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    B, longest = case.shape["B"], 100 * case.shape["seconds"]
    lengths = torch.randint(longest // 2, longest + 1, (B,), generator=generator) // 4 * 4
    lengths[0] = longest
    mels = torch.randn(B, size.mels, WINDOW, generator=generator)
    mels.masked_fill_((torch.arange(WINDOW) >= lengths[:, None])[:, None], 0.0)
    return encoder.requires_grad_(False), mels.to(where, dtype), lengths.to(where)


def whisper(case: Case, where: torch.device, seed: int):
    """transformers' own forward."""
    encoder, mels, _ = _setup(case, where, seed)

    @torch.no_grad()
    def step():
        return (encoder(mels).last_hidden_state,)

    return step


def whole_window(case: Case, where: torch.device, seed: int):
    """encoder_pad='30s'."""
    encoder, mels, _ = _setup(case, where, seed)

    @torch.no_grad()
    def step():
        return (encode_frames(encoder, mels, None),)

    return step


def longest(case: Case, where: torch.device, seed: int):
    """encoder_pad='longest'."""
    encoder, mels, lengths = _setup(case, where, seed)
    encoded = (lengths + EDGE_MELS).clamp_max(WINDOW)
    mels = mels[..., : int(encoded.max())].contiguous()

    @torch.no_grad()
    def step():
        return (encode_frames(encoder, mels, encoded),)

    return step


def case(B: int, seconds: int) -> Case:
    return Case(
        "encoder",
        f"utterances of {seconds // 2} to {seconds} s" if seconds > 1 else "utterances of 1 s",
        {"B": B, "seconds": seconds},
        {"Whisper": whisper, "30s": whole_window, "longest": longest},
        dtype="bfloat16" if GPU else "float32",
        sources=("soundwave_fast/model/whisper.py",),
        tests="tests/model/test_whisper.py",
        compare=False,  # 30 s of context and a few seconds of it give different frames
        rounds=7 if GPU else 3,
    )


CASES = [case(8, 4), case(8, 12)] if GPU else [case(4, 4)]


@rows(CASES)
def test_encoder(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
