"""Hub names: each kind of checkpoint out of huggingface_hub's cache, offline, by the usual classes and the CLI."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from soundwave_fast import cli
from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveProcessor, checkpoint
from soundwave_fast.model.hub import local_directory
from soundwave_fast.model.released import write_released
from tests.model import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40


def cached(cache: Path, name: str, revision: str = "main", commit: str = COMMIT) -> Path:
    """An empty snapshot of a repository in a cache folder, laid out as huggingface_hub does."""
    assert constants.HF_HUB_OFFLINE, "tests/conftest.py sees to it"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def logits(model, processor):
    with torch.no_grad():
        return model(**processor(text=processor.prompt("Stop."), audio=tiny.make_wave(0, 1.1))).logits


def save(parts, kind: str, path: Path):
    """A checkpoint of a kind; what it must compute, as its directory does."""
    settings = {"semantics": "released", "ctc_head": "free"} if kind == "released" else {}
    model, processor = tiny.make_model(parts, **settings)
    without = logits(model, processor)
    tiny.add_lora(model)
    assert not torch.equal(without, logits(model, processor)), "a LoRA that is lost must show"
    if kind == "released":
        write_released(model, path, processor=processor)
    elif kind == "stage":
        checkpoint.save_stage_directory(model, path, processor)
    else:
        model.save_pretrained(path)
        processor.save_pretrained(path)
    model = SoundwaveForConditionalGeneration.from_pretrained(path).eval()
    return logits(model, SoundwaveProcessor.from_pretrained(path))


@pytest.mark.parametrize("kind", ["whole", "stage", "released"])
def test_all_kinds_by_name(tiny_parts, tmp_path, kind):
    want = save(tiny_parts, kind, cached(tmp_path, "owner/name"))
    where = {"cache_dir": tmp_path}
    for loader in (SoundwaveForConditionalGeneration, AutoModelForMultimodalLM, AutoModel):
        for processors in (SoundwaveProcessor, AutoProcessor):
            processor = processors.from_pretrained("owner/name", **where)
            assert isinstance(processor, SoundwaveProcessor)
        model = loader.from_pretrained("owner/name", **where).eval()
        assert isinstance(model, SoundwaveForConditionalGeneration)
        assert torch.equal(logits(model, processor), want)
    half = SoundwaveForConditionalGeneration.from_pretrained("owner/name", dtype="bfloat16", **where)
    assert {p.dtype for n, p in half.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    config = AutoConfig.from_pretrained("owner/name", **where)
    assert isinstance(config, SoundwaveConfig) == (kind != "released")
    assert config.model_type == ("Soundwave" if kind == "released" else "soundwave")


def test_the_default_cache_a_revision_and_a_subfolder(tiny_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    new, old = cached(tmp_path, "owner/name"), cached(tmp_path, "owner/name", "v1", OLDER)
    (old / "stage2").mkdir()
    assert local_directory("owner/name") == new
    assert local_directory("owner/name", {"local_files_only": True}) == new
    assert local_directory("owner/name", {"revision": "v1"}) == old
    assert local_directory("owner/name", {"revision": OLDER}, weights=False) == old
    options = {"revision": "v1", "subfolder": "stage2", "token": False, "proxies": None, "dtype": "auto"}
    assert local_directory("owner/name", options) == old / "stage2"
    assert options == {"dtype": "auto"}, "what is not about the Hub stays"
    with pytest.raises(OSError, match="owner/name: has no folder stage2"):
        local_directory("owner/name", {"subfolder": "stage2"})


def test_a_directory_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cached(tmp_path / "cache", "owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_directory("owner/name") == Path("owner/name")


@pytest.mark.parametrize("name", ["owner/absent", "runs/nano/stage9", "/nowhere/at/all", "./nothing"])
@pytest.mark.parametrize("cls", [SoundwaveForConditionalGeneration, SoundwaveProcessor])
def test_what_is_not_there_is_named(tmp_path, monkeypatch, cls, name):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=f"^{name}: no such directory") as error:
        cls.from_pretrained(name)
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match=r"^owner/name \(revision v9\): no such directory"):
        cls.from_pretrained("owner/name", revision="v9")


def test_a_processor_downloads_no_weights(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "soundwave_fast.model.hub.snapshot_download", lambda name, **options: asked.append(options) or str(tmp_path)
    )
    for weights in (True, False):
        local_directory("owner/name", {"revision": "v1"}, weights)
    assert [("*.safetensors" in options.pop("ignore_patterns")) for options in asked] == [False, True]
    assert asked == [{"revision": "v1", "local_files_only": True}] * 2, "as tests are offline"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    local_directory("owner/name", {"token": "secret", "local_files_only": None})
    assert asked[2].pop("ignore_patterns") and asked[2] == {"token": "secret"}


def test_the_command_line_takes_a_name(tiny_parts, speech_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = cached(tmp_path / "cache", "owner/name")
    save(tiny_parts, "stage", snapshot)
    shutil.copy(speech_dir / "3.wav", tmp_path / "a.wav")
    said = []
    for model in ("owner/name", str(snapshot)):
        assert cli.main(["transcribe", str(tmp_path / "a.wav"), "--model", model, "--max-new-tokens", "4"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert cli.main(["transcribe", str(tmp_path / "a.wav"), "--model", "owner/absent"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 1
    assert out.err.startswith("soundwave: --model owner/absent: no such directory, nor a repository")
    assert "HF_HUB_OFFLINE is set" in out.err
