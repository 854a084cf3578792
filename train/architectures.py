"""Sizes of the parts the presets name, and a whole model of them on meta tensors: no weights, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from soundwave_fast.errors import UserError
from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration
from soundwave_fast.model.config import SEMANTICS
from train import build, freeze
from train.config import Config


def _whisper(width: int, layers: int, heads: int, mels: int = 80) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "num_mel_bins": mels,
    }


def _llama(width: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# From the config.json of each model card.
KNOWN = {
    "package:whisper-tiny.en": _whisper(384, 4, 6),
    **{f"openai/whisper-tiny{english}": _whisper(384, 4, 6) for english in ("", ".en")},
    **{f"openai/whisper-base{english}": _whisper(512, 6, 8) for english in ("", ".en")},
    **{f"openai/whisper-small{english}": _whisper(768, 12, 12) for english in ("", ".en")},
    **{f"openai/whisper-medium{english}": _whisper(1024, 24, 16) for english in ("", ".en")},
    "openai/whisper-large-v3": _whisper(1280, 32, 20, mels=128),
    "package:smollm2-135m-instruct": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(2048, 8192, 24, 32, 32, 49152, tied=True),
    "meta-llama/Llama-3.2-1B-Instruct": _llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(4096, 14336, 32, 32, 8, 128256, tied=False),
    "meta-llama/Llama-3.1-70B-Instruct": _llama(8192, 28672, 80, 64, 8, 128256, tied=False),
}


def part(name: str, key: str) -> Any:
    """Configuration of a part: one of `KNOWN`, or a folder's own.

    Raises:
        UserError: neither.
    """
    if name in KNOWN:
        sizes = dict(KNOWN[name])
        return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    if not (Path(name) / "config.json").is_file():
        raise UserError(f"{key}: {name!r} is no folder, and not one of the known {', '.join(KNOWN)}")
    return AutoConfig.from_pretrained(name)


def soundwave(config: Config) -> SoundwaveConfig:
    """The architecture a training config describes."""
    settings = config.model
    overrides = {key: getattr(settings, key) for key in SEMANTICS["paper"] if getattr(settings, key) is not None}
    try:
        return SoundwaveConfig(
            part(settings.whisper, "model.whisper"),
            part(settings.llm, "model.llm"),
            semantics=settings.semantics,
            look_back=settings.look_back,
            ctc_head=settings.ctc_head,
            adapter_dropout=settings.adapter_dropout,
            **overrides,
        )
    except ValueError as error:
        raise UserError(" ".join(str(error).split())[:300]) from None


def meta_model(config: Config, stage: int) -> SoundwaveForConditionalGeneration:
    """The model of a stage on meta tensors, in the trainer's dtypes for a GPU, LoRA in and the rest frozen.

    Raises:
        UserError: parts whose sizes are not known, or settings that do not fit them.
    """
    architecture = soundwave(config)
    frozen = build.frozen_dtype(config.model, torch.device("cuda"))
    with torch.device("meta"):
        model = SoundwaveForConditionalGeneration(architecture, with_language_model=stage > 1)
        for frozen_part in (model.audio_tower, model.language_model, model.token_embedding):
            if frozen_part is not None:
                frozen_part.to(frozen)
        if stage > 1:
            build.add_lora(model, config.model, None)
    freeze.parameter_groups(model, config.optim.trainable, 0.0)
    return model
