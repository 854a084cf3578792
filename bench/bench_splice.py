"""splice against the released loop over prompts and a vectorised merge in eager torch: forward and backward.

One placeholder a prompt in the middle of its text; audio and text embeddings require gradients.
"""

from __future__ import annotations

import torch

from bench import whole_batch
from bench.harness import Case, device, record, rows
from soundwave_fast import cost_model
from soundwave_fast.ops import splice
from soundwave_fast.packed import pack

ON_GPU = device().type == "cuda"
BASE = {"B": 8, "L": 60, "A": 100, "D": 4096 if ON_GPU else 576}  # A: audio rows a prompt, on average
DTYPE = "bfloat16" if ON_GPU else "float32"
SWEEP = {"B": (1, 32), "A": (20, 400)}
AUDIO_ID, PAD_ID = 3, 0


def _inputs(shape: dict[str, int], where: torch.device, seed: int):
    B, L, A, D = (shape[key] for key in "BLAD")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 99, (B, L), generator=generator)
    ids[:, L // 2] = AUDIO_ID
    lengths = torch.randint(A // 2, 3 * A // 2 + 1, (B,), generator=generator).tolist()
    dtype = getattr(torch, DTYPE)
    text = torch.randn(B, L, D, generator=generator).to(where, dtype).requires_grad_()
    audio = pack([torch.randn(n, D, generator=generator).to(where, dtype) for n in lengths])
    weight = torch.randn(B, L - 1 + max(lengths), D, generator=generator).to(where, dtype)
    ids = ids.to(where)
    return ids, text, audio, audio.data.requires_grad_(), weight


def as_released(ids, text, audio, rows):
    """A prompt at a time: torch.where, slices bounded by tensors, four pieces joined, padded to the longest."""
    lengths = audio.lengths
    longest, start, embeds, new_ids = lengths.max(), 0, [], []
    for id_L, text_LD, length in zip(ids, text, lengths):
        segment = rows[start : start + length]
        start += length
        pad = torch.full((longest,), PAD_ID, dtype=torch.long, device=ids.device)
        pad_embeds = text_LD.new_zeros(1, text_LD.shape[1]).expand(longest, -1)
        at = torch.where(id_L == AUDIO_ID)[0][:1]
        n = segment.shape[0]
        new_ids.append(torch.cat((id_L[:at], id_L[at : at + 1].repeat(n), id_L[at + 1 :], pad[: longest - n])))
        embeds.append(torch.cat((text_LD[:at], segment, text_LD[at + 1 :], pad_embeds[: longest - n])))
    mask = torch.stack(new_ids).ne(PAD_ID)
    return torch.stack(embeds), mask


def merge(ids, text, audio, rows):
    """Vectorised over the batch: places by cumsum, text and audio put there by boolean masks."""
    return whole_batch.splice(text, ids == AUDIO_ID, rows, audio.lengths)[:2]


def ours(ids, text, audio, rows):
    out = splice(text, audio.with_data(rows), ids == AUDIO_ID, ids != PAD_ID)
    return out.inputs_embeds, out.attention_mask


def ours_max_length(ids, text, audio, rows):
    out = splice(
        text, audio.with_data(rows), ids == AUDIO_ID, ids != PAD_ID, max_length=ids.shape[1] - 1 + audio.max_len
    )
    return out.inputs_embeds, out.attention_mask


def _provider(splice_):
    def make(case: Case, where: torch.device, seed: int):
        ids, text, audio, audio_rows, weight = _inputs(case.shape, where, seed)

        def step():
            embeds, mask = splice_(ids, text, audio, audio_rows)
            embeds.backward(weight)
            results = embeds, mask, text.grad, audio_rows.grad
            text.grad = audio_rows.grad = None
            return results

        return step

    return make


def case(**shape: int) -> Case:
    providers = {
        "eager as released": _provider(as_released),
        "vectorised merge": _provider(merge),
        "vectorised merge, compiled": _provider(torch.compile(merge)),
        "ours": _provider(ours),
        "ours, length known": _provider(ours_max_length),
    }
    B, L, A, D = (shape[key] for key in "BLAD")
    cost = cost_model.splice(B * (L - 1), B * A, D, DTYPE)
    return Case("splice", "fwd+bwd right", shape, providers, dtype=DTYPE, cost=cost, budget=0.0, rounds=21)


CASES = [case(**BASE)]


@rows(CASES)
def test_splice(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
