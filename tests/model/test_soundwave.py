"""The whole model: losses and gradients, one utterance as in a batch, generation, saving and loading bit for bit."""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveProcessor, checkpoint
from tests.model import tiny

AUDIO = ("input_features", "feature_lengths")
PROMPTS = ("Stop.", "What is the time now?", "Open the red door.")
SECONDS = (0.6, 2.4, 1.3)


@pytest.fixture(scope="module", params=["paper", "released"])
def pair(request, tiny_parts):
    """(model, processor) of each semantics."""
    torch.manual_seed(0)
    return tiny.make_model(tiny_parts, semantics=request.param)


@pytest.fixture
def fresh(tiny_parts):
    return tiny.make_model(tiny_parts, adapter_dropout=0.0)


def prompts_and_audio(processor, numbers=(0, 1, 2)):
    waves = [tiny.make_wave(i, SECONDS[i]) for i in numbers]
    return processor(text=[processor.prompt(PROMPTS[i]) for i in numbers], audio=waves)


def test_packed_prompts_that_begin_with_text_are_scored_as_padded_ones(fresh):
    """No prompt's first token is predicted by the prompt before it."""
    model, processor = fresh
    inputs = tiny.training_inputs(processor)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert (inputs["input_ids"][:, 0] != model.config.audio_token_id).all()
    padded, packed = (model.eval()(**inputs, packed=packed) for packed in (False, True))
    assert padded.ce_count == packed.ce_count
    torch.testing.assert_close(packed.ce_sum, padded.ce_sum, rtol=1e-4, atol=0)


@pytest.mark.conformance
def test_loss_is_the_weighted_mean_of_its_sums(pair):
    model, processor = pair
    inputs = tiny.training_inputs(processor)
    out = model(**inputs)
    want = out.ce_sum / out.ce_count + 0.3 * out.ctc_sum / out.ctc_count
    assert out.loss.isfinite() and out.loss > 0
    torch.testing.assert_close(out.loss, want)
    assert out.ce_count == (inputs["labels"][:, 1:] != -100).sum() and out.ctc_count == 3
    assert (out.audio_lengths >= 1).all() and (out.audio_lengths <= out.frame_lengths).all()
    frames = inputs["feature_lengths"] // 4 if model.config.mask_frames else torch.full((3,), 750)
    assert torch.equal(out.frame_lengths, frames)


@pytest.mark.conformance
@pytest.mark.parametrize("head", ["tied", "free"])
@pytest.mark.parametrize("semantics", ["paper", "released"])
def test_gradients_reach_every_trained_part(tiny_parts, semantics, head):
    model, processor = tiny.make_model(tiny_parts, semantics=semantics, ctc_head=head)
    tiny.add_lora(model).train()
    model(**tiny.training_inputs(processor)).loss.backward()
    trained = [n for n, _ in model.named_parameters() if n.startswith(checkpoint.TRAINED) or "lora_" in n]
    assert len(trained) > 20
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
        else:
            assert parameter.grad is None, f"{name} is frozen"


@pytest.mark.conformance
def test_ce_is_the_llms_own_on_spliced_embeddings(fresh):
    """Cross-entropy of one utterance, put together by hand from embeddings."""
    model, processor = fresh
    inputs = tiny.training_inputs(processor, seconds=(1.1,))
    out = model(**inputs)
    heard = model.hear(*model.encode(*(inputs[key] for key in AUDIO)))
    audio = model.shrink(heard).data
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    at = int((ids == processor.audio_token_id).nonzero())
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(ids[:at]), audio, embed(ids[at + 1 :])])[None]
    spliced = torch.cat([labels[:at], torch.full((len(audio),), -100), labels[at + 1 :]])[None]
    want = model.language_model(inputs_embeds=embeds, labels=spliced).loss
    torch.testing.assert_close(out.ce_sum / out.ce_count, want, rtol=1e-5, atol=0)


def test_stage_1_needs_no_llm(tiny_parts):
    model, processor = tiny.make_model(tiny_parts, with_language_model=False)
    whole, _ = tiny.make_model(tiny_parts)
    adapters = {k: v for k, v in model.state_dict().items() if k.startswith(checkpoint.TRAINED)}
    whole.load_state_dict(adapters, strict=False)
    inputs = tiny.training_inputs(processor)
    out, with_llm = model(**inputs), whole(**inputs)
    assert out.ce_sum is None and out.logits is None
    torch.testing.assert_close(out.ctc_sum, with_llm.ctc_sum)
    torch.testing.assert_close(out.loss, out.ctc_sum / out.ctc_count)


@torch.no_grad()
def test_logits_of_a_padded_batch_are_those_of_one(pair):
    model, processor = pair
    inputs = prompts_and_audio(processor)
    together = model(**inputs)
    for i in range(3):
        alone = model(**prompts_and_audio(processor, [i]))
        assert together.audio_lengths[i] == alone.audio_lengths[0]
        length = alone.logits.shape[1]
        assert together.logits.shape[1] >= length
        scale = alone.logits.abs().max()
        assert (together.logits[i, :length] - alone.logits[0]).abs().max() <= 1e-4 * scale


@pytest.mark.conformance
def test_generate_in_a_batch_is_one_by_one(pair):
    model, processor = pair
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    settings["no_repeat_ngram_size"] = 1  # random weights repeat themselves
    together = model.generate(**prompts_and_audio(processor), **settings)
    alone = [model.generate(**prompts_and_audio(processor, [i]), **settings)[0] for i in range(3)]
    assert together.shape == (3, 12)
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(row.tolist()) for row in together}) == 3, "three prompts, three answers"


def test_generate_follows_the_training_forward(pair):
    """The first new token is the argmax of forward's last logits: the prompt is spliced alike on both roads."""
    model, processor = pair
    for i in range(3):
        inputs = prompts_and_audio(processor, [i])
        token = model.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=1)
        assert token.item() == model(**inputs).logits[0, -1].argmax().item()


def test_text_only_generation_is_the_llms(pair, tiny_parts):
    model, processor = pair
    llm = AutoModelForCausalLM.from_pretrained(tiny_parts.llm).eval()
    questions = ["Good morning", "What is the time"]
    text = processor.tokenizer(questions, return_tensors="pt", padding=True, padding_side="left")
    text = {key: text[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    want = llm.generate(**text, **settings)[:, text["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**text, **settings), want)


def test_several_audios_in_one_prompt(pair):
    model, processor = pair
    waves = [tiny.make_wave(i, SECONDS[i]) for i in range(2)]
    out = model(**processor(text=processor.prompt("Which is louder?", audios=2), audio=waves))
    apart = [model(**prompts_and_audio(processor, [i])).audio_lengths.item() for i in range(2)]
    assert out.audio_lengths.tolist() == apart


def test_placeholder_past_the_embedding(tiny_parts):
    """The placeholder's id need not have a row in the LLM's embedding."""
    model, processor = tiny.make_model(tiny_parts)
    inputs = prompts_and_audio(processor, [0])
    want = model(**inputs).logits
    inputs["input_ids"][inputs["input_ids"] == processor.audio_token_id] = tiny.VOCABULARY
    model.config.audio_token_id = tiny.VOCABULARY
    assert torch.equal(model(**inputs).logits, want)


# -- saving and loading ----------------------------------------------------------------------------------------


def outputs(model, processor) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(**tiny.training_inputs(processor))
        return [out.ce_sum, out.ctc_sum, model(**prompts_and_audio(processor)).logits]


@pytest.mark.parametrize("semantics", ["paper", "released"])
def test_stage_directory_is_bit_for_bit(tiny_parts, tmp_path, semantics):
    model, processor = tiny.make_model(tiny_parts, semantics=semantics)
    without = outputs(model, processor)
    tiny.add_lora(model)
    want = outputs(model, processor)
    assert not torch.equal(without[0], want[0]), "the LoRA must matter for this test to mean something"
    checkpoint.save_stage_directory(model, tmp_path, processor)
    loaded = SoundwaveForConditionalGeneration.from_pretrained(tmp_path)
    same = outputs(loaded, SoundwaveProcessor.from_pretrained(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(want, same))
    assert not loaded.training


def test_stage_directory_without_the_llm(tiny_parts, tmp_path):
    model, processor = tiny.make_model(tiny_parts)
    checkpoint.save_stage_directory(tiny.add_lora(model), tmp_path, processor)
    light = SoundwaveForConditionalGeneration.from_pretrained(tmp_path, with_language_model=False)
    inputs = tiny.training_inputs(processor)
    assert light.language_model is None
    assert torch.equal(light(**inputs).ctc_sum, model(**inputs).ctc_sum)


@pytest.mark.parametrize("semantics", ["paper", "released"])
def test_whole_model_is_bit_for_bit(tiny_parts, tmp_path, semantics):
    model, processor = tiny.make_model(tiny_parts, semantics=semantics)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    want = outputs(model, processor)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SoundwaveConfig)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), SoundwaveProcessor)
    for loader in (SoundwaveForConditionalGeneration, AutoModelForMultimodalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, SoundwaveForConditionalGeneration)
        assert all(torch.equal(a, b) for a, b in zip(want, outputs(loaded.eval(), processor)))


def test_whole_model_without_the_llm(tiny_parts, tmp_path):
    """`soundwave transcribe --ctc` on a whole saved model: the tied head needs the LLM's real embedding."""
    model, processor = tiny.make_model(tiny_parts)
    model.save_pretrained(tmp_path)
    light = SoundwaveForConditionalGeneration.from_pretrained(tmp_path, with_language_model=False).eval()
    inputs = tiny.training_inputs(processor)
    assert not light.token_embedding.weight.requires_grad
    assert torch.equal(light(**inputs).ctc_sum, model(**inputs).ctc_sum)


@pytest.mark.parametrize("call", ["right", "packed", "generate"])
def test_splice_is_told_the_length(tiny_parts, monkeypatch, call):
    """Or it would have to wait for an accelerator, once peak_gather has."""
    model, processor = tiny.make_model(tiny_parts)
    module = importlib.import_module("soundwave_fast.ops.splice")
    run, lengths = module._run, []

    def noting(*args):
        lengths.append(args[-1])
        out = run(*args)
        assert out[0].shape[1] == args[-1], "and told right"
        return out

    monkeypatch.setattr(module, "_run", noting)
    if call == "generate":
        names = ("input_ids", "attention_mask", "input_features", "feature_lengths")
        inputs = {name: value for name, value in tiny.training_inputs(processor).items() if name in names}
        model.generate(**inputs, max_new_tokens=1)
    else:
        model(**tiny.training_inputs(processor), packed=call == "packed")
    assert len(lengths) == 1 and lengths[0] is not None


def test_adapters_that_do_not_fit_are_named(tiny_parts, tmp_path):
    model, _ = tiny.make_model(tiny_parts)
    checkpoint.save_stage_directory(model, tmp_path)
    free, _ = tiny.make_model(tiny_parts, ctc_head="free")
    with pytest.raises(ValueError, match=r"missing \['ctc_head.audio_feature_head.weight'\]"):
        checkpoint.load_adapters(free, tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a stage directory"):
        checkpoint.load_adapters(model, tmp_path / "nowhere")


def test_a_part_that_is_gone_is_an_os_error(tiny_parts, tmp_path):
    model, _ = tiny.make_model(tiny_parts)
    model.config.audio_tower = str(tmp_path / "gone")
    checkpoint.save_stage_directory(model, tmp_path / "stage")
    with pytest.raises(OSError, match="gone"):
        SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "stage")


def test_only_the_embedding_is_read(tiny_parts):
    whole = AutoModelForCausalLM.from_pretrained(tiny_parts.llm).get_input_embeddings().weight
    assert torch.equal(checkpoint.load_token_embedding(tiny_parts.llm).weight, whole)
