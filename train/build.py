"""From a config to a model and its processor: parts found, semantics set, LoRA put in, adapters started or loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging

from soundwave_fast.errors import UserError, one_line
from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave_fast.model import checkpoint as stage_directory
from soundwave_fast.model.config import SEMANTICS
from soundwave_fast.model.lora import quietly
from train.config import Config, Model

STAGES = (1, 2, 3)
_TELLING = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, TemplateError, StrictDataclassError)
_TERSE = (TypeError, AttributeError, LookupError, ArithmeticError, re.error)  # say little without their name


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """What loaders say of files and settings they cannot take becomes one line that begins with the setting.

    Args:
        setting: what the loader was given, e.g. 'model.llm'; '' where the error itself names it.

    Yields:
        Nothing.

    Raises:
        UserError: the loader failed.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _TELLING + _TERSE) and type(error) is not Exception:  # tokenizers raises just that
            raise
        kind = f"{type(error).__name__}: " if isinstance(error, _TERSE) else ""
        raise UserError(f"{setting}{': ' * bool(setting)}{kind}{one_line(error, 300)}") from error


def resolve_part(name: str, what: str) -> str:
    """A part's folder or hub name; `package:NAME` is made from a Python package once and cached.

    Raises:
        UserError: no name given, an unknown package part, or one that cannot be had.
    """
    if not name:
        raise UserError(f"model.{what}: name a folder or a hub model (--{what})")
    if not name.startswith("package:"):
        return name
    from train.nano import parts

    makers = {"whisper-tiny.en": parts.prepare_whisper, "smollm2-135m-instruct": parts.prepare_llm}
    key = name.removeprefix("package:")
    if key not in makers:
        raise UserError(f"model.{what}: no package part {key!r} (there are {', '.join(makers)})")
    return str(makers[key]())


def frozen_dtype(model: Model, device: torch.device) -> torch.dtype:
    """Dtype of the frozen parts and of the arithmetic; 'auto': bfloat16 where the hardware multiplies it."""
    if model.dtype != "auto":
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if model.dtype not in kinds:
            raise UserError(f"model.dtype: {model.dtype!r} is not one of auto, {', '.join(kinds)}")
        return kinds[model.dtype]
    if device.type == "cuda":
        return torch.bfloat16
    try:
        native = "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        native = False
    return torch.bfloat16 if native else torch.float32


def packed(config: Config, model: SoundwaveForConditionalGeneration) -> bool:
    """Whether the LLM's batches go without padding.

    'auto': where its attention walks prompt after prompt; the others would mask a square of all the prompts' tokens.
    """
    if config.run.packed != "auto":
        return bool(config.run.packed)
    return "flash" in str(model.causal_lm.config._attn_implementation)


def previous_stage(path: str, stage: int) -> Path | None:
    """The stage directory to start from; stage 1 starts fresh.

    Raises:
        UserError: stage 2 or 3 without a finished earlier stage.
    """
    if not path:
        if stage == 1:
            return None
        raise UserError(f"stage {stage} starts from stage {stage - 1}: pass --init DIRECTORY")
    folder = Path(path)
    if not stage_directory.is_stage_directory(folder):
        raise UserError(f"--init {path}: not the output of a finished stage (no {stage_directory.ADAPTERS} in it)")
    return folder


def build(
    config: Config, stage: int, device: torch.device
) -> tuple[SoundwaveForConditionalGeneration, SoundwaveProcessor]:
    """Model (trainable parts float32, frozen parts in their dtype, LoRA from stage 2 on) and processor.

    Raises:
        UserError: parts that cannot be loaded, or a previous stage that does not fit.
    """
    logging.disable_progress_bar()  # a bar for every part loaded would bury the run's own lines
    settings = config.model
    previous = previous_stage(config.run.init, stage)
    whisper, llm = resolve_part(settings.whisper, "whisper"), resolve_part(settings.llm, "llm")
    overrides = {key: getattr(settings, key) for key in SEMANTICS["paper"] if getattr(settings, key) is not None}
    with naming("model.whisper"):
        audio_config = AutoConfig.from_pretrained(whisper)
    with naming("model.llm"):
        text_config = AutoConfig.from_pretrained(llm)
    with naming(""):
        architecture = SoundwaveConfig(
            audio_config,
            text_config,
            audio_tower=whisper,
            language_model=llm,
            semantics=settings.semantics,
            look_back=settings.look_back,
            ctc_head=settings.ctc_head,
            ctc_weight=settings.ctc_weight,
            adapter_dropout=settings.adapter_dropout,
            ctc_blank_id=text_config.vocab_size,
            **overrides,
        )
    with naming("model.whisper, model.llm"):
        processor = SoundwaveProcessor.from_parts(whisper, llm, settings.chat_template, architecture.encoder_pad)
        architecture.audio_token_id = processor.audio_token_id
        model = SoundwaveForConditionalGeneration.from_parts(
            architecture, dtype=frozen_dtype(settings, device), with_language_model=stage > 1
        )
    if stage > 1:
        with naming("model.attention"):
            if settings.attention != "auto":
                model.language_model.set_attn_implementation(settings.attention)
        with naming("model.chat_template"):
            processor.prompt("")  # none, or one that cannot be filled in, would end the first batch
    if previous is None:
        stage_directory.initialise_adapters(model)
    else:
        with naming(f"--init {previous}"):
            check_fits(config, architecture, previous)
            stage_directory.load_adapters(model, previous)
    if stage > 1:
        add_lora(model, settings, previous)
    return place(model, device), processor


def place(model: SoundwaveForConditionalGeneration, device: torch.device) -> SoundwaveForConditionalGeneration:
    """To the device, but for the LLM's layers where they are to be sharded: FSDP takes those there one by one.

    So a GPU never holds more of the LLM than its share, its embedding and a layer.
    """
    if model.language_model is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return model.to(device)
    llm = model.causal_lm.model
    layers, llm.layers = llm.layers, torch.nn.ModuleList()
    model.to(device)
    llm.layers = layers
    return model


_HEARING = ("adapter_attention", "mask_frames", "encoder_pad", "ctc_head", "ctc_blank_id", "audio_token_id")
_SHRINKING = ("look_back", "look_back_keys", "drop_blank", "peak_select")  # stage 1 has not met these yet
_SIZES = {
    "audio_config": ("d_model", "encoder_layers", "num_mel_bins"),
    "text_config": ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
}


def check_fits(config: Config, now: SoundwaveConfig, previous: Path) -> None:
    """Whether the previous stage trained what this one goes on with: the same parts, semantics and LoRA.

    Raises:
        UserError: it did not; the first difference is named.
    """
    was = SoundwaveConfig.from_pretrained(previous)
    lora = previous / stage_directory.LORA / "adapter_config.json"
    keys = _HEARING + (_SHRINKING if lora.is_file() else ())
    pairs = {key: (getattr(was, key), getattr(now, key)) for key in keys}
    for part, sizes in _SIZES.items():
        for key in sizes:
            pairs[f"{part}.{key}"] = getattr(getattr(was, part), key), getattr(getattr(now, part), key)
    if lora.is_file():
        saved = json.loads(lora.read_text())
        pairs["model.lora_rank"] = saved.get("r"), config.model.lora_rank
        pairs["model.lora_alpha"] = saved.get("lora_alpha"), config.model.lora_alpha
    for key, (before, after) in pairs.items():
        if before != after:
            raise UserError(f"--init {previous} does not fit: {key} was {before!r} there, is {after!r} here")


def add_lora(model: SoundwaveForConditionalGeneration, settings: Model, previous: Path | None) -> None:
    """LoRA around the LLM: the previous stage's where it has one, else new. Its weights are float32."""
    if previous is not None and (previous / stage_directory.LORA).is_dir():
        with naming(f"--init {previous}"):
            stage_directory.load_lora(model, previous, trainable=True)
    else:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.lora_targets,
            task_type="CAUSAL_LM",
        )
        with naming("model.lora_targets"), quietly():
            model.language_model = get_peft_model(model.language_model, lora)
    for name, parameter in model.language_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
