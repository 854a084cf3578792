"""Every op against float64, in float32, bfloat16 and float16, at the paper's shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soundwave_fast.ops import ctc_loss, linear_ctc_loss, peak_gather, splice, varlen_cross_attention
from soundwave_fast.ops.backend import use_backend
from soundwave_fast.packed import pack
from tests.gpu.calls import Inputs
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))


def torchs(log_probs: Tensor, *labels, reduction: str = "mean") -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(log_probs, *labels, reduction=reduction, zero_infinity=True)


def by_utterance(make_log_probs, targets: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
    """The mean loss in float64, backward run an utterance at a time, so that one utterance's logits exist."""
    total = 0.0
    for b in range(len(targets)):
        one = slice(b, b + 1)
        nll = torchs(make_log_probs(b), targets[one], frames[one], labels[one], reduction="sum")
        nll = nll / (labels[b].clamp(min=1) * len(targets))
        nll.backward()
        total += nll.detach()
    return total


@dtypes
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_linear_ctc_loss(device, shape, dtype, trainable):
    B, T, D, V, S = (shape[name] for name in ("B", "T", "D", "V", "S"))
    inputs = Inputs(device, dtype)
    hidden, weight = inputs.normal(B, T, D), inputs.normal(V, D).div_(D**0.5)
    targets, labels = inputs.ints(1, V, B, S), inputs.ints(1, S + 1, B)
    frames = inputs.ints(2 * S, T + 1, B)

    x, w = (x.double().requires_grad_() for x in (hidden, weight))
    truth = by_utterance(lambda b: (x[b] @ w.T).log_softmax(-1)[:, None], targets, frames, labels)
    truth_dx, truth_dw = x.grad, w.grad

    def run(loss) -> tuple[Tensor, Tensor, Tensor | None]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        value = loss(x, w)
        value.backward()
        return value.detach(), x.grad, w.grad

    eager = run(lambda x, w: torchs(F.linear(x, w).float().log_softmax(-1).transpose(0, 1), targets, frames, labels))
    ours = run(lambda x, w: linear_ctc_loss(x, w, targets, frames, labels, zero_infinity=True))
    assert_within_budget(ours[0], eager[0], truth, FORWARD)
    assert_within_budget(ours[1], eager[1], truth_dx, BACKWARD)
    if trainable:
        assert_within_budget(ours[2], eager[2], truth_dw, BACKWARD)
    else:
        assert ours[2] is None


@dtypes
def test_ctc_loss(device, shape, dtype):
    B, T, V, S = (shape[name] for name in ("B", "T", "V", "S"))
    inputs = Inputs(device, torch.float32)
    log_probs = inputs.normal(T, B, V).log_softmax(-1).to(dtype)
    targets, labels = inputs.ints(1, V, B, S), inputs.ints(1, S + 1, B)
    frames = inputs.ints(2 * S, T + 1, B)
    columns = [log_probs[:, b : b + 1].double().requires_grad_() for b in range(B)]
    truth = by_utterance(columns.__getitem__, targets, frames, labels)
    truth_grad = torch.cat([x.grad.to(torch.float32) for x in columns], 1)
    del columns

    def run(loss) -> tuple[Tensor, Tensor]:
        x = log_probs.clone().requires_grad_()
        value = loss(x)
        value.backward()
        return value.detach(), x.grad

    eager = run(lambda x: torchs(x.float(), targets, frames, labels))
    ours = run(lambda x: ctc_loss(x, targets, frames, labels, zero_infinity=True))
    assert_within_budget(ours[0], eager[0], truth, FORWARD)
    for b in range(B):  # a column at a time: the comparison is in float64
        assert_within_budget(ours[1][:, b], eager[1][:, b], truth_grad[:, b], BACKWARD)


@dtypes
@pytest.mark.parametrize("queries", ["few", "many"])
def test_attention(device, shape, dtype, queries):
    B, T, H, d = (shape[name] for name in ("B", "T", "H", "d"))
    longest = shape["Lq"] if queries == "few" else T // 2
    inputs = Inputs(device, dtype)
    lengths_q, lengths_k = [longest - b for b in range(B - 1)] + [0], [T - 2 * b for b in range(B)]
    q, grad = inputs.normal(sum(lengths_q), H, d), inputs.normal(sum(lengths_q), H, d)
    k, v = inputs.normal(sum(lengths_k), H, d), inputs.normal(sum(lengths_k), H, d)
    offsets = [torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (lengths_q, lengths_k)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for one in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
            a, b, c = (x.transpose(0, 1) for x in one)
            out.append(((a * d**-0.5) @ b.mT).softmax(-1) @ c)
        return torch.cat([x.transpose(0, 1) for x in out])

    def run(function, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    truth = run(attend, q.double(), k.double(), v.double())
    eager = run(attend, q, k, v)
    ours = run(lambda *x: varlen_cross_attention(*x, *offsets, longest, T), q, k, v)
    for x, y, z, times in zip(ours, eager, truth, (FORWARD, *[BACKWARD] * 3)):
        assert_within_budget(x, y, z, times)


@dtypes
@pytest.mark.parametrize("select", ["first", "peak"])
@pytest.mark.parametrize("capacity", [False, True], ids=["exact", "capacity"])
def test_peak_gather_copies(device, shape, dtype, select, capacity):
    B, T, D = (shape[name] for name in "BTD")
    inputs = Inputs(device, dtype)
    features, tokens = inputs.normal(B, T, D), inputs.runs(B, T)
    scores = inputs.normal(B, T) if select == "peak" else None
    lengths = inputs.ints(T // 2, T + 1, B)
    size = -(-B * T // 256) * 256 if capacity else None

    def run():
        x = features.clone().requires_grad_()
        packed = peak_gather(x, tokens, lengths, 0, True, select=select, scores=scores, capacity=size)
        grad = torch.autograd.grad(packed.data, x, packed.data.detach() * 2)[0]
        return packed.data, packed.cu_seqlens, packed.lengths, packed.index, grad

    ours = run()
    with use_backend("torch"):
        truth = run()
    assert all(torch.equal(x, y) for x, y in zip(ours, truth))


@dtypes
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_splice_copies(device, shape, dtype, layout):
    B, L, D, T = (shape[name] for name in ("B", "L", "D", "T"))
    inputs = Inputs(device, dtype)
    audio = pack([inputs.normal(1 + T // 4 + b, D) for b in range(B)])
    text = inputs.normal(B, L, D)
    ids = torch.arange(L, device=device).expand(B, L).contiguous()

    def run():
        x, rows = text.clone().requires_grad_(), audio.data.clone().requires_grad_()
        out = splice(x, audio.with_data(rows), ids == L // 2, torch.ones_like(ids), ids, layout=layout)
        grads = torch.autograd.grad(out.inputs_embeds, (x, rows), out.inputs_embeds.detach() * 2)
        return out.inputs_embeds, out.position_ids, out.labels, out.cu_seqlens, *grads

    ours = run()
    with use_backend("torch"):
        truth = run()
    assert all(torch.equal(x, y) for x, y in zip(ours, truth))
