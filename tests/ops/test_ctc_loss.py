"""ctc_loss on both backends: against F.ctc_loss in every argument form, and on inputs F.ctc_loss gets wrong."""

import pytest
import torch
import torch.nn.functional as F

from soundwave_fast.ops import ctc_loss, reference
from soundwave_fast.ops.compact import compact_targets
from soundwave_fast.ops.ctc_loss import _backward_op, _forward_op
from tests.ops.backends import DEVICE
from tests.ops.ctc_cases import (
    INPUT_LENGTHS,
    TARGET_LENGTHS,
    TARGETS,
    B,
    C,
    make_log_probs,
    padded,
    same,
    value_and_grad,
)
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("reduction", "blank"), [("none", 0), ("none", 3), ("mean", C - 1), ("mean", 0), ("sum", 3), ("none", C - 1)]
)
def test_matches_torch(backend, poison, reduction, blank):
    args = (padded(blank, fill=0 if blank else 1), torch.tensor(INPUT_LENGTHS), torch.tensor(TARGET_LENGTHS))
    weights = torch.arange(1.0, B + 1) if reduction == "none" else torch.tensor(3.0)
    x = make_log_probs(device="cpu")
    want, want_grad = value_and_grad(lambda x: F.ctc_loss(x, *args, blank, reduction), x, weights)
    got, got_grad = value_and_grad(lambda x: ctc_loss(x, *args, blank, reduction), make_log_probs(), weights)
    torch.testing.assert_close(got.cpu(), want)
    torch.testing.assert_close(got_grad.cpu(), want_grad)


def test_argument_forms():
    x = make_log_probs(device="cpu")
    concatenated = torch.tensor(sum(TARGETS, []))
    want = ctc_loss(x, padded(), INPUT_LENGTHS, TARGET_LENGTHS, reduction="none")
    lengths = [
        (INPUT_LENGTHS, TARGET_LENGTHS),
        (tuple(INPUT_LENGTHS), torch.tensor(TARGET_LENGTHS)),
        (torch.tensor(INPUT_LENGTHS, dtype=torch.int32), tuple(TARGET_LENGTHS)),
    ]
    for targets in (padded(), padded().int(), concatenated, concatenated.int(), padded(fill=10**6)):
        for pair in lengths:
            assert torch.equal(ctc_loss(x, targets, *pair, reduction="none"), want)
    torch.testing.assert_close(F.ctc_loss(x, concatenated, INPUT_LENGTHS, TARGET_LENGTHS, reduction="none"), want)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_unbatched(backend, reduction):
    x, targets = make_log_probs()[:, 0], torch.tensor(TARGETS[0])
    for lengths in ((torch.tensor(12), torch.tensor(4)), ((12,), (4,)), (torch.tensor([12]), torch.tensor([4]))):
        want = F.ctc_loss(x.cpu(), targets, *lengths, reduction=reduction)
        got = ctc_loss(x, targets, *lengths, reduction=reduction)
        assert got.shape == want.shape
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.conformance
def test_matches_recursion(backend):
    x = make_log_probs()
    want = reference.ctc_loss(x.cpu(), TARGETS, INPUT_LENGTHS)
    got = ctc_loss(x, padded(), INPUT_LENGTHS, TARGET_LENGTHS, reduction="none")
    torch.testing.assert_close(got.cpu(), want)


def test_gradcheck_behind_log_softmax(backend):
    frames = 5 if backend == "torch" else 3
    logits = torch.randn(frames, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    targets = torch.tensor([[1, 2], [1, -1]])

    def f(x):
        return ctc_loss(x.log_softmax(-1), targets, [frames, frames - 1], [2, 1], 0, "none")

    torch.autograd.gradcheck(f, (logits,), fast_mode=backend == "triton")


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(backend, poison, dtype):
    x = make_log_probs(dtype, seed=torch.seed() % 1000)
    args = (padded(fill=1), INPUT_LENGTHS, TARGET_LENGTHS, 0, "none")
    truth, truth_grad = value_and_grad(lambda x: F.ctc_loss(x, *args), x.detach().cpu().double().requires_grad_())
    eager, eager_grad = value_and_grad(lambda x: F.ctc_loss(x.float(), *args), x.detach().cpu().requires_grad_())
    ours, ours_grad = value_and_grad(lambda x: ctc_loss(x, *args), x)
    assert ours.dtype == torch.float32 and ours_grad.dtype == dtype
    assert_within_budget(ours.cpu(), eager, truth, FORWARD)
    assert_within_budget(ours_grad.cpu(), eager_grad, truth_grad, BACKWARD)


@pytest.mark.parametrize(("frames", "labels"), [(160, 30), (750, 100)])
def test_float32_gradient_is_far_closer_than_torch(backend, frames, labels):
    if backend == "triton" and DEVICE == "cpu" and frames > 160:
        pytest.skip("too long for the interpreter")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(frames, 1, 60, generator=generator).log_softmax(-1).to(DEVICE).requires_grad_()
    args = (torch.randint(1, 60, (1, labels), generator=generator), [frames], [labels])
    x_cpu = x.detach().cpu().requires_grad_()
    truth = value_and_grad(lambda x: F.ctc_loss(x, *args), x_cpu.detach().double().requires_grad_())[1]
    eager = (value_and_grad(lambda x: F.ctc_loss(x, *args), x_cpu)[1] - truth).norm()
    ours = (value_and_grad(lambda x: ctc_loss(x, *args), x)[1].cpu() - truth).norm()
    assert ours < 3e-5 * truth.norm() and ours < eager / 10


def test_garbage_past_the_length_stays_there(backend, poison):
    x = make_log_probs().detach()
    dirty = x.clone()
    for b, (n, garbage) in enumerate(zip(INPUT_LENGTHS, (0, torch.nan, torch.inf, -torch.inf, torch.nan))):
        dirty[n:, b] = garbage
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS)
    want = value_and_grad(lambda x: ctc_loss(x, *args), x.requires_grad_())
    got, got_grad = value_and_grad(lambda x: ctc_loss(x, *args), dirty.requires_grad_())
    assert same(want, (got, got_grad))
    for b, n in enumerate(INPUT_LENGTHS):
        assert got_grad[n:, b].abs().sum() == 0


def test_infeasible(backend, poison):
    targets = torch.tensor([[1, 1, 1], [1, 2, 3]])
    args = (targets, [4, 12], [3, 3])  # three equal labels need five frames
    x = make_log_probs()
    loss, grad = value_and_grad(lambda x: ctc_loss(x[:, :2], *args, reduction="none"), x)
    assert loss[0] == torch.inf and loss[1].isfinite()
    assert not grad.isnan().any() and grad[:, 0].abs().sum() == 0 and grad[:, 1].abs().sum() > 0
    for reduction in ("none", "mean", "sum"):
        cpu = make_log_probs(device="cpu")
        want, want_grad = value_and_grad(lambda x, r=reduction: F.ctc_loss(x[:, :2], *args, 0, r, True), cpu)
        got, got_grad = value_and_grad(lambda x, r=reduction: ctc_loss(x[:, :2], *args, 0, r, True), x)
        torch.testing.assert_close(got.cpu(), want)
        torch.testing.assert_close(got_grad.cpu(), want_grad)


def test_input_length_zero_and_one(backend, poison):
    x = make_log_probs()[:, :3]
    loss, grad = value_and_grad(
        lambda x: ctc_loss(x, torch.tensor([[1], [1], [1]]), [0, 0, 1], [0, 1, 1], reduction="none"), x
    )
    assert loss[:2].tolist() == [0.0, torch.inf] and loss[2].item() == pytest.approx(-x[0, 2, 1].item(), rel=1e-14)
    assert not grad.isnan().any() and grad[:, :2].abs().sum() == 0


def test_empty_batch_and_no_frames(backend, poison):
    for reduction in ("mean", "sum", "none"):
        loss, grad = value_and_grad(
            lambda x, r=reduction: ctc_loss(x, torch.zeros(0, 3).long(), [], [], reduction=r),
            torch.zeros(4, 0, 5, device=DEVICE, requires_grad=True),
        )
        assert loss.sum() == 0 and grad.shape == (4, 0, 5)
    x = torch.zeros(0, 2, 5, device=DEVICE, requires_grad=True)
    loss, grad = value_and_grad(lambda x: ctc_loss(x, torch.tensor([[1], [1]]), [0, 0], [0, 1], reduction="none"), x)
    assert loss.tolist() == [0.0, torch.inf] and grad.shape == (0, 2, 5)


def test_never_negative_and_never_nan(backend):
    logits = torch.full((40, 1, 3), -30.0, device=DEVICE)
    logits[..., 1] = 0.0  # p(1) rounds to 1 in every frame
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.log_softmax(-1).to(dtype).requires_grad_()
        loss, grad = value_and_grad(lambda x: ctc_loss(x, torch.tensor([[1]]), [40], [1]), x)
        assert loss >= 0 and not grad.isnan().any()
    x = (1e4 * torch.randn(40, 1, 3, device=DEVICE)).log_softmax(-1).requires_grad_()
    loss, grad = value_and_grad(lambda x: ctc_loss(x, torch.tensor([[1, 2]]), [40], [2]), x)
    assert loss.isfinite() and grad.isfinite().all()


def test_minus_infinity_probabilities(backend):
    x = make_log_probs().detach()[:, :1].clone()
    x[:, 0, 4] = -torch.inf  # a class off the target
    x[3, 0, 1] = -torch.inf  # one frame cannot emit the first label
    loss, grad = value_and_grad(lambda x: ctc_loss(x, torch.tensor([[1, 2]]), [12], [2]), x.requires_grad_())
    assert loss.isfinite() and grad.isfinite().all() and grad[3, 0, 1] == 0


def test_unnormalised_input_keeps_torch_values(backend):
    x = 3 + make_log_probs().detach()
    args = (padded(fill=1), INPUT_LENGTHS, TARGET_LENGTHS)
    want, want_grad = value_and_grad(lambda x: F.ctc_loss(x, *args), x.cpu().requires_grad_())
    got, got_grad = value_and_grad(lambda x: ctc_loss(x, *args), x.requires_grad_())
    torch.testing.assert_close(got.cpu(), want)
    torch.testing.assert_close(got_grad.cpu(), want_grad)


def test_non_contiguous(backend, poison):
    """Any layout gives the same bits; the gradient takes the input's, so that log_softmax's backward need not copy."""
    x = make_log_probs().detach()
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS)
    want = value_and_grad(lambda x: ctc_loss(x, *args), x.requires_grad_())
    batch_first = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got = value_and_grad(lambda x: ctc_loss(x, *args), batch_first)
    assert same(want, got) and got[1].stride() == batch_first.stride()
    gaps = F.pad(x.detach().permute(1, 2, 0), (1, 2))[..., 1:-2].permute(2, 0, 1).requires_grad_()
    assert same(want, value_and_grad(lambda x: ctc_loss(x, *args), gaps))
    expanded = x.detach()[:, :1].clone().requires_grad_()
    got = value_and_grad(lambda x: ctc_loss(x.expand(-1, B, -1), *args), expanded)[1]
    torch.testing.assert_close(
        got, value_and_grad(lambda x: ctc_loss(x.repeat(1, B, 1), *args), expanded)[1], rtol=0, atol=1e-15
    )


def test_no_gradient_no_residual(backend, launches):
    x = make_log_probs(torch.float32)
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS)
    with torch.no_grad():
        quiet = ctc_loss(x, *args, reduction="none")
    assert not quiet.requires_grad
    assert launches == (["_pick_kernel", "_recursion_kernel"] if backend == "triton" else [])
    launches.clear()
    loss = ctc_loss(x, *args, reduction="none")
    assert torch.equal(loss, quiet)
    loss.sum().backward()
    kernels = ["pick", "recursion", "chain", "occupancy", "dense", "label"] if backend == "triton" else []
    assert launches == [f"_{name}_kernel" for name in kernels]


def test_classes_and_targets_wider_than_a_block(backend, poison, monkeypatch):
    if backend == "triton":
        import csrc_triton.ctc_loss

        monkeypatch.setattr(csrc_triton.ctc_loss, "_TILE", 16)
        monkeypatch.setattr(csrc_triton.ctc_loss, "_COMPACT_TILE", 16)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(44, 1, 39, generator=generator).log_softmax(-1).to(DEVICE).requires_grad_()
    args = (torch.randint(0, 38, (1, 21), generator=generator), [43], [21], 38)
    want = value_and_grad(lambda x: F.ctc_loss(x, *args), x.detach().cpu().double().requires_grad_())
    for ours, truth in zip(value_and_grad(lambda x: ctc_loss(x, *args), x), want):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-5, atol=1e-6)


def test_large_vocabulary_and_long_target():
    """More classes than 2^17, and more labels than the native CUDA op once got right (512)."""
    generator = torch.Generator().manual_seed(4)
    for frames, labels, classes in ((40, 12, 1 << 18), (1400, 600, 40)):
        x = torch.randn(frames, 2, classes, generator=generator).log_softmax(-1).to(DEVICE).requires_grad_()
        args = (torch.randint(1, classes, (2, labels), generator=generator), [frames, frames - 3], [labels, 5])
        want = value_and_grad(lambda x, a=args: F.ctc_loss(x, *a), x.detach().cpu().double().requires_grad_())
        for ours, truth in zip(value_and_grad(lambda x, a=args: ctc_loss(x, *a), x), want):
            assert (ours.cpu() - truth).norm() <= 3e-5 * truth.norm()


def test_same_bits_in_a_long_run(backend):
    generator = torch.Generator().manual_seed(5)
    frames, runs = (200, 40) if backend == "torch" or DEVICE == "cuda" else (12, 3)
    x = torch.randn(frames, 4, 30, generator=generator).log_softmax(-1).to(DEVICE).requires_grad_()
    targets = torch.randint(1, 5, (4, frames // 4), generator=generator)  # many repeats
    args = (targets, [frames, frames - 1, frames // 2, frames], [frames // 4, 3, 0, 1])
    torch.use_deterministic_algorithms(True)
    try:
        want = value_and_grad(lambda x: ctc_loss(x, *args), x)
        for _ in range(runs):
            held = torch.full((torch.randint(1, 10**6, ()),), torch.nan, device=DEVICE)  # other addresses, dirty memory
            assert same(want, value_and_grad(lambda x: ctc_loss(x, *args), x))
            del held
    finally:
        torch.use_deterministic_algorithms(False)


def test_batch_composition_changes_no_bits(backend):
    """An utterance gets the same loss and gradient alone and beside others."""
    x = make_log_probs(torch.float32)
    loss, grad = value_and_grad(lambda x: ctc_loss(x, padded(), INPUT_LENGTHS, TARGET_LENGTHS, 0, "none"), x)
    for b in (0, 3):
        args = (padded()[b : b + 1], INPUT_LENGTHS[b : b + 1], TARGET_LENGTHS[b : b + 1], 0, "none")
        alone = value_and_grad(lambda x, a=args: ctc_loss(x, *a), x.detach()[:, b : b + 1].requires_grad_())
        torch.testing.assert_close(alone[0], loss[b : b + 1], rtol=1e-6, atol=0)
        torch.testing.assert_close(alone[1], grad[:, b : b + 1], rtol=1e-6, atol=1e-7)


def test_opcheck(backend):
    x = make_log_probs(torch.float32).detach()[:6, :2].requires_grad_()
    compact = compact_targets(torch.tensor([[1, 1], [2, 0]]), [6, 4], [2, 1], 2, 6, C, 0, x.device)
    parts = (compact.columns_BK, compact.first_BK, compact.input_lengths_B, compact.target_lengths_B)
    torch.library.opcheck(_forward_op, (x, *parts, "mean", False, True))
    torch.library.opcheck(_forward_op, (x.detach(), *parts, "none", True, False))
    _, *saved = _forward_op(x.detach(), *parts, "sum", False, True)
    torch.library.opcheck(_backward_op, (torch.ones((), device=DEVICE), x.detach(), *parts[:2], *saved))
    torch.library.opcheck(_backward_op, (torch.ones(2, device=DEVICE), x.detach(), *parts[:2], *saved))


def test_no_second_derivative():
    x = make_log_probs()
    (grad,) = torch.autograd.grad(ctc_loss(x, padded(), INPUT_LENGTHS, TARGET_LENGTHS), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("form", ["tensors", "lists", "concatenated"])
def test_compiles_whole_and_seldom(form):
    """fullgraph, with sizes and lengths that change from call to call: after the first few, no graph is new."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @torch.compile(fullgraph=True, backend=count)
    def f(logits, targets, input_lengths, target_lengths):
        return ctc_loss(logits.log_softmax(-1), targets, input_lengths, target_lengths, zero_infinity=True)

    for frames, batch, classes, labels in ((9, 3, 5, 2), (12, 4, 7, 3), (10, 2, 6, 4), (15, 5, 9, 5)):
        batch = 3 if form == "lists" else batch  # a list of another length is another program
        logits = torch.randn(frames, batch, classes, requires_grad=True)
        input_lengths = [frames - b for b in range(batch)]
        target_lengths = [max(labels - b, 1) for b in range(batch)]
        targets = torch.randint(1, classes, (batch, labels))
        if form != "lists":
            input_lengths, target_lengths = torch.tensor(input_lengths), torch.tensor(target_lengths)
        if form == "concatenated":
            targets = torch.cat([row[:n] for row, n in zip(targets, target_lengths)])
        args = (targets, input_lengths, target_lengths)
        want = value_and_grad(lambda x, a=args: ctc_loss(x.log_softmax(-1), *a, zero_infinity=True), logits)
        got = value_and_grad(lambda x, a=args: f(x, *a), logits)
        torch.testing.assert_close(got, want)
    assert len(graphs) <= (3 if form == "lists" else 2)


@pytest.mark.slow
def test_compiled_by_inductor():
    x = make_log_probs(torch.float32, device="cpu")
    args = (padded(), torch.tensor(INPUT_LENGTHS), torch.tensor(TARGET_LENGTHS))
    f = torch.compile(lambda x: ctc_loss(x.log_softmax(-1), *args), fullgraph=True, dynamic=True)
    want = value_and_grad(lambda x: ctc_loss(x.log_softmax(-1), *args), x)
    torch.testing.assert_close(value_and_grad(f, x), want)
