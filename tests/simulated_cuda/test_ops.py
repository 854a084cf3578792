"""Every op on the simulated device, forward and backward: the CPU's values, and no wait that is not announced."""

import pytest
import torch

from soundwave_fast.model.losses import next_token_loss
from soundwave_fast.ops import PromptCounts, linear_argmax, peak_gather, splice
from tests.gpu import calls
from tests.gpu.conftest import TINY
from tests.ops.test_ragged_road import BATCHES, batch, road
from tests.simulated_cuda.device import DEVICE, read

LAYOUTS = ("right", "left", "packed")


@pytest.mark.parametrize("name", calls.CALLS)
def test_no_op_waits_whose_sizes_are_known(waits, name):
    truth = calls.CALLS[name](calls.Inputs(torch.device("cpu"), torch.float32), TINY)()  # in plain torch
    call = calls.CALLS[name](calls.Inputs(DEVICE, torch.float32), TINY)
    waits.clear()
    ours = call()
    assert waits == [] and all(x.is_cuda for x in ours)
    for a, b in () if call.seeded else zip(read(ours), truth, strict=True):  # each draws dropout in its own way
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_best_classes_do_not_wait(waits):
    hidden, weight = torch.randn(3, 7, 12), torch.randn(50, 12)
    lengths = torch.tensor([7, 0, 3])
    truth = linear_argmax(hidden, weight, lengths)
    there = [x.to("cuda") for x in (hidden, weight, lengths)]
    waits.clear()
    ours = read(linear_argmax(*there))
    assert waits == [] and torch.equal(ours[0], truth[0])
    torch.testing.assert_close(ours[1], truth[1])


def on_device(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cuda").requires_grad_(value.requires_grad) for name, value in x.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(len(BATCHES)))
def test_the_road_waits_where_sizes_are_asked_for_and_nowhere_else(waits, layout, seed):
    B, T, L = BATCHES[seed]
    truth = road(batch(B, T, L, seed=seed), None, None, layout)
    x = on_device(batch(B, T, L, seed=seed))
    waits.clear()
    ours = road(x, None, None, layout)
    assert [w.where.split(":")[0] for w in waits] == [f"soundwave_fast/ops/{op}.py" for op in ("peak_gather", "splice")]
    assert all(torch.equal(a, b) for a, b in zip(read(ours), truth, strict=True))
    waits.clear()
    road(x, B * T, B * (T + L) if layout == "packed" else T + L, layout)
    assert waits == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_road_to_the_loss_waits_once(waits, layout):
    """Once for the peaks; the prompts' counts came to the host meanwhile, and their event is long past."""
    x = on_device(batch(4, 30, 9))
    waits.clear()
    counts = PromptCounts(x["placeholders"], x["attention_mask"], x["labels"])
    audio = peak_gather(x["features"], x["tokens"], x["lengths"])
    length = counts.max_length(audio, layout)
    out = splice(x["text"], audio, x["placeholders"], x["attention_mask"], x["labels"], layout, length)
    labels = torch.where(out.labels == -100, -100, out.labels.clamp(max=7))
    loss, _ = next_token_loss(out.inputs_embeds, torch.nn.Identity(), labels, counts.labels())
    grads = torch.autograd.grad(loss, (x["features"], x["text"]))
    assert [w.what for w in waits] == ["a copy to cpu", "an event", "an event"]
    assert waits[0].where.startswith("soundwave_fast/ops/peak_gather.py") and all(
        read(g).isfinite().all() for g in grads
    )
