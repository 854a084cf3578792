"""Names and files of released-format tensors: shards with or without an index, and our names for theirs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
_LISTED = 12  # names an error message shows of each kind

# ours -> released, both as prefixes of parameter names; the released adapters usually lie under "model."
_ADAPTERS = {
    "alignment_adapter.mm_projector1.": "mm_projector1.",
    "alignment_adapter.asr_transformer_encoder.": "asr_transformer_encoder.",
    "alignment_adapter.out_norm.": "out_norm.",
    "ctc_head.audio_feature_head.": "audio_feature_head.",
    "shrinking_adapter.encoder_attn.": "lbm.encoder_attn.",
    "shrinking_adapter.atten_layer_norm.": "lbm.atten_layer_norm.",
}
_PLAIN = {"adapters": "model.", "audio_tower": "model.audio_tower."}
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^(model\.)?audio_tower\.(0\.)?(model\.)?(decoder|proj_out)\.")
_TOWER = re.compile(r"^(model\.)?audio_tower\.(0\.)?(model\.)?(encoder\.)?")
_SPLIT = re.compile(r"^(.*encoder_attn\.)([qkv])_proj[._](weight|bias)$")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files: those its index names, or, without an index, of every file.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index names is missing.
        ValueError: a damaged file, a name in two files, or tensors that the index misplaces.
    """
    where = None
    if (path / INDEX).is_file():
        try:
            where = dict(json.loads((path / INDEX).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / INDEX}: not an index of shards ({error!r})") from None
    files = sorted(set(where.values())) if where else sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: holds no .safetensors files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path / file}: missing, {INDEX} names it")
        try:
            shard = load_file(path / file)
        except SafetensorError as error:
            raise ValueError(f"{path / file}: {error}") from None
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{path / file}: {some(twice)} also in another shard")
        if where and (lost := sorted(name for name in where if where[name] == file and name not in shard)):
            raise ValueError(f"{path / file}: {INDEX} says it holds {some(lost)}")
        tensors.update(shard)
    return tensors


def to_ours(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str | None]]:
    """Tensors under our names (unknown ones under `language_model.`), and where they lay: a layout.

    A layout says what the names of the adapters begin with ('model.' or nothing) and those of the Whisper's encoder,
    None where it is not stored.

    Raises:
        ValueError: some adapters lie under 'model.' and some do not.
    """
    bare = tuple(_ADAPTERS.values())
    adapters = [name for name in tensors if name.removeprefix("model.").startswith(bare)]
    prefixes = {"model." if name.startswith("model.") else "" for name in adapters}
    if len(prefixes) > 1:
        raise ValueError(f"{path}: some adapters lie under 'model.' and some do not")
    layout = {"adapters": prefixes.pop() if prefixes else "model.", "audio_tower": None}
    theirs = {layout["adapters"] + released: ours for ours, released in _ADAPTERS.items()}
    out = {}
    for name, tensor in _fused(tensors).items():
        if _IGNORED.search(name):
            continue
        start = next((prefix for prefix in theirs if name.startswith(prefix)), None)
        if start is not None:
            out[theirs[start] + name.removeprefix(start)] = tensor
        elif tower := _TOWER.match(name):
            layout["audio_tower"] = tower[0]
            out["audio_tower." + name.removeprefix(tower[0])] = tensor
        else:
            out["language_model." + name] = tensor
    return out, layout


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The look-back's query, key and value projections, where they are stored apart, as nn.MultiheadAttention's one."""
    apart: dict[str, dict[str, Tensor]] = {}
    out = {}
    for name, tensor in tensors.items():
        if match := _SPLIT.match(name):
            apart.setdefault(f"{match[1]}in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            out[name] = tensor
    for name, found in apart.items():
        if set(found) == set("qkv"):
            out[name] = torch.cat([found[letter] for letter in "qkv"])
    return out


def to_released(name: str, layout: dict[str, str | None]) -> str:
    """Released name of one of our parameters."""
    for ours, released in _ADAPTERS.items():
        if name.startswith(ours):
            return layout["adapters"] + released + name.removeprefix(ours)
    if name.startswith("audio_tower."):
        return (layout["audio_tower"] or _PLAIN["audio_tower"]) + name.removeprefix("audio_tower.")
    return name.removeprefix("language_model.")


def some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
