"""FLOPs, bytes and the floor: what each op must compute and move, and how fast a named chip could do it.

A floor is max(FLOPs / peak rate, bytes / bandwidth): no implementation runs faster on that chip. FLOPs count a multiply
and an add as two; bytes count every input read once and every output written once, so a method that stores an
intermediate is charged for it. Benchmarks print time as a share of the floor, the training planner adds floors up.

Shape legend as in the ops: B utterances, T frames, D width, V vocabulary, S labels, Lq/Lk queries and keys an
utterance, H heads, d head width, N rows, K kept rows.
"""

from __future__ import annotations

from dataclasses import dataclass

ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """Work of one call: matmul FLOPs and bytes of device memory traffic."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Chip:
    """Peak rates: dense matmul FLOP/s by dtype (fp32 as tf32 off), and bytes/s of device memory."""

    name: str
    flops: dict[str, float]
    bandwidth: float


def _gpu(name: str, half: float, single: float, bandwidth: float) -> Chip:
    rates = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Chip(name, rates, bandwidth * 1e12)


# Vendors' data sheets, dense rates: an upper bound on what a matmul reaches (usually 70-85 % of it).
CHIPS = {
    chip.name: chip
    for chip in (
        _gpu("A100-SXM", 312, 19.5, 2.04),
        _gpu("H100-SXM", 989, 67, 3.35),
        _gpu("H200", 989, 67, 4.8),
        _gpu("B200", 2250, 75, 8.0),
        _gpu("L40S", 362, 91.6, 0.864),
        _gpu("RTX-4090", 165, 82.6, 1.008),
        _gpu("MI300X", 1307, 163.4, 5.3),
    )
}


def chip(name: str) -> Chip:
    """The chip of that name, or the one a driver's device name ("NVIDIA H100 80GB HBM3") speaks of.

    Raises ValueError for an unknown one.
    """
    for known in CHIPS.values():
        model = known.name.split("-")[-1] if known.name.startswith("RTX") else known.name.split("-")[0]
        if known.name == name or model in name.replace("-", " ").split():
            return known
    raise ValueError(f"name must be one of {', '.join(CHIPS)}, got {name!r}")


def floor_seconds(cost: Cost, chip: Chip, dtype: str) -> float:
    """The least time `cost` can take on `chip` with matmuls in `dtype`."""
    return max(cost.flops / chip.flops[dtype], cost.bytes / chip.bandwidth)


def ctc_loss(B: int, T: int, C: int, S: int, dtype: str, backward: bool = True) -> Cost:
    """Reads S + 1 columns forward; backward reads log_probs once and writes its gradient once."""
    emissions = B * T * (S + 1)
    dense = 2 * B * T * C * ITEM[dtype] if backward else 0
    # alpha, beta (float32, 2S + 1 states) written and read once each
    return Cost(0.0, emissions * ITEM[dtype] + dense + (4 if backward else 0) * B * T * (2 * S + 1) * 4)


def linear_ctc_loss(N: int, D: int, V: int, dtype: str, trainable: bool, backward: bool = True) -> Cost:
    """2 GEMMs with a frozen head, 3 with a trainable one, 1 without gradients; logits never leave the chip.

    N = valid frames. DESIGN.md's floor: hidden and weight read once a GEMM, gradients written once.
    """
    gemms = (3 if trainable else 2) if backward else 1
    item = ITEM[dtype]
    moved = gemms * V * D * item + gemms * N * D * item
    if backward and trainable:
        moved += V * D * item
    return Cost(gemms * 2.0 * N * D * V, moved)


def peak_gather(B: int, T: int, D: int, K: int, dtype: str, backward: bool = True) -> Cost:
    """Tokens read once, K rows read and written; backward reads K rows and writes B T rows."""
    item = ITEM[dtype]
    return Cost(0.0, B * T * 8 + 2 * K * D * item + ((K + B * T) * D * item if backward else 0))


def splice(text_rows: int, audio_rows: int, D: int, dtype: str, backward: bool = True) -> Cost:
    """Every source row read once and every output row written once, each way."""
    rows = text_rows + audio_rows
    return Cost(0.0, (4 if backward else 2) * rows * D * ITEM[dtype])


def varlen_cross_attention(B: int, Lq: int, Lk: int, H: int, d: int, dtype: str, backward: bool = True) -> Cost:
    """2 matmuls forward, 5 backward; q, k, v, out (and their gradients) moved once a pass."""
    matmuls = 7 if backward else 2
    item = ITEM[dtype]
    queries, keys = B * Lq * H * d * item, B * Lk * H * d * item
    forward = 2 * queries + 2 * keys
    return Cost(matmuls * 2.0 * B * H * Lq * Lk * d, forward + (4 * queries + 4 * keys if backward else 0))


def alignment_adapter(
    B: int, T: int, d_in: int, D: int, ffn: int, heads_over_time: bool, dtype: str, backward: bool = True
) -> Cost:
    """Projection, attention, feed-forward; attention over time if paper. Backward is twice forward.

    Released, over an axis of length 1: its query and key projections change nothing and need not be computed.
    """
    weights = d_in * D + (4 if heads_over_time else 2) * D * D + 2 * D * ffn
    flops = 2.0 * B * T * weights + (4.0 * B * T * T * D if heads_over_time else 0)
    moved = weights * ITEM[dtype] + 2 * B * T * D * ITEM[dtype]
    return Cost(3 * flops, 3 * moved) if backward else Cost(flops, moved)


def shrinking_adapter(B: int, Lq: int, Lk: int, D: int, H: int, dtype: str) -> Cost:
    """Forward and backward: q, o on the kept rows, k, v on the keys, and the attention."""
    projections = Cost(3 * 2.0 * B * (2 * Lq + 2 * Lk) * D * D, 3 * 4 * D * D * ITEM[dtype])
    return projections + varlen_cross_attention(B, Lq, Lk, H, D // H, dtype)
