"""What linear_ctc_loss promises beside its values: GEMMs and memory, autograd, compilation, registration, errors."""

import importlib
from itertools import product

import pytest
import torch

from soundwave_fast.ops import linear_ctc_loss, linear_ctc_passes
from tests.ops.backends import DEVICE
from tests.ops.linear_ctc_cases import INPUT_LENGTHS, TARGET_LENGTHS, B, D, T, V, make, padded, shrink_chunks

op = importlib.import_module("soundwave_fast.ops.linear_ctc_loss")  # the package exports the function of this name


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    shrink_chunks(monkeypatch)


def test_frozen_head_gets_no_gradient_and_no_grad_no_graph():
    hidden, weight, blank_row = make()
    hidden.requires_grad_()
    loss = linear_ctc_loss(hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS, zero_infinity=True)
    loss.backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        weight.requires_grad_()
        assert not linear_ctc_loss(hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS).requires_grad


def test_gemms(monkeypatch):
    """GEMMs forward and backward over a vocabulary of 3 chunks: no more than are needed for what is asked."""
    monkeypatch.setattr(linear_ctc_passes, "CHUNK_COLUMNS", 16)
    calls = []
    for name in ("mm", "add_mm"):
        original = getattr(linear_ctc_passes, name)
        monkeypatch.setattr(
            linear_ctc_passes, name, lambda *a, _name=name, _f=original, **k: calls.append(_name) or _f(*a, **k)
        )
    monkeypatch.setattr(linear_ctc_passes, "TRAINED_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(linear_ctc_passes, "FROZEN_ROWS", {"cpu": 100, "cuda": 100})
    hidden, weight, _ = make(torch.float32)
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0)

    def gemms(need_hidden, trainable, reduction="mean", grad=True):
        calls.clear()
        h, w = hidden.clone().requires_grad_(need_hidden), weight.clone().requires_grad_(trainable)
        with torch.set_grad_enabled(grad):
            loss = linear_ctc_loss(h, w, *args, reduction, True)
        forward = len(calls)
        if loss.requires_grad:
            loss.sum().backward()
        return forward, len(calls) - forward

    assert gemms(False, False) == (3, 0)
    assert gemms(True, True, grad=False) == (3, 0)
    assert gemms(True, False) == (6, 0)
    assert gemms(True, False, "none") == (6, 0)
    assert gemms(True, True) == (9, 0)
    assert gemms(False, True) == (6, 0)
    assert gemms(True, True, "none") == (3, 9)
    with torch.inference_mode():
        calls.clear()
        linear_ctc_loss(hidden.clone().requires_grad_(), weight, *args)
        assert len(calls) == 3


@pytest.mark.parametrize("backward", [False, True])
def test_never_allocates_logits_or_a_weight_sized_buffer(backward, monkeypatch):
    monkeypatch.setattr(linear_ctc_passes, "CHUNK_COLUMNS", 1024)
    monkeypatch.setattr(linear_ctc_passes, "FROZEN_ROWS", {"cpu": 128, "cuda": 128})
    hidden = torch.randn(4, 32, 16, device=DEVICE, requires_grad=backward)
    weight = torch.randn(20_000, 16, device=DEVICE)
    targets = torch.ones(4, 3, dtype=torch.long, device=DEVICE)
    memory = "self_device_memory_usage" if DEVICE == "cuda" else "self_cpu_memory_usage"
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = linear_ctc_loss(hidden, weight, targets, [32] * 4, [3] * 4)
        if backward:
            loss.backward()
    largest = max(getattr(event, memory) for event in profile.events())
    assert 4 * 32 * 512 <= largest / 4 <= 4 * 32 * 1024 + 128  # a chunk is seen, and nothing is larger


@pytest.mark.parametrize("trainable", [False, True])
def test_autocast(trainable):
    hidden, weight, blank_row = make(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_(trainable), blank_row.requires_grad_()
    leaves = [x for x in (hidden, weight, blank_row) if x.requires_grad]
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, V, "mean", True)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_ctc_loss(hidden, weight, *args, blank_row=blank_row)
    grads = torch.autograd.grad(loss, leaves)
    half = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in (hidden, weight, blank_row)]
    half_loss = linear_ctc_loss(half[0], half[1], *args, blank_row=half[2])
    assert torch.equal(loss, half_loss)
    for got, want in zip(grads, torch.autograd.grad(half_loss, [x for x in half if x.requires_grad])):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_backward_and_second_run_are_bitwise_the_same(backend, trainable, reduction):
    hidden, weight, _ = make(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_(trainable)
    leaves = [hidden, weight] if trainable else [hidden]
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0, reduction, True)
    loss = linear_ctc_loss(hidden, weight, *args)
    first = torch.autograd.grad(2 * loss.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss.sum(), leaves)
    again = torch.autograd.grad(2 * linear_ctc_loss(hidden, weight, *args).sum(), leaves)
    for a, b, c in zip(first, second, again):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_no_gradient_of_a_gradient():
    hidden, weight, _ = make()
    loss = linear_ctc_loss(hidden.requires_grad_(), weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0, "sum", True)
    (grad,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_ctc_nll_backward"):
        grad.sum().backward()


def test_empty_and_non_contiguous(backend):
    _, weight, _ = make(torch.float32)
    for trainable in (False, True):
        w = weight.clone().requires_grad_(trainable)
        h = torch.zeros(0, T, D, device=DEVICE, requires_grad=True)
        for reduction in ("none", "mean"):
            targets = torch.zeros(0, 3, dtype=torch.long, device=DEVICE)
            loss = linear_ctc_loss(h, w, targets, [], [], reduction=reduction)
            assert loss.sum() == 0
            assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss.sum(), [h, w] if trainable else [h]))
        h = torch.zeros(2, 0, D, device=DEVICE, requires_grad=True)
        targets = torch.ones(2, 1, dtype=torch.long, device=DEVICE)
        loss = linear_ctc_loss(h, w, targets, [0, 0], [0, 1], reduction="none")
        assert loss.tolist() == [0.0, torch.inf]
        assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss.sum(), [h, w] if trainable else [h]))
    hidden, weight, _ = make(torch.float32)
    strided, wide = hidden.transpose(1, 2).contiguous().transpose(1, 2), weight.t().contiguous().t()
    every_other = torch.stack([weight, weight], 2).flatten(1)[:, ::2]
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0, "none")
    want = linear_ctc_loss(hidden, weight, *args)
    for w in (wide, every_other):
        torch.testing.assert_close(linear_ctc_loss(strided, w, *args), want)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("with_blank_row", [False, True])
def test_opcheck(trainable, with_blank_row):
    hidden, weight, blank_row = make(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_(trainable), blank_row.requires_grad_()
    blank_row, blank = (blank_row, V) if with_blank_row else (None, 0)
    lengths = torch.tensor(INPUT_LENGTHS), torch.tensor(TARGET_LENGTHS)
    args = (hidden, weight, blank_row, padded(), *lengths, blank)
    torch.library.opcheck(op._nll, (*args, not trainable, with_blank_row and not trainable, True))
    if trainable:
        for weights in (None, torch.rand(B, device=DEVICE)):
            torch.library.opcheck(op._reduced, (*args, weights, True, True, True, True))
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(op._nll_gradients, (torch.ones(B, device=DEVICE), *plain, False))


def test_weights_that_require_a_gradient_nobody_asks_for():
    hidden, weight, _ = make(torch.float32)
    args = (hidden, weight, padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0, "sum", True)
    with torch.no_grad():
        doubled = linear_ctc_loss(*args, utterance_weights=torch.full((B,), 2.0, device=DEVICE, requires_grad=True))
        torch.testing.assert_close(doubled, 2 * linear_ctc_loss(*args))


def test_opcheck_of_backward():
    grad_B, nll_B, dx, dblank = torch.ones(2), torch.ones(2), torch.randn(2, 3, 4), torch.randn(2, 4)
    none = torch.empty(0)
    for args in ((dx, dblank), (dx, none), (none, dblank)):
        torch.library.opcheck(op._nll_backward, (grad_B, nll_B, *args, torch.bfloat16))
    torch.library.opcheck(op._reduced_backward, (torch.tensor(2.0), dx, dblank, none, torch.bfloat16, torch.float32))


@pytest.mark.parametrize(("trainable", "reduction"), [(False, "mean"), (True, "mean"), (True, "none")])
def test_compiles_whole_and_seldom(trainable, reduction):
    """fullgraph, with sizes and lengths that change from call to call: after the first few, no graph is new."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def f(hidden, weight, blank_row, targets, *lengths):
        options = {"reduction": reduction, "zero_infinity": True, "return_argmax": True, "blank_row": blank_row}
        return linear_ctc_loss(hidden, weight, targets, *lengths, V, **options)

    compiled = torch.compile(f, fullgraph=True, backend=count)
    _, weight, blank_row = make(torch.float32)
    leaves = [weight.requires_grad_(trainable), blank_row.requires_grad_()]
    for frames, batch, labels in ((9, 3, 2), (12, 4, 7), (10, 2, 4), (15, 8, 5)):
        hidden = torch.randn(batch, frames, D, device=DEVICE, requires_grad=True)
        targets = torch.randint(1, V, (batch, labels), device=DEVICE)
        lengths = torch.randint(frames // 2, frames + 1, (batch,)), torch.randint(0, labels + 1, (batch,))
        results = []
        for g in (f, compiled):
            loss, argmax = g(hidden, *leaves, targets, *lengths)
            grads = torch.autograd.grad(loss.sum(), [hidden, *leaves] if trainable else [hidden, blank_row])
            results.append((loss, argmax, *grads))
        torch.testing.assert_close(results[1], results[0])
    assert len(graphs) <= 2


def test_compiled_checks_values():
    hidden, weight = torch.zeros(1, 4, 3), torch.zeros(9, 3)
    f = torch.compile(linear_ctc_loss, fullgraph=True, backend="aot_eager")
    f(hidden, weight, torch.tensor([[1, 2]]), [4], [2])
    with pytest.raises(ValueError, match="targets"):
        f(hidden, weight, torch.tensor([[1, 9]]), [4], [2])
    with pytest.raises(ValueError, match="input_lengths"):
        f(hidden, weight, torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]))


class DTensor(torch.Tensor):
    """Called what the op looks for."""


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"hidden": torch.zeros(1, 4, 3).bfloat16()}, TypeError, r"hidden is torch.bfloat16 and weight is"),
        ({"hidden": torch.zeros(1, 4, 3).long()}, TypeError, "hidden"),
        ({"hidden": torch.zeros(4, 3)}, ValueError, "hidden"),
        ({"weight": torch.zeros(9, 2)}, ValueError, "weight"),
        ({"weight": torch.zeros(9, 3).as_subclass(DTensor)}, TypeError, "weight is a DTensor"),
        ({"blank": 9}, ValueError, "blank"),
        ({"blank": 8, "blank_row": torch.zeros(3)}, ValueError, "blank"),
        ({"blank": 9, "blank_row": torch.zeros(2)}, ValueError, "blank_row"),
        ({"targets": torch.tensor([[1, 9]])}, ValueError, "targets"),
        ({"targets": torch.tensor([[1, 0]])}, ValueError, "blank"),
        ({"targets": torch.tensor([[1.0, 2.0]])}, TypeError, "targets"),
        ({"input_lengths": [5]}, ValueError, "input_lengths"),
        ({"input_lengths": [4, 4]}, ValueError, "input_lengths"),
        ({"target_lengths": [3]}, ValueError, "target_lengths"),
        ({"target_lengths": torch.tensor([2.0])}, TypeError, "target_lengths"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"utterance_weights": torch.ones(2)}, ValueError, "utterance_weights"),
        ({"utterance_weights": torch.ones(1, dtype=torch.long)}, TypeError, "utterance_weights"),
        ({"utterance_weights": torch.ones(1, requires_grad=True)}, ValueError, "utterance_weights"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("trainable", [False, True])
def test_waits_for_nothing_on_a_gpu(trainable):
    hidden, weight, _ = make(torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_(trainable)
    targets = padded().clamp(min=1)
    lengths = torch.tensor(INPUT_LENGTHS), torch.tensor(TARGET_LENGTHS)

    def run(reduction, *lengths):
        loss = linear_ctc_loss(hidden, weight, targets, *lengths, 0, reduction, True)
        return loss, *torch.autograd.grad(loss.sum(), [hidden, weight] if trainable else [hidden])

    forms = [lengths, (INPUT_LENGTHS, TARGET_LENGTHS), [n.cuda() for n in lengths]]
    for form, reduction in product(forms, ("none", "mean")):
        want = run(reduction, *form)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = run(reduction, *form)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.gpu
def test_wrong_values_on_a_gpu_cost_their_utterance_alone():
    hidden, weight, _ = make(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    targets = padded()
    targets[0, 0], targets[1, 0] = V, 0
    lengths = [torch.tensor(x, device=DEVICE) for x in ([9, 5, T + 1, 7, 0], [4, 1, 1, 3, 0])]
    loss = linear_ctc_loss(hidden, weight, targets, *lengths, reduction="none")
    assert loss[:3].isnan().all() and loss[3:].isfinite().all()
    grads = torch.autograd.grad(loss.sum(), [hidden, weight])
    assert grads[0][:3].abs().sum() == 0 and all(g.isfinite().all() for g in grads)
