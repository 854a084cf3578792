"""linear_ctc_loss on both backends against float64 truth: values, gradients, and what it must not hold or do."""

import importlib
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from soundwave_fast.ops import linear_ctc_loss, linear_ctc_parts, linear_ctc_passes, reference
from soundwave_fast.ops.backend import implementation, use_backend
from tests.ops.backends import DEVICE
from tests.ops.linear_ctc_cases import (
    FEASIBLE,
    INPUT_LENGTHS,
    TARGET_LENGTHS,
    TARGETS,
    B,
    D,
    V,
    make,
    padded,
    shrink_chunks,
)
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget

op = importlib.import_module("soundwave_fast.ops.linear_ctc_loss")  # the package exports the function of this name

REDUCTIONS = ("none", "sum", "mean")
GRADS = [grads for grads in product((0, 1), repeat=3) if any(grads)]  # hidden, weight, blank_row
EVERY = [(r, g, blank_row) for r, g, blank_row in product(REDUCTIONS, GRADS, (False, True)) if blank_row or not g[2]]
SOME = [
    ("none", (1, 0, 0), False),
    ("none", (1, 1, 1), True),
    ("mean", (0, 0, 1), True),
    ("mean", (1, 1, 0), False),
    ("sum", (1, 0, 1), True),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    shrink_chunks(monkeypatch)


def check_values_and_gradients(reduction, grads, with_blank_row):
    hidden, weight, blank_row = make()
    blank_row, blank = (blank_row, V) if with_blank_row else (None, 0)
    leaves = [
        None if x is None else x.requires_grad_(bool(need)) for x, need in zip((hidden, weight, blank_row), grads)
    ]
    got, argmax = linear_ctc_loss(
        *leaves[:2], padded(), INPUT_LENGTHS, TARGET_LENGTHS, blank, reduction, True, True, blank_row=leaves[2]
    )
    asked = [x for x in leaves if x is not None and x.requires_grad]
    got_grads = torch.autograd.grad((got * FEASIBLE.to(got)).sum() if reduction == "none" else got, asked)

    clones = [None if x is None else x.detach().cpu().requires_grad_(x.requires_grad) for x in leaves]
    nll, want_argmax = reference.linear_ctc_loss(clones[0], clones[1], TARGETS, INPUT_LENGTHS, blank, clones[2])
    nll = nll.masked_fill(nll == torch.inf, 0.0)
    lengths = torch.tensor(TARGET_LENGTHS).clamp(min=1)
    weights = {"none": FEASIBLE, "sum": torch.ones(B), "mean": 1 / (lengths * B)}[reduction].double()
    want = nll if reduction == "none" else (nll * weights).sum()
    want_grads = torch.autograd.grad((nll * weights).sum(), [x for x in clones if x is not None and x.requires_grad])
    tolerance = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(got.detach().cpu(), want.detach(), **tolerance)
    assert torch.equal(argmax.cpu(), want_argmax)
    for got_grad, want_grad in zip(got_grads, want_grads):
        torch.testing.assert_close(got_grad.cpu(), want_grad, **tolerance)


@pytest.mark.conformance
@pytest.mark.parametrize(("reduction", "grads", "with_blank_row"), EVERY)
def test_values_and_gradients(reduction, grads, with_blank_row):
    check_values_and_gradients(reduction, grads, with_blank_row)


@pytest.mark.parametrize(("reduction", "grads", "with_blank_row"), SOME)
def test_values_and_gradients_on_both_backends(backend, poison, lengths_known, reduction, grads, with_blank_row):
    check_values_and_gradients(reduction, grads, with_blank_row)


@pytest.mark.conformance
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_utterance_weights_are_weighted_losses(backend, poison, reduction, trainable):
    """The last utterance does not fit its target: its infinite loss times a weight of 0 is 0."""
    weights = torch.tensor([0.5, 2.0, 0.0, -1.5, 0.0], device=DEVICE)
    tensors = [x.requires_grad_() for x in make()]
    tensors[1].requires_grad_(trainable)
    asked = [x for x in tensors if x.requires_grad]
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, V)
    got = linear_ctc_loss(*tensors[:2], *args, reduction, blank_row=tensors[2], utterance_weights=weights)
    nll = linear_ctc_loss(*tensors[:2], *args, "none", blank_row=tensors[2])
    assert nll[-1] == torch.inf
    scale = weights.double()
    if reduction == "mean":
        scale = scale / (torch.tensor(TARGET_LENGTHS, device=DEVICE).clamp(min=1) * B)
    want = torch.where(scale == 0, 0.0, nll * scale)
    torch.testing.assert_close(got, want if reduction == "none" else want.sum(), rtol=1e-12, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), asked) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(trainable, reduction):
    hidden, weight, blank_row = make()
    weight.requires_grad_(trainable)

    def f(hidden, weight, blank_row):
        args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, V, reduction, True)
        return linear_ctc_loss(hidden, weight, *args, blank_row=blank_row)

    # Float64 leaves the chunked sums 1e-16; a fixed nondet_tol of 0 also checks that two backward runs agree.
    torch.autograd.gradcheck(f, (hidden.requires_grad_(), weight, blank_row.requires_grad_()))


def budget(dtype, trainable, weight, hidden):
    """Ours and eager's results in dtype, against truth, on the utterances that fit."""
    args = (padded(fill=1)[:4], INPUT_LENGTHS[:4], TARGET_LENGTHS[:4])

    def eager(h, w):
        return F.ctc_loss(F.linear(h, w).float().log_softmax(-1).transpose(0, 1), *args, reduction="none")

    def truth(h, w):
        return F.ctc_loss((h @ w.t()).log_softmax(-1).transpose(0, 1), *args, reduction="none")

    def ours(h, w):
        return linear_ctc_loss(h, w, *args, reduction="none")

    results = []
    for f, cast in ((ours, dtype), (eager, dtype), (truth, torch.float64)):
        h, w = hidden[:4].to(cast).requires_grad_(), weight.to(cast).requires_grad_(trainable)
        loss = f(h, w)
        results.append((loss, *torch.autograd.grad(loss.sum(), [h, w] if trainable else [h])))
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == dtype
    for i, columns in enumerate(zip(*results)):
        assert_within_budget(*columns, FORWARD if i == 0 else BACKWARD)


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_error_budget(backend, poison, dtype, trainable, scale):
    hidden, weight, _ = make(dtype, scale=scale)
    budget(dtype, trainable, weight, hidden)


@pytest.mark.parametrize("trainable", [False, True])
def test_logits_that_rise_from_chunk_to_chunk(backend, monkeypatch, trainable):
    """Far enough that exponentials kept relative to an early chunk would overflow, or vanish beside a later one."""
    monkeypatch.setattr(linear_ctc_passes, "CHUNK_COLUMNS", 16)
    hidden, weight, _ = make(torch.float32)
    weight[16:32] *= 60
    weight[32:] *= 150
    logits = hidden @ weight.t()
    assert (logits[..., 16:32].amax(-1) - logits[..., :16].amax(-1)).max() > 100
    assert (logits[..., 32:].amax(-1) - logits[..., 16:32].amax(-1)).max() > 100
    budget(torch.float32, trainable, weight, hidden)


@pytest.mark.parametrize("in_place", [False, True])
def test_chunks_in_padded_rows(backend, in_place):
    """Rows as a GPU's products want them, further apart than they are wide, with anything in between."""
    N, w, K = 7, 21, 3
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, 2 * w, generator=generator, dtype=torch.float64)
    logits[:, 25] += 80.0
    columns = torch.tensor([[0, 5, 30], [41, 25, 20]], device=DEVICE)
    utterance_N = torch.tensor([0] * 3 + [1] * 4, device=DEVICE)
    running_3N = torch.tensor([-torch.inf, -torch.inf, 0.0], device=DEVICE)[:, None].repeat(1, N)
    picked_NK, argmax_N = torch.zeros(N, K, device=DEVICE), torch.zeros(N, dtype=torch.long, device=DEVICE)
    steps = implementation("linear_ctc_loss", running_3N)
    kept = []
    for start in (0, w):
        z = torch.full((N, 32), torch.nan, device=DEVICE)
        z[:, :w] = logits[:, start : start + w].to(z)
        out = z[:, :w] if in_place else torch.full_like(z, torch.nan)[:, :w]
        base_N = torch.empty(N, device=DEVICE)
        steps.update_chunk(z[:, :w], out, start, columns, utterance_N, running_3N, picked_NK, argmax_N, None, base_N)
        kept.append(out.double() * base_N.double().exp()[:, None])
    own = columns[utterance_N].cpu()
    _, offset_N, sum_N = running_3N.double().cpu()
    torch.testing.assert_close(offset_N + sum_N.log(), logits.logsumexp(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(picked_NK.double().cpu(), logits.gather(1, own), rtol=1e-6, atol=1e-6)
    assert torch.equal(argmax_N.cpu(), logits.argmax(1))
    want = logits.exp().scatter(1, own, 0.0)
    torch.testing.assert_close(torch.cat(kept, 1).cpu(), want, rtol=1e-4, atol=0)


def test_float16_factors_below_its_range():
    """exp^T (scale x) in float16, where scale alone would underflow: what a GPU computes, here on whatever there is."""
    exp_Nw, x_ND = torch.rand(30, 8, device=DEVICE).half(), torch.randn(30, D, device=DEVICE).half()
    scale_N, log_factor_N = torch.full((30,), 1e-3, device=DEVICE), -20 * torch.rand(30, device=DEVICE)
    chunk = linear_ctc_passes.Chunk(0, exp_Nw, torch.zeros(30))
    got = torch.ones(8, D, device=DEVICE)
    linear_ctc_passes._add_weight_grad(got, chunk, x_ND, scale_N, log_factor_N, overwrite=True)
    want = exp_Nw.double().t() @ (x_ND.double() * (scale_N.double() * log_factor_N.double().exp())[:, None])
    assert want.abs().max() < 0.01
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_never_negative(backend, dtype):
    """Frames as sure as can be: the path's probability rounds to 1, and must not round beyond."""
    generator = torch.Generator().manual_seed(0)
    frames, path = 9, [3, 0, 3, 20, 0, 40, 40, 40, 0]
    weight = torch.eye(V).to(DEVICE, dtype)
    hidden = torch.stack([scale * F.one_hot(torch.tensor(path), V) for scale in (1.0, 5.0, 12.0, 17.0, 30.0, 1000.0)])
    hidden = (hidden + 0.3 * torch.randn(hidden.shape, generator=generator)).to(DEVICE, dtype)
    args = (torch.tensor([[3, 3, 20, 40]] * 6, device=DEVICE), [frames] * 6, [4] * 6)
    loss = linear_ctc_loss(hidden, weight, *args, reduction="none")
    assert (loss >= 0).all() and loss[-1] == 0 and loss[0] > 10


def test_many_classes_and_long_targets():
    generator = torch.Generator().manual_seed(0)
    for frames, width, classes, labels in ((30, 4, 140_001, 12), (1100, 4, 50, 520)):
        hidden = torch.randn(2, frames, width, generator=generator).to(DEVICE).requires_grad_()
        weight = torch.randn(classes, width, generator=generator).to(DEVICE)
        targets = torch.randint(1, classes, (2, labels), generator=generator).to(DEVICE)
        targets[0, -1] = classes - 1
        args = (targets, [frames, frames - 1], [labels, labels - 1])
        loss = linear_ctc_loss(hidden, weight, *args)
        truth = hidden.detach().double().requires_grad_()
        want = F.ctc_loss((truth @ weight.double().t()).log_softmax(-1).transpose(0, 1), *args)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
        got_grad, want_grad = (torch.autograd.grad(x, y)[0].double() for x, y in ((loss, hidden), (want, truth)))
        assert (got_grad - want_grad).norm() <= 1e-4 * want_grad.norm()


@pytest.mark.parametrize("most", [1, 7, 20, 1000])
def test_groups_are_whole_utterances_of_like_size(most):
    lengths = torch.randint(0, 8, (60,), generator=torch.Generator().manual_seed(most))
    compact = op.compact_targets(torch.zeros(60, 1).long(), lengths, [0] * 60, 60, 7, V, 0, torch.device("cpu"))
    frames = linear_ctc_parts.Frames.of(torch.zeros(60, 7, D), compact, lengths)
    groups = frames.groups(most)
    assert [g.start for g in groups] == [0, *(g.stop for g in groups[:-1])] and groups[-1].stop == lengths.sum()
    assert {g.stop for g in groups} <= set(frames.starts)
    sizes = [g.stop - g.start for g in groups]
    assert max(sizes) <= max(most, 7) and max(sizes) - min(sizes) <= max(most // 2, 2 * 7)


def test_argument_forms_agree():
    hidden, weight, _ = make()
    want = linear_ctc_loss(hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS, reduction="none")
    concatenated = torch.tensor(sum(TARGETS, []), device=DEVICE)
    on_device = [torch.tensor(n, device=DEVICE) for n in (INPUT_LENGTHS, TARGET_LENGTHS)]
    for targets in (padded(7), padded().int(), concatenated, concatenated.int()):
        for lengths in ((tuple(INPUT_LENGTHS), TARGET_LENGTHS), on_device, [n.int() for n in on_device]):
            got = linear_ctc_loss(hidden, weight, targets, *lengths, reduction="none")
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("garbage", "trainable", "reduction"),
    [("nan", False, "none"), ("inf", False, "mean"), ("inf", True, "none"), ("nan", True, "mean")],
)
def test_garbage_past_the_length_stays_there(backend, lengths_known, garbage, trainable, reduction):
    hidden, weight, blank_row = make(torch.float32)
    dirty = hidden.clone()
    for b, n in enumerate(INPUT_LENGTHS):
        dirty[b, n:] = float(garbage)
    results = []
    for h in (hidden, dirty):
        leaves = [h.requires_grad_(), blank_row.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
        loss, argmax = linear_ctc_loss(
            h, leaves[2], padded(), INPUT_LENGTHS, TARGET_LENGTHS, V, reduction, True, True, blank_row=leaves[1]
        )
        results.append((loss, argmax, *torch.autograd.grad(loss.sum(), leaves if trainable else leaves[:2])))
    for got, want in zip(*results):
        assert torch.equal(got, want)
    for b, n in enumerate(INPUT_LENGTHS):
        assert results[1][2][b, n:].abs().sum() == 0
        assert (results[1][1][b, n:] == V).all()


@pytest.mark.parametrize(
    ("backend", "trainable", "reduction"),
    [
        *product(["torch"], [False, True], REDUCTIONS),
        *[("triton", False, "none"), ("triton", True, "mean"), ("triton", True, "none")],
    ],
    indirect=["backend"],
)
def test_infeasible_is_inf_and_adds_no_gradient(backend, lengths_known, trainable, reduction):
    hidden, weight, _ = make(torch.float32)
    h, w = hidden.requires_grad_(), weight.requires_grad_(trainable)
    lengths = [4, *INPUT_LENGTHS[1:]]  # [1, 1, 2, 1] needs five frames
    grads = []
    for zero_infinity in (False, True):
        loss = linear_ctc_loss(h, w, padded(), lengths, TARGET_LENGTHS, 0, reduction, zero_infinity=zero_infinity)
        assert not loss.isnan().any()
        for x in (loss[0], loss[-1]) if reduction == "none" else (loss,):
            assert bool(x.isinf()) != zero_infinity
        grads.append(torch.autograd.grad(loss.sum(), [h, w] if trainable else [h]))
        assert grads[-1][0][[0, 4]].abs().sum() == 0
    feasible = [torch.as_tensor(x)[1:4] for x in (padded(), lengths, TARGET_LENGTHS)]
    part = linear_ctc_loss(h[1:4], w, *feasible, reduction="sum" if reduction != "mean" else "mean")
    want = torch.autograd.grad(part * (3 / B if reduction == "mean" else 1), [h, w] if trainable else [h])
    for zero_infinity in (0, 1):
        for got_grad, want_grad in zip(grads[zero_infinity], want):
            torch.testing.assert_close(got_grad, want_grad)


@pytest.mark.parametrize("blank_row", [False, True])
def test_argmax_takes_the_lowest_among_equals(backend, lengths_known, blank_row):
    hidden = torch.ones(1, 3, 2, device=DEVICE)
    weight = torch.zeros(V, 2, device=DEVICE)
    weight[[9, 12, 20, 40]] = 1.0  # equal maxima, two in one chunk and two in others
    args = (torch.tensor([[1]], device=DEVICE), [2], [1])
    if blank_row:
        row = torch.ones(2, device=DEVICE)
        _, argmax = linear_ctc_loss(hidden, weight, *args, blank=V, return_argmax=True, blank_row=row)
        assert argmax.tolist() == [[9, 9, V]]
        _, argmax = linear_ctc_loss(hidden, weight, *args, blank=V, return_argmax=True, blank_row=2 * row)
        assert argmax.tolist() == [[V, V, V]]
    else:
        _, argmax = linear_ctc_loss(hidden, weight, *args, blank=5, return_argmax=True)
        assert argmax.tolist() == [[9, 9, 5]]


def test_backends_agree():
    """The kernels' lazily moved offsets and torch's chunk-wise softmax are two ways to the same numbers."""
    results = []
    for name in ("torch", "triton"):
        hidden, weight, _ = make(torch.float32, scale=3.0)
        hidden.requires_grad_()
        with use_backend(name):
            loss = linear_ctc_loss(hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0, "none", True)
            results.append((loss, *torch.autograd.grad(loss.sum(), hidden)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
