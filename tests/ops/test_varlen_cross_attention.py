"""varlen_cross_attention against a loop over utterances and heads, empty sequences and all."""

import pytest
import torch
import torch.nn.functional as F

from soundwave_fast.ops import reference, varlen_cross_attention
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget

LENGTHS = [
    ([3, 5, 1], [7, 2, 9]),
    ([0, 4, 2, 1], [3, 0, 5, 1]),  # no queries; no keys
    ([0, 0], [0, 0]),
    ([6] * 3, [4] * 3),
    ([1], [1]),
]


def offsets(lengths) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def make(lengths_q, lengths_k, H=4, G=2, d=8, extra=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths_q) + extra, H, d), (sum(lengths_k) + extra, G, d), (sum(lengths_k) + extra, G, d)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(tensors, lengths_q, lengths_k, **kwargs):
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    return varlen_cross_attention(*tensors, cu_q, cu_k, max(lengths_q), max(lengths_k) + 3, **kwargs)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_matches_the_loop(lengths, heads):
    tensors = make(*lengths, *heads)
    out = run(tensors, *lengths, softmax_scale=0.3)
    want = reference.varlen_cross_attention(*tensors, offsets(lengths[0]).tolist(), offsets(lengths[1]).tolist(), 0.3)
    torch.testing.assert_close(out, want)
    if not want.requires_grad:  # nothing to attend; see the next test
        return
    weights = torch.randn(out.shape, dtype=out.dtype)
    got = torch.autograd.grad((out * weights).sum(), tensors)
    expected = torch.autograd.grad((want * weights).sum(), tensors, allow_unused=True)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e)


def test_nothing_to_attend_still_has_gradients():
    tensors = make([2, 0], [0, 3])
    out = run(tensors, [2, 0], [0, 3])
    assert out.abs().sum() == 0
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert grad.abs().sum() == 0


def test_garbage_beyond_the_offsets_stays_there():
    lengths = ([3, 2], [4, 6])
    tensors = make(*lengths)
    for x in tensors:
        x.data[-2:] = float("nan")
    out = run(tensors, *lengths)
    assert out.isfinite().all() and out[-2:].abs().sum() == 0
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert grad.isfinite().all() and grad[-2:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(dtype):
    lengths = ([9, 4, 0, 1], [17, 30, 3, 2])
    cu = [offsets(x).tolist() for x in lengths]
    ours, eager = make(*lengths, dtype=dtype), make(*lengths, dtype=dtype)
    truth = [x.detach().double().requires_grad_() for x in ours]
    outs = [
        run(ours, *lengths),
        reference.varlen_cross_attention(*eager, *cu),
        reference.varlen_cross_attention(*truth, *cu),
    ]
    assert outs[0].dtype == dtype
    assert_within_budget(*outs, FORWARD)
    grads = [torch.autograd.grad(o.sum(), x) for o, x in zip(outs, (ours, eager, truth))]
    for columns in zip(*grads):
        assert_within_budget(*columns, BACKWARD)


def test_gradcheck():
    tensors = make([2, 1, 0], [3, 0, 2], H=2, G=1, d=3, extra=1)
    torch.autograd.gradcheck(lambda *x: run(x, [2, 1, 0], [3, 0, 2]), tensors)


def test_dropout():
    tensors = make([50], [40])
    torch.manual_seed(0)
    dropped = run(tensors, [50], [40], dropout_p=0.5)
    assert dropped.isfinite().all() and not torch.allclose(dropped, run(tensors, [50], [40]))


def test_non_contiguous_and_many_lengths():
    lengths = (list(range(20)), list(range(19, -1, -1)))
    tensors = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in make(*lengths)]
    want = reference.varlen_cross_attention(*tensors, offsets(lengths[0]).tolist(), offsets(lengths[1]).tolist())
    torch.testing.assert_close(run(tensors, *lengths), want)


def test_refuses():
    q, k, v = make([3], [4], extra=0)
    cu_q, cu_k = offsets([3]), offsets([4])
    good = dict(q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=3, max_seqlen_k=4)
    varlen_cross_attention(**good)
    for error, name, change in [
        (ValueError, "q must", {"q": q[0]}),
        (TypeError, "k is", {"k": k.float()}),
        (ValueError, "k and v", {"v": v[:2]}),
        (ValueError, "heads", {"k": k[:, :0], "v": v[:, :0]}),
        (ValueError, "head width", {"q": q[..., :2]}),
        (ValueError, "cu_seqlens_q", {"cu_seqlens_q": offsets([4])}),
        (ValueError, "cu_seqlens_k", {"cu_seqlens_k": torch.tensor([1, 4], dtype=torch.int32)}),
        (ValueError, "cu_seqlens_q", {"cu_seqlens_q": offsets([1, 2])}),
        (TypeError, "cu_seqlens_q", {"cu_seqlens_q": cu_q.float()}),
        (ValueError, "max_seqlen_k", {"max_seqlen_k": 3}),
        (ValueError, "dropout_p", {"dropout_p": 1.0}),
    ]:
        with pytest.raises(error, match=name):
            varlen_cross_attention(**{**good, **change})
