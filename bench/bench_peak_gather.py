"""peak_gather against the released loop over utterances, a boolean mask and index_select: forward and backward.

Tokens change with probability 0.14 a frame, about 105 kept frames of 750. Features require gradients; the gradient of
the rows is a fixed random tensor, so that all providers move the same bytes. All but the loops also give what variable
length attention needs: offsets on the device and the longest length on the host.
"""

from __future__ import annotations

import torch

from bench.harness import Case, device, record, rows
from soundwave_fast import cost_model
from soundwave_fast.ops import peak_gather

ON_GPU = device().type == "cuda"
BASE = {"B": 8, "T": 750, "D": 4096 if ON_GPU else 576}
DTYPE = "bfloat16" if ON_GPU else "float32"
SWEEP = {"T": (100, 400, 1500), "B": (1, 32)}


def _inputs(shape: dict[str, int], where: torch.device, seed: int):
    B, T, D = shape["B"], shape["T"], shape["D"]
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(B, T, generator=generator) < 0.14).cumsum(1).remainder(50)
    kept = 1 + (tokens[:, 1:] != tokens[:, :-1]).sum(1)
    features = torch.randn(B, T, D, generator=generator).to(where, getattr(torch, DTYPE)).requires_grad_()
    grad = torch.randn(int(kept.sum()), D, generator=generator).to(features)
    return features, tokens.to(where), grad


def _starts(tokens_BT: torch.Tensor) -> torch.Tensor:
    start_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    start_BT[:, 1:] = tokens_BT[:, 1:] != tokens_BT[:, :-1]
    return start_BT


def as_released(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Roll and compare, one boolean index, then a slice an utterance whose bounds are tensors; joined again here."""
    keep = tokens.roll(1) != tokens
    keep[:, 0] = True
    lengths = keep.long().sum(-1)
    flat, start, utterances = features[keep], 0, []
    for length, _, _ in zip(lengths, features, ~keep):
        utterances.append(flat[start : start + length])
        start += length
    return torch.cat(utterances)


def one_by_one(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The same a whole utterance at a time, as the splice loop handles them: compare, torch.where, index, cat."""
    utterances = []
    for hidden, token in zip(features, tokens):
        keep = token != token.roll(1)
        keep[0] = True
        utterances.append(hidden[torch.where(keep)[0]])
    return torch.cat(utterances)


def _offsets(start_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    lengths = start_BT.sum(1)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())


def boolean_mask(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    start_BT = _starts(tokens)
    _offsets(start_BT)
    return features[start_BT]


def index_select(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    start_BT = _starts(tokens)
    _offsets(start_BT)
    return features.flatten(0, 1).index_select(0, start_BT.view(-1).nonzero().squeeze(1))


def ours(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return peak_gather(features, tokens).data


def _provider(gather):
    def make(case: Case, where: torch.device, seed: int):
        features, tokens, grad = _inputs(case.shape, where, seed)

        def step():
            data = gather(features, tokens)
            data.backward(grad)
            result, features.grad = features.grad, None
            return data, result

        return step

    return make


def _with_capacity(case: Case, where: torch.device, seed: int):
    features, tokens, grad = _inputs(case.shape, where, seed)
    capacity = -(-len(grad) // 256) * 256
    grad = torch.nn.functional.pad(grad, (0, 0, 0, capacity - len(grad)))
    total = int(_starts(tokens).sum())

    def step():
        data = peak_gather(features, tokens, capacity=capacity).data
        data.backward(grad)
        result, features.grad = features.grad, None
        return data[:total], result

    return step


def case(**shape: int) -> Case:
    providers = {
        "eager as released": _provider(as_released),
        "utterance by utterance": _provider(one_by_one),
        "boolean mask": _provider(boolean_mask),
        "index_select": _provider(index_select),
        "index_select, compiled": _provider(torch.compile(index_select)),
        "ours": _provider(ours),
        "ours with a capacity": _with_capacity,
    }
    kept = round(shape["B"] * (1 + 0.14 * (shape["T"] - 1)))
    cost = cost_model.peak_gather(*shape.values(), kept, DTYPE)
    rounds = 21 if ON_GPU or shape["D"] < 1000 else 7
    note = "" if ON_GPU else "ours is index_select with checks and packing; a capacity also writes rows of nobody"
    return Case(
        "peak_gather", "fwd+bwd", shape, providers, dtype=DTYPE, cost=cost, budget=0.0, rounds=rounds, note=note
    )


CASES = [case(**BASE)] if ON_GPU else [case(**BASE), case(**{**BASE, "D": 4096})]


@rows(CASES)
def test_peak_gather(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
