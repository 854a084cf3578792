"""What every version of the dependencies must give: import, ops, forward, generation, saving and loading, each stage.

`make contract` runs this file on the newest transformers, peft and NumPy that pyproject.toml allows, in under two
minutes; `make test VERSIONS=newest` runs everything on the newest of all.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from soundwave_fast import SoundwaveForConditionalGeneration, SoundwaveProcessor, ops
from soundwave_fast.model import checkpoint
from soundwave_fast.ops.backend import use_backend
from tests.model import tiny
from tests.ops.backends import DEVICE
from tests.train import runs

PROMPTS = ("Stop.", "Open the red door.")
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


@pytest.fixture(scope="module")
def pair(tiny_parts):
    torch.manual_seed(0)
    model, processor = tiny.make_model(tiny_parts)
    return tiny.add_lora(model).eval(), processor


def inputs_of(processor) -> dict:
    waves = [tiny.make_wave(i, seconds) for i, seconds in enumerate((0.6, 1.7))]
    return processor(text=[processor.prompt(prompt) for prompt in PROMPTS], audio=waves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ops(backend):
    hidden, weight = (torch.randn(*shape, device=DEVICE) for shape in ((2, 12, 16), (40, 16)))
    hidden.requires_grad_()
    lengths = torch.tensor([12, 9], device=DEVICE), torch.tensor([3, 2], device=DEVICE)
    targets = torch.tensor([[3, 3, 7], [9, 1, 0]], device=DEVICE)
    with use_backend(backend):
        loss, tokens = ops.linear_ctc_loss(hidden, weight, targets, *lengths, return_argmax=True)
        kept = ops.peak_gather(hidden, tokens, lengths[0], blank=0)
        heads = hidden.reshape(24, 2, 8)
        cu = torch.tensor([0, 12, 24], dtype=torch.int32, device=DEVICE)
        mixed = ops.varlen_cross_attention(heads, heads, heads, cu, cu, 12, 12)
        (grad,) = torch.autograd.grad(loss + kept.data.sum() + mixed.sum(), hidden)
    log_probs = (hidden @ weight.T).log_softmax(-1).transpose(0, 1)
    torch.testing.assert_close(loss, F.ctc_loss(log_probs, targets, *lengths), rtol=1e-4, atol=1e-4)
    runs_of_tokens = torch.unique_consecutive(tokens[1, :9])
    assert int(kept.cu_seqlens[2] - kept.cu_seqlens[1]) == len(runs_of_tokens)
    padded = heads.view(2, 12, 2, 8).transpose(1, 2)
    want = F.scaled_dot_product_attention(padded, padded, padded).transpose(1, 2).reshape(24, 2, 8)
    torch.testing.assert_close(mixed, want, rtol=1e-4, atol=1e-5)
    assert grad.isfinite().all() and grad.abs().sum() > 0


def test_forward_scores_and_gives_gradients(pair):
    model, processor = pair
    inputs = tiny.training_inputs(processor)
    out = model(**inputs)
    assert out.loss.isfinite() and out.ctc_count == 3 and out.ce_count > 0
    out.loss.backward()
    trained = [p for name, p in model.named_parameters() if p.grad is not None and "lora_" in name]
    assert trained and all(p.grad.isfinite().all() for p in trained)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_forward_without_labels_gives_logits_and_a_cache_by_both_names(pair):
    model, processor = pair
    inputs = inputs_of(processor)
    assert model(**inputs).logits.isfinite().all()
    ids = torch.arange(5, 15)[None]
    whole, first = model(input_ids=ids), model(input_ids=ids[:, :6], use_cache=True)
    assert first.cache is first.past_key_values and first.cache.get_seq_length() == 6
    rest = model(input_ids=ids[:, 6:], cache=first.cache, use_cache=True)
    torch.testing.assert_close(rest.logits, whole.logits[:, 6:], rtol=1e-4, atol=1e-4)
    for name in ("cache", "past_key_values"):
        again = model(input_ids=ids[:, :6], use_cache=True)
        new = model(input_ids=ids[:, 6:], use_cache=True, **{name: getattr(again, name)})
        assert torch.equal(new.logits, rest.logits)
    with pytest.raises(ValueError, match="cache, past_key_values|past_key_values, cache"):
        model(input_ids=ids, cache=first.cache, past_key_values=first.cache)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=str)
def test_generate(pair, more):
    model, processor = pair
    tokens = model.generate(**inputs_of(processor), **SETTINGS, **more)
    assert tokens.shape == (2, 6)
    assert len(processor.tokenizer.batch_decode(tokens)) == 2


@torch.no_grad()
@pytest.mark.parametrize("form", ["saved model", "stage directory"])
def test_save_and_load(pair, tmp_path, form):
    model, processor = pair
    inputs = inputs_of(processor)
    if form == "saved model":
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    else:
        checkpoint.save_stage_directory(model, tmp_path, processor)
    loaded = SoundwaveForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    again = inputs_of(SoundwaveProcessor.from_pretrained(tmp_path))
    assert again.keys() == inputs.keys() and all(torch.equal(again[name], inputs[name]) for name in inputs)


def test_one_step_of_each_stage(tiny_parts, speech_dir, tmp_path):
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir, optim={"steps": 1, "warmup": 0})
    for number in (1, 2, 3):
        more = ["--init", str(tmp_path / f"stage{number - 1}")] if number > 1 else []
        assert runs.run(number, config, tmp_path / f"stage{number}", *more) == 0
        (row,) = runs.rows(tmp_path / f"stage{number}")
        assert row["ctc"] > 0 and (number == 1 or row["ce"] > 0)
