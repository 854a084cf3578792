"""PromptCounts: the spliced length as splice finds it, known beforehand; on a GPU the road then waits once."""

import warnings

import pytest
import torch

from soundwave_fast.model.losses import next_token_loss
from soundwave_fast.ops import Packed, PromptCounts, peak_gather, splice
from tests.ops.backends import DEVICE

LAYOUTS = ("right", "left", "packed")
B, L, D = 5, 8, 6


def prompts(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """placeholder_mask, attention_mask, labels: none, one or several placeholders a prompt, padding on either side."""
    generator = torch.Generator().manual_seed(seed)
    placeholder = torch.rand(B, L, generator=generator) < 0.25
    placeholder[0] = False
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, :2], mask[2, 5:] = 0, 0
    placeholder &= mask != 0
    labels = torch.randint(0, 9, (B, L), generator=generator).where(torch.rand(B, L, generator=generator) < 0.5, -100)
    return placeholder.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE)


def segments(count: int, seed: int) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (count,), generator=generator).tolist()
    if not count:
        empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
        return Packed(torch.zeros(0, D, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE), empty, 0)
    return Packed.from_list([torch.randn(n, D, generator=generator).to(DEVICE) for n in lengths])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_length_is_the_one_splice_finds(layout, with_mask, seed):
    placeholder, mask, labels = prompts(seed)
    mask = mask if with_mask else None
    audio = segments(int(placeholder.sum()), seed)
    text = torch.randn(B, L, D, device=DEVICE)
    counts = PromptCounts(placeholder, mask, labels)
    want = splice(text, audio, placeholder, mask, labels, layout)
    assert counts.max_length(audio, layout) == want.inputs_embeds.shape[1]
    got = splice(text, audio, placeholder, mask, labels, layout, counts.max_length(audio, layout))
    for name in ("inputs_embeds", "attention_mask", "position_ids", "labels", "cu_seqlens", "lengths"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours is theirs is None or torch.equal(ours, theirs), name
    assert counts.placeholders() == placeholder.sum(1).tolist()
    assert counts.labels() == int((splice(text, audio, placeholder, mask, labels).labels != -100).sum())


def test_counts_are_those_of_the_moment_it_was_made():
    placeholder, mask, labels = prompts(1)
    counts, want = PromptCounts(placeholder, mask, labels), placeholder.sum(1).tolist()
    placeholder.zero_()
    assert counts.placeholders() == want


def test_no_prompts_and_no_text():
    audio = segments(0, 0)
    assert PromptCounts(torch.zeros(0, 3, dtype=torch.bool, device=DEVICE)).max_length(audio) == 0
    counts = PromptCounts(torch.zeros(2, 0, dtype=torch.bool, device=DEVICE))
    assert counts.max_length(audio) == counts.labels() == 0 and counts.placeholders() == [0, 0]


def test_refuses_what_splice_refuses():
    placeholder = torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)
    placeholder[0, 1] = True
    mask = torch.ones(2, 4, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="1 placeholders, but audio holds 2 segments; with 1 a row, row 1 has 0"):
        PromptCounts(placeholder, mask).max_length(segments(2, 0))
    mask[0, 1] = 0
    with pytest.raises(ValueError, match="row 0 that attention_mask calls padding"):
        PromptCounts(placeholder, mask).max_length(segments(1, 0))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"placeholder_mask": torch.zeros(2, 4)}, TypeError, "placeholder_mask must be bool"),
        ({"placeholder_mask": torch.zeros(4, dtype=torch.bool)}, ValueError, "placeholder_mask must be"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, r"attention_mask must be \(2, 4\)"),
        ({"labels": torch.ones(2, 5)}, ValueError, r"labels must be \(2, 4\)"),
        ({"labels": torch.ones(2, 4, device="meta")}, ValueError, "labels must be on"),
    ],
)
def test_refuses_what_does_not_fit(change, error, name):
    good = {"placeholder_mask": torch.zeros(2, 4, dtype=torch.bool), "attention_mask": None, "labels": None}
    PromptCounts(**good)
    with pytest.raises(error, match=name):
        PromptCounts(**{**good, **change})


def test_audio_whose_lengths_only_the_device_knows():
    placeholder, *_ = prompts(2)
    audio = segments(int(placeholder.sum()), 2)

    class Elsewhere(Packed):
        def known_lengths(self):
            return None

    far = Elsewhere(audio.data, audio.cu_seqlens, audio.lengths, audio.max_len)
    assert PromptCounts(placeholder).max_length(far) is None


@pytest.mark.parametrize("extra", [0, 1, 3, 100])
def test_loss_with_a_bound_on_the_labels(extra):
    torch.manual_seed(extra)
    head = torch.nn.Linear(D, 11, bias=False)
    hidden = torch.randn(3, L, D, requires_grad=True)
    labels = torch.randint(0, 11, (3, L)).where(torch.rand(3, L) < 0.4, -100)
    exact = int((labels[:, 1:] != -100).sum())
    want, count = next_token_loss(hidden, head, labels)
    got, again = next_token_loss(hidden, head, labels, exact + extra)
    assert count == again == exact
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, head.weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_what_fills_up_the_bound_reaches_no_gradient():
    head = torch.nn.Linear(D, 11, bias=False)
    hidden = torch.randn(1, 4, D)
    hidden[0, 0] = torch.nan  # predicts nothing
    labels = torch.tensor([[1, -100, 2, 3]])
    loss, count = next_token_loss(hidden.requires_grad_(), head, labels, 3)
    grads = torch.autograd.grad(loss, (hidden, head.weight))
    assert count == 2 and loss.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_peak_gather_leaves_its_counts_on_the_host():
    tokens = torch.tensor([[1, 1, 2], [3, 3, 3]], device=DEVICE)
    features = torch.randn(2, 3, D, device=DEVICE)
    packed = peak_gather(features, tokens)
    assert packed.known_lengths().device.type == "cpu" and packed.known_lengths().tolist() == [2, 1]
    assert packed.with_data(packed.data * 2).known_lengths().tolist() == [2, 1]
    assert (peak_gather(features, tokens, capacity=8).known_lengths() is None) == (DEVICE != "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_road_waits_once(layout):
    features = torch.randn(4, 30, D, device="cuda", requires_grad=True)
    tokens = torch.randint(0, 4, (4, 30), device="cuda")
    placeholder = torch.zeros(4, L, dtype=torch.bool, device="cuda")
    placeholder[:, 2] = True
    text = torch.randn(4, L, D, device="cuda")
    labels = torch.randint(0, 9, (4, L), device="cuda")

    def road():
        counts = PromptCounts(placeholder, None, labels)
        audio = peak_gather(features, tokens)
        out = splice(text, audio, placeholder, None, labels, layout, counts.max_length(audio, layout))
        loss, _ = next_token_loss(out.inputs_embeds, torch.nn.Identity(), out.labels.clamp(max=D - 1), counts.labels())
        return torch.autograd.grad(loss, features)

    road()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            road()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) == 1
