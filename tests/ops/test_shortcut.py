"""Eager calls go round torch's dispatcher, tracers do not: same results, same errors, once differentiable."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from soundwave_fast.ops import ctc_peaks, peak_gather
from soundwave_fast.ops.gemm import linear


class Calls(TorchDispatchMode):
    """Names of the operators that torch dispatches inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run():
    features = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    packed = peak_gather(features, torch.tensor([[1, 1, 2, 2, 3, 3]] * 2), [6, 3])
    (packed.data**2).sum().backward()
    return packed.data.detach(), packed.index, features.grad


def test_both_roads_agree_and_only_one_is_seen():
    short = run()
    with Calls() as calls:
        long = run()
    assert "soundwave_fast.peak_gather.default" in calls.names
    assert "soundwave_fast.peak_gather_backward.default" in calls.names
    for x, y in zip(short, long, strict=True):
        assert torch.equal(x, y)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert not [event.key for event in profile.key_averages() if event.key.startswith("soundwave_fast::")]


def test_fake_tensors_take_the_registered_op():
    with FakeTensorMode():
        index, cu_seqlens = ctc_peaks(torch.empty(2, 6, dtype=torch.int64), capacity=256)
    assert index.shape == (256,) and cu_seqlens.shape == (3,)


def test_functorch_takes_the_registered_op():
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    out = torch.func.vmap(linear, in_dims=(0, None))(x[:, None], weight)
    torch.testing.assert_close(out[:, 0], x @ weight.T)


def test_a_second_backward_is_refused():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()
