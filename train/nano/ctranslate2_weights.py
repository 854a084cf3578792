"""Reads a CTranslate2 Whisper `model.bin` without CTranslate2 and renames its weights to Hugging Face's Whisper.

The file is little-endian: a version, the spec's name and revision, then named arrays, then aliases (name -> name).
CTranslate2 fuses q, k and v of self-attention into one matrix and k, v of cross-attention into another; the rest
is a change of names. fp16 -> fp32 is exact, so the converted encoder computes what the original does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import WhisperConfig

# CTranslate2's type codes; 5 is bfloat16, which numpy lacks: it is widened to float32 on reading.
_DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}
_BFLOAT16 = 5
_VERSIONS = (4, 5, 6)  # the layout has not changed between these; older ones store no type code


@dataclass(frozen=True)
class Ct2Model:
    """What a `model.bin` holds: its spec and the arrays by name, aliases resolved."""

    spec: str
    revision: int
    variables: dict[str, np.ndarray] = field(repr=False)


class _Reader:
    """Typed reads from a file; a short read is an error that names the file, not a silent half array."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path

    def take(self, n_bytes: int) -> bytes:
        data = self.file.read(n_bytes)
        if len(data) != n_bytes:
            raise ValueError(f"path: {self.path} is cut short or no CTranslate2 model")
        return data

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("H"))[:-1].decode("utf-8", "replace")  # stored with its final NUL

    def array(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        code, n_bytes = self.number("B"), self.number("I")
        item_bytes = 2 if code == _BFLOAT16 else _DTYPES[code].itemsize if code in _DTYPES else 0
        if n_bytes != item_bytes * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"path: {self.path}: {n_bytes} bytes do not fit type {code}, shape {shape}")
        data = self.take(n_bytes)
        if code == _BFLOAT16:
            wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(shape)
        return np.frombuffer(data, _DTYPES[code]).reshape(shape)


def read_model(path: Path) -> Ct2Model:
    """Read a CTranslate2 `model.bin` (binary versions 4 to 6).

    Arrays keep their stored dtype (bfloat16 comes as float32) and are read-only. Raises ValueError naming `path`
    where the file is cut short, has bytes left over, or has another version.
    """
    with open(path, "rb") as file:
        reader = _Reader(file, Path(path))
        version = reader.number("I")
        if version not in _VERSIONS:
            raise ValueError(f"path: {path} has binary version {version}; known are {_VERSIONS}")
        spec, revision = reader.text(), reader.number("I")
        variables = {}
        for _ in range(reader.number("I")):
            name = reader.text()
            variables[name] = reader.array()
        for _ in range(reader.number("I")):
            alias, name = reader.text(), reader.text()
            if name not in variables:
                raise ValueError(f"path: {path}: alias {alias} points at {name}, which is not there")
            variables[alias] = variables[name]
        if file.read(1):
            raise ValueError(f"path: {path} has bytes after its last entry")
    return Ct2Model(spec, revision, variables)


class _Renamer:
    """Copies entries of a CTranslate2 model into a Hugging Face state dict, in float32."""

    def __init__(self, model: Ct2Model) -> None:
        self.source, self.state = model.variables, {}

    def get(self, name: str) -> Tensor:
        import torch

        if name not in self.source:
            raise ValueError(f"model: no variable {name}: not a Whisper")
        array = self.source[name]
        if array.dtype.kind != "f":
            raise ValueError(f"model: {name} is {array.dtype}: quantised weights are not supported")
        return torch.from_numpy(array.astype(np.float32))

    def norm(self, source: str, target: str) -> None:
        self.state[f"{target}.weight"] = self.get(f"{source}/gamma")
        self.state[f"{target}.bias"] = self.get(f"{source}/beta")

    def linear(self, source: str, *targets: str) -> None:
        """One fused Linear -> `targets` of equal height; a k_proj takes no bias (Whisper has none: it must be 0)."""
        weight, bias = self.get(f"{source}/weight"), self.get(f"{source}/bias")
        if weight.shape[0] % len(targets):
            raise ValueError(f"model: {source} has {weight.shape[0]} rows: not divisible by {len(targets)}")
        parts = zip(targets, weight.chunk(len(targets)), bias.chunk(len(targets)), strict=True)
        for target, part_weight, part_bias in parts:
            self.state[f"{target}.weight"] = part_weight.clone()
            if not target.endswith("k_proj"):
                self.state[f"{target}.bias"] = part_bias.clone()
            elif part_bias.any():
                raise ValueError(f"model: {source} has a bias for k, which Hugging Face's Whisper cannot hold")


def _n_layers(model: Ct2Model, stack: str) -> int:
    return len({name.split("/")[1] for name in model.variables if name.startswith(f"{stack}/layer_") and
                name.split("/")[1] != "layer_norm"})


def whisper_state_dict(model: Ct2Model) -> dict[str, Tensor]:
    """State dict of WhisperForConditionalGeneration, float32, strict: no key missing, none too many.

    Raises ValueError naming `model` where a variable is missing, quantised, or of a shape that cannot be split.
    """
    out = _Renamer(model)
    for i in (1, 2):
        for leaf in ("weight", "bias"):
            out.state[f"model.encoder.conv{i}.{leaf}"] = out.get(f"encoder/conv{i}/{leaf}")
    out.state["model.decoder.embed_tokens.weight"] = out.get("decoder/embeddings/weight")
    out.state["proj_out.weight"] = out.state["model.decoder.embed_tokens.weight"]
    for stack in ("encoder", "decoder"):
        out.state[f"model.{stack}.embed_positions.weight"] = out.get(f"{stack}/position_encodings/encodings")
        out.norm(f"{stack}/layer_norm", f"model.{stack}.layer_norm")
        for i in range(_n_layers(model, stack)):
            source, target = f"{stack}/layer_{i}", f"model.{stack}.layers.{i}"
            attn = f"{target}.self_attn"
            out.norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            out.linear(f"{source}/self_attention/linear_0", f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj")
            out.linear(f"{source}/self_attention/linear_1", f"{attn}.out_proj")
            if stack == "decoder":
                attn = f"{target}.encoder_attn"
                out.norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
                out.linear(f"{source}/attention/linear_0", f"{attn}.q_proj")
                out.linear(f"{source}/attention/linear_1", f"{attn}.k_proj", f"{attn}.v_proj")
                out.linear(f"{source}/attention/linear_2", f"{attn}.out_proj")
            out.norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            out.linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            out.linear(f"{source}/ffn/linear_1", f"{target}.fc2")
    return out.state


def whisper_config(model: Ct2Model, **token_ids: int) -> WhisperConfig:
    """The WhisperConfig whose model `whisper_state_dict(model)` fits; `token_ids` are passed on (eos_token_id=...)."""
    from transformers import WhisperConfig

    shape = {name: array.shape for name, array in model.variables.items()}
    n_heads = {stack: int(model.variables[f"{stack}/num_heads"]) for stack in ("encoder", "decoder")}
    return WhisperConfig(
        vocab_size=shape["decoder/embeddings/weight"][0],
        num_mel_bins=shape["encoder/conv1/weight"][1],
        d_model=shape["encoder/layer_norm/gamma"][0],
        encoder_layers=_n_layers(model, "encoder"),
        decoder_layers=_n_layers(model, "decoder"),
        encoder_attention_heads=n_heads["encoder"],
        decoder_attention_heads=n_heads["decoder"],
        encoder_ffn_dim=shape["encoder/layer_0/ffn/linear_0/weight"][0],
        decoder_ffn_dim=shape["decoder/layer_0/ffn/linear_0/weight"][0],
        max_source_positions=shape["encoder/position_encodings/encodings"][0],
        max_target_positions=shape["decoder/position_encodings/encodings"][0],
        **token_ids,
    )
