"""`soundwave info`: what a checkpoint holds (parts, parameters, dtypes, semantics, stage), read off headers alone."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from soundwave_fast.commands import check_default_model

SEMANTICS = ("adapter_attention", "look_back_keys", "drop_blank", "mask_frames", "peak_select", "encoder_pad")
SETTINGS = (*SEMANTICS, "look_back", "ctc_head", "ctc_weight", "audio_token_id", "ctc_blank_id")
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16}  # others: 8
_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PARTS = {  # beginnings of parameter names, ours and the released ones (a leading "model." or peft's prefix is cut off)
    "Whisper encoder": ("audio_tower.",),
    "alignment adapter": ("alignment_adapter.", "mm_projector1.", "asr_transformer_encoder.", "out_norm."),
    "CTC head": ("ctc_head.", "audio_feature_head."),
    "shrinking adapter": ("shrinking_adapter.", "lbm."),
}
_LLM = "LLM"

Tensors = dict[str, tuple[str, int]]  # name -> dtype, number of elements


def read_headers(path: Path) -> Tensors:
    """Names, dtypes and sizes of the tensors of a .safetensors file, from its first few kilobytes.

    Raises:
        ValueError: not a safetensors file, or one that is cut short.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(path.stat().st_size, 1 << 28):
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
            last = max((row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"), default=0)
            if 8 + length + last > path.stat().st_size:
                raise ValueError("cut short")
            return {
                name: (row["dtype"], math.prod(row["shape"])) for name, row in header.items() if name != "__metadata__"
            }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def describe(checkpoint: str | Path) -> dict[str, Any]:
    """What a stage directory, saved model or released-format directory holds; no weights are loaded.

    Returns:
        kind, parts (name, parameters, bytes, dtypes, source: where it is; parameters None where that is not on this
        machine), settings, sources of the frozen parts, lora (rank, alpha, targets) and training (stage figures), where
        there are any.

    Raises:
        FileNotFoundError: no such directory, or no checkpoint in it.
        ValueError: a damaged file.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    config = _json(path / "config.json")
    kind = _kind(path, config)
    stored: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        stored.update(read_headers(file))
    parts = _parts(stored, str(path))
    out: dict[str, Any] = {"path": str(path), "kind": kind}
    sources = {key: config[key] for key in ("audio_tower", "language_model") if config.get(key)}
    held = {part["name"] for part in parts}
    if "Whisper encoder" not in held and "audio_tower" in sources:
        parts.insert(0, _elsewhere("Whisper encoder", sources["audio_tower"], "encoder."))
    if _LLM not in held and "language_model" in sources:
        parts.append(_elsewhere(_LLM, sources["language_model"], ""))
    lora = _lora(path / "lora")
    if lora is not None:
        parts.append(lora.pop("part"))
    out.update(parts=parts, settings=_settings(kind, config), sources=sources, lora=lora, training=_training(path))
    return out


def _kind(path: Path, config: dict) -> str:
    if (path / "adapters.safetensors").is_file():
        return "stage directory"
    if any(path.glob("*.safetensors")) and config.get("model_type") == "Soundwave":
        return "released format"
    if any(path.glob("*.safetensors")) and config.get("model_type") == "soundwave":
        return "saved model"
    raise FileNotFoundError(f"{path}: no checkpoint (neither a stage directory, nor a saved or released model)")


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _part_of(name: str) -> str:
    plain = name.removeprefix("model.")
    return next((part for part, begins in _PARTS.items() if plain.startswith(begins)), _LLM)


def _parts(tensors: Tensors, source: str) -> list[dict]:
    groups: dict[str, Tensors] = {part: {} for part in (*_PARTS, _LLM)}
    for name, row in tensors.items():
        groups[_part_of(name)][name] = row
    return [_summed(part, group, source) for part, group in groups.items() if group]


def _summed(part: str, tensors: Tensors, source: str) -> dict[str, Any]:
    dtypes = Counter(dtype for dtype, _ in tensors.values())
    size = sum(count * _BITS.get(dtype, 8) // 8 for dtype, count in tensors.values())
    names = [_NAMES.get(dtype, dtype.lower()) for dtype, _ in dtypes.most_common()]
    parameters = sum(count for _, count in tensors.values())
    return {"name": part, "parameters": parameters, "bytes": size, "dtypes": names, "source": source}


def _elsewhere(part: str, source: str, inside: str) -> dict[str, Any]:
    """A frozen part that the checkpoint only names: counted where its folder is at hand."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    tensors = {name: row for file in files for name, row in read_headers(file).items()}
    own = {name: row for name, row in tensors.items() if name.removeprefix("model.").startswith(inside)}
    if own:
        return _summed(part, own, source)
    return {"name": part, "parameters": None, "bytes": None, "dtypes": [], "source": source}


def _lora(folder: Path) -> dict[str, Any] | None:
    config = _json(folder / "adapter_config.json")
    if not config:
        return None
    file = folder / "adapter_model.safetensors"
    targets = config.get("target_modules")
    return {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": targets if isinstance(targets, str) else sorted(targets or []),
        "part": _summed("LoRA", read_headers(file) if file.is_file() else {}, str(folder)),
    }


def _settings(kind: str, config: dict) -> dict[str, Any]:
    if kind == "released format":
        names = ("adapter_size", "audio_patch_token", "vocab_size", "hidden_size")
        own = config.get("soundwave_fast") or {}  # what `convert` writes there differs from the released code
        return {"semantics": "released", **{name: config[name] for name in names if name in config}, **own}
    return {name: config[name] for name in ("semantics", *SETTINGS) if name in config}


def _training(path: Path) -> dict[str, Any] | None:
    done = _json(path / "done.json")
    valid = done.get("valid") or {}
    figures = {"steps": done.get("steps"), "ctc_wer": valid.get("ctc_wer"), "llm_wer": valid.get("llm_wer")}
    return {key: value for key, value in figures.items() if value is not None} or None


# -- print ---------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[str]:
    """`describe`'s result to read."""
    out = [f"{found['path']}: {found['kind']}"]
    if found["training"]:
        words = [f"{v} steps" if k == "steps" else f"{k} {100 * v:.1f} %" for k, v in found["training"].items()]
        out.append("trained    " + ", ".join(words))
    settings = dict(found["settings"])
    out.append(f"semantics  {settings.pop('semantics', 'unknown')}")
    out.append("settings   " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    if found["lora"]:
        out.append("LoRA       " + ", ".join(f"{key} {value}" for key, value in found["lora"].items()))
    rows = [("part", "parameters", "MiB", "dtype", "from")]
    for part in found["parts"]:
        known = part["parameters"] is not None
        size = f"{part['bytes'] / 2**20:,.1f}" if known else "not here"
        count, dtypes = f"{part['parameters']:,}" if known else "", "+".join(part["dtypes"])
        rows.append((part["name"], count, size, dtypes, part["source"]))
    known = [part for part in found["parts"] if part["parameters"] is not None]
    total = sum(part["parameters"] for part in known), sum(part["bytes"] for part in known) / 2**20
    rows.append(("together", f"{total[0]:,}", f"{total[1]:,.1f}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, count, size, dtype, source in rows:
        row = f"{name:<{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}  {dtype:<{widths[3]}}  {source}"
        out.append(row.rstrip())
    return out


def run(checkpoint: str, as_json: bool) -> int:
    """Print it; exit code 0.

    Raises:
        UserError, OSError, ValueError: no checkpoint, or a damaged one; see `describe`.
    """
    check_default_model(checkpoint, "name a CHECKPOINT")
    found = describe(checkpoint)
    print(json.dumps(found) if as_json else "\n".join(lines(found)))
    return 0
