"""ctc_peaks and peak_gather: hand-written cases, and random and adversarial tokens against a loop."""

import pytest
import torch

from soundwave_fast.ops import ctc_peaks, peak_gather, reference


def kept(tokens, lengths=None, **kwargs) -> list[list[int]]:
    """ctc_peaks as lists of frames, after checking the shape of what it returns."""
    tokens = torch.as_tensor(tokens)
    index, cu_seqlens = ctc_peaks(tokens, lengths, **kwargs)
    T = tokens.shape[1]
    assert index.numel() == kwargs.get("capacity", -(-tokens.numel() // 256) * 256)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0
    assert (index[cu_seqlens[-1] :] == -1).all()
    out = []
    for b in range(tokens.shape[0]):
        flat = index[cu_seqlens[b] : cu_seqlens[b + 1]]
        assert (flat // max(T, 1) == b).all()
        out.append((flat - b * T).tolist())
    return out


def test_by_hand():
    a, b, o = 5, 6, 0
    assert kept([[a, a, b, b, a]]) == [[0, 2, 4]]
    assert kept([[a, o, a, a]], blank=o, drop_blank=True) == [[0, 2]]  # a blank a: two frames of a
    assert kept([[a, o, a, a]], blank=o) == [[0, 1, 2]]
    assert kept([[o, o, a, o]], blank=o, drop_blank=True) == [[2]]
    assert kept([[o, o, o]], blank=o, drop_blank=True) == [[0]]  # nothing to keep: frame 0
    assert kept([[a, a, b], [b, a, a]], [2, 1]) == [[0], [0]]  # the padding starts no run
    assert kept([[a, a], [a, a]]) == [[0], [0]]  # a run does not cross utterances
    assert kept([[a, b], [a, b]], [0, 2]) == [[], [0, 1]]
    assert kept([[a, b]], [1], capacity=1) == [[0]]


def test_peak_takes_the_best_frame_of_each_run():
    tokens = [[5, 5, 5, 6, 6, 0, 0, 5]]
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.2, 0.3, 0.8, 0.7, 0.0]])
    assert kept(tokens, select="peak", scores=scores) == [[1, 4, 5, 7]]
    assert kept(tokens, select="peak", scores=scores, blank=0, drop_blank=True) == [[1, 4, 7]]
    assert kept(tokens, [2], select="peak", scores=-scores) == [[0]]
    nan = torch.full((1, 8), float("nan"))
    assert kept(tokens, select="peak", scores=nan) == [[0, 3, 5, 7]]
    assert kept([[0, 0, 0]], select="peak", scores=torch.tensor([[1.0, 2, 3]]), blank=0, drop_blank=True) == [[0]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("drop_blank", [False, True])
def test_matches_the_loop(seed, drop_blank):
    generator = torch.Generator().manual_seed(seed)
    B, T, kinds = (seed % 4) + 1, seed * 3 % 17 + 1, seed % 3 + 1
    tokens = torch.randint(0, kinds, (B, T), generator=generator)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    scores = torch.randint(0, 3, (B, T), generator=generator).float()  # many ties
    args = (tokens.tolist(), lengths.tolist(), 0, drop_blank)
    assert kept(tokens, lengths, blank=0, drop_blank=drop_blank) == reference.ctc_peaks(*args)
    got = kept(tokens, lengths.tolist(), blank=0, drop_blank=drop_blank, select="peak", scores=scores)
    want = reference.ctc_peaks(*args, scores.tolist())
    nothing = reference.ctc_peaks(*args)  # an utterance without content keeps frame 0 whatever the scores
    assert got == want or got == [
        w if (tokens[b, : lengths[b]] != 0).any() else n for b, (w, n) in enumerate(zip(want, nothing))
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gather_and_its_gradient(dtype):
    tokens = torch.tensor([[1, 1, 2, 0, 0], [0, 0, 3, 3, 1], [1, 2, 3, 4, 5]])
    lengths = [5, 3, 0]
    frames = reference.ctc_peaks(tokens.tolist(), lengths, 0, True)
    x = torch.randn(3, 5, 4).to(dtype).requires_grad_()
    packed = peak_gather(x, tokens, lengths, 0, True)
    assert torch.equal(packed.data, reference.peak_gather(x, frames))
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 3] and packed.max_len == 2
    assert packed.index.tolist() == [0, 2, 7]
    weights = torch.randn(3, 4).to(dtype)
    (grad,) = torch.autograd.grad((packed.data * weights).sum(), x)
    want = torch.zeros(15, 4, dtype=dtype).index_copy(0, packed.index, weights).view(3, 5, 4)
    assert torch.equal(grad, want)


def test_gradcheck_and_garbage():
    tokens = torch.tensor([[1, 1, 2], [2, 1, 1]])
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: peak_gather(x, tokens, [3, 1]).data, (x,))
    torch.autograd.gradcheck(lambda x: peak_gather(x.transpose(1, 2), tokens[:, :2], [2, 1]).data, (x,))
    dirty = x.detach().clone()
    dirty[1, 1:] = float("nan")
    assert peak_gather(dirty, tokens, [3, 1]).data.isfinite().all()


def test_empty():
    assert kept(torch.zeros(0, 4, dtype=torch.long)) == []
    assert kept(torch.zeros(2, 0, dtype=torch.long)) == [[], []]
    packed = peak_gather(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), [0, 0])
    assert packed.data.shape == (0, 4) and packed.max_len == 0 and packed.cu_seqlens.tolist() == [0, 0, 0]


def test_refuses():
    tokens = torch.tensor([[1, 2, 3]])
    bad = [
        (ValueError, "blank", {"drop_blank": True}),
        (ValueError, "select", {"select": "last"}),
        (ValueError, "scores", {"select": "peak"}),
        (ValueError, "scores", {"select": "peak", "scores": torch.zeros(1, 2)}),
        (ValueError, "lengths", {"lengths": [4]}),
        (ValueError, "lengths", {"lengths": [1, 1]}),
        (ValueError, "capacity", {"capacity": 2}),
    ]
    for error, name, kwargs in bad:
        with pytest.raises(error, match=name):
            ctc_peaks(tokens, **kwargs)
    with pytest.raises(TypeError, match="tokens"):
        ctc_peaks(tokens.float())
    with pytest.raises(ValueError, match="tokens"):
        ctc_peaks(tokens[0])
    with pytest.raises(ValueError, match="features"):
        peak_gather(torch.zeros(1, 2, 4), tokens)
