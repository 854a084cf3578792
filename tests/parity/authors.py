"""The authors' forward, restated: one utterance at a time over its padded 30 s, no masks, in plain modules.

Written from the description in docs/parity.md. Parameters carry the released names, so `state_dict()` is what a
released checkpoint holds; the Whisper is kept beside them, not among them.

Shape legend: T adapter frames (750), E encoder width, D LLM width, V vocabulary, N kept frames, L prompt, M spliced.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, WhisperModel

from tests.model import tiny

CTC_WEIGHT = 0.3


class LookBack(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.encoder_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.atten_layer_norm = nn.LayerNorm(width)


class Authors(nn.Module):
    """Whisper -> adapters -> peaks -> look-back -> splice -> Llama, as the released weights were made with."""

    def __init__(self, config: LlamaConfig, whisper: WhisperModel, placeholder: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, norm_first=True)  # not batch_first
        self.model = LlamaModel(config)
        self.model.mm_projector1 = nn.Linear(2 * whisper.config.d_model, width)
        self.model.asr_transformer_encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.model.out_norm = nn.LayerNorm(width)
        self.model.audio_feature_head = nn.Linear(width, config.vocab_size, bias=False)
        self.model.lbm = LookBack(width, heads)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.beside = (whisper.eval(),)
        self.placeholder = placeholder

    @torch.no_grad()
    def frames(self, mel: Tensor) -> Tensor:  # (mels, 3000) -> (1500, E)
        return self.beside[0].encoder(mel[None]).last_hidden_state[0]

    def align(self, frames: Tensor) -> Tensor:  # (1500, E) -> (T, D)
        x = self.model.mm_projector1(frames.reshape(len(frames) // 2, -1))[None]
        return self.model.out_norm(self.model.asr_transformer_encoder(x))[
            0
        ]  # (1, T, D): the layer's sequence is 1 long

    def ctc_logits(self, features: Tensor) -> Tensor:  # (T, D) -> (T, V)
        return self.model.audio_feature_head(features)

    @staticmethod
    def kept(ctc_logits: Tensor) -> Tensor:  # (T,) bool: the first frame of every run, blanks too
        tokens = ctc_logits.argmax(-1)
        changes = tokens[1:] != tokens[:-1]
        return torch.cat([torch.ones(1, dtype=torch.bool), changes])

    def shrink(self, features: Tensor, kept: Tensor) -> Tensor:  # (T, D), (T,) -> (N, D)
        queries = features[kept]
        seen, _ = self.model.lbm.encoder_attn(queries, features, features, key_padding_mask=~kept)
        return self.model.lbm.atten_layer_norm(queries + seen)

    def splice(self, ids: Tensor, audio: Tensor) -> Tensor:  # (L,), (N, D) -> (M, D)
        at = ids.tolist().index(self.placeholder)
        text = self.model.embed_tokens(ids)
        return torch.cat([text[:at], audio, text[at + 1 :]])

    def logits(self, embeds: Tensor) -> Tensor:  # (M, D) -> (M, V)
        return self.lm_head(self.model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state)[0]

    def hear(self, mel: Tensor) -> tuple[Tensor, Tensor]:  # audio tokens (N, D), CTC logits (T, V)
        features = self.align(self.frames(mel))
        ctc = self.ctc_logits(features)
        return self.shrink(features, self.kept(ctc)), ctc

    @torch.no_grad()
    def greedy(self, ids: Tensor, mel: Tensor, count: int) -> list[int]:
        """`count` new tokens, everything computed anew for each."""
        embeds, found = self.splice(ids, self.hear(mel)[0]), []
        for _ in range(count):
            found.append(int(self.logits(embeds)[-1].argmax()))
            embeds = torch.cat([embeds, self.model.embed_tokens(torch.tensor(found[-1:]))])
        return found

    def loss(
        self,
        ids: list[Tensor],
        labels: list[Tensor],
        mels: list[Tensor],
        targets: list[list[int]],
        recursion: torch.dtype,  # of the CTC; float32 is theirs
    ) -> Tensor:
        """Cross-entropy over all answer tokens of the batch + 0.3 times its mean CTC loss per target token."""
        nll, count, ctc = 0.0, 0, 0.0
        for one, label, mel, target in zip(ids, labels, mels, targets, strict=True):
            audio, ctc_logits = self.hear(mel)
            at = one.tolist().index(self.placeholder)
            spliced = torch.cat([label[:at], label.new_full((len(audio),), -100), label[at + 1 :]])
            logits = self.logits(self.splice(one, audio))
            nll = nll + F.cross_entropy(logits[:-1], spliced[1:], reduction="sum")
            count += int((spliced[1:] != -100).sum())
            log_probs = ctc_logits.log_softmax(-1)[:, None].to(recursion)
            ctc = ctc + F.ctc_loss(
                log_probs, torch.tensor([target]), [len(log_probs)], [len(target)], self.placeholder, zero_infinity=True
            )
        return nll / count + CTC_WEIGHT * ctc / len(ids)


def make(parts: tiny.Parts, tied: bool = False) -> tuple[Authors, dict, PreTrainedTokenizerFast]:
    """Random weights round the tiny Whisper, their checkpoint's config.json, and the tokenizer with the placeholder."""
    torch.manual_seed(3)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(parts.llm)
    tokenizer.add_tokens(["<audio_patch>"], special_tokens=True)
    placeholder = tokenizer.convert_tokens_to_ids("<audio_patch>")
    llama = {
        "hidden_size": tiny.HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
    whisper = WhisperModel.from_pretrained(parts.whisper)
    model = Authors(LlamaConfig.from_dict(copy.deepcopy(llama)), whisper, placeholder)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.2)
        for name, parameter in model.model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
    config = {
        "architectures": ["SoundwaveForCausalLM"],
        "model_type": "Soundwave",
        **llama,
        "adapter_size": whisper.config.d_model,
        "audio_tower": parts.whisper,
        "audio_patch_token": placeholder,
        "torch_dtype": "float32",
        "use_cache": True,
        "a_key_of_theirs": [1, "two"],
    }
    return model.eval(), config, tokenizer


def save(folder: Path, tensors: dict[str, Tensor], config: dict, tokenizer=None, shards: int = 1, index: bool = True):
    """A released-format directory; with shards=1 and no index the one file is model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    names, where = sorted(tensors), {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = {name: tensors[name].clone() for name in names[number::shards]}
        save_file(own, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(own, file))
    if shards > 1 and index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
