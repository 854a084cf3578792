"""torch's fused attention on a CPU, and the matrix products that stand in for it: who computes what, how exactly."""

import pytest
import torch

from soundwave_fast.ops.pure_torch import fused_attention
from tests.ops.backends import DEVICE
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget
from tests.ops.test_varlen_cross_attention import check_budget, gradients, loop, make, run

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="fused attention is what a CPU runs")
LENGTHS = ([5, 9], [40, 70])


@pytest.fixture
def kernel_calls(monkeypatch):
    """What is done by torch's kernel, in order."""
    calls = []
    for name in ("_forward", "_backward"):
        real = getattr(fused_attention, name)
        monkeypatch.setattr(fused_attention, name, lambda *a, f=real, n=name, **k: (calls.append(n), f(*a, **k))[1])
    return calls


@pytest.mark.parametrize("d", [80, 128])
@pytest.mark.parametrize("times", [1, 1.5, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_moderate_scores_stay_within_the_budget(times, d, seed):
    """Log-sum-exps from 5 to 100, on both sides of where the kernel's backward is given up; the scale is rounded."""
    tensors = [(times * x.detach()).requires_grad_() for x in make(LENGTHS, 2, 2, d, seed=seed)]
    torch.manual_seed(seed)
    check_budget(tensors, LENGTHS)


def test_large_scores_are_left_to_products_by_the_utterance(kernel_calls):
    """An utterance's gradients do not depend on its company: each is judged alone."""
    q, k, v = (x.detach() for x in make(LENGTHS, 2, 2, 32, extra=0))
    alone = [x[:n].clone().requires_grad_() for x, n in ((q, 5), (k, 40), (v, 40))]
    weights = torch.randn(14, 2, 32)
    want = torch.autograd.grad(run(alone, ([5], [40])), alone, weights[:5])
    q[5:] *= 1000
    both = [x.requires_grad_() for x in (q, k, v)]
    kernel_calls.clear()
    grads = torch.autograd.grad(run(both, LENGTHS), both, weights)
    assert kernel_calls == ["_forward", "_forward", "_forward", "_backward"]
    assert all(torch.equal(x, y[: len(x)]) for x, y in zip(want, grads))


@pytest.mark.parametrize("grads", [(1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_some_gradients_are_products(kernel_calls, grads, dtype):
    tensors = make(LENGTHS, 2, 2, 80, dtype=dtype, grads=grads)
    weights = torch.randn_like(tensors[0])
    outs = [run(tensors, LENGTHS)]
    kernel_calls.clear()
    outs[0].backward(weights)
    got = [[torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]]
    assert kernel_calls == ["_backward"] * 2 * (grads[0] and any(grads[1:]))
    for like in (dtype, torch.float64):
        others = [x.detach().to(like).requires_grad_(bool(need)) for x, need in zip(tensors, grads)]
        outs.append(loop(others, LENGTHS))
        leaves = [x for x in others if x.requires_grad]
        found = iter(torch.autograd.grad(outs[-1], leaves, weights.to(like)))
        got.append([next(found) if x.requires_grad else torch.zeros_like(x) for x in others])
    assert_within_budget(*outs, FORWARD)
    for columns in zip(*got):
        assert_within_budget(*columns, BACKWARD)


def test_nan_stays_where_it_is(kernel_calls):
    """A row that is NaN spoils its utterance and no other."""
    tensors = make(LENGTHS, 2, 2, 32)
    tensors[0].data[2] = float("nan")
    out = run(tensors, LENGTHS)
    assert out[2].isnan().all() and out[5:14].isfinite().all()
    dq, dk, dv = gradients(out, tensors, torch.ones_like(out))
    assert dq[5:].isfinite().all() and dk[40:].isfinite().all() and dv[40:].isfinite().all()
