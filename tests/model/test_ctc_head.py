"""CTCHead against the full logits: greedy, loss, candidates; tied to the LLM's embedding and free."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, WhisperConfig

from soundwave_fast.model import SoundwaveConfig
from soundwave_fast.model.ctc_head import CTCHead

V, D = 37, 16


def make(kind: str) -> tuple[CTCHead, torch.Tensor | None, torch.Tensor]:
    """The head in float64, the embedding it is called with, and the (V + 1, D) weight it amounts to."""
    text = LlamaConfig(hidden_size=D, num_attention_heads=2, num_hidden_layers=1, vocab_size=V)
    head = CTCHead(SoundwaveConfig(WhisperConfig(d_model=8), text, ctc_head=kind)).double()
    if kind == "free":
        return head, None, head.audio_feature_head.weight
    torch.nn.init.normal_(head.blank_row)
    embedding = torch.randn(V, D, dtype=torch.float64)
    return head, embedding, torch.cat([embedding, head.blank_row[None]])


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, lengths, targets, target lengths: one repeats a token, one has no transcript, one cannot fit."""
    hidden = torch.randn(4, 14, D, dtype=torch.float64)
    targets = torch.tensor([[3, 3, 9, 1], [5, 20, 0, 0], [0, 0, 0, 0], [7, 7, 7, 7]])
    return hidden, torch.tensor([14, 9, 14, 6]), targets, torch.tensor([4, 2, 0, 4])


def truth(hidden, lengths, targets, target_lengths, weight, rows=None) -> torch.Tensor:
    """Sum over utterances with a transcript of nll / its length, by F.ctc_loss on all logits (of `rows` of weight)."""
    weight = weight if rows is None else weight[rows]
    log_probs = (hidden @ weight.T).log_softmax(-1)
    if rows is not None:
        targets = torch.tensor([[rows.index(t) if t in rows else 0 for t in line] for line in targets.tolist()])
    blank = weight.shape[0] - 1
    nll = F.ctc_loss(
        log_probs.transpose(0, 1), targets, lengths, target_lengths, blank, reduction="none", zero_infinity=True
    )
    return sum((nll[b] / n for b, n in enumerate(target_lengths.tolist()) if n), torch.zeros(()))


@pytest.mark.parametrize("lengths", [None, [11, 0, 4]])
@pytest.mark.parametrize("kind", ["tied", "free"])
def test_greedy_is_argmax_of_log_softmax(kind, lengths):
    head, embedding, weight = make(kind)
    hidden = torch.randn(3, 11, D, dtype=torch.float64)
    tokens, log_probs = head.greedy(hidden, None if lengths is None else torch.tensor(lengths), embedding)
    best, arg = (hidden @ weight.T).log_softmax(-1).max(-1)
    past = torch.arange(11) >= torch.tensor(lengths or [11] * 3)[:, None]
    assert torch.equal(tokens, arg.masked_fill(past, head.blank))
    torch.testing.assert_close(log_probs, best.detach().masked_fill(past, 0.0), rtol=1e-10, atol=1e-12)
    assert not log_probs.requires_grad


def test_greedy_finds_the_blank():
    head, embedding, _ = make("tied")
    frames = 10 * torch.stack([head.blank_row, embedding[4]])[None].detach()
    assert head.greedy(frames, embedding_VD=embedding)[0].tolist() == [[V, 4]]


@pytest.mark.parametrize("kind", ["tied", "free"])
def test_loss_is_ctc_over_the_whole_vocabulary(kind):
    head, embedding, weight = make(kind)
    hidden, *rest = batch()
    hidden.requires_grad_()
    total, count, tokens = head.loss(hidden, *rest, embedding, return_argmax=True)
    want = truth(hidden, *rest, weight)
    assert int(count) == 3, "an utterance without a transcript is not counted"
    torch.testing.assert_close(total, want, rtol=1e-10, atol=0)
    learned = head.blank_row if kind == "tied" else head.audio_feature_head.weight
    for ours, eager in zip(*(torch.autograd.grad(x, (hidden, learned)) for x in (total, want))):
        torch.testing.assert_close(ours, eager, rtol=1e-8, atol=1e-10)
    argmax = (hidden @ weight.T).argmax(-1)
    for b, n in enumerate(rest[0].tolist()):
        assert torch.equal(tokens[b, :n], argmax[b, :n])


def test_no_transcript_at_all_is_zero_and_differentiable():
    head, embedding, _ = make("tied")
    hidden, lengths, targets, target_lengths = batch()
    hidden.requires_grad_()
    total, count, _ = head.loss(hidden, lengths, targets, torch.zeros_like(target_lengths), embedding)
    total.backward()
    assert total.item() == 0 and int(count) == 0
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("kind", ["tied", "free"])
def test_candidates_are_a_softmax_over_them_and_the_blank(kind):
    head, embedding, weight = make(kind)
    hidden, *rest = batch()
    hidden.requires_grad_()
    candidates = [1, 3, 5, 7, 9, 11, 20, 36]
    total, count, _ = head.loss(hidden, *rest, embedding, candidates=torch.tensor(candidates))
    want = truth(hidden, *rest, weight, rows=[*candidates, V])
    torch.testing.assert_close(total, want, rtol=1e-10, atol=0)
    assert int(count) == 3
    learned = head.blank_row if kind == "tied" else head.audio_feature_head.weight
    for ours, eager in zip(*(torch.autograd.grad(x, (hidden, learned)) for x in (total, want))):
        torch.testing.assert_close(ours, eager, rtol=1e-8, atol=1e-10)


def test_candidates_must_hold_every_target():
    head, embedding, _ = make("tied")
    hidden, *rest = batch()
    with pytest.raises(ValueError, match="candidates: does not contain every target"):
        head.loss(hidden, *rest, embedding, candidates=torch.tensor([1, 3, 5, 7, 9]))  # 20 is missing
    with pytest.raises(ValueError, match="return_argmax"):
        head.loss(hidden, *rest, embedding, return_argmax=True, candidates=torch.arange(V))


def test_tied_needs_the_embedding():
    head, _, _ = make("tied")
    with pytest.raises(ValueError, match="embedding_VD"):
        head.greedy(torch.randn(1, 2, D, dtype=torch.float64))
