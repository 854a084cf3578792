"""Reading released-format checkpoints (config `model_type: Soundwave`) strictly: every tensor there, none to spare.

Such a directory holds the LLM's flat config.json with `adapter_size`, `audio_tower` (hub name or folder of the
Whisper) and `audio_patch_token` (id of the placeholder, which is the CTC blank too), safetensors shards with or without
an index, and the LLM's tokenizer with `<audio_patch>` added. Its weights have LoRA merged into them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, LlamaConfig

from soundwave_fast.model import checkpoint
from soundwave_fast.model.chat import AUDIO_TOKEN
from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.model.released_names import read_tensors, some, to_ours, to_released

MODEL_TYPE = "Soundwave"
OURS = "soundwave_fast"  # config.json key under which settings the authors' code does not know are written


class ReleasedConfig(LlamaConfig):
    """The flat config.json of a released-format directory, so that transformers' auto classes can read it."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        """As transformers' own, but what an auto class was given for the parts goes on to the model: this flat config
        would swallow a part's attention and the name of the Whisper unseen."""
        auto = kwargs.get("return_unused_kwargs", False)
        parts = {k: kwargs.pop(k) for k in ("attn_implementation", "audio_tower") if auto and k in kwargs}
        found = super().from_dict(config_dict, **kwargs)
        return (found[0], {**found[1], **parts}) if auto else found


def is_released_directory(name: Any) -> bool:
    """Whether `name` is a folder whose config.json says `model_type: Soundwave`."""
    try:
        return json.loads((Path(name) / "config.json").read_text()).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


# -- config ------------------------------------------------------------------------------------------------------


def read_config(path: str | Path, audio_tower: str | None = None) -> SoundwaveConfig:
    """`SoundwaveConfig` with the released semantics of a released-format directory.

    Args:
        audio_tower: Whisper folder or hub name instead of the one config.json names.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: a key that is missing or does not fit, named.
        OSError: the Whisper cannot be found.
    """
    path = Path(path)
    try:
        flat = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    if flat.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{path / 'config.json'}: model_type is {flat.get('model_type')!r}, expected {MODEL_TYPE!r}")
    name = audio_tower or flat.get("audio_tower")
    if not name:
        raise ValueError(f"{path / 'config.json'}: no audio_tower; pass audio_tower, a Whisper folder or hub name")
    name = str(path / name) if not Path(name).is_dir() and (path / name).is_dir() else str(name)
    try:
        audio = AutoConfig.from_pretrained(name)
    except OSError as error:  # transformers' own words need not name it
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OSError(f"{path / 'config.json'}: audio_tower {name} cannot be loaded: {reason}") from error
    audio = getattr(audio, "audio_config", audio)
    width = flat.get("adapter_size", audio.d_model)
    if width != audio.d_model:
        raise ValueError(f"{path / 'config.json'}: adapter_size {width}, audio_tower {name} is {audio.d_model} wide")
    hidden = {"model_type", "architectures", "audio_tower", "adapter_size", "audio_patch_token", OURS, "auto_map"}
    # a copy: transformers completes nested dictionaries in place
    text = LlamaConfig.from_dict(copy.deepcopy({k: v for k, v in flat.items() if k not in hidden}))
    placeholder = _placeholder(path, flat)
    return SoundwaveConfig(
        audio,
        text,
        audio_tower=name,
        audio_token_id=placeholder,
        ctc_blank_id=placeholder,
        ctc_head="free",
        released={"config": flat},
        **{"semantics": "released", **flat.get(OURS, {})},
    )


def _placeholder(path: Path, flat: dict) -> int:
    value = flat.get("audio_patch_token")
    if value is None or isinstance(value, str):
        value = _token_id(path, value or AUDIO_TOKEN)
    vocabulary = flat.get("vocab_size", 0)
    if not isinstance(value, int) or not 0 <= value < vocabulary:
        raise ValueError(f"{path / 'config.json'}: audio_patch_token {value!r} is no id below vocab_size {vocabulary}")
    return value


def _token_id(path: Path, token: str) -> int | None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        raise ValueError(f"{path / 'config.json'}: no audio_patch_token, and no tokenizer to look it up in") from None
    return tokenizer.get_vocab().get(token)


# -- reading -----------------------------------------------------------------------------------------------------


def from_released_directory(
    cls: type,
    path: str | Path,
    dtype: torch.dtype | None = None,
    audio_tower: str | None = None,
    with_language_model: bool | None = None,
    attn_implementation: str | dict | None = None,
    config: ReleasedConfig | None = None,
) -> Any:
    """A `cls` (SoundwaveForConditionalGeneration) in eval mode; see `soundwave_fast.model.released.read_released`.

    Args:
        config: what an auto class read; not used, as the file itself is kept for writing it back.
    """
    path = Path(path)
    config = read_config(path, audio_tower)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    stored, layout = to_ours(read_tensors(path), path)
    inside = layout["audio_tower"] is not None
    layout["lm_head"] = "language_model.lm_head.weight" in stored
    config.released["layout"] = layout
    with torch.device("meta"):
        model = cls(config)
    _check_fit(model, stored, layout, path)
    if not inside:
        reference = next(t for n, t in stored.items() if n.startswith("alignment_adapter."))
        tower = checkpoint.load_whisper_encoder(config.audio_tower, reference.dtype)
        stored.update({f"audio_tower.{name}": tensor for name, tensor in tower.state_dict().items()})
    model.load_state_dict(stored, strict=False, assign=True)
    model.causal_lm.tie_weights()
    _fill_buffers(model)
    model.audio_tower.requires_grad_(False)
    model.language_model.requires_grad_(False)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    if with_language_model is False:
        model.token_embedding, model.language_model = model.get_input_embeddings(), None
    return (model if dtype is None else checkpoint.cast(model, dtype)).eval()


def _check_fit(model: nn.Module, stored: dict[str, Tensor], layout: dict, path: Path) -> None:
    """Names and shapes; of a tied lm_head that is stored nevertheless, that it equals the embedding."""
    wanted = {k: v for k, v in model.state_dict().items() if layout["audio_tower"] or not k.startswith("audio_tower.")}
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    tied = model.config.text_config.tie_word_embeddings
    if tied and head not in stored:
        wanted.pop(head)
    shapes = [
        f"{to_released(k, layout)} is {tuple(stored[k].shape)}, expected {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in stored and stored[k].shape != v.shape
    ]
    if tied and head in stored and embedding in stored and not torch.equal(stored[head], stored[embedding]):
        shapes.append("lm_head.weight differs from model.embed_tokens.weight, though tie_word_embeddings is set")
    kinds = {
        "missing": sorted(to_released(k, layout) for k in wanted.keys() - stored.keys()),
        "not expected": sorted(to_released(k, layout) for k in stored.keys() - wanted.keys()),
        "wrong": shapes,
    }
    problems = [f"{what}: {some(names)}" for what, names in kinds.items() if names]
    if problems:
        raise ValueError(f"{path}: weights that do not fit config.json; {'; '.join(problems)}")


def _fill_buffers(model: nn.Module) -> None:
    """Rotary frequencies are computed, not stored: make them anew where building on the meta device left none."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(config=module.config))
