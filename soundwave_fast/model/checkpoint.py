"""Stage directories: adapters and LoRA as trained, beside the names of the frozen parts they were trained with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, WhisperModel

from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.model.lora import has_lora, quietly

ADAPTERS = "adapters.safetensors"
LORA = "lora"
TRAINED = ("alignment_adapter.", "ctc_head.", "shrinking_adapter.")


def is_stage_directory(name: str | os.PathLike) -> bool:
    return (Path(name) / ADAPTERS).is_file()


def part_of(attn_implementation: str | dict | None, part: str) -> str | None:
    """What an `attn_implementation` says of one part: 'audio_config' or 'text_config'."""
    return attn_implementation.get(part) if isinstance(attn_implementation, dict) else attn_implementation


def load_whisper_encoder(
    name: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> nn.Module:
    """The encoder of a Whisper folder or hub name, frozen.

    Raises:
        OSError: nothing can be loaded from `name`.
    """
    encoder = WhisperModel.from_pretrained(name, dtype=dtype, attn_implementation=attn_implementation).encoder
    return encoder.requires_grad_(False).eval()


def load_llm(name: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> nn.Module:
    """A causal LLM, frozen."""
    llm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attn_implementation)
    return llm.requires_grad_(False).eval()


def load_token_embedding(name: str, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    """Only the input embedding (V, D) of an LLM: one tensor read from its safetensors files, not the model.

    A name that is no local folder (a hub name) loads the model once and keeps its embedding.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                keys = [key for key in tensors.keys() if key.endswith("embed_tokens.weight")]
                if keys:
                    weight = tensors.get_tensor(keys[0]).to(dtype)
                    return nn.Embedding.from_pretrained(weight, freeze=True)
        if files:
            raise ValueError(f"language_model: no embed_tokens.weight in {folder}")
    return load_llm(name, dtype).get_input_embeddings()


def from_parts(
    cls: type,
    config: SoundwaveConfig,
    dtype: torch.dtype = torch.float32,
    with_language_model: bool = True,
    attn_implementation: str | dict | None = None,
) -> Any:
    """Model with the frozen parts `config` names and fresh float32 adapters.

    Args:
        dtype: of the frozen parts.
        attn_implementation: a name, or one for each of 'audio_config' and 'text_config'.
        with_language_model: False loads no more of the LLM than its token embedding.

    Raises:
        ValueError: the config names no parts.
    """
    if not config.audio_tower or not config.language_model:
        raise ValueError("config: audio_tower and language_model must name the parts to load")
    encoder = load_whisper_encoder(config.audio_tower, dtype, part_of(attn_implementation, "audio_config"))
    text_attention = part_of(attn_implementation, "text_config")
    llm = load_llm(config.language_model, dtype, text_attention) if with_language_model else None
    model = cls(config, audio_tower=encoder, language_model=llm, with_language_model=with_language_model)
    if not with_language_model:
        model.token_embedding = load_token_embedding(config.language_model, dtype)
    return model


LOGIT_STD = 7.0  # of a tied head at the start; at 2 (LayerNorm's gain 1) CTC stays on its blank plateau far longer


def initialise_adapters(model: Any) -> None:
    """Start values for training from scratch, taken from the LLM's token embeddings."""
    embedding = model.get_input_embeddings().weight.float()
    model.shrinking_adapter.match_embedding(embedding)
    if model.ctc_head.tied:
        with torch.no_grad():
            model.ctc_head.blank_row.copy_(embedding.mean(0))
            gain = LOGIT_STD / (embedding.shape[1] ** 0.5 * embedding.std(0).mean())
            model.alignment_adapter.out_norm.weight.fill_(gain)


def save_stage_directory(
    model: Any, path: Path, processor: Any = None, adapters: dict | None = None, lora: dict | None = None
) -> None:
    """Write config, adapters, LoRA (an ordinary PEFT folder) and processor.

    Args:
        adapters, lora: gathered full state dicts where the model's own parameters are sharded.
    """
    path.mkdir(parents=True, exist_ok=True)
    if adapters is None:
        adapters = {k: v for k, v in model.state_dict().items() if k.startswith(TRAINED)}
    adapters = {k: v.detach().cpu().contiguous() for k, v in adapters.items()}
    if hasattr(model.language_model, "peft_config"):
        model.language_model.save_pretrained(path / LORA, state_dict=lora)
    if processor is not None:
        processor.save_pretrained(path)
    model.config.save_pretrained(path)
    # written last and by rename: a directory without it is not taken for a stage directory
    temporary = path / (ADAPTERS + ".tmp")
    save_file(adapters, temporary, metadata={"format": "pt"})
    os.replace(temporary, path / ADAPTERS)


def load_adapters(model: Any, path: Path, parts: tuple[str, ...] = TRAINED) -> None:
    """Load the adapters of a stage directory, strictly, in place.

    Raises:
        FileNotFoundError: `path` is no stage directory.
        ValueError: a damaged file, or a name or shape that does not fit, named.
    """
    if not is_stage_directory(path):
        raise FileNotFoundError(f"{path} is not a stage directory: it has no {ADAPTERS}")
    try:
        saved = load_file(path / ADAPTERS)
    except SafetensorError as error:
        raise ValueError(f"{path / ADAPTERS}: {error}") from None
    own = {k: v for k, v in model.state_dict().items() if k.startswith(parts)}
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or extra:
        raise ValueError(f"{path / ADAPTERS}: missing {missing or 'nothing'}, not expected {extra or 'nothing'}")
    for name, tensor in saved.items():
        if own[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, the model has {tuple(own[name].shape)}"
            raise ValueError(f"{path / ADAPTERS}: {name} is {shapes}")
    model.load_state_dict(saved, strict=False)


def save_lora(model: Any, path: Path) -> None:
    """LoRA as an ordinary PEFT folder; an older one is removed where the model has none."""
    if has_lora(model.language_model):
        model.language_model.save_pretrained(path / LORA)
    elif (path / LORA / "adapter_config.json").is_file():
        shutil.rmtree(path / LORA)


def load_lora(model: Any, path: Path, trainable: bool = False, as_saved: bool = False) -> None:
    """Put the LoRA of a directory around the LLM, if it has one.

    Args:
        as_saved: keep the file's dtype, where peft would make bfloat16 and float16 float32.
    """
    if not (path / LORA / "adapter_config.json").is_file():
        return
    from peft import PeftModel

    with quietly():
        model.language_model = PeftModel.from_pretrained(model.language_model, path / LORA, is_trainable=trainable)
    file = path / LORA / "adapter_model.safetensors"
    if as_saved and file.is_file():
        with safe_open(file, framework="pt") as tensors:
            dtypes = {tensors.get_tensor(name).dtype for name in tensors.keys()}
        if len(dtypes) == 1:
            dtype = dtypes.pop()
            for name, parameter in model.language_model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Parameters to another dtype, in place. Not `model.to`: it would round the LLM's rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


BY_AUTO_CLASSES = ("_commit_hash", "_from_auto", "adapter_kwargs", "code_revision", "trust_remote_code")


def own_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`from_pretrained`'s arguments that apply to a directory it does not load through transformers.

    Raises:
        TypeError: any other, but for those that auto classes add.
    """
    known = ("dtype", "with_language_model", "attn_implementation", "audio_tower", "config")
    kwargs = {k: v for k, v in kwargs.items() if k not in BY_AUTO_CLASSES and v is not None}
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", dtype)
    if unknown := sorted(kwargs.keys() - set(known)):
        raise TypeError(f"from_pretrained: {', '.join(unknown)} cannot be given for this kind of directory")
    dtype = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return {**kwargs, "dtype": dtype}


def from_stage_directory(
    cls: type,
    path: Path,
    dtype: torch.dtype | None = None,
    with_language_model: bool | None = None,
    attn_implementation: str | dict | None = None,
    config: SoundwaveConfig | None = None,
) -> Any:
    """The whole model as a stage left it: frozen parts from where the config says, adapters and LoRA from `path`.

    Args:
        config: instead of the directory's. An auto class passes one that holds what it was given: settings, and the
            attention of either part.
    """
    config = SoundwaveConfig.from_pretrained(path) if config is None else config
    if attn_implementation is None:
        attn_implementation = {part: getattr(config, part)._attn_implementation for part in config.sub_configs}
    with_language_model = True if with_language_model is None else with_language_model
    model = from_parts(cls, config, dtype or torch.float32, with_language_model, attn_implementation)
    load_adapters(model, path)
    if with_language_model:
        load_lora(model, path)
    return (model if dtype is None else cast(model, dtype)).eval()
