"""linear_ctc_loss against float64 truth: values, every combination of gradients, dtypes, and what it must not hold."""

import pytest
import torch
import torch.nn.functional as F

from soundwave_fast.ops import linear_ctc_loss, linear_ctc_passes, reference
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget

B, T, D, V = 5, 12, 6, 41
TARGETS = [[1, 1, 2, 1], [], [33], [40, 40, 40], [6, 2]]
INPUT_LENGTHS = [12, 5, 1, 7, 0]  # the last cannot hold its target
TARGET_LENGTHS = [len(t) for t in TARGETS]
FEASIBLE = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and several groups, also on tensors this small."""
    monkeypatch.setattr(linear_ctc_passes, "CHUNK_COLUMNS", 16)
    monkeypatch.setattr(linear_ctc_passes, "GROUP_ROWS", 13)


def padded(fill: int = -100) -> torch.Tensor:
    return torch.tensor([t + [fill] * (4 - len(t)) for t in TARGETS])


def make(dtype=torch.float64, seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(V, D, generator=generator, dtype=torch.float64)
    blank_row = torch.randn(D, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (hidden, weight, blank_row)]


def truth_of(hidden, weight, blank_row, blank, grads):
    """nll (B,), argmax, and the gradients of FEASIBLE . nll in float64."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, blank_row)]
    nll, argmax = reference.linear_ctc_loss(leaves[0], leaves[1], TARGETS, INPUT_LENGTHS, blank, leaves[2])
    total = (nll[:4] * FEASIBLE[:4]).sum()
    return nll, argmax, torch.autograd.grad(total, [x for x, need in zip(leaves, grads) if need])


@pytest.mark.parametrize("with_blank_row", [False, True])
@pytest.mark.parametrize("grads", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_values_and_gradients(reduction, grads, with_blank_row):
    if grads[2] and not with_blank_row:
        pytest.skip("no blank row to differentiate")
    hidden, weight, blank_row = make()
    blank_row, blank = (blank_row, V) if with_blank_row else (None, 0)
    want_nll, want_argmax, _ = truth_of(hidden, weight, blank_row, blank, grads)
    leaves = [
        None if x is None else x.requires_grad_(bool(need)) for x, need in zip((hidden, weight, blank_row), grads)
    ]
    got, argmax = linear_ctc_loss(
        *leaves[:2], padded(), INPUT_LENGTHS, TARGET_LENGTHS, blank, reduction, True, True, blank_row=leaves[2]
    )
    nll = want_nll.detach().masked_fill(want_nll == torch.inf, 0.0)
    lengths = torch.tensor(TARGET_LENGTHS).clamp(min=1)
    weights = {"none": FEASIBLE, "sum": torch.ones(B), "mean": 1 / (lengths * B)}[reduction].double()
    want = nll if reduction == "none" else (nll * weights).sum()
    torch.testing.assert_close(got.detach(), want)
    assert torch.equal(argmax, want_argmax)

    asked = [x for x in leaves if x is not None and x.requires_grad]
    got_grads = torch.autograd.grad((got * FEASIBLE).sum() if reduction == "none" else got, asked)
    clones = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    nll, _ = reference.linear_ctc_loss(clones[0], clones[1], TARGETS, INPUT_LENGTHS, blank, clones[2])
    want_grads = torch.autograd.grad(
        (nll[:4] * weights[:4]).sum(), [c for c, x in zip(clones, leaves) if x is not None and x.requires_grad]
    )
    for got_grad, want_grad in zip(got_grads, want_grads):
        torch.testing.assert_close(got_grad, want_grad)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_error_budget(dtype, trainable, scale):
    hidden, weight, _ = make(dtype, scale=scale)
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


def test_argument_forms_agree():
    hidden, weight, _ = make()
    want = linear_ctc_loss(hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS, reduction="none")
    concatenated = torch.tensor(sum(TARGETS, []))
    for targets in (padded(7), padded().int(), concatenated, concatenated.int()):
        for lengths in ((tuple(INPUT_LENGTHS), TARGET_LENGTHS), map(torch.tensor, (INPUT_LENGTHS, TARGET_LENGTHS))):
            assert torch.equal(linear_ctc_loss(hidden, weight, targets, *lengths, reduction="none"), want)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_past_the_length_stays_there(garbage, trainable):
    hidden, weight, _ = make()
    dirty = hidden.clone()
    for b, n in enumerate(INPUT_LENGTHS):
        dirty[b, n:] = garbage
    results = []
    for h in (hidden, dirty):
        w = weight.clone().requires_grad_(trainable)
        h.requires_grad_()
        loss = linear_ctc_loss(h, w, padded(), INPUT_LENGTHS, TARGET_LENGTHS, zero_infinity=True)
        results.append((loss, *torch.autograd.grad(loss, [h, w] if trainable else [h])))
    for got, want in zip(*results):
        assert torch.equal(got, want)
    for b, n in enumerate(INPUT_LENGTHS):
        assert results[1][1][b, n:].abs().sum() == 0


@pytest.mark.parametrize("trainable", [False, True])
def test_infeasible_is_inf_and_adds_no_gradient(trainable):
    hidden, weight, _ = make()
    h, w = hidden.requires_grad_(), weight.requires_grad_(trainable)
    for zero_infinity in (False, True):
        for reduction in ("none", "mean", "sum"):
            loss = linear_ctc_loss(
                h, w, padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0, reduction, zero_infinity=zero_infinity
            )
            assert not loss.isnan().any()
            last = loss[-1] if reduction == "none" else loss
            assert bool(last.isinf()) != zero_infinity
            for grad in torch.autograd.grad(loss.sum(), [h, w] if trainable else [h]):
                assert grad.isfinite().all()


def test_argmax_takes_the_lowest_among_equals():
    hidden = torch.ones(1, 3, 2)
    weight = torch.zeros(V, 2)
    weight[[9, 20, 40]] = 1.0  # three equal maxima, in three chunks
    args = (torch.tensor([[1]]), [2], [1])
    _, argmax = linear_ctc_loss(hidden, weight, *args, blank=5, return_argmax=True)
    assert argmax.tolist() == [[9, 9, 5]]
    _, argmax = linear_ctc_loss(hidden, weight, *args, blank=V, return_argmax=True, blank_row=torch.ones(2))
    assert argmax.tolist() == [[9, 9, V]]


def test_frozen_head_gets_no_gradient_and_no_grad_no_graph():
    hidden, weight, blank_row = make()
    hidden.requires_grad_()
    loss = linear_ctc_loss(hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS, zero_infinity=True)
    loss.backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        weight.requires_grad_()
        assert not linear_ctc_loss(hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS).requires_grad


@pytest.mark.parametrize("backward", [False, True])
def test_never_allocates_logits_or_a_weight_sized_buffer(backward, monkeypatch):
    monkeypatch.setattr(linear_ctc_passes, "CHUNK_COLUMNS", 1024)
    hidden, weight = torch.randn(4, 32, 16, requires_grad=backward), torch.randn(20_000, 16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != weight.data_ptr():
                largest = max(largest, out.numel())
            return out

    with Watch():
        loss = linear_ctc_loss(hidden, weight, torch.ones(4, 3).long(), [32] * 4, [3] * 4)
        if backward:
            loss.backward()
    assert largest <= 4 * 32 * 1024


@pytest.mark.parametrize("trainable", [False, True])
def test_autocast(trainable):
    hidden, weight, blank_row = make(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_(trainable), blank_row.requires_grad_()
    leaves = [x for x in (hidden, weight, blank_row) if x.requires_grad]
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, V, "mean", True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_ctc_loss(hidden, weight, *args, blank_row=blank_row)
    grads = torch.autograd.grad(loss, leaves)
    half = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in (hidden, weight, blank_row)]
    half_loss = linear_ctc_loss(half[0], half[1], *args, blank_row=half[2])
    assert torch.equal(loss, half_loss)
    for got, want in zip(grads, torch.autograd.grad(half_loss, [x for x in half if x.requires_grad])):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=2e-2, atol=2e-4)


def test_second_backward_of_a_trainable_head():
    hidden, weight, _ = make()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_ctc_loss(hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS, zero_infinity=True)
    first = torch.autograd.grad(2 * loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(2 * loss, [hidden, weight])
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b)


def test_empty_batch_and_non_contiguous():
    _, weight, _ = make()
    for trainable in (False, True):
        w = weight.clone().requires_grad_(trainable)
        h = torch.zeros(0, T, D, dtype=torch.float64, requires_grad=True)
        for reduction in ("none", "mean"):
            loss = linear_ctc_loss(h, w, torch.zeros(0, 3).long(), [], [], reduction=reduction)
            assert loss.sum() == 0
            assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss.sum(), [h, w] if trainable else [h]))
    hidden, weight, _ = make()
    strided, wide = hidden.transpose(1, 2).contiguous().transpose(1, 2), weight.t().contiguous().t()
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0, "none")
    torch.testing.assert_close(linear_ctc_loss(strided, wide, *args), linear_ctc_loss(hidden, weight, *args))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"hidden": torch.zeros(1, 4, 3).bfloat16()}, TypeError, r"hidden is torch.bfloat16 and weight is"),
        ({"hidden": torch.zeros(1, 4, 3).long()}, TypeError, "hidden"),
        ({"hidden": torch.zeros(4, 3)}, ValueError, "hidden"),
        ({"weight": torch.zeros(9, 2)}, ValueError, "weight"),
        ({"blank": 9}, ValueError, "blank"),
        ({"blank": 8, "blank_row": torch.zeros(3)}, ValueError, "blank"),
        ({"blank": 9, "blank_row": torch.zeros(2)}, ValueError, "blank_row"),
        ({"targets": torch.tensor([[1, 9]])}, ValueError, "targets"),
        ({"targets": torch.tensor([[1, 0]])}, ValueError, "blank"),
        ({"input_lengths": [5]}, ValueError, "input_lengths"),
        ({"target_lengths": [3]}, ValueError, "target_lengths"),
        ({"reduction": "max"}, ValueError, "reduction"),
    ],
)
def test_refuses(change, error, name):
    good = {
        "hidden": torch.zeros(1, 4, 3),
        "weight": torch.zeros(9, 3),
        "targets": torch.tensor([[1, 2]]),
        "input_lengths": [4],
        "target_lengths": [2],
    }
    linear_ctc_loss(**good)
    with pytest.raises(error, match=name):
        linear_ctc_loss(**{**good, **change})
