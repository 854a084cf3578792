"""What can be tuned: each launcher at the paper's shapes, with the sizes worth trying, as bench/tune.py takes them.

A `Tunable` makes one call of one launcher. Its inputs come from a `Fill`: random numbers where it runs, memory that is
never touched where it is only compiled. Sizes are those of csrc_triton/tuned.json.

Shape legend as in the kernels' modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], tuple]
Sizes = dict[str, int]  # beside them "backend": str


@dataclass(frozen=True)
class Fill:
    """Makes inputs on a device: random, or (touch=False) of the right shape alone."""

    device: torch.device
    touch: bool = True

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if not self.touch:
            return torch.empty(*shape, dtype=dtype, device=self.device)
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def ints(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)

    def offsets(self, lengths: list[int]) -> Tensor:
        return self.ints([0, *itertools.accumulate(lengths)], torch.int32)


@dataclass(frozen=True)
class Tunable:
    """One launcher at one shape: `make(fill, **shape)` gives a step that returns what it computed."""

    kernel: str  # as the launcher asks for it
    name: str
    make: Callable[..., Step]
    shape: Sizes
    tiny: Sizes  # for a rehearsal
    candidates: tuple[Sizes, ...]
    budget: float  # how far a result may be from the default's, relative to its largest value; 0: bit for bit
    compiles: bool = True  # False: the sizes are torch's affair, there is no kernel to compile ahead of time


def grid(**values: tuple[int, ...]) -> tuple[Sizes, ...]:
    return tuple(dict(zip(values, choice)) for choice in itertools.product(*values.values()))


# -- attention -----------------------------------------------------------------------------------------------------


def _attention(fill: Fill, B: int, Lq: int, Lk: int, H: int, d: int, item: int):
    from csrc_triton import varlen_cross_attention as kernels

    dtype = torch.bfloat16 if item == 2 else torch.float32
    q, k, v = (fill.normal(B * length, H, d, dtype=dtype) for length in (Lq, Lk, Lk))
    common = (fill.offsets([Lq] * B), fill.offsets([Lk] * B), Lq, Lk, d**-0.5, 0.0, None)
    return kernels, q, k, v, common


def forward(fill: Fill, **shape: int) -> Step:
    kernels, q, k, v, common = _attention(fill, **shape)
    return lambda: kernels.forward(q, k, v, *common, True)


def backward(fill: Fill, **shape: int) -> Step:
    kernels, q, k, v, common = _attention(fill, **shape)
    grad = fill.normal(*q.shape, dtype=q.dtype)
    out, lse = kernels.forward(q, k, v, *common, True)
    return lambda: kernels.backward(grad, q, k, v, out, lse, *common, True, True)


def attention(fill: Fill, **shape: int) -> Step:
    """The op as its callers have it, both ways, on whatever backend the table names."""
    from soundwave_fast.ops import varlen_cross_attention

    _, q, k, v, common = _attention(fill, **shape)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad = fill.normal(*q.shape, dtype=q.dtype)

    def step() -> tuple:
        out = varlen_cross_attention(*leaves, *common[:4])
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return step


# -- CTC -----------------------------------------------------------------------------------------------------------


def _compact(fill: Fill, B: int, S: int, C: int) -> tuple[Tensor, Tensor]:
    """Columns (B, S + 1) with the blank first, and where each class first occurs; no label twice."""
    columns = fill.ints([[0, *(1 + (17 * b + s) % (C - 1) for s in range(S))] for b in range(B)])
    return columns, fill.ints([list(range(S + 1))] * B)


def dense(fill: Fill, B: int, T: int, S: int, C: int, item: int) -> Step:
    from csrc_triton.ctc_loss import ctc_loss_backward

    log_probs = fill.normal(T, B, C, dtype=torch.bfloat16 if item == 2 else torch.float32)
    columns, first = _compact(fill, B, S, C)
    residual = fill.normal(T, B, S + 1, dtype=torch.float32)
    grad, frames = fill.normal(B, dtype=torch.float32), fill.ints([T] * B)
    return lambda: (ctc_loss_backward(grad, log_probs, residual, columns, first, frames),)


def recursion(fill: Fill, B: int, T: int, S: int) -> Step:
    from csrc_triton.alpha_beta import alpha_beta

    emissions = fill.normal(T, B, S + 1, dtype=torch.float32)
    if fill.touch:
        emissions = emissions.log_softmax(-1)
    _, first = _compact(fill, B, S, S + 1)
    lengths = fill.ints([T] * B), fill.ints([S] * B)
    return lambda: alpha_beta(emissions, first, *lengths, True)


def update(fill: Fill, N: int, w: int, K: int, D: int) -> Step:
    from csrc_triton.linear_ctc_loss import update_chunk

    z, out = fill.normal(N, w), fill.normal(N, w)
    columns, utterance = _compact(fill, 8, K - 1, w + K)[0], fill.ints([n * 8 // N for n in range(N)])
    start = fill.normal(3, N, dtype=torch.float32)
    running, picked = torch.empty_like(start), fill.normal(N, K, dtype=torch.float32)
    start[:2], start[2] = -torch.inf, 0.0
    argmax, expected = fill.ints([0] * N), fill.normal(N, D, dtype=torch.float32)
    base = torch.empty_like(start[0])

    def step() -> tuple:
        running.copy_(start)
        update_chunk(z, out, 0, columns, utterance, running, picked, argmax, expected, base)
        return out, running, argmax

    return step


def chunks(fill: Fill, B: int, T: int, D: int, V: int, S: int) -> Step:
    from soundwave_fast.ops import linear_ctc_loss

    hidden, weight = fill.normal(B, T, D).requires_grad_(), fill.normal(V, D) / D**0.5
    targets, lengths = _compact(fill, B, S, V)[0][:, 1:], (fill.ints([T] * B), fill.ints([S] * B))

    def step() -> tuple:
        loss = linear_ctc_loss(hidden, weight, targets, *lengths, zero_infinity=True)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    return step


# -- rows ----------------------------------------------------------------------------------------------------------


def _kept(fill: Fill, B: int, T: int, every: int) -> tuple[Tensor, Tensor, int]:
    each = -(-T // every)
    kept = [[*range(0, T, every), *[0] * (T - each)] for _ in range(B)]
    return fill.ints(kept, torch.int32), fill.ints([each] * B, torch.int32), B * each


def gather(fill: Fill, B: int, T: int, D: int, every: int) -> Step:
    from csrc_triton.peak_gather import gather_peaks

    features = fill.normal(B, T, D)
    kept, counts, total = _kept(fill, B, T, every)
    return lambda: gather_peaks(features, kept, counts, T, total)


def gather_backward(fill: Fill, B: int, T: int, D: int, every: int) -> Step:
    from csrc_triton.peak_gather import gather_peaks_backward

    _, _, total = _kept(fill, B, T, every)
    grad, each = fill.normal(total, D), total // B
    index = fill.ints([b * T + t * every for b in range(B) for t in range(each)])
    offsets = fill.offsets([each] * B)
    return lambda: (gather_peaks_backward(grad, index, offsets, B, T),)


def _spliced(fill: Fill, B: int, L: int, A: int, D: int):
    from csrc_triton import splice as kernels

    text, audio, cu_audio = fill.normal(B, L, D), fill.normal(B * A, D), fill.offsets([A] * B)
    place = L // 2
    ends = fill.ints([[i + 1 if i < place else i + A for i in range(L)]] * B, torch.int32)
    segment = fill.ints([[b if i == place else -1 for i in range(L)] for b in range(B)], torch.int32)
    home = fill.ints([b * L + place for b in range(B)], torch.int32)
    lengths = fill.ints([L - 1 + A] * B, torch.int32)
    return kernels, text, audio, cu_audio, ends, segment, home, lengths, L - 1 + A


def splice_rows(fill: Fill, **shape: int) -> Step:
    kernels, text, audio, cu_audio, ends, segment, home, lengths, M = _spliced(fill, **shape)
    plan = (cu_audio, ends, segment, home, lengths)
    labels = fill.ints([[1] * shape["L"]] * shape["B"])

    def step() -> tuple:
        return kernels.splice_rows(text, audio, *plan, labels, torch.int64, "right", M)

    return step


def splice_text(fill: Fill, **shape: int) -> Step:
    kernels, text, _, _, ends, segment, _, lengths, M = _spliced(fill, **shape)
    grad, offsets = fill.normal(len(text), M, text.shape[2]), fill.offsets([M] * len(text))
    return lambda: (kernels.splice_text_backward(grad, ends, segment, lengths, offsets, "right"),)


def splice_audio(fill: Fill, **shape: int) -> Step:
    kernels, text, audio, cu_audio, ends, _, home, lengths, M = _spliced(fill, **shape)
    grad, offsets = fill.normal(len(text), M, text.shape[2]), fill.offsets([M] * len(text))
    rest = (lengths, offsets, "right", len(audio), audio.dtype)
    return lambda: (kernels.splice_audio_backward(grad, cu_audio, ends, home, *rest),)


# -- the list ------------------------------------------------------------------------------------------------------

_ROWS = tuple(
    sizes
    for sizes in grid(BLOCK_N=(1, 2, 4, 8, 16), BLOCK_D=(512, 1024, 2048, 4096), num_warps=(4, 8))
    if 2048 <= sizes["BLOCK_N"] * sizes["BLOCK_D"] <= 8192
)
_ATTENTION = {"B": 8, "Lq": 100, "Lk": 750, "H": 32, "d": 128, "item": 2}
_TINY_ATTENTION = {"B": 1, "Lq": 20, "Lk": 40, "H": 2, "d": 16, "item": 2}
_GATHER, _TINY_GATHER = {"B": 8, "T": 750, "D": 4096, "every": 7}, {"B": 2, "T": 20, "D": 40, "every": 3}
_SPLICE, _TINY_SPLICE = {"B": 8, "L": 60, "A": 100, "D": 4096}, {"B": 2, "L": 5, "A": 7, "D": 40}

TUNABLES = (
    Tunable(
        "attention forward", "attention forward", forward, _ATTENTION, _TINY_ATTENTION,
        grid(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)), 2e-2,
    ),
    Tunable(
        "attention stationary", "attention backward, few queries", backward, _ATTENTION, _TINY_ATTENTION,
        # 64 stands for the tiled kernels, which take over where 100 queries are more than a block
        grid(BLOCK_M=(128,), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))
        + ({"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},), 2e-2,
    ),
    Tunable(
        "attention queries", "attention backward, dQ of many queries", backward,
        {**_ATTENTION, "Lq": 375}, {**_TINY_ATTENTION, "Lq": 140},
        grid(BLOCK_M=(32, 64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2)), 2e-2,
    ),
    Tunable(
        "attention keys", "attention backward, dK and dV of many queries", backward,
        {**_ATTENTION, "Lq": 375}, {**_TINY_ATTENTION, "Lq": 140},
        grid(BLOCK_M=(32, 64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2)), 2e-2,
    ),
    # after the kernels' own sizes; a backend that is not installed is ours again, and gains nothing
    Tunable(
        "attention", "attention, backends", attention, _ATTENTION, _TINY_ATTENTION,
        tuple({"backend": name} for name in ("varlen_attn", "flash_attn", "xformers")), 2e-2, compiles=False,
    ),
    *(
        Tunable(
            "recursion", f"recursions, S {S}", recursion,
            {"B": 8, "T": 750, "S": S}, {"B": 2, "T": 6, "S": 3 + S // 20},
            grid(num_warps=(1, 2, 4, 8, 16)), 1e-3,
        )
        for S in (100, 300)
    ),
    *(
        Tunable(
            "ctc_loss dense", f"ctc_loss gradient, {item} bytes", dense,
            {"B": 8, "T": 750, "S": 100, "C": 128257, "item": item}, {"B": 2, "T": 5, "S": 3, "C": 70, "item": item},
            tuple(
                sizes
                for sizes in grid(BLOCK_T=(1, 2, 4), BLOCK_C=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16))
                if 2048 <= sizes["BLOCK_T"] * sizes["BLOCK_C"] <= 8192
            ), 1e-5,
        )
        for item in (4, 2)
    ),
    *(
        Tunable(
            "linear_ctc_loss update", f"softmax of a chunk, {w} columns", update,
            {"N": 6000, "w": w, "K": 101, "D": 4096}, {"N": 16, "w": w // 64, "K": 5, "D": 24},
            grid(num_warps=(2, 4, 8, 16, 32)), 1e-2,
        )
        for w in (4096, 8064, 16128)
    ),
    Tunable("peak_gather rows", "rows of peak_gather", gather, _GATHER, _TINY_GATHER, _ROWS, 0.0),
    Tunable("peak_gather backward", "backward of peak_gather", gather_backward, _GATHER, _TINY_GATHER, _ROWS, 0.0),
    Tunable("splice rows", "rows of splice", splice_rows, _SPLICE, _TINY_SPLICE, _ROWS, 0.0),
    Tunable("splice text backward", "text gradient of splice", splice_text, _SPLICE, _TINY_SPLICE, _ROWS, 0.0),
    Tunable("splice audio backward", "audio gradient of splice", splice_audio, _SPLICE, _TINY_SPLICE, _ROWS, 0.0),
    # last: the update kernel's own sizes are known by then
    Tunable(
        "linear_ctc_loss chunks", "vocabulary chunks of linear_ctc_loss", chunks,
        {"B": 8, "T": 750, "D": 4096, "V": 128257, "S": 100}, {"B": 2, "T": 8, "D": 24, "V": 300, "S": 3},
        grid(columns=(4096, 8192, 16384, 32768), elements=(64 << 20, 128 << 20, 256 << 20)), 2e-2, compiles=False,
    ),
)  # fmt: skip
