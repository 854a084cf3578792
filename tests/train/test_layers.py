"""Activation checkpointing, compiled layers and packed batches: the same losses and gradients as without them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.model import tiny
from train import build, layers
from train.config import Config, Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tiny_parts):
    return tiny_parts


def prepared(parts, wrapped: Run | None = None):
    """A model in training mode, adapters and LoRA trained, and its processor."""
    torch.manual_seed(0)
    model, processor = tiny.make_model(parts, adapter_dropout=0.0)
    model = tiny.add_lora(model).train()
    model.audio_tower.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name or "lora_" in name or "ctc_head" in name)
    if wrapped is not None:  # a backend that needs no C++ compiler: what is traced is the same
        layers.wrap(model, wrapped, CPU, backend="aot_eager")
    return model, processor


def outcome(model, processor, seconds, **forward) -> dict[str, torch.Tensor]:
    """Losses and gradients of one batch."""
    model.zero_grad()
    out = model(**tiny.training_inputs(processor, seconds), **forward)
    (out.ce_sum + out.ctc_sum).backward()
    losses = {"ce": out.ce_sum.detach(), "ctc": out.ctc_sum.detach()}
    return losses | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], error: float = 1e-5) -> None:
    assert ours.keys() == truth.keys() and len(truth) > 20
    for name, value in truth.items():
        assert (ours[name] - value).abs().max() <= error * value.abs().max().clamp_min(1e-6), name


SECONDS = [(0.6, 1.7, 2.4), (1.3,), (0.3, 0.9)]


@pytest.mark.parametrize("seconds", SECONDS, ids=str)
def test_packed_batches(parts, seconds):
    """Prompts end to end in one row: no prompt sees another, and no position is lost."""
    both = prepared(parts)
    same(outcome(*both, seconds, packed=True), outcome(*both, seconds))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_batches_in_every_attention(parts, attention):
    model, processor = tiny.make_model(parts)
    model.language_model.set_attn_implementation(attention)
    inputs = tiny.training_inputs(processor)
    with torch.no_grad():
        one, other = (model.eval()(**inputs, packed=packed).ce_sum for packed in (True, False))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_checkpointed_layers(parts):
    ran = []
    model, processor = tiny.make_model(parts)
    layer = model.causal_lm.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    layers.wrap(model, Run(activation_checkpointing=True), CPU)
    inputs = tiny.training_inputs(processor)
    model.train()(**inputs).loss.backward()
    assert len(ran) == 2, "once more in backward"
    model.eval()(**inputs)
    assert len(ran) == 3
    both = prepared(parts, Run(activation_checkpointing=True))
    same(outcome(*both, SECONDS[0]), outcome(*prepared(parts), SECONDS[0]))


@pytest.mark.slow
def test_compiled_layers(parts):
    """Adapters without a graph break, and programs that serve all layers and lengths; checkpointed as well.

    There are four: two adapters, the LLM's first layer, whose input is a view, and its others. A batch of one, or one
    without padding, is compiled anew.
    """
    torch._dynamo.reset()
    counters.clear()
    both, plain = prepared(parts, Run(compile=True, activation_checkpointing=True)), prepared(parts)
    for seconds in ((0.6, 1.7, 2.4), (0.4, 1.1, 2.9), (0.5, 0.7, 1.6, 2.2)):
        same(outcome(*both, seconds), outcome(*plain, seconds))
        assert counters["stats"]["unique_graphs"] == 4
    both[0].eval()(**tiny.training_inputs(both[1], (1.9, 2.0)))
    assert counters["stats"]["unique_graphs"] == 4, "evaluation goes its own way"


def test_when_to_compile():
    assert layers.compiles("auto", torch.device("cuda")) and not layers.compiles("auto", CPU)
    assert layers.compiles(True, CPU) and not layers.compiles(False, torch.device("cuda"))


def test_when_to_pack(parts):
    model, _ = tiny.make_model(parts)
    assert not build.packed(Config(), model), "sdpa masks a square of all tokens"
    assert build.packed(Config(run=Run(packed=True)), model)
    model.causal_lm.config._attn_implementation = "flash_attention_2"
    assert build.packed(Config(), model) and not build.packed(Config(run=Run(packed=False)), model)
