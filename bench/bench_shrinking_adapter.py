"""The shrinking adapter, peaks to LayerNorm, against the authors' loop over utterances: forward + backward, memory.

Frames are padded to T; utterances fill between a quarter and all of it and keep about one frame in eight. "kept" and
"frames" are the two settings of the look-back's keys; the released loop projects all frames and masks, in both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, WhisperConfig

from bench import whole_batch
from bench.harness import Case, device, record, rows
from soundwave_fast import cost_model
from soundwave_fast.model import SoundwaveConfig
from soundwave_fast.model.shrinking_adapter import ShrinkingAdapter

ON_GPU = device().type == "cuda"
DTYPE = "bfloat16" if ON_GPU else "float32"
BASE = {"B": 8, "T": 750, "D": 4096, "H": 32} if ON_GPU else {"B": 8, "T": 375, "D": 576, "H": 9}
SWEEP = {"T": (100, 1500), "B": (1, 32)}
BLANK = 50


def _setup(case: Case, where: torch.device, seed: int):
    """Adapter, frames that require gradients, tokens with runs of about 8 frames, lengths."""
    B, T, D, H = case.shape.values()
    text = LlamaConfig(hidden_size=D, num_attention_heads=H, num_hidden_layers=1, vocab_size=BLANK)
    keys = "kept" if "kept" in case.variant else "frames"
    config = SoundwaveConfig(
        WhisperConfig(d_model=8), text, look_back_keys=keys, drop_blank=False, adapter_dropout=0.0, ctc_blank_id=BLANK
    )
    torch.manual_seed(seed)
    adapter = ShrinkingAdapter(config).to(where, getattr(torch, case.dtype))
    tokens = (torch.rand(B, T) < 0.125).cumsum(1).remainder(BLANK)
    lengths = torch.randint(T // 4, T + 1, (B,))
    lengths[0] = T
    frames = torch.randn(B, T, D).to(where, getattr(torch, case.dtype)).requires_grad_()
    return adapter, frames, tokens.to(where), lengths.to(where)


def as_released(adapter: ShrinkingAdapter, frames: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """One utterance after the other: all its frames projected to keys and values, those not to be seen masked."""
    out = []
    for hidden, token, length in zip(frames, tokens, lengths):
        keep = token != token.roll(1)
        keep[0] = True
        keep[length:] = False
        hide = ~keep if adapter.keys == "kept" else torch.arange(len(token), device=token.device) >= length
        query = hidden[torch.where(keep)[0]][None]
        mixed, _ = adapter.encoder_attn(query, hidden[None], hidden[None], key_padding_mask=hide[None])
        out.append(adapter.atten_layer_norm(query + mixed)[0])
    return torch.cat(out)


def keys_alone(adapter: ShrinkingAdapter, frames: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The same without the work that is masked: only real keys go in, and no mean of the weights comes out."""
    out = []
    for hidden, token, length in zip(frames, tokens, lengths):
        keep = token != token.roll(1)
        keep[0] = True
        keep[length:] = False
        query = hidden[torch.where(keep)[0]][None]
        keys = query if adapter.keys == "kept" else hidden[None, :length]
        mixed, _ = adapter.encoder_attn(query, keys, keys, need_weights=False)
        out.append(adapter.atten_layer_norm(query + mixed)[0])
    return torch.cat(out)


def padded(adapter: ShrinkingAdapter, frames: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    return whole_batch.shrink(adapter, frames, tokens, lengths)[0]


def ours(adapter: ShrinkingAdapter, frames: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    return adapter(frames, tokens, lengths).data


def _provider(shrink, compiled: bool = False):
    def make(case: Case, where: torch.device, seed: int):
        adapter, frames, tokens, lengths = _setup(case, where, seed)
        leaves = (frames, *adapter.parameters())
        function = torch.compile(shrink) if compiled else shrink
        with torch.no_grad():
            grad = torch.randn_like(ours(adapter, frames, tokens, lengths))

        def step():
            out = function(adapter, frames, tokens, lengths)
            return out, *torch.autograd.grad(out, leaves, grad)[:2]

        return step

    return make


def case(variant: str = "frames", dtype: str = DTYPE, **shape: int) -> Case:
    B, T, D, H = shape.values()
    valid = round(0.65 * T)
    providers = {
        "eager as released": _provider(as_released),
        "eager, keys alone": _provider(keys_alone),
        "eager, padded": _provider(padded),
        "eager, padded, compiled": _provider(padded, compiled=True),
        "ours": _provider(ours),
    }
    if not ON_GPU and D > 1000:  # seconds a call
        del providers["eager, padded"], providers["eager, padded, compiled"]
    cost = cost_model.shrinking_adapter(B, valid // 8, valid // 8 if "kept" in variant else valid, D, H, dtype)
    return Case(
        "shrinking_adapter",
        variant,
        shape,
        providers,
        dtype=dtype,
        cost=cost,
        sources=(
            "soundwave_fast/model/shrinking_adapter.py",
            "soundwave_fast/ops",
            "csrc_triton/varlen_cross_attention",
            "csrc_triton/peak_gather.py",
        ),
        tests="tests/model/test_shrinking_adapter.py",
        rounds=11 if ON_GPU or D < 1000 else 3,
    )


CASES = [case(**BASE), case("kept", **BASE)]
if not ON_GPU:
    CASES += [case("frames bfloat16", "bfloat16", **BASE), case(B=2, T=750, D=4096, H=32)]


@rows(CASES)
def test_shrinking_adapter(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
