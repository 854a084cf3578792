"""PEFT round the whole model, as its users call it: `get_peft_model`, and transformers' own `add_adapter`."""

from __future__ import annotations

import warnings
from importlib import metadata

import pytest
import torch
from packaging import version

from soundwave_fast.model import SoundwaveForConditionalGeneration
from tests.model import tiny

TARGETS = r".*language_model.*\.(q_proj|v_proj)"  # a list of names would reach into the Whisper as well
SETTINGS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def inputs_of(processor):
    waves = [tiny.make_wave(0, 0.6), tiny.make_wave(1, 1.7)]
    return dict(processor(text=[processor.prompt("Stop."), processor.prompt("What is the time?")], audio=waves))


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def fill(model):
    """LoRA's B away from zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def lora_names(model):
    return [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_get_peft_model(tiny_parts, tmp_path, task):
    from peft import LoraConfig, PeftModel, get_peft_model

    base, processor = tiny.make_model(tiny_parts)
    inputs = inputs_of(processor)
    plain, plain_tokens = logits(base, inputs), base.generate(**inputs, **SETTINGS)
    base.save_pretrained(tmp_path / "base")
    model = fill(get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, task_type=task)))
    assert len(lora_names(model)) == 8 and all("language_model" in name for name in lora_names(model))
    want, tokens = logits(model, inputs), model.generate(**inputs, **SETTINGS)
    assert not torch.allclose(want, plain) and not torch.equal(tokens, plain_tokens)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
    model.train()
    model(**tiny.training_inputs(processor)).loss.backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
    model.eval().save_pretrained(tmp_path / "adapter")
    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(logits(again, inputs), want)
    assert torch.equal(again.generate(**inputs, **SETTINGS), tokens)
    merged = again.merge_and_unload()
    assert isinstance(merged, SoundwaveForConditionalGeneration) and not lora_names(merged)
    torch.testing.assert_close(logits(merged, inputs), want, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))


def test_add_adapter(tiny_parts, tmp_path):
    from peft import LoraConfig
    from transformers.integrations import peft as integration

    needed, found = integration.MIN_PEFT_VERSION, metadata.version("peft")
    if version.parse(found) < version.parse(needed):  # transformers 5.24 asks for a peft that is not out yet
        pytest.skip(f"transformers' add_adapter needs peft {needed}, there is {found}")

    model, processor = tiny.make_model(tiny_parts)
    inputs = inputs_of(processor)
    plain = logits(model, inputs)
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    fill(model)
    want, tokens = logits(model, inputs), model.generate(**inputs, **SETTINGS)
    assert len(lora_names(model)) == 8 and not torch.allclose(want, plain)
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists(), "transformers saves the adapter alone"
    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again.eval(), inputs), want)
    assert torch.equal(again.generate(**inputs, **SETTINGS), tokens)
