"""Hugging Face conventions: auto classes, save and load bit for bit, attention per part, gradient checkpointing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, GenerationConfig

from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveProcessor, checkpoint
from tests.model import tiny


def logits(model, processor):
    waves = [tiny.make_wave(i, seconds) for i, seconds in enumerate((0.6, 1.7))]
    inputs = processor(text=[processor.prompt("Stop."), processor.prompt("What is the time?")], audio=waves)
    with torch.no_grad():
        return model(**inputs).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_a_whole_model_is_loaded_bit_for_bit(tiny_parts, tmp_path, dtype, lora):
    model, processor = tiny.make_model(tiny_parts, ctc_head="free")
    without = logits(checkpoint.cast(model, dtype), processor)
    if lora:
        checkpoint.cast(tiny.add_lora(model), dtype)
        assert not torch.equal(without, logits(model, processor)), (
            "the LoRA must matter for this test to mean something"
        )
    model.save_pretrained(tmp_path)
    assert (tmp_path / "lora" / "adapter_config.json").is_file() == lora
    assert not any("lora" in name or "base_layer" in name for name in load_file(tmp_path / "model.safetensors"))
    for loader in (SoundwaveForConditionalGeneration, AutoModelForMultimodalLM, AutoModel):
        loaded = loader.from_pretrained(tmp_path).eval()
        assert type(loaded) is SoundwaveForConditionalGeneration
        mine, theirs = state(model), state(loaded)
        assert mine.keys() == theirs.keys()
        assert all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)
        assert torch.equal(logits(loaded, processor), logits(model, processor))


def test_the_saved_lora_is_an_ordinary_peft_folder(tiny_parts, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, _ = tiny.make_model(tiny_parts)
    tiny.add_lora(model).save_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    llm = AutoModelForCausalLM.from_pretrained(tiny_parts.llm)
    alone = PeftModel.from_pretrained(llm, tmp_path / "lora").eval()
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, model.language_model(ids).logits)


def test_a_lora_saved_earlier_does_not_stay(tiny_parts, tmp_path):
    model, processor = tiny.make_model(tiny_parts)
    want = logits(model, processor)
    tiny.add_lora(tiny.make_model(tiny_parts)[0]).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(SoundwaveForConditionalGeneration.from_pretrained(tmp_path).eval(), processor), want)


def test_float32_lora_round_a_bfloat16_llm_stays_float32(tiny_parts, tmp_path):
    model, _ = tiny.make_model(tiny_parts)
    tiny.add_lora(checkpoint.cast(model, torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() + 1e-5
    model.save_pretrained(tmp_path)
    loaded = SoundwaveForConditionalGeneration.from_pretrained(tmp_path)
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(loaded).values(), strict=True))


def test_auto_classes_read_a_stage_directory(tiny_parts, tmp_path):
    model, processor = tiny.make_model(tiny_parts)
    checkpoint.save_stage_directory(tiny.add_lora(model), tmp_path, processor)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SoundwaveConfig)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), SoundwaveProcessor)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, processor), logits(model, processor))
    half = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    padded = AutoModel.from_pretrained(tmp_path, encoder_pad="30s")
    assert padded.config.encoder_pad == "30s", "an auto class puts settings into the config it passes on"
    with pytest.raises(TypeError, match="from_pretrained: no_such_argument cannot be given"):
        SoundwaveForConditionalGeneration.from_pretrained(tmp_path, no_such_argument=1)


@pytest.mark.parametrize("loader", [SoundwaveForConditionalGeneration, AutoModelForMultimodalLM])
@pytest.mark.parametrize("kind", ["whole", "stage"])
def test_attention_is_chosen_part_by_part(tiny_parts, tmp_path, kind, loader):
    model, processor = tiny.make_model(tiny_parts)
    model.save_pretrained(tmp_path) if kind == "whole" else checkpoint.save_stage_directory(model, tmp_path)
    want = logits(model, processor)
    for choice in ("eager", {"audio_config": "eager", "text_config": "sdpa"}, {"text_config": "eager"}):
        loaded = loader.from_pretrained(tmp_path, attn_implementation=choice).eval()
        chosen = [part.config._attn_implementation for part in (loaded.audio_tower, loaded.language_model)]
        by_part = choice if isinstance(choice, dict) else dict.fromkeys(("audio_config", "text_config"), choice)
        assert chosen == [by_part.get(key, "sdpa") for key in ("audio_config", "text_config")]
        torch.testing.assert_close(logits(loaded, processor), want, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_equal_gradients(tiny_parts):
    model, processor = tiny.make_model(tiny_parts, adapter_dropout=0.0, ctc_head="free")
    tiny.add_lora(model).train()
    inputs = tiny.training_inputs(processor)
    runs = {layer: 0 for layer in model.causal_lm.model.layers}
    for layer in runs:
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1)
        )

    def gradients():
        model(**inputs).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    plain = gradients()
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # by transformers' version
    getattr(model, f"{name}_checkpointing_enable")()
    checkpointed = gradients()
    assert list(runs.values()) == [3, 3], "once without, and with it once forward and once again backward"
    assert plain.keys() == checkpointed.keys() and len(plain) > 20
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    getattr(model, f"{name}_checkpointing_disable")()
    assert all(torch.equal(plain[name], grad) for name, grad in gradients().items())
    assert list(runs.values()) == [4, 4]


def test_the_llms_generation_config_is_the_models(tiny_parts, tmp_path):
    model, processor = tiny.make_model(tiny_parts)
    assert model.can_generate() and model.generation_config is model.language_model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=[2, 3], pad_token_id=1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    loaded = SoundwaveForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.language_model.generation_config.eos_token_id == [2, 3]
    inputs = processor(text=processor.prompt("Stop."), audio=tiny.make_wave(0, 1.0))
    assert loaded.generate(**inputs).shape[1] <= 3
    assert tiny.add_lora(loaded).generation_config.eos_token_id == [2, 3]


def test_without_audio_forward_is_the_llms_own(tiny_parts):
    model, _ = tiny.make_model(tiny_parts)
    ids = torch.arange(5, 25).view(2, 10)
    labels = ids.masked_fill(torch.arange(10) < 4, -100)
    with torch.no_grad():
        want = model.language_model(input_ids=ids, labels=labels)
        assert torch.equal(model(input_ids=ids).logits, want.logits)
        torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, want.loss)
