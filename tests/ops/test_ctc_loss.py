"""ctc_loss against F.ctc_loss in every argument form, against the recursion, and on inputs F.ctc_loss gets wrong."""

import pytest
import torch
import torch.nn.functional as F

from soundwave_fast.ops import ctc_loss, reference
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget

T, C = 12, 7
TARGETS = [[1, 1, 2, 1], [], [3], [5, 5, 5], [6, 2]]
INPUT_LENGTHS = [12, 5, 1, 7, 9]
TARGET_LENGTHS = [len(t) for t in TARGETS]
B = len(TARGETS)


def padded(blank: int = 0, fill: int = -100) -> torch.Tensor:
    """TARGETS (B, 5), with the blank's place and class 0 exchanged."""
    rows = [[0 if x == blank else x for x in t] + [fill] * (5 - len(t)) for t in TARGETS]
    return torch.tensor(rows)


def make_log_probs(dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, B, C, generator=generator, dtype=torch.float64).log_softmax(-1).to(dtype).requires_grad_()


def value_and_grad(f, x, weights=None):
    loss = f(x)
    total = loss.sum() if weights is None else (loss * weights.to(loss.dtype)).sum()
    return loss.detach(), torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("blank", [0, 3, C - 1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_matches_torch(reduction, blank):
    args = (padded(blank, fill=0 if blank else 1), torch.tensor(INPUT_LENGTHS), torch.tensor(TARGET_LENGTHS))
    weights = torch.arange(1.0, B + 1) if reduction == "none" else torch.tensor(3.0)
    want, want_grad = value_and_grad(lambda x: F.ctc_loss(x, *args, blank, reduction), make_log_probs(), weights)
    got, got_grad = value_and_grad(lambda x: ctc_loss(x, *args, blank, reduction), make_log_probs(), weights)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad)


def test_argument_forms():
    x = make_log_probs()
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
def test_unbatched(reduction):
    x, targets = make_log_probs()[:, 0], torch.tensor(TARGETS[0])
    for lengths in ((torch.tensor(12), torch.tensor(4)), ((12,), (4,)), (torch.tensor([12]), torch.tensor([4]))):
        want = F.ctc_loss(x, targets, *lengths, reduction=reduction)
        got = ctc_loss(x, targets, *lengths, reduction=reduction)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)


def test_matches_recursion():
    x = make_log_probs()
    want = reference.ctc_loss(x, TARGETS, INPUT_LENGTHS)
    torch.testing.assert_close(ctc_loss(x, padded(), INPUT_LENGTHS, TARGET_LENGTHS, reduction="none"), want)


def test_gradcheck_behind_log_softmax():
    logits = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def f(x):
        return ctc_loss(x.log_softmax(-1), torch.tensor([[1, 1], [2, 3], [3, -1]]), [5, 4, 2], [2, 2, 1], 0, "none")

    torch.autograd.gradcheck(f, (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(dtype):
    x = make_log_probs(dtype)
    args = (padded(fill=1), INPUT_LENGTHS, TARGET_LENGTHS, 0, "none")
    truth, truth_grad = value_and_grad(lambda x: F.ctc_loss(x, *args), x.detach().double().requires_grad_())
    eager, eager_grad = value_and_grad(lambda x: F.ctc_loss(x.float(), *args), x)
    ours, ours_grad = value_and_grad(lambda x: ctc_loss(x, *args), x)
    assert ours.dtype == torch.float32 and ours_grad.dtype == dtype
    assert_within_budget(ours, eager, truth, FORWARD)
    assert_within_budget(ours_grad, eager_grad, truth_grad, BACKWARD)


def test_float32_gradient_is_far_closer_than_torch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(750, 1, 60, generator=generator).log_softmax(-1).requires_grad_()
    args = (torch.randint(1, 60, (1, 100), generator=generator), [750], [100])
    truth = value_and_grad(lambda x: F.ctc_loss(x, *args), x.detach().double().requires_grad_())[1]
    eager = (value_and_grad(lambda x: F.ctc_loss(x, *args), x)[1] - truth).norm()
    ours = (value_and_grad(lambda x: ctc_loss(x, *args), x)[1] - truth).norm()
    assert ours < eager / 30


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_garbage_past_the_length_stays_there(garbage):
    x = make_log_probs().detach()
    dirty = x.clone()
    for b, n in enumerate(INPUT_LENGTHS):
        dirty[n:, b] = garbage
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS)
    want, want_grad = value_and_grad(lambda x: ctc_loss(x, *args), x.requires_grad_())
    got, got_grad = value_and_grad(lambda x: ctc_loss(x, *args), dirty.requires_grad_())
    assert torch.equal(got, want) and torch.equal(got_grad, want_grad)
    for b, n in enumerate(INPUT_LENGTHS):
        assert got_grad[n:, b].abs().sum() == 0


def test_infeasible():
    x = make_log_probs()
    targets = torch.tensor([[1, 1, 1], [1, 2, 3]])
    args = (targets, [4, 12], [3, 3])  # three equal labels need five frames
    loss, grad = value_and_grad(lambda x: ctc_loss(x[:, :2], *args, reduction="none"), x)
    assert loss[0] == torch.inf and loss[1].isfinite()
    assert not grad.isnan().any() and grad[:, 0].abs().sum() == 0 and grad[:, 1].abs().sum() > 0
    for reduction in ("none", "mean", "sum"):
        want, want_grad = value_and_grad(lambda x, r=reduction: F.ctc_loss(x[:, :2], *args, 0, r, True), x)
        got, got_grad = value_and_grad(lambda x, r=reduction: ctc_loss(x[:, :2], *args, 0, r, True), x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_grad, want_grad)


def test_input_length_zero_and_one():
    x = make_log_probs()[:, :3]
    loss, grad = value_and_grad(
        lambda x: ctc_loss(x, torch.tensor([[1], [1], [1]]), [0, 0, 1], [0, 1, 1], reduction="none"), x
    )
    assert loss.tolist() == [0.0, torch.inf, -x[0, 2, 1].item()]
    assert not grad.isnan().any() and grad[:, :2].abs().sum() == 0


def test_empty_batch_and_no_frames():
    for reduction in ("mean", "sum", "none"):
        loss, grad = value_and_grad(
            lambda x, r=reduction: ctc_loss(x, torch.zeros(0, 3).long(), [], [], reduction=r),
            torch.zeros(4, 0, 5, requires_grad=True),
        )
        assert loss.sum() == 0 and grad.shape == (4, 0, 5)
    x = torch.zeros(0, 2, 5, requires_grad=True)
    assert ctc_loss(x, torch.tensor([[1], [1]]), [0, 0], [0, 1], reduction="none").tolist() == [0.0, torch.inf]


def test_never_negative_and_never_nan():
    logits = torch.full((40, 1, 3), -30.0)
    logits[..., 1] = 0.0  # p(1) rounds to 1 in every frame
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.log_softmax(-1).to(dtype).requires_grad_()
        loss, grad = value_and_grad(lambda x: ctc_loss(x, torch.tensor([[1]]), [40], [1]), x)
        assert loss >= 0 and not grad.isnan().any()
    x = (1e4 * torch.randn(40, 1, 3)).log_softmax(-1).requires_grad_()
    loss, grad = value_and_grad(lambda x: ctc_loss(x, torch.tensor([[1, 2]]), [40], [2]), x)
    assert loss.isfinite() and grad.isfinite().all()


def test_minus_infinity_probabilities():
    x = make_log_probs().detach()[:, :1].clone()
    x[:, 0, 4] = -torch.inf  # a class off the target
    x[3, 0, 1] = -torch.inf  # one frame cannot emit the first label
    loss, grad = value_and_grad(lambda x: ctc_loss(x, torch.tensor([[1, 2]]), [12], [2]), x.requires_grad_())
    assert loss.isfinite() and grad.isfinite().all() and grad[3, 0, 1] == 0


def test_unnormalised_input_keeps_torch_values():
    x = 3 + make_log_probs().detach()
    args = (padded(fill=1), INPUT_LENGTHS, TARGET_LENGTHS)
    want, want_grad = value_and_grad(lambda x: F.ctc_loss(x, *args), x.clone().requires_grad_())
    got, got_grad = value_and_grad(lambda x: ctc_loss(x, *args), x.clone().requires_grad_())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad)


def test_non_contiguous():
    x = make_log_probs().detach()
    strided = x.permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS)
    want, want_grad = value_and_grad(lambda x: ctc_loss(x, *args), x.requires_grad_())
    got, got_grad = value_and_grad(lambda x: ctc_loss(x, *args), strided)
    assert torch.equal(got, want) and torch.equal(got_grad, want_grad)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"targets": torch.tensor([[1, 7]])}, ValueError, "targets"),
        ({"targets": torch.tensor([[1, -1]])}, ValueError, "targets"),
        ({"targets": torch.tensor([[1, 0]])}, ValueError, "blank"),
        ({"targets": torch.tensor([1, 2, 3])}, ValueError, "targets"),
        ({"targets": torch.tensor([[1.0, 2.0]])}, TypeError, "targets"),
        ({"targets": torch.tensor([[1, 2]] * 2)}, ValueError, "targets"),
        ({"input_lengths": [5]}, ValueError, "input_lengths"),
        ({"input_lengths": [-1]}, ValueError, "input_lengths"),
        ({"input_lengths": [4, 4]}, ValueError, "input_lengths"),
        ({"input_lengths": torch.tensor([4.0])}, TypeError, "input_lengths"),
        ({"target_lengths": [3]}, ValueError, "target_lengths"),
        ({"blank": 7}, ValueError, "blank"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"log_probs": torch.zeros(4)}, ValueError, "log_probs"),
        ({"log_probs": torch.zeros(4, 1, 7).long()}, TypeError, "log_probs"),
    ],
)
def test_refuses(change, error, name):
    good = {
        "log_probs": torch.zeros(4, 1, 7),
        "targets": torch.tensor([[1, 2]]),
        "input_lengths": [4],
        "target_lengths": [2],
    }
    ctc_loss(**good)
    with pytest.raises(error, match=name):
        ctc_loss(**{**good, **change})
