"""The alignment adapter, encoder frames to adapter frames, forward + backward: the released modules, and ours.

Utterances fill between half and all of T50 encoder frames (50 a second). "time" attends over the utterance (the paper),
"position" is the released layer, whose attention runs over an axis of length 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, WhisperConfig

from bench import whole_batch
from bench.harness import Case, device, record, rows
from soundwave_fast import cost_model
from soundwave_fast.model import SoundwaveConfig
from soundwave_fast.model.alignment_adapter import AlignmentAdapter

ON_GPU = device().type == "cuda"
DTYPE = "bfloat16" if ON_GPU else "float32"
BASE = (
    {"B": 8, "T50": 1500, "E": 1280, "D": 4096, "H": 32} if ON_GPU else {"B": 8, "T50": 300, "E": 384, "D": 576, "H": 9}
)
SWEEP = {"T50": (100, 1500), "B": (1, 32)}


def _setup(case: Case, where: torch.device, seed: int):
    """Adapter without dropout, frames that require gradients, lengths."""
    B, T50, E, D, H = case.shape.values()
    text = LlamaConfig(hidden_size=D, num_attention_heads=H, num_hidden_layers=1, vocab_size=50)
    attention = "position" if "position" in case.variant else "time"
    config = SoundwaveConfig(WhisperConfig(d_model=E), text, adapter_attention=attention, adapter_dropout=0.0)
    torch.manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    adapter = AlignmentAdapter(config).to(where, dtype)
    lengths = torch.randint(T50 // 2, T50 + 1, (B,))
    lengths[0] = T50
    return adapter, torch.randn(B, T50, E).to(where, dtype).requires_grad_(), lengths.to(where)


def _stacked(frames: Tensor) -> Tensor:
    B, T, E = frames.shape
    return frames[:, : T - T % 2].reshape(B, T // 2, 2 * E)


def as_released(adapter: AlignmentAdapter, frames: Tensor, lengths: Tensor) -> Tensor:
    """One utterance after the other: nn.Linear, nn.TransformerEncoder, nn.LayerNorm."""
    out = []
    for frame, length in zip(frames, (lengths // 2).tolist()):
        x = adapter.mm_projector1(_stacked(frame[None])[:, :length])
        x = adapter.asr_transformer_encoder(x if adapter.over_time else x.transpose(0, 1))
        out.append(adapter.out_norm(x if adapter.over_time else x.transpose(0, 1))[0])
    return torch.cat(out)


def padded(adapter: AlignmentAdapter, frames: Tensor, lengths: Tensor) -> Tensor:
    """The same modules over the padded batch with a key mask."""
    out, counts = whole_batch.align(adapter, frames, lengths)
    return out[torch.arange(out.shape[1], device=out.device) < counts[:, None]]


def ours(adapter: AlignmentAdapter, frames: Tensor, lengths: Tensor) -> Tensor:
    out, counts = adapter(frames, lengths)
    return out[torch.arange(out.shape[1], device=out.device) < counts[:, None]]


def _provider(align, compiled: bool = False):
    def make(case: Case, where: torch.device, seed: int):
        adapter, frames, lengths = _setup(case, where, seed)
        leaves = (frames, *adapter.parameters())
        function = torch.compile(align) if compiled else align
        with torch.no_grad():
            grad = torch.randn_like(padded(adapter, frames, lengths))

        def step():
            out = function(adapter, frames, lengths)
            grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
            return out, *grads[:2]

        return step

    return make


def case(variant: str = "time", dtype: str = DTYPE, **shape: int) -> Case:
    B, T50, E, D, _ = shape.values()
    rows_ = round(0.78 * T50 // 2)  # frames of an utterance that count, on average
    cost = cost_model.alignment_adapter(B, rows_, 2 * E, D, 2 * D, "time" in variant, dtype)
    return Case(
        "alignment_adapter",
        variant,
        shape,
        {
            "eager as released": _provider(as_released),
            "eager, padded": _provider(padded),
            "eager, padded, compiled": _provider(padded, compiled=True),
            "ours": _provider(ours),
        },
        dtype=dtype,
        cost=cost,
        sources=("soundwave_fast/model/alignment_adapter.py", "soundwave_fast/ops", "csrc_triton"),
        tests="tests/model/test_alignment_adapter.py",
        budget=2e-2 if dtype == "float32" else 5e-2,
        rounds=11,
    )


CASES = [case(**BASE), case("position", **BASE)]
if not ON_GPU:
    CASES.append(case("time bfloat16", "bfloat16", **BASE))


@rows(CASES)
def test_alignment_adapter(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
