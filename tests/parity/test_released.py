"""Released-format directories: read strictly, written back bit for bit, converted both ways whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer

from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveProcessor, checkpoint
from soundwave_fast.model.released import convert, read_released, write_released
from soundwave_fast.model.released_names import read_tensors
from tests.model import tiny
from tests.parity import authors


@pytest.fixture(scope="module")
def theirs(tiny_parts):
    """(tensors, config.json, tokenizer) of a released checkpoint."""
    model, config, tokenizer = authors.make(tiny_parts)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}, config, tokenizer


@pytest.fixture
def folder(theirs, tmp_path):
    return authors.save(tmp_path / "released", *theirs)


def logits(model, processor):
    inputs = processor(text=processor.prompt("What is the time?"), audio=tiny.make_wave(0, 1.1))
    with torch.no_grad():
        return model(**inputs).logits


def same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_is_bit_for_bit(theirs, tmp_path, dtype, shards):
    tensors, config, tokenizer = theirs
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    authors.save(tmp_path / "in", tensors, config, tokenizer, shards)
    size = "5GB" if shards == 1 else 60_000 * dtype.itemsize
    write_released(read_released(tmp_path / "in"), tmp_path / "out", max_shard_size=size)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shards > 1)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (shards > 1)
    same_tensors(read_tensors(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def rename(tensors, how):
    """The same checkpoint with other names for some of its tensors."""
    out = {}
    for name, tensor in tensors.items():
        part = name.removeprefix("model.").split(".")[0]
        adapter = part in ("mm_projector1", "asr_transformer_encoder", "out_norm", "audio_feature_head", "lbm")
        if how == "bare adapters" and adapter:
            name = name.removeprefix("model.")
        if how == "split attention" and name.endswith("encoder_attn.in_proj_weight"):
            out.update({name.replace("in_", f"{k}_"): t for k, t in zip("qkv", tensor.chunk(3))})
            continue
        out[name] = tensor
    return out


@pytest.mark.parametrize("how", ["bare adapters", "split attention"])
def test_other_names_are_the_same_model(theirs, folder, tmp_path, how):
    tensors, config, tokenizer = theirs
    authors.save(tmp_path / "other", rename(tensors, how), config, tokenizer)
    model = read_released(tmp_path / "other")
    same_tensors(dict(model.state_dict()), dict(read_released(folder).state_dict()))
    write_released(model, tmp_path / "out")
    same_tensors(read_tensors(tmp_path / "out"), rename(tensors, how) if how == "bare adapters" else tensors)


@pytest.mark.parametrize("prefix", ["model.audio_tower.", "model.audio_tower.encoder."])
def test_whisper_inside(theirs, folder, tmp_path, prefix):
    tensors, config, tokenizer = theirs
    outside = read_released(folder)
    tower = {prefix + name: 2 * tensor for name, tensor in outside.audio_tower.state_dict().items()}
    authors.save(tmp_path / "in", {**tensors, **tower}, config, tokenizer)
    model = read_released(tmp_path / "in")
    assert torch.equal(model.audio_tower.conv1.weight, 2 * outside.audio_tower.conv1.weight)
    write_released(model, tmp_path / "out")
    same_tensors(read_tensors(tmp_path / "out"), {**tensors, **tower})


@pytest.mark.parametrize("stored", [True, False])
def test_tied_output_layer(tiny_parts, tmp_path, stored):
    model, config, tokenizer = authors.make(tiny_parts, tied=True)
    tensors = dict(model.state_dict())
    if not stored:
        del tensors["lm_head.weight"]
    authors.save(tmp_path / "in", tensors, config, tokenizer)
    loaded = read_released(tmp_path / "in")
    llm = loaded.language_model
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    write_released(loaded, tmp_path / "out")
    same_tensors(read_tensors(tmp_path / "out"), tensors)


def test_shards_without_an_index(theirs, folder, tmp_path):
    authors.save(tmp_path / "in", *theirs, shards=3, index=False)
    same_tensors(dict(read_released(tmp_path / "in").state_dict()), dict(read_released(folder).state_dict()))


def test_what_does_not_fit_is_listed_in_one_error(theirs, tmp_path):
    tensors, config, _ = theirs
    tensors = dict(tensors)
    tensors["model.extra.weight"] = tensors.pop("model.lbm.atten_layer_norm.bias")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.mm_projector1.weight"] = torch.zeros(48, 32)
    authors.save(tmp_path / "in", tensors, config)
    with pytest.raises(ValueError) as error:
        read_released(tmp_path / "in")
    assert str(error.value) == (
        f"{tmp_path / 'in'}: weights that do not fit config.json; "
        "missing: model.layers.1.mlp.up_proj.weight, model.lbm.atten_layer_norm.bias; "
        "not expected: model.extra.weight; "
        "wrong: model.mm_projector1.weight is (48, 32), expected (48, 64)"
    )


CONFIGS = {
    "model_type is 'llama', expected 'Soundwave'": {"model_type": "llama"},
    "no audio_tower; pass audio_tower": {"audio_tower": None},
    "adapter_size 1280, audio_tower .* is 32 wide": {"adapter_size": 1280},
    "audio_patch_token 9999 is no id below vocab_size": {"audio_patch_token": 9999},
    "audio_patch_token None is no id below vocab_size": {"audio_patch_token": "<no_such_token>"},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_a_config_that_does_not_fit(theirs, tmp_path, message):
    tensors, config, tokenizer = theirs
    authors.save(tmp_path / "in", tensors, {**config, **CONFIGS[message]}, tokenizer)
    with pytest.raises(ValueError, match=message):
        read_released(tmp_path / "in")


def test_the_placeholder_is_found_in_the_tokenizer(theirs, tmp_path):
    tensors, config, tokenizer = theirs
    config = {key: value for key, value in config.items() if key != "audio_patch_token"}
    authors.save(tmp_path / "in", tensors, config, tokenizer)
    model = read_released(tmp_path / "in")
    assert model.config.audio_token_id == model.config.ctc_blank_id == len(tokenizer) - 1
    (tmp_path / "in" / "tokenizer.json").unlink()
    (tmp_path / "in" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no audio_patch_token, and no tokenizer to look it up in"):
        read_released(tmp_path / "in")


def test_keys_that_were_absent_stay_absent_unless_a_reader_needs_them(theirs, tiny_parts, tmp_path):
    tensors, config, tokenizer = theirs
    absent = ("audio_patch_token", "torch_dtype", "architectures", "audio_tower")
    config = {key: value for key, value in config.items() if key not in absent}
    authors.save(tmp_path / "in", tensors, config, tokenizer)
    model = read_released(tmp_path / "in", audio_tower=tiny_parts.whisper)
    processor = SoundwaveProcessor.from_pretrained(tmp_path / "in", audio_tower=tiny_parts.whisper)
    placeholder = model.config.audio_token_id
    for beside, more in ((processor, {}), (None, {"audio_patch_token": placeholder})):
        out = tmp_path / f"out{len(more)}"
        write_released(model, out, processor=beside)
        want = {**config, "audio_tower": tiny_parts.whisper, **more}
        assert json.loads((out / "config.json").read_text()) == want
        assert read_released(out).config.audio_token_id == placeholder


def test_damaged_files_are_named(theirs, tmp_path):
    whole = authors.save(tmp_path / "in", *theirs, shards=3)
    shard = whole / "model-00002-of-00003.safetensors"
    body = shard.read_bytes()
    shard.write_bytes(body[: len(body) // 2])
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors"):
        read_released(whole)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors: missing"):
        read_released(whole)
    (whole / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of shards"):
        read_released(whole)
    with pytest.raises(FileNotFoundError, match="holds no .safetensors"):
        read_tensors(tmp_path)


def test_some_adapters_under_model_and_some_not(theirs, tmp_path):
    tensors = dict(theirs[0])
    tensors["out_norm.weight"] = tensors.pop("model.out_norm.weight")
    authors.save(tmp_path / "in", tensors, theirs[1])
    with pytest.raises(ValueError, match="some adapters lie under 'model.' and some do not"):
        read_released(tmp_path / "in")


def test_a_tower_found_beside_the_checkpoint_and_one_given(theirs, tiny_parts, tmp_path):
    tensors, config, tokenizer = theirs
    authors.save(tmp_path / "in", tensors, {**config, "audio_tower": "whisper"}, tokenizer)
    os.symlink(tiny_parts.whisper, tmp_path / "in" / "whisper")
    assert read_released(tmp_path / "in").config.audio_tower == str(tmp_path / "in" / "whisper")
    given = read_released(tmp_path / "in", audio_tower=tiny_parts.whisper)
    assert given.config.audio_tower == tiny_parts.whisper


def test_the_usual_classes_load_it(folder):
    want = read_released(folder)
    model = SoundwaveForConditionalGeneration.from_pretrained(folder, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for auto in (AutoModel, AutoModelForMultimodalLM):
        found = auto.from_pretrained(folder)
        assert type(found) is SoundwaveForConditionalGeneration
        same_tensors(dict(found.state_dict()), dict(want.state_dict()))
        assert {p.dtype for p in auto.from_pretrained(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}
    light = SoundwaveForConditionalGeneration.from_pretrained(folder, with_language_model=False)
    assert light.language_model is None
    embedding = want.get_input_embeddings().weight
    assert torch.equal(light.get_input_embeddings().weight, embedding)
    assert isinstance(AutoProcessor.from_pretrained(folder), SoundwaveProcessor)
    assert AutoTokenizer.from_pretrained(folder).get_vocab()["<audio_patch>"] == want.config.audio_token_id
    assert AutoConfig.from_pretrained(folder).vocab_size == len(embedding)


@pytest.mark.parametrize("loader", [SoundwaveForConditionalGeneration, AutoModelForMultimodalLM, read_released])
def test_attention_is_chosen_part_by_part(folder, loader):
    load = getattr(loader, "from_pretrained", loader)
    processor = SoundwaveProcessor.from_pretrained(folder)
    want = logits(read_released(folder), processor)
    for choice in ("eager", {"audio_config": "eager", "text_config": "sdpa"}, {"text_config": "eager"}):
        model = load(folder, attn_implementation=choice)
        chosen = [part.config._attn_implementation for part in (model.audio_tower, model.language_model)]
        by_part = choice if isinstance(choice, dict) else dict.fromkeys(("audio_config", "text_config"), choice)
        assert chosen == [by_part.get(key, "sdpa") for key in ("audio_config", "text_config")]
        torch.testing.assert_close(logits(model, processor), want, rtol=1e-4, atol=1e-4)


def test_another_whisper_for_every_class(folder, tiny_parts, tmp_path):
    """`audio_tower=` reaches the model and the processor, whoever loads them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "audio_tower": "nowhere/at-all"}))
    with pytest.raises(OSError, match="audio_tower nowhere/at-all cannot be loaded"):
        SoundwaveProcessor.from_pretrained(folder)
    given = {"audio_tower": tiny_parts.whisper}
    for loader in (SoundwaveForConditionalGeneration, AutoModelForMultimodalLM, AutoModel):
        assert loader.from_pretrained(folder, **given).config.audio_tower == tiny_parts.whisper
    for loader in (SoundwaveProcessor, AutoProcessor):
        assert loader.from_pretrained(folder, **given, trust_remote_code=False).encoder_pad == "30s"
        with pytest.raises(TypeError, match="from_pretrained: no_such_argument cannot be given"):
            loader.from_pretrained(folder, **given, no_such_argument=1)


# -- convert -----------------------------------------------------------------------------------------------------


def test_convert_there_and_back(theirs, folder, tmp_path):
    assert convert(folder, tmp_path / "ours") == "released to soundwave_fast"
    model = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    processor = SoundwaveProcessor.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(model, processor), logits(read_released(folder), processor))
    assert convert(tmp_path / "ours", tmp_path / "back", max_shard_size="200KB") == "soundwave_fast to released"
    same_tensors(read_tensors(tmp_path / "back"), theirs[0])
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == theirs[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab() == theirs[2].get_vocab()
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


def stage(parts, path, head, semantics="released"):
    """A stage directory with LoRA, as training leaves it."""
    model, processor = tiny.make_model(parts, semantics=semantics, ctc_head=head)
    tiny.add_lora(model)
    checkpoint.save_stage_directory(model, path, processor)
    return model, processor


@pytest.mark.parametrize("head", ["free", "tied"])
def test_a_stage_becomes_a_released_checkpoint_with_its_lora_merged(tiny_parts, tmp_path, head):
    model, processor = stage(tiny_parts, tmp_path / "stage", head)
    convert(tmp_path / "stage", tmp_path / "released")
    released, prompts = read_released(tmp_path / "released"), SoundwaveProcessor.from_pretrained(tmp_path / "released")
    assert not any("lora" in name for name in load_file(tmp_path / "released" / "model.safetensors"))
    same_prompt = prompts(text=processor.prompt("What is the time?"), audio=tiny.make_wave(0, 1.1))
    with torch.no_grad():
        got = released(**same_prompt).logits
    want = logits(model, processor)
    torch.testing.assert_close(got[..., :-1], want, rtol=0, atol=1e-4)
    assert (got[..., -1] < want.max(-1).values).all(), "the row the blank needed never wins"
    assert released.config.audio_token_id == released.config.ctc_blank_id == processor.audio_token_id
    heard = [
        m.get_audio_features(**{k: same_prompt[k] for k in ("input_features", "feature_lengths")})
        for m in (model, released)
    ]
    assert torch.equal(heard[0].index, heard[1].index)


def test_a_placeholder_past_the_vocabulary(tiny_parts, tmp_path):
    model, processor = tiny.make_model(tiny_parts, semantics="released", ctc_head="tied")
    model.config.audio_token_id = tiny.VOCABULARY
    write_released(model, tmp_path / "released")
    released = read_released(tmp_path / "released")
    assert released.config.audio_token_id == tiny.VOCABULARY
    assert len(released.get_input_embeddings().weight) == tiny.VOCABULARY + 1
    inputs = processor(text=processor.prompt("What is the time?"), audio=tiny.make_wave(0, 1.1))
    inputs["input_ids"][inputs["input_ids"] == processor.audio_token_id] = tiny.VOCABULARY
    with torch.no_grad():
        got, want = released(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(got[..., :-1], want, rtol=0, atol=1e-5)
    assert (got[..., -1] < want.max(-1).values).all()


def test_other_semantics_are_refused_unless_forced(tiny_parts, tmp_path):
    stage(tiny_parts, tmp_path / "stage", "free", "paper")
    with pytest.raises(ValueError, match="adapter_attention='time', look_back_keys='frames', drop_blank=True"):
        convert(tmp_path / "stage", tmp_path / "released")
    assert not (tmp_path / "released").exists() and not list(tmp_path.glob(".*"))
    convert(tmp_path / "stage", tmp_path / "released", force=True)
    config = read_released(tmp_path / "released").config
    assert (config.adapter_attention, config.drop_blank, config.encoder_pad) == ("time", True, "longest")


def test_convert_refuses(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        convert(folder, tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_convert_into_an_empty_directory_in_another_dtype(folder, tmp_path):
    (tmp_path / "out").mkdir()
    convert(folder, tmp_path / "out", dtype=torch.bfloat16)
    model = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert isinstance(model.config, SoundwaveConfig) and model.config.encoder_pad == "30s"
