"""varlen_cross_attention against what nn.MultiheadAttention does an utterance, SDPA, and installed peers: fwd + bwd.

Projections are left out (bench_shrinking_adapter.py has them). Lq and Lk are the longest lengths; "ragged" draws them
from a third of that upwards, "equal" takes them for all. The released loop's keys are padded to Lk and masked, as they
are there. Run the rows of one group together: `python -m pytest bench/bench_varlen_cross_attention.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.harness import Case, Unavailable, device, record, rows
from soundwave_fast import cost_model
from soundwave_fast.ops import varlen_cross_attention
from soundwave_fast.ops.attention_backends import choose

ON_GPU = device().type == "cuda"
DTYPE = "bfloat16" if ON_GPU else "float32"
BASE = {"B": 8, "Lq": 100, "Lk": 750, "H": 32, "d": 128} if ON_GPU else {"B": 8, "Lq": 50, "Lk": 375, "H": 9, "d": 64}
SWEEP = {"Lk": (100, 1500), "Lq": (10, 200), "B": (1, 32)}


PEERS = ("varlen_attn", "flash_attn", "xformers")


class Batch:
    """Random packed q, k, v that require gradients, a gradient of the output, and the lengths on both sides."""

    def __init__(self, case: Case, where: torch.device, seed: int) -> None:
        shape = case.shape
        self.generator = torch.Generator().manual_seed(seed)
        least = 1.0 if case.variant.startswith("equal") else 0.3
        self.lengths_q, self.lengths_k = (
            torch.empty(shape["B"])
            .uniform_(least, 1.0, generator=self.generator)
            .mul(shape[name])
            .ceil()
            .int()
            .tolist()
            for name in ("Lq", "Lk")
        )
        self.max_q, self.max_k, self.heads, self.d = (shape[name] for name in ("Lq", "Lk", "H", "d"))
        self.where, self.dtype = where, getattr(torch, case.dtype)
        self.q, self.grad = self._rows(sum(self.lengths_q)), self._rows(sum(self.lengths_q))
        self.k, self.v = self._rows(sum(self.lengths_k)), self._rows(sum(self.lengths_k))
        for x in (self.q, self.k, self.v):
            x.requires_grad_()
        self.cu_q, self.cu_k = (
            F.pad(torch.tensor(x).cumsum(0), (1, 0)).to(where, torch.int32) for x in (self.lengths_q, self.lengths_k)
        )

    def _rows(self, n: int) -> torch.Tensor:
        return torch.randn(n, self.heads, self.d, generator=self.generator).to(self.where, self.dtype)

    def padded(self, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)


def _step(batch: Batch, forward, leaves):
    def step():
        out = forward()
        grads = torch.autograd.grad(out, leaves, batch.grad)
        return out, grads[0]

    return step


def mha_loop(case: Case, where: torch.device, seed: int):
    """The inside of nn.MultiheadAttention, one utterance after the other: weights with -inf masks, and their mean."""
    batch = Batch(case, where, seed)
    keys, values = (batch.padded(x.detach(), batch.lengths_k).requires_grad_() for x in (batch.k, batch.v))
    hidden = torch.arange(keys.shape[1], device=where) >= batch.cu_k.diff()[:, None]

    def forward():
        out = []
        for q, k, v, hide in zip(batch.q.split(batch.lengths_q), keys, values, hidden):
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            mask = torch.zeros(1, 1, k.shape[1], dtype=q.dtype, device=where).masked_fill(hide, float("-inf"))
            weights = torch.baddbmm(mask, q * batch.d**-0.5, k.mT).softmax(-1)
            out.append(torch.bmm(weights, v).transpose(0, 1))
            weights.mean(0)  # need_weights defaults to True
        return torch.cat(out)

    return _step(batch, forward, (batch.q, keys, values))


def sdpa_loop(case: Case, where: torch.device, seed: int):
    batch = Batch(case, where, seed)

    def forward():
        out = []
        sides = zip(batch.q.split(batch.lengths_q), batch.k.split(batch.lengths_k), batch.v.split(batch.lengths_k))
        for side in sides:
            mixed = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in side))
            out.append(mixed[0].transpose(0, 1))
        return torch.cat(out)

    return _step(batch, forward, (batch.q, batch.k, batch.v))


def padded_sdpa(case: Case, where: torch.device, seed: int, wrap=lambda f: f):
    """One call on the whole padded batch with a key mask; padding on and off is part of it."""
    batch = Batch(case, where, seed)
    mask = (torch.arange(max(batch.lengths_k), device=where) < batch.cu_k.diff()[:, None])[:, None, None]
    real = torch.arange(max(batch.lengths_q), device=where) < batch.cu_q.diff()[:, None]

    def forward():
        sides = ((batch.q, batch.lengths_q), (batch.k, batch.lengths_k), (batch.v, batch.lengths_k))
        q, k, v = (batch.padded(x, lengths).transpose(1, 2) for x, lengths in sides)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)[real]

    return _step(batch, wrap(forward), (batch.q, batch.k, batch.v))


def padded_sdpa_compiled(case: Case, where: torch.device, seed: int):
    return padded_sdpa(case, where, seed, torch.compile)


def backend(name: str):
    def make(case: Case, where: torch.device, seed: int):
        batch = Batch(case, where, seed)
        try:
            choose(name, batch.q, 0.0)
        except ValueError as reason:
            raise Unavailable(str(reason)) from None
        sizes = (batch.cu_q, batch.cu_k, batch.max_q, batch.max_k)

        def forward():
            return varlen_cross_attention(batch.q, batch.k, batch.v, *sizes, backend=name)

        return _step(batch, forward, (batch.q, batch.k, batch.v))

    return make


def case(variant: str = "ragged fwd+bwd", dtype: str = DTYPE, **shape: int) -> Case:
    providers = {
        "MHA loop as released": mha_loop,
        "SDPA loop": sdpa_loop,
        "padded SDPA": padded_sdpa,
        "padded SDPA, compiled": padded_sdpa_compiled,
        "ours": backend("auto"),
        **{name: backend(name) for name in PEERS},
    }
    share = 1.0 if variant.startswith("equal") else 0.65
    B, Lq, Lk, H, d = shape.values()
    cost = cost_model.varlen_cross_attention(B, round(share * Lq), round(share * Lk), H, d, dtype)
    sources = ("soundwave_fast/ops/attention_backends.py",)
    rounds = 21 if ON_GPU or H * d < 1000 else 7
    return Case(
        "varlen_cross_attention", variant, shape, providers, dtype, cost, sources, rounds=rounds, peers=PEERS
    )


PAPER = {"B": 4, "Lq": 150, "Lk": 750, "H": 32, "d": 128}
if ON_GPU:
    CASES = [case("equal fwd+bwd", **BASE), case(**BASE), case("equal kept keys", **{**BASE, "Lk": 100})]
else:
    CASES = [case(**BASE), case("ragged bfloat16", "bfloat16", **BASE), case(**PAPER)]


@rows(CASES)
def test_varlen_cross_attention(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
