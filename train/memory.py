"""Memory of one GPU in training, by kind: what is kept of every parameter, what is there for a moment, activations.

Parameters are counted on a meta model. What autograd keeps of an LLM layer is counted too, by running one on meta
tensors; the rest of the activations are small beside it and estimated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from soundwave_fast.model.alignment_adapter import STACK
from soundwave_fast.ops.linear_ctc_passes import CHUNK_ELEMENTS, TRAINED_BYTES
from train.config import Config
from train.cost import Work

USABLE = 0.9  # of a chip's memory: the rest goes to the CUDA context, to NCCL and to fragmentation
PARTS = {
    "audio_tower": "Whisper encoder",
    "alignment_adapter": "alignment adapter",
    "ctc_head": "CTC head",
    "shrinking_adapter": "shrinking adapter",
    "token_embedding": "LLM's embedding",
    "language_model": "LLM",
}


@dataclass(frozen=True)
class Count:
    """Parameters of a part."""

    total: int
    trained: int


def parameters(model: nn.Module) -> dict[str, Count]:
    """Part -> its parameters, LoRA apart from the LLM it sits in."""
    counts: dict[str, Count] = {}
    for name, parameter in model.named_parameters():
        part = "LoRA" if "lora_" in name else PARTS[name.split(".")[0]]
        before = counts.get(part, Count(0, 0))
        size = parameter.numel()
        counts[part] = Count(before.total + size, before.trained + size * parameter.requires_grad)
    return counts


class _Attention(torch.autograd.Function):
    """Keeps what a flash attention keeps: q, k, v and the output."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("only counted, never run")


def _attention(module, query, key, value, attention_mask, **kwargs):
    return _Attention.apply(query, key, value).transpose(1, 2), None


def kept_per_token(model: nn.Module, tokens: int = 64) -> float:
    """Bytes that autograd keeps of one LLM layer per token, in bfloat16, LoRA and its dropout included."""
    AttentionInterface.register("counted", _attention)
    llm = model.causal_lm.model
    layer = copy.deepcopy(llm.layers[0]).to(torch.bfloat16).train()
    layer.self_attn.config._attn_implementation = "counted"
    hidden = torch.empty(1, tokens, llm.config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    positions = torch.empty(1, tokens, dtype=torch.long, device="meta")
    rotary = llm.rotary_emb(hidden, positions)
    own = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens


def _largest_layer(model: nn.Module) -> int:
    layers = list(model.audio_tower.layers)
    if model.language_model is not None:
        layers += list(model.causal_lm.model.layers)[:1]
    return max(sum(p.numel() for p in layer.parameters()) for layer in layers)


def _root(model: nn.Module) -> tuple[int, int]:
    """Parameters of FSDP's root unit, all and trained: whatever is in no layer."""
    inside = {id(p) for layer in model.audio_tower.layers for p in layer.parameters()}
    if model.language_model is not None:
        inside |= {id(p) for layer in model.causal_lm.model.layers for p in layer.parameters()}
    root = [p for p in model.parameters() if id(p) not in inside]
    return sum(p.numel() for p in root), sum(p.numel() for p in root if p.requires_grad)


def activations(model: nn.Module, config: Config, work: Work) -> float:
    """Bytes kept for backward, and of the encoder's widest layer, which keeps nothing."""
    width, audio = model.config.hidden_size, model.config.audio_config
    frames = work.encoder_frames / STACK
    encoder = work.encoder_frames * (6 * audio.d_model + audio.encoder_ffn_dim) * 2
    alignment = frames * (STACK * audio.d_model + 14 * width) * 2  # norms, q k v, attention, 2 D wide feed-forward
    if model.language_model is None:
        return encoder + alignment
    shrinking = (4 * frames + 6 * work.audio_tokens) * width * 2  # k, v and their inputs; q, attention, output, norm
    tokens, layers = work.audio_tokens + work.text_tokens, model.config.text_config.num_hidden_layers
    kept = kept_per_token(model) * tokens
    llm = layers * tokens * width * 2 + kept if config.run.activation_checkpointing else layers * kept
    return encoder + alignment + shrinking + llm


def by_kind(model: nn.Module, config: Config, work: Work, gpus: int) -> dict[str, float]:
    """Kind -> bytes on one GPU.

    Args:
        work: of one GPU's batch.
        gpus: over which the model is sharded (HSDP: those of one replica).
    """
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    masters = [p for p in model.parameters() if p.dtype == torch.float32]
    frozen32 = sum(p.numel() for p in masters if not p.requires_grad)  # adapters stay in float32 where they are frozen
    root, root_trained = _root(model)
    if gpus > 1:  # the root unit and two layers in bfloat16, gradients of the root before they are scattered
        gathered = 2 * (root + 2 * _largest_layer(model)) + (2 + 4) * root_trained
    else:  # autocast's copies of what is kept in float32
        gathered = 2 * (trained + frozen32)
    frames, width = work.encoder_frames / STACK, model.config.hidden_size
    classes = work.ctc_classes or model.config.ctc_vocab_size
    head_trains = any(p.requires_grad and p.ndim > 1 for p in model.ctc_head.parameters())
    ctc = frames * width * 4 + 2 * 2 * CHUNK_ELEMENTS["cuda"]
    if head_trains:
        ctc += TRAINED_BYTES["cuda"] + classes * width * 4
    vocabulary = model.config.text_config.vocab_size
    logits = work.predicted * vocabulary * (2 + 4 + 4) if model.language_model is not None else 0
    return {
        "frozen weights": (2 * (total - trained - frozen32) + 4 * frozen32) / gpus,
        "float32 masters": 4 * trained / gpus,
        "gradients": 4 * trained / gpus,
        "Adam's moments": 8 * trained / gpus,
        "gathered for a moment": gathered,
        "activations": activations(model, config, work),
        "CTC workspace": ctc,
        "logits": logits,
    }
