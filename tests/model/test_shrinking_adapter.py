"""ShrinkingAdapter against one utterance at a time through nn.MultiheadAttention, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, WhisperConfig

from soundwave_fast.model import SoundwaveConfig, shrinking_adapter
from soundwave_fast.model.shrinking_adapter import ShrinkingAdapter
from soundwave_fast.ops import Packed
from soundwave_fast.ops.backend import use_backend

D, BLANK = 24, 9


def make(width: int = D, **kwargs) -> ShrinkingAdapter:
    text = LlamaConfig(hidden_size=width, num_attention_heads=4, num_hidden_layers=1, vocab_size=BLANK)
    config = SoundwaveConfig(WhisperConfig(d_model=8), text, ctc_blank_id=BLANK, **kwargs)
    adapter = ShrinkingAdapter(config).double()
    for parameter in adapter.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return adapter


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(4, 12) tokens with repeats and blanks; one utterance is all blank, one has a single frame."""
    tokens = torch.randint(0, 3, (4, 12))
    tokens[tokens == 0] = BLANK
    tokens[1] = BLANK
    return torch.randn(4, 12, D, dtype=torch.float64), tokens, torch.tensor([12, 7, 9, 1])


def kept_frames(tokens: list[int], drop_blank: bool) -> list[int]:
    first = [t for t, token in enumerate(tokens) if t == 0 or token != tokens[t - 1]]
    content = [t for t in first if tokens[t] != BLANK] if drop_blank else first
    return content or [0]


def loop(adapter: ShrinkingAdapter, hidden: Tensor, tokens: Tensor, lengths: Tensor) -> list[Tensor]:
    """The released way: one utterance, all its frames as keys, those not to be seen masked."""
    out = []
    for b, n in enumerate(lengths.tolist()):
        kept = kept_frames(tokens[b, :n].tolist(), adapter.drop_blank)
        query = hidden[b : b + 1, kept]
        if adapter.look_back:
            hide = torch.arange(hidden.shape[1]) >= n  # True: no key
            if adapter.keys == "kept":
                hide = torch.ones(hidden.shape[1], dtype=torch.bool)
                hide[kept] = False
            mixed, _ = adapter.encoder_attn(query, hidden[b : b + 1], hidden[b : b + 1], key_padding_mask=hide[None])
            query = query + mixed
        out.append(adapter.atten_layer_norm(query)[0])
    return out


CASES = [
    {"look_back_keys": keys, "drop_blank": drop} for keys, drop in itertools.product(("frames", "kept"), (True, False))
]


@pytest.mark.conformance
@pytest.mark.parametrize("kwargs", [*CASES, {"look_back": False}], ids=str)
def test_is_the_loop(kwargs):
    adapter = make(adapter_dropout=0.0, **kwargs)
    hidden, tokens, lengths = batch()
    hidden.requires_grad_()
    ours = adapter(hidden, tokens, lengths)
    theirs = loop(adapter, hidden, tokens, lengths)
    assert ours.lengths.tolist() == [len(x) for x in theirs]
    torch.testing.assert_close(ours.data, torch.cat(theirs), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours.data)
    learned = [hidden, *adapter.parameters()]
    for one, other in zip(*(torch.autograd.grad((x * weight).sum(), learned) for x in (ours.data, torch.cat(theirs)))):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("drop_blank", [True, False])
def test_index_tells_where_a_row_came_from(drop_blank):
    adapter = make(look_back=False, drop_blank=drop_blank)
    hidden, tokens, lengths = batch()
    packed = adapter(hidden, tokens, lengths)
    frames = hidden.flatten(0, 1)[packed.index.long()]
    torch.testing.assert_close(packed.data, adapter.atten_layer_norm(frames), rtol=0, atol=0)


def test_all_blank_yields_one_token_and_other_utterances_are_not_touched():
    adapter = make().eval()
    hidden, tokens, lengths = batch()
    together = adapter(hidden, tokens, lengths)
    assert together.lengths[1] == 1
    for b, alone in enumerate(together.unbind()):
        single = adapter(hidden[b : b + 1], tokens[b : b + 1], lengths[b : b + 1])
        torch.testing.assert_close(single.data, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kwargs", [*CASES, {"look_back": False}], ids=str)
def test_utterances_of_nothing(kwargs):
    """One of length 0 yields no token and takes nothing from the others; a batch of nothing else has gradients of 0."""
    adapter = make(adapter_dropout=0.0, **kwargs)
    hidden, tokens, lengths = batch()
    want = adapter(hidden, tokens, lengths)
    empty = torch.tensor([12, 0, 9, 1])
    hidden[1] = float("nan")
    hidden.requires_grad_()
    got = adapter(hidden, tokens, empty)
    assert got.lengths.tolist() == [want.lengths[0], 0, *want.lengths[2:].tolist()]
    kept = torch.cat([x for b, x in enumerate(want.unbind()) if b != 1])
    torch.testing.assert_close(got.data, kept, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(got.data.sum(), hidden)
    assert grad.isfinite().all() and grad[1].eq(0).all() and grad[0].ne(0).any()
    nothing = adapter(hidden, tokens, torch.zeros(4, dtype=torch.long))
    assert nothing.data.shape == (0, D) and nothing.lengths.tolist() == [0] * 4 and nothing.max_len == 0
    grads = torch.autograd.grad(nothing.data.sum(), [hidden, *adapter.parameters()], allow_unused=True)
    assert all(g is None or g.eq(0).all() for g in grads) and grads[0] is not None


def test_peak_takes_the_surest_frame():
    adapter = make(peak_select="peak", look_back=False)
    hidden = torch.randn(1, 4, D, dtype=torch.float64)
    tokens = torch.tensor([[2, 2, 2, 5]])
    packed = adapter(hidden, tokens, torch.tensor([4]), torch.tensor([[-3.0, -1.0, -2.0, -0.5]]))
    assert packed.index.tolist() == [1, 3]


def test_on_the_kernels():
    """The same on Triton, which is what a GPU runs (interpreted elsewhere)."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    for kwargs in CASES[::2]:
        adapter = make(adapter_dropout=0.0, **kwargs).float()
        hidden, tokens, lengths = batch()
        theirs = torch.cat(loop(adapter, hidden.float(), tokens, lengths))
        weight = torch.randn_like(theirs)
        parameters = list(adapter.parameters())
        expected = torch.autograd.grad((theirs * weight).sum(), parameters)
        adapter.to(where)
        with use_backend("triton"):
            ours = adapter(hidden.float().to(where), tokens.to(where), lengths.to(where)).data
            got = torch.autograd.grad((ours * weight.to(where)).sum(), list(adapter.parameters()))
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
        for one, other in zip(got, expected):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


def test_keys_with_rows_of_nobody(monkeypatch):
    """On a GPU, where the frames are packed without a look at the lengths, rows of nobody follow the last one."""
    adapter = make(adapter_dropout=0.0)
    hidden, tokens, lengths = batch()
    want = adapter(hidden.requires_grad_(), tokens, lengths).data
    weight = torch.randn_like(want)
    (wanted,) = torch.autograd.grad((want * weight).sum(), hidden)
    exact = Packed.from_padded
    monkeypatch.setattr(shrinking_adapter.Packed, "from_padded", lambda x, n: exact(x, n, total=4 * 12, max_len=12))
    got = adapter(hidden, tokens, lengths).data
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), hidden)[0], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", ["frames", "kept"])
def test_waits_for_the_gpu_once(keys):
    """For the number of kept frames; the look-back itself never does."""
    adapter = make(64, look_back_keys=keys).float().cuda()
    hidden = torch.randn(3, 40, 64, device="cuda", requires_grad=True)
    tokens, lengths = torch.randint(0, 4, (3, 40), device="cuda"), torch.tensor([40, 3, 17], device="cuda")
    peaks = adapter.peaks(hidden, tokens, lengths)
    for _ in range(2):  # the first run compiles
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            adapter._attend(peaks, hidden, lengths).sum().backward(retain_graph=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_backend_of_the_config_is_what_runs(monkeypatch):
    seen = []
    attend = shrinking_adapter.varlen_cross_attention
    monkeypatch.setattr(
        shrinking_adapter, "varlen_cross_attention", lambda *a, **k: (seen.append(k["backend"]), attend(*a, **k))[1]
    )
    make(attention_backend="torch")(*batch())
    assert seen == ["torch"]
    with pytest.raises(ValueError, match="backend 'flash_attn' needs a GPU"):
        make(attention_backend="flash_attn")(*batch())


def test_released_names_and_sizes():
    """Llama-3.1-8B: 67.1 M parameters under the checkpoint's names."""
    text = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=1, vocab_size=BLANK)
    with torch.device("meta"):
        adapter = ShrinkingAdapter(SoundwaveConfig(WhisperConfig(d_model=8), text, ctc_blank_id=BLANK))
    D = 4096
    assert {name: tuple(p.shape) for name, p in adapter.named_parameters()} == {
        "encoder_attn.in_proj_weight": (3 * D, D),
        "encoder_attn.in_proj_bias": (3 * D,),
        "encoder_attn.out_proj.weight": (D, D),
        "encoder_attn.out_proj.bias": (D,),
        "atten_layer_norm.weight": (D,),
        "atten_layer_norm.bias": (D,),
    }
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 1) == 67.1


def test_dropout_only_when_training():
    adapter = make(adapter_dropout=0.5)
    arguments = batch()
    outputs = [adapter(*arguments).data for _ in range(2)]
    assert not torch.equal(*outputs)
    adapter.eval()
    outputs = [adapter(*arguments).data for _ in range(2)]
    assert torch.equal(*outputs)


def test_dropout_has_the_law_of_multihead_attention():
    """Mean and spread over many masks."""
    adapter = make(adapter_dropout=0.3, drop_blank=False)
    adapter.encoder_attn.dropout = 0.3
    hidden, tokens, lengths = (x[:1].repeat(2000, *[1] * (x.dim() - 1)) for x in batch())
    peaks = adapter.peaks(hidden, tokens, lengths)
    queries = peaks.data.view(2000, -1, D)
    moments = []
    for out in (adapter._attend(peaks, hidden, lengths), adapter.encoder_attn(queries, hidden, hidden)[0]):
        out = out.detach().view(2000, -1, D)
        moments.append((out.mean(0), out.var(0)))
    adapter.eval()
    exact = adapter._attend(peaks, hidden, lengths).detach().view(2000, -1, D)[0]
    sigma = (moments[1][1] / 2000).sqrt()
    for mean, variance in moments:
        assert ((mean - exact).abs() < 5.5 * sigma).all()
        assert (variance / moments[1][1] - 1).abs().max() < 0.35 and variance.min() > 0


@pytest.mark.parametrize("keys", ["frames", "kept"])
def test_fit_embedding_says_the_heads_tokens_in_the_llms_code(keys):
    """Frames are another linear code of the embeddings: after the fit each comes out nearest to its own token's."""
    width = 128  # heads of 32: in very narrow ones a frame's score with itself does not stand out
    adapter = make(width, look_back_keys=keys, drop_blank=False).float().eval()
    embedding = torch.randn(200, width) * (0.5 + torch.rand(width)) + torch.randn(width)
    code = torch.linalg.qr(torch.randn(width, width)).Q
    tokens = torch.randint(200, (1, 600))
    hidden = ((embedding - embedding.mean(0)) / embedding.std(0))[tokens] @ code + 0.05 * torch.randn(1, 600, width)
    share = adapter.fit_embedding(hidden[0], tokens[0], embedding)
    assert 0.98 < share < 1
    packed = adapter(hidden, tokens, torch.tensor([600]))
    said, known = ((x - embedding.mean(0)) / embedding.std(0) for x in (packed.data, embedding))
    nearest = (said @ torch.nn.functional.normalize(known, dim=1).T).argmax(-1)
    assert (nearest == tokens[0, packed.index.long()]).float().mean() > 0.99


def test_fit_embedding_needs_look_back_and_frames():
    with pytest.raises(ValueError, match="look_back"):
        make(look_back=False).fit_embedding(torch.randn(5, D), torch.arange(5), torch.randn(9, D))
    with pytest.raises(ValueError, match="no frames to fit"):
        make().fit_embedding(torch.zeros(0, D), torch.zeros(0, dtype=torch.long), torch.randn(9, D))


def test_match_embedding_starts_where_the_llm_can_read():
    adapter = make().float().eval()
    embedding = torch.randn(500, D) * torch.rand(D) + torch.randn(D)
    adapter.match_embedding(embedding)
    hidden, tokens = torch.randn(1, 4000, D), torch.arange(4000)[None] % 7
    rows = adapter(hidden, tokens, torch.tensor([4000])).data
    without = make(look_back=False).float()
    without.atten_layer_norm.load_state_dict(adapter.atten_layer_norm.state_dict())
    torch.testing.assert_close(rows, without(hidden, tokens, torch.tensor([4000])).data)  # look-back adds nothing yet
    # 4000 draws of a standard normal: their mean is off by 1/63, their spread by 1/89, at one sigma
    assert ((rows.mean(0) - embedding.mean(0)).abs() < 5 / 63 * embedding.std(0)).all()
    assert ((rows.std(0) / embedding.std(0) - 1).abs() < 5 / 89).all()
