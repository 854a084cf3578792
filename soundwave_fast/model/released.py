"""Checkpoints in the format of the released weights: reading, writing, and converting from and to our directories."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from soundwave_fast.model.config import SEMANTICS
from soundwave_fast.model.lora import llm_state_dict
from soundwave_fast.model.processing import SoundwaveProcessor
from soundwave_fast.model.released_names import to_released
from soundwave_fast.model.released_reading import (
    MODEL_TYPE,
    OURS,
    from_released_directory,
    is_released_directory,
)
from soundwave_fast.model.soundwave import SoundwaveForConditionalGeneration

_SETTINGS = ("adapter_attention", "look_back_keys", "drop_blank", "mask_frames", "peak_select", "encoder_pad")
_HEAD, _EMBEDDING, _CTC = (
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "ctc_head.audio_feature_head.weight",
)


def read_released(
    path: str | Path,
    dtype: torch.dtype | None = None,
    audio_tower: str | None = None,
    with_language_model: bool = True,
    attn_implementation: str | dict | None = None,
) -> SoundwaveForConditionalGeneration:
    """The model of a released-format directory, in eval mode; every tensor must be there, fit, and be expected.

    Args:
        dtype: of all parameters; None keeps each as it is stored (float16 in the authors' files).
        audio_tower: Whisper folder or hub name instead of the one config.json names. Its weights are loaded from there
            unless the directory holds them under `model.audio_tower`.
        with_language_model: False keeps of the LLM the token embedding alone (CTC transcripts need no more).
        attn_implementation: as in `from_pretrained`: a name, or one for each of `audio_config` and `text_config`.

    Raises:
        FileNotFoundError, OSError: a file or the Whisper is missing.
        ValueError: a config key, or all the tensors that are missing, not expected or of a wrong shape, named.
    """
    return from_released_directory(
        SoundwaveForConditionalGeneration, path, dtype, audio_tower, with_language_model, attn_implementation
    )


def write_released(
    model: Any, path: str | Path, max_shard_size: int | str = "5GB", force: bool = False, processor: Any = None
) -> None:
    """Write a model as a released-format directory; what `read_released` read comes out bit for bit.

    LoRA is merged, a tied CTC head written as rows of its own. A CTC blank just past the LLM's vocabulary takes one
    more row in its embedding and output layer: the mean of all rows, which never has the largest logit.

    Args:
        path: directory, created where it is missing.
        force: write a model whose semantics are not the released code's. The authors' code would then compute something
            else of it; `read_released` finds the settings in config.json and does not.
        processor: its tokenizer is written too.

    Raises:
        ValueError: a model that the format cannot hold, or that the authors' code would compute otherwise.
    """
    config, path = model.config, Path(path)
    differing = {k: getattr(config, k) for k in _SETTINGS if getattr(config, k) != SEMANTICS["released"][k]}
    if model.language_model is None or config.text_config.model_type != "llama" or not config.look_back:
        raise ValueError("model: the released format holds Llama models with their LLM and with look-back")
    if differing and not force:
        listed = ", ".join(f"{k}={v!r}" for k, v in differing.items())
        raise ValueError(
            f"model: the authors' code would compute it otherwise ({listed}); force writes it nevertheless"
        )
    layout = (config.released or {}).get("layout") or {"adapters": "model.", "audio_tower": None}
    tensors = _tensors(model, layout["audio_tower"] is not None)
    path.mkdir(parents=True, exist_ok=True)
    in_tokenizer = processor is not None and processor.audio_token_id == config.audio_token_id
    flat = _flat_config(model, tensors[_EMBEDDING].shape[0], differing, in_tokenizer)
    if config.text_config.tie_word_embeddings and not layout.get("lm_head"):
        tensors.pop(_HEAD)
    elif config.text_config.tie_word_embeddings:
        tensors[_HEAD] = tensors[_HEAD].clone()  # a file of its own name must not share memory
    tensors = {to_released(name, layout): tensor.detach().cpu() for name, tensor in tensors.items()}
    save_torch_state_dict(tensors, path, max_shard_size=max_shard_size, metadata={"format": "pt"})
    model.generation_config.save_pretrained(path)
    if processor is not None:
        processor.tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(flat, indent=2) + "\n")


def _tensors(model: Any, with_tower: bool) -> dict[str, Tensor]:
    """All that is written, under our names: LoRA merged, CTC head free, a row for the placeholder everywhere."""
    parts = ("alignment_adapter.", "shrinking_adapter.", *(["audio_tower."] if with_tower else []))
    out = {k: v for k, v in model.state_dict().items() if k.startswith(parts)}
    out.update({f"language_model.{k}": v for k, v in llm_state_dict(model.language_model, merge=True).items()})
    head, embedding = model.ctc_head, model.get_input_embeddings().weight
    if head.tied:
        rows = torch.cat([embedding, head.blank_row[None]])  # in the wider dtype of the two
    else:
        rows = head.audio_feature_head.weight
    placeholder, blank = model.config.audio_token_id, model.config.ctc_blank_id
    if len(rows) - len(embedding) not in (0, 1) or placeholder >= len(rows):
        raise ValueError(
            f"model: placeholder {placeholder} and blank {blank} do not fit a vocabulary of {len(embedding)}"
        )
    if placeholder != blank:  # the format knows one id for both: the two classes change places
        rows = rows.clone()
        rows[[placeholder, blank]] = rows[[blank, placeholder]]
    if len(rows) > len(embedding):
        for name in (_EMBEDDING, _HEAD):
            old = out[name]
            out[name] = torch.cat([old, old.float().mean(0, keepdim=True).to(old.dtype)])
    out[_CTC] = rows
    return out


def _flat_config(model: Any, vocabulary: int, differing: dict, found_in_tokenizer: bool) -> dict:
    """The config.json that was read, or one made of ours. Of keys that were absent when read, only those come in that a
    reader cannot do without: `audio_tower`, and the placeholder's id unless the tokenizer written beside tells it."""
    config = model.config
    dtype = str(next(model.language_model.parameters()).dtype).removeprefix("torch.")
    flat = dict((config.released or {}).get("config") or {})
    if not flat:
        flat = {k: v for k, v in config.text_config.to_dict().items() if k not in ("_name_or_path", "dtype")}
        rope = dict(flat.get("rope_parameters") or {})
        if rope:  # the older form, which the authors' transformers reads; newer ones read both
            flat["rope_theta"] = rope.pop("rope_theta", 10000.0)
            flat["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        found_in_tokenizer = False  # the authors' own code looks in config.json
        flat.update(torch_dtype=dtype, adapter_size=config.audio_config.d_model, vocab_size=vocabulary)
        flat["architectures"] = ["SoundwaveForCausalLM"]
    if "dtype" in flat or "torch_dtype" in flat:
        flat["dtype" if "dtype" in flat else "torch_dtype"] = dtype
    flat.update(model_type=MODEL_TYPE)
    if not flat.get("audio_tower"):
        flat["audio_tower"] = config.audio_tower
    if not found_in_tokenizer and not isinstance(flat.get("audio_patch_token"), int):
        flat["audio_patch_token"] = config.audio_token_id
    flat.pop(OURS, None)
    return {**flat, OURS: differing} if differing else flat


# -- directories -------------------------------------------------------------------------------------------------


def convert(
    source: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    audio_tower: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> str:
    """Released-format directory -> `save_pretrained` directory with its processor, or ours -> released format.

    `out` appears whole or not at all. Which way is told by `source`: a config.json with `model_type: Soundwave` is the
    released format; a stage directory or a saved model is ours, and its LoRA is merged.

    Args:
        dtype: of the weights written; None: as stored.
        audio_tower: Whisper folder or hub name instead of the one a released config.json names.
        force: see `write_released`.

    Returns:
        'released to soundwave_fast' or 'soundwave_fast to released'.

    Raises:
        FileNotFoundError, OSError: nothing to read at `source`.
        FileExistsError: `out` exists and is not an empty directory.
        ValueError: a checkpoint that does not fit its config, or does not fit the released format.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: no checkpoint (no config.json)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty directory")
    released = is_released_directory(source)
    if released:
        model = read_released(source, dtype, audio_tower)
    else:
        model = SoundwaveForConditionalGeneration.from_pretrained(source, dtype=dtype or "auto")
    processor = _processor(source, released, audio_tower)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if released:
            model.save_pretrained(temporary, max_shard_size=max_shard_size)
            if processor is not None:
                processor.save_pretrained(temporary)
        else:
            write_released(model, temporary, max_shard_size, force, processor)
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return "released to soundwave_fast" if released else "soundwave_fast to released"


def _processor(source: Path, released: bool, audio_tower: str | None) -> SoundwaveProcessor | None:
    """The processor of a directory that has a tokenizer; weights alone are converted alone."""
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return (
        SoundwaveProcessor.from_released(source, audio_tower)
        if released
        else SoundwaveProcessor.from_pretrained(source)
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
