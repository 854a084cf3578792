"""One call, forward and backward, of each op at a shape: what the tests of determinism, graphs and syncs repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from soundwave_fast.ops import ctc_loss, linear_ctc_loss, peak_gather, splice, varlen_cross_attention
from soundwave_fast.packed import Packed

ON_GPU = torch.cuda.is_available()


@dataclass
class Call:
    """`forward()`, whose first result is differentiated, and what it is differentiated by."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    grad: Tensor | None = None  # of the first result; None: it is a scalar
    seeded: bool = False  # draws random numbers: the same each time

    def run(self, forward: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        """Results and gradients of `forward`, which may be this call's own, compiled."""
        if self.seeded:
            torch.manual_seed(5)
        out = forward()
        grads = torch.autograd.grad(out[0], self.leaves, self.grad)
        return [*(x.detach() for x in out), *grads]

    def __call__(self) -> list[Tensor]:
        return self.run(self.forward)


class Inputs:
    """Random tensors on a device from one seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype, generator=self.generator)

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)

    def runs(self, B: int, T: int) -> Tensor:
        """Tokens (B, T) that change with probability 0.14 a frame, as a CTC head's do."""
        return (torch.rand(B, T, device=self.device, generator=self.generator) < 0.14).cumsum(1).remainder(50)


def linear_ctc(inputs: Inputs, shape: dict[str, int], trainable: bool) -> Call:
    B, T, D, V, S = (shape[name] for name in ("B", "T", "D", "V", "S"))
    hidden, weight = inputs.normal(B, T, D).requires_grad_(), inputs.normal(V, D).div_(D**0.5)
    weight.requires_grad_(trainable)
    targets = inputs.ints(1, V, B, S)
    lengths = inputs.ints(T // 2, T + 1, B), inputs.ints(S // 2, S + 1, B)

    def forward() -> tuple[Tensor, ...]:
        return linear_ctc_loss(hidden, weight, targets, *lengths, zero_infinity=True, return_argmax=True)

    return Call(forward, (hidden, weight) if trainable else (hidden,))


def ctc(inputs: Inputs, shape: dict[str, int]) -> Call:
    B, T, V, S = (shape[name] for name in ("B", "T", "V", "S"))
    log_probs = inputs.normal(T, B, V).log_softmax(-1).requires_grad_()
    targets, lengths = inputs.ints(1, V, B, S), (inputs.ints(T // 2, T + 1, B), inputs.ints(S // 2, S + 1, B))

    return Call(lambda: (ctc_loss(log_probs, targets, *lengths, zero_infinity=True),), (log_probs,))


def attention(inputs: Inputs, shape: dict[str, int], queries: int, dropout: float = 0.0) -> Call:
    B, T, H, d = (shape[name] for name in ("B", "T", "H", "d"))
    lengths_q, lengths_k = [queries] * (B - 1) + [0], [T - b for b in range(B)]
    offsets = [torch.tensor([0, *x]).cumsum(0).to(inputs.device, torch.int32) for x in (lengths_q, lengths_k)]
    q = inputs.normal(sum(lengths_q), H, d).requires_grad_()
    k, v = (inputs.normal(sum(lengths_k), H, d).requires_grad_() for _ in range(2))

    def forward() -> tuple[Tensor, ...]:
        return (varlen_cross_attention(q, k, v, *offsets, queries, T, None, dropout),)

    return Call(forward, (q, k, v), inputs.normal(*q.shape), seeded=dropout > 0)


def adapters(inputs: Inputs, shape: dict[str, int]) -> tuple[Call, Tensor]:
    """Peaks, look-back and splice with sizes known beforehand, and the tokens they begin with: nothing waits."""
    B, T, D, H, L = (shape[name] for name in ("B", "T", "D", "H", "L"))
    frames, text = inputs.normal(B, T, D).requires_grad_(), inputs.normal(B, L, D).requires_grad_()
    tokens, lengths = inputs.runs(B, T), inputs.ints(T // 2, T + 1, B)
    capacity, longest = -(-B * T // 256) * 256, L - 1 + T
    ids = torch.arange(L, device=inputs.device).expand(B, L)
    mask, placeholder = torch.ones_like(ids), ids == L // 2

    def forward() -> tuple[Tensor, ...]:
        kept = peak_gather(frames, tokens, lengths, 0, True, capacity=capacity)
        keys = Packed.from_padded(frames, lengths, total=B * T, max_len=T)
        q, k = (x.data.unflatten(1, (H, -1)) for x in (kept, keys))
        mixed = varlen_cross_attention(q, k, k, kept.cu_seqlens, keys.cu_seqlens, T, T)
        audio = kept.with_data(kept.data + mixed.flatten(1))
        out = splice(text, audio, placeholder, mask, ids, max_length=longest)
        return out.inputs_embeds, out.attention_mask, out.position_ids, out.labels, kept.cu_seqlens

    return Call(forward, (frames, text), inputs.normal(B, longest, D)), tokens


CALLS: dict[str, Callable[[Inputs, dict[str, int]], Call]] = {
    "linear_ctc_loss frozen": lambda inputs, shape: linear_ctc(inputs, shape, False),
    "linear_ctc_loss trainable": lambda inputs, shape: linear_ctc(inputs, shape, True),
    "ctc_loss": ctc,
    "attention, few queries": lambda inputs, shape: attention(inputs, shape, shape["Lq"]),
    "attention, many queries": lambda inputs, shape: attention(inputs, shape, shape["T"] // 2),
    "attention, dropout": lambda inputs, shape: attention(inputs, shape, shape["Lq"], 0.1),
    "adapters": lambda inputs, shape: adapters(inputs, shape)[0],
}
