"""CTCLoss and LinearCTCLoss: the functions' values behind torch's module interface."""

import pytest
import torch
from torch import nn

from soundwave_fast.ops import CTCLoss, LinearCTCLoss

TARGETS, LENGTHS = torch.tensor([[3, 4, 4], [5, 1, -100]]), (torch.tensor([12, 9]), torch.tensor([3, 2]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("blank", [0, 6])
def test_ctc_loss_is_torchs(reduction, blank):
    log_probs = torch.randn(12, 2, 7).log_softmax(-1).requires_grad_()
    arguments = {"blank": blank, "reduction": reduction, "zero_infinity": True}
    ours, theirs = CTCLoss(**arguments), nn.CTCLoss(**arguments)
    targets = TARGETS.clamp(min=1)
    values = [loss(log_probs, targets, *LENGTHS) for loss in (ours, theirs)]
    torch.testing.assert_close(*values)
    grads = [torch.autograd.grad(value.sum(), log_probs)[0] for value in values]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_linear_ctc_loss_is_a_linear_and_the_loss():
    torch.manual_seed(3)
    ours = LinearCTCLoss(16, 7, return_argmax=True)
    linear = nn.Linear(16, 7, bias=False)
    linear.load_state_dict(ours.state_dict())
    hidden = torch.randn(2, 12, 16, requires_grad=True)
    loss, tokens = ours(hidden, TARGETS, *LENGTHS)
    logits = linear(hidden)
    want = nn.CTCLoss()(logits.log_softmax(-1).transpose(0, 1), TARGETS.clamp(min=1), *LENGTHS)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(ours.logits(hidden), logits)
    assert torch.equal(tokens[0], logits[0].argmax(-1)) and torch.equal(tokens[1, :9], logits[1, :9].argmax(-1))
    loss.backward()
    want.backward()
    torch.testing.assert_close(ours.weight.grad, linear.weight.grad, rtol=1e-4, atol=1e-5)


def test_initialised_as_linear():
    torch.manual_seed(0)
    weight = LinearCTCLoss(64, 500).weight.detach()
    assert weight.abs().max() <= 1 / 8 and weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CTCLoss(reduction="avg"), "reduction"),
        (lambda: LinearCTCLoss(4, 3, blank=3), "blank"),
        (lambda: LinearCTCLoss(4, 3, reduction="avg"), "reduction"),
    ],
)
def test_bad_arguments(make, name):
    with pytest.raises(ValueError, match=name):
        make()
