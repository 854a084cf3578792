"""ctc_peaks and peak_gather on both backends: hand-written cases, random and adversarial tokens against a loop."""

import pytest
import torch

from soundwave_fast.ops import ctc_peaks, peak_gather, reference
from soundwave_fast.ops.backend import implementation, use_backend
from soundwave_fast.ops.peak_gather import _ctc_peaks, _peak_gather, _peak_gather_backward
from tests.ops.backends import DEVICE, DTensor, TorchOps


def kept(tokens, lengths=None, **kwargs) -> list[list[int]]:
    """ctc_peaks as lists of frames, after checking the shape of what it returns."""
    tokens = torch.as_tensor(tokens, device=DEVICE)
    index, cu_seqlens = ctc_peaks(tokens, lengths, **kwargs)
    T = tokens.shape[1]
    assert index.numel() == kwargs.get("capacity", -(-tokens.numel() // 256) * 256)
    assert index.dtype == torch.int64 and cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0
    assert (index[cu_seqlens[-1] :] == -1).all()
    out = []
    for b in range(tokens.shape[0]):
        flat = index[cu_seqlens[b] : cu_seqlens[b + 1]]
        assert (flat // max(T, 1) == b).all()
        out.append((flat - b * T).tolist())
    return out


def test_by_hand(backend):
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


def test_peak_takes_the_best_frame_of_each_run(backend):
    tokens = [[5, 5, 5, 6, 6, 0, 0, 5]]
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.2, 0.3, 0.8, 0.7, 0.0]], device=DEVICE)
    assert kept(tokens, select="peak", scores=scores) == [[1, 4, 5, 7]]
    assert kept(tokens, select="peak", scores=scores, blank=0, drop_blank=True) == [[1, 4, 7]]
    assert kept(tokens, [2], select="peak", scores=-scores) == [[0]]
    nan = torch.full((1, 8), float("nan"), device=DEVICE)
    assert kept(tokens, select="peak", scores=nan) == [[0, 3, 5, 7]]
    scores = torch.tensor([[1.0, 2, 3]], device=DEVICE)
    assert kept([[0, 0, 0]], select="peak", scores=scores, blank=0, drop_blank=True) == [[0]]
    close = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64, device=DEVICE)  # equal in float32
    assert kept([[1, 1]], select="peak", scores=close) == [[1]]


def adversarial(B: int, T: int) -> dict[str, torch.Tensor]:
    return {
        "equal": torch.ones(B, T),
        "different": torch.arange(T).expand(B, T),
        "blank": torch.zeros(B, T),
        "wrap": torch.stack([torch.arange(T) + b * (T - 1) for b in range(B)]),  # a row ends as the next one begins
        "alternating": torch.arange(T).remainder(2).expand(B, T),
        "one at the end": torch.nn.functional.pad(torch.ones(B, 1), (T - 1, 0)),
    }


@pytest.mark.parametrize("name", adversarial(1, 2))
@pytest.mark.parametrize("drop_blank", [False, True])
def test_adversarial_tokens(backend, name, drop_blank):
    tokens = adversarial(4, 19)[name].int()
    lengths = [19, 0, 1, 7]
    want = reference.ctc_peaks(tokens.tolist(), lengths, 0, drop_blank)
    assert kept(tokens, lengths, blank=0, drop_blank=drop_blank) == want
    assert kept(tokens, blank=0, drop_blank=drop_blank) == reference.ctc_peaks(tokens.tolist(), [19] * 4, 0, drop_blank)


def check_against_the_loop(seed: int, drop_blank: bool, B: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    T, kinds = seed * 13 % 67 + 1, seed % 3 + 1
    tokens = torch.randint(0, kinds, (B, T), generator=generator)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    scores = torch.randint(0, 3, (B, T), generator=generator).float()  # many ties
    arguments = (tokens.tolist(), lengths.tolist(), 0, drop_blank)
    first, best = reference.ctc_peaks(*arguments), reference.ctc_peaks(*arguments, scores.tolist())
    if drop_blank:  # an utterance without content keeps frame 0 whatever the scores
        best = [best[b] if (tokens[b, : lengths[b]] != 0).any() else first[b] for b in range(B)]
    assert kept(tokens, lengths.to(DEVICE), blank=0, drop_blank=drop_blank) == first
    scores = scores.bfloat16().to(DEVICE)
    assert kept(tokens, lengths.tolist(), blank=0, drop_blank=drop_blank, select="peak", scores=scores) == best


@pytest.mark.conformance
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drop_blank", [False, True])
def test_matches_the_loop(backend, seed, drop_blank):
    check_against_the_loop(seed, drop_blank, seed % 4 + 1)


@pytest.mark.parametrize("seed", [3, 5])
def test_runs_and_batches_that_reach_over_many_blocks(seed, monkeypatch):
    import csrc_triton.peak_gather as kernels

    monkeypatch.setattr(kernels, "block", lambda n, most=0: 16)
    with use_backend("triton"):
        for drop_blank in (False, True):
            check_against_the_loop(seed, drop_blank, 18)


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capacity", [None, 3, 20])
def test_gather_and_its_gradient(backend, poison, dtype, capacity):
    tokens = torch.tensor([[1, 1, 2, 0, 0], [0, 0, 3, 3, 1], [1, 2, 3, 4, 5]], device=DEVICE)
    lengths = [5, 3, 0]
    frames = reference.ctc_peaks(tokens.tolist(), lengths, 0, True)
    x = torch.randn(3, 5, 4, device=DEVICE).to(dtype).requires_grad_()
    packed = peak_gather(x, tokens, lengths, 0, True, capacity=capacity)
    spare = 0 if capacity is None else capacity - 3
    assert torch.equal(packed.data[:3], reference.peak_gather(x, frames)) and packed.data[3:].eq(0).all()
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 3] and packed.lengths.tolist() == [2, 1, 0]
    assert packed.max_len == (2 if capacity is None else 5) and not packed.overflowed()
    assert packed.index.tolist() == [0, 2, 7] + [-1] * spare
    weights = torch.randn(3 + spare, 4, device=DEVICE).to(dtype)
    (grad,) = torch.autograd.grad((packed.data * weights).sum(), x)
    want = torch.zeros(15, 4, dtype=dtype, device=DEVICE).index_copy(0, packed.index[:3], weights[:3]).view(3, 5, 4)
    assert torch.equal(grad, want)


def test_strides_widths_and_a_broadcast_gradient(backend, poison):
    tokens = torch.randint(0, 3, (3, 40), device=DEVICE)
    base = torch.randn(1300, 40, 3, device=DEVICE, requires_grad=True)
    x = base.permute(2, 1, 0)  # (3, 40, 1300), wider than a block
    packed = peak_gather(x, tokens.t().contiguous().t(), torch.tensor([40, 1, 0], dtype=torch.int32))
    assert torch.equal(packed.data, x.reshape(120, 1300)[packed.index])
    (grad,) = torch.autograd.grad(packed.data.sum(), base)  # an expanded scalar
    want = torch.zeros(120, device=DEVICE).index_fill(0, packed.index, 1).view(3, 40)
    assert torch.equal(grad.permute(2, 1, 0), want[..., None].expand(3, 40, 1300))


def test_gradcheck_and_garbage(backend):
    tokens = torch.tensor([[1, 1, 2], [2, 1, 1]], device=DEVICE)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True, device=DEVICE)
    torch.autograd.gradcheck(lambda x: peak_gather(x, tokens, [3, 1]).data, (x,))
    torch.autograd.gradcheck(lambda x: peak_gather(x.transpose(1, 2), tokens[:, :2], [2, 1]).data, (x,))
    dirty = x.detach().clone()
    dirty[1, 1:] = float("nan")
    assert peak_gather(dirty, tokens, [3, 1]).data.isfinite().all()


def test_empty(backend, poison):
    long = {"dtype": torch.long, "device": DEVICE}
    assert kept(torch.zeros(0, 4, **long)) == [] and kept(torch.zeros(0, 4, **long), []) == []
    nobody = peak_gather(torch.zeros(0, 4, 2, device=DEVICE), torch.zeros(0, 4, **long), [])
    assert nobody.data.shape == (0, 2) and nobody.cu_seqlens.tolist() == [0]
    assert kept(torch.zeros(2, 0, **long)) == [[], []]
    packed = peak_gather(torch.zeros(2, 3, 4, device=DEVICE), torch.zeros(2, 3, **long), [0, 0])
    assert packed.data.shape == (0, 4) and packed.max_len == 0 and packed.cu_seqlens.tolist() == [0, 0, 0]
    x = torch.zeros(2, 0, 4, device=DEVICE, requires_grad=True)
    peak_gather(x, torch.zeros(2, 0, **long), blank=0, drop_blank=True, capacity=2).data.sum().backward()
    assert x.grad.shape == (2, 0, 4)


def test_a_capacity_too_small_loses_the_last_peaks_and_nothing_else(backend, poison):
    """What an accelerator does, where nobody looks at the number of peaks: the implementations below the check."""
    tokens = torch.arange(5, device=DEVICE).expand(2, 5)
    x = torch.randn(2, 5, 3, device=DEVICE)
    ops = implementation("peak_gather", tokens)
    found, counts = ops.scan_peaks(tokens, None, None, False, None)
    rows, index, cu_seqlens = ops.gather_peaks(x, found, counts, 5, 7)
    assert torch.equal(rows, x.reshape(10, 3)[:7]) and index.tolist() == list(range(7))
    assert cu_seqlens.tolist() == [0, 5, 7] and counts.tolist() == [5, 5]
    grad = ops.gather_peaks_backward(rows, index, cu_seqlens, 2, 5)
    assert torch.equal(grad.view(10, 3), torch.nn.functional.pad(rows, (0, 0, 0, 3)))
    _, index, cu_seqlens = ops.gather_peaks(None, found, counts, 5, 7)
    assert cu_seqlens.tolist() == [0, 5, 10] and index.tolist() == list(range(7))


@pytest.mark.parametrize("capacity", [None, 64])
@pytest.mark.parametrize("select", ["first", "peak"])
def test_two_launches_forward_one_backward_and_nothing_beside(launches, capacity, select):
    tokens = torch.randint(0, 3, (4, 15), device=DEVICE)
    lengths = torch.tensor([15, 0, 1, 9], device=DEVICE)
    scores = torch.rand(4, 15, device=DEVICE) if select == "peak" else None
    x = torch.randn(4, 15, 6, device=DEVICE)
    with use_backend("triton"), TorchOps() as seen:
        rows, index, cu_seqlens, *_ = _peak_gather._init_fn(x, tokens, lengths, 0, True, scores, capacity)
        assert launches == ["_scan_kernel", "_gather_kernel"]
        _peak_gather_backward._init_fn(rows, index, cu_seqlens, 4, 15)
        assert launches[2:] == ["_gather_backward_kernel"]
        _ctc_peaks._init_fn(tokens, lengths, 0, True, scores, 64)
        assert launches[3:] == ["_scan_kernel", "_gather_kernel"]
    assert len(seen.names) == (DEVICE == "cuda" and capacity is None)  # no memset, no cast; one copy to the host


def test_same_bits_every_run(backend):
    tokens = torch.randint(0, 3, (3, 30), device=DEVICE)
    x = torch.randn(3, 30, 5, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(3):
        packed = peak_gather(x, tokens)
        runs.append((packed.data, packed.index, *torch.autograd.grad(packed.data.square().sum(), x)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("capacity", [None, 64])
def test_opcheck(backend, capacity):
    tokens = torch.randint(0, 3, (4, 15), device=DEVICE)
    lengths = torch.tensor([15, 0, 1, 9], device=DEVICE)
    scores = torch.rand(4, 15, device=DEVICE)
    x = torch.randn(4, 15, 6, device=DEVICE, requires_grad=True)
    for extra in ((None, None, False, None), (lengths, 0, True, scores)):
        torch.library.opcheck(_peak_gather, (x, tokens, *extra, capacity))
        torch.library.opcheck(_ctc_peaks, (tokens, *extra, 64))
    rows, index, cu_seqlens, *_ = _peak_gather(x.detach(), tokens, None, None, False, None, capacity)
    torch.library.opcheck(_peak_gather_backward, (rows, index, cu_seqlens, 4, 15))


def test_refuses():
    tokens = torch.tensor([[1, 2, 3]])
    bad = [
        (ValueError, "blank", {"drop_blank": True}),
        (ValueError, "select", {"select": "last"}),
        (ValueError, "scores", {"select": "peak"}),
        (ValueError, "scores", {"select": "peak", "scores": torch.zeros(1, 2)}),
        (TypeError, "scores", {"select": "peak", "scores": torch.zeros(1, 3).long()}),
        (ValueError, "lengths", {"lengths": [4]}),
        (ValueError, "lengths", {"lengths": [-1]}),
        (ValueError, "lengths", {"lengths": [1, 1]}),
        (TypeError, "lengths", {"lengths": [1.5]}),
        (ValueError, "lengths", {"lengths": []}),
        (TypeError, "lengths is a DTensor", {"lengths": torch.tensor([1]).as_subclass(DTensor)}),
        (TypeError, "scores is a DTensor", {"select": "peak", "scores": torch.zeros(1, 3).as_subclass(DTensor)}),
        (ValueError, "capacity", {"capacity": 2}),
        (ValueError, "capacity", {"capacity": -1}),
    ]
    for error, name, kwargs in bad:
        with pytest.raises(error, match=name):
            ctc_peaks(tokens, **kwargs)
        with pytest.raises(error, match=name):
            peak_gather(torch.zeros(1, 3, 4), tokens, **kwargs)
    with pytest.raises(TypeError, match="tokens is a DTensor: call ctc_peaks inside"):
        ctc_peaks(tokens.as_subclass(DTensor))
    with pytest.raises(TypeError, match="tokens is a DTensor: call peak_gather inside"):
        peak_gather(torch.zeros(1, 3, 4), tokens.as_subclass(DTensor))
    with pytest.raises(TypeError, match="features is a DTensor"):
        peak_gather(torch.zeros(1, 3, 4).as_subclass(DTensor), tokens)
    with pytest.raises(TypeError, match="tokens"):
        ctc_peaks(tokens.float())
    with pytest.raises(ValueError, match="tokens"):
        ctc_peaks(tokens[0])
    with pytest.raises(ValueError, match="features"):
        peak_gather(torch.zeros(1, 2, 4), tokens)
