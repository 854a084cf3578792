"""`soundwave info`: parts, parameters, dtypes, semantics and LoRA of every kind of checkpoint, without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from soundwave_fast import cli
from soundwave_fast.commands.info import describe, read_headers
from soundwave_fast.model import checkpoint
from tests.model import tiny


@pytest.fixture(scope="module")
def folders(tiny_parts, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    model, processor = tiny.make_model(tiny_parts)
    tiny.add_lora(model)
    checkpoint.save_stage_directory(model, root / "stage", processor)
    (root / "stage" / "done.json").write_text(json.dumps({"steps": 40, "valid": {"ctc_wer": 0.05, "llm_wer": None}}))
    whole, _ = tiny.make_model(tiny_parts, semantics="released", ctc_head="free")
    whole.to(torch.bfloat16).save_pretrained(root / "whole")
    assert cli.main(["convert", str(root / "whole"), str(root / "released")]) == 0
    return {path.name: path for path in root.iterdir()}


def counts(module) -> dict[str, int]:
    """Parameters by the names `info` gives the parts."""
    parts = {"Whisper encoder": "audio_tower", "alignment adapter": "alignment_adapter", "CTC head": "ctc_head"}
    parts["shrinking adapter"] = "shrinking_adapter"
    return {name: sum(p.numel() for p in getattr(module, part).parameters()) for name, part in parts.items()}


def test_a_stage_directory(folders, tiny_parts):
    model, _ = tiny.make_model(tiny_parts)
    llm = sum(p.numel() for p in model.language_model.parameters())
    tiny.add_lora(model)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    found = describe(folders["stage"])
    assert found["kind"] == "stage directory" and found["settings"]["semantics"] == "paper"
    parameters = {part["name"]: part["parameters"] for part in found["parts"]}
    assert parameters == {**counts(model), "LLM": llm, "LoRA": lora}
    assert all(part["dtypes"] == ["float32"] and part["bytes"] == 4 * part["parameters"] for part in found["parts"])
    sources = {part["name"]: part["source"] for part in found["parts"]}
    assert sources["Whisper encoder"] == tiny_parts.whisper and sources["LLM"] == tiny_parts.llm
    assert found["lora"] == {"rank": 4, "alpha": 8, "targets": r".*\.(q_proj|v_proj|down_proj)"}
    assert found["training"] == {"steps": 40, "ctc_wer": 0.05}


def test_a_saved_and_a_released_model(folders, tiny_parts):
    model, _ = tiny.make_model(tiny_parts, semantics="released", ctc_head="free")
    for name, kind in (("whole", "saved model"), ("released", "released format")):
        found = describe(folders[name])
        parameters = {part["name"]: part["parameters"] for part in found["parts"]}
        assert found["kind"] == kind and found["settings"]["semantics"] == "released" and found["lora"] is None
        own = counts(model)
        for part in ("alignment adapter", "shrinking adapter"):
            assert parameters[part] == own[part]
        assert {"Whisper encoder", "CTC head", "LLM"} <= parameters.keys() and parameters["Whisper encoder"] > 0
        assert {d for part in found["parts"] if part["source"] == str(folders[name]) for d in part["dtypes"]} == {
            "bfloat16"
        }


def test_parts_that_are_not_here(folders, tmp_path):
    folder = shutil.copytree(folders["stage"], tmp_path / "moved")
    config = json.loads((folder / "config.json").read_text())
    config["language_model"] = "somebody/some-llm"
    (folder / "config.json").write_text(json.dumps(config))
    llm = next(part for part in describe(folder)["parts"] if part["name"] == "LLM")
    assert llm == {"name": "LLM", "parameters": None, "bytes": None, "dtypes": [], "source": "somebody/some-llm"}


def test_the_command(folders, capsys):
    assert cli.main(["info", str(folders["stage"])]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"{folders['stage']}: stage directory"
    assert "40 steps, ctc_wer 5.0 %" in said and "rank 4" in said and "shrinking adapter" in said
    assert cli.main(["info", str(folders["stage"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(folders["stage"])


def test_mistakes(folders, tmp_path, capsys):
    cut = shutil.copytree(folders["stage"], tmp_path / "cut")
    file = cut / "adapters.safetensors"
    whole = file.read_bytes()
    for length in (1000, len(whole) - 1, 3):
        file.write_bytes(whole[:length])
        assert cli.main(["info", str(cut)]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "adapters.safetensors" in err and "not a whole safetensors file" in err
    (cut / "config.json").write_text("{")
    file.write_bytes(whole)
    for folder, message in (
        (tmp_path / "none", "no such directory"),
        (tmp_path, "no checkpoint"),
        (cut, "config.json"),
    ):
        assert cli.main(["info", str(folder)]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and message in err


def test_headers_are_safetensors_own(folders):
    from safetensors.torch import load_file

    file = folders["stage"] / "adapters.safetensors"
    assert {name: count for name, (_, count) in read_headers(file).items()} == {
        name: tensor.numel() for name, tensor in load_file(file).items()
    }
