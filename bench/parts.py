"""Random-weight models and batches of the benchmarks: nano sizes on a CPU, the paper's on a GPU.

Nano is Whisper tiny.en with SmolLM2-135M, the paper Whisper large-v3 with Llama-3.1-8B. Utterances last 2 to 6 s.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration


@dataclass(frozen=True)
class Size:
    """What the shapes of one released model family come down to."""

    d_enc: int
    enc_layers: int
    enc_heads: int
    mels: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


NANO = Size(384, 4, 6, 80, 576, 30, 9, 3, 1536, 49152)
PAPER = Size(1280, 32, 20, 128, 4096, 32, 32, 8, 14336, 128256)


def size(device: torch.device) -> Size:
    return PAPER if device.type == "cuda" else NANO


def config(parts: Size, **semantics) -> SoundwaveConfig:
    """A Soundwave of that size with the paper's semantics."""
    audio = WhisperConfig(
        d_model=parts.d_enc,
        encoder_layers=parts.enc_layers,
        encoder_attention_heads=parts.enc_heads,
        encoder_ffn_dim=4 * parts.d_enc,
        num_mel_bins=parts.mels,
    )
    text = LlamaConfig(
        hidden_size=parts.hidden,
        intermediate_size=parts.ffn,
        num_hidden_layers=parts.layers,
        num_attention_heads=parts.heads,
        num_key_value_heads=parts.kv_heads,
        vocab_size=parts.vocab,
        tie_word_embeddings=parts is NANO,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return SoundwaveConfig(audio, text, ctc_head="free", adapter_dropout=0.0, **semantics)


def model(
    parts: Size, device: torch.device, with_language_model: bool = True, lora: bool = False, **semantics
) -> SoundwaveForConditionalGeneration:
    """The model in bf16 on a GPU, fp32 on a CPU; with_language_model=False as in stage 1, lora=True as in 2 and 3.

    A GPU has room for one 8B model: there, whoever asks for the same gets the same, changed by those before or not.
    """
    make = _shared if device.type == "cuda" else _make
    return make(parts, device, with_language_model, lora, **semantics).train()


def _make(
    parts: Size, device: torch.device, with_language_model: bool, lora: bool, **semantics
) -> SoundwaveForConditionalGeneration:
    torch.manual_seed(0)
    settings = config(parts, **semantics)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        tower = WhisperEncoder._from_config(settings.audio_config).to(dtype)
        llm = AutoModelForCausalLM.from_config(settings.text_config, dtype=dtype) if with_language_model else None
        made = SoundwaveForConditionalGeneration(settings, tower, llm, with_language_model).to(dtype)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith(("alignment_adapter", "shrinking_adapter", "ctc_head")))
    if lora:
        from peft import LoraConfig, get_peft_model

        target = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        made.language_model = get_peft_model(
            made.language_model, LoraConfig(r=64, lora_alpha=16, target_modules=target, task_type="CAUSAL_LM")
        )
    return made


_shared = functools.lru_cache(maxsize=1)(_make)


@dataclass(frozen=True)
class Speech:
    """Encoder frames of a batch with its transcripts: what the trainer's cache hands to a step."""

    frames: Tensor  # (B, T50, d_enc)
    lengths: Tensor  # (B,) encoder frames
    targets: Tensor  # (B, S)
    target_lengths: Tensor  # (B,)


def speech(parts: Size, B: int, T50: int, S: int, device: torch.device, seed: int = 0, still: int = 1) -> Speech:
    """Random frames of ragged length (half of T50 and up), random transcripts.

    Of random frames every one is a peak. Where an LLM reads them they stand `still` for 16 frames, 0.32 s, so that runs
    of equal tokens form: 3 audio tokens a second, as trained models have.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    frames = torch.randn(B, T50, parts.d_enc, generator=generator).to(dtype)
    frames = frames[:, ::still].repeat_interleave(still, 1)[:, :T50].contiguous() if still > 1 else frames
    lengths = torch.randint(T50 // 2, T50 + 1, (B,), generator=generator)
    lengths[0] = T50
    targets = torch.randint(3, parts.vocab, (B, S), generator=generator)
    return Speech(*(x.to(device) for x in (frames, lengths, targets, torch.full((B,), S))))


def prompt(parts: Size, B: int, text: int, answer: int, device: torch.device, audio_id: int, seed: int = 0) -> dict:
    """input_ids, attention_mask and labels of prompts with one placeholder each, and their answers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, parts.vocab, (B, text + answer), generator=generator)
    ids[:, text // 2] = audio_id
    labels = ids.clone()
    labels[:, :text] = -100
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "labels": labels.to(device),
    }
