"""The simulated device itself: computes what a CPU computes, refuses what CUDA refuses, notes what would wait."""

import pytest
import torch
from torch.utils._device import _device_constructors

from soundwave_fast.ops import peak_gather
from soundwave_fast.ops.backend import use_backend
from tests.simulated_cuda.device import DEVICE, OnDevice, read, simulated_cuda


def test_values_gradients_views_and_in_place(waits):
    x = torch.randn(4, 3)
    truth, ours = x.clone().requires_grad_(), x.to("cuda").requires_grad_()
    assert ours.is_cuda and ours.device == DEVICE and isinstance(ours, OnDevice)
    results = []
    for leaf in (truth, ours):
        y = leaf * 2
        y[1:].mul_(torch.arange(3.0, device=leaf.device))
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(results[0], read(results[1]), strict=True))


def test_modules_keep_their_parameters_and_ties(waits):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    x = torch.randn(2, 3)
    truth, known = module(x).detach(), id(module[0].weight)
    module.to("cuda")
    assert id(module[0].weight) == id(module[1].weight) == known and module[0].weight.is_cuda
    assert torch.equal(read(module(x.to("cuda"))), truth)


def test_what_cuda_refuses(waits):
    here, there = torch.randn(3), torch.randn(3, device="cuda")
    for mixed in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: torch.stack([here.sum(), there.sum()]),
        lambda: here[there.long()],
        lambda: there.__setitem__(there > 0, here),
    ):
        with pytest.raises(RuntimeError, match="cuda:0"):
            mixed()
    with pytest.raises(TypeError, match="cuda:0"):
        there.numpy()
    assert (there + torch.tensor(1.0)).is_cuda, "a scalar of the host may take part"
    tokens = torch.ones(1, 3, dtype=torch.long, device="cuda")
    with pytest.raises(ValueError, match="must be on"):
        peak_gather(torch.randn(1, 3, 2), tokens)


def test_a_kernel_is_not_handed_memory_of_the_host(waits):
    with use_backend("triton"), pytest.raises(RuntimeError, match="memory of the host"):
        peak_gather(torch.randn(1, 3, 2), torch.ones(1, 3, dtype=torch.long))


WAITING = {
    "item": lambda x, mask: x.sum().item(),
    "tolist": lambda x, mask: x.tolist(),
    "if": lambda x, mask: bool(mask.any()),
    "equal": lambda x, mask: torch.equal(x, x),
    "cpu": lambda x, mask: x.cpu(),
    "to the host": lambda x, mask: x.to("cpu"),
    "from the host": lambda x, mask: torch.ones(3).to(x.device),
    "from a list": lambda x, mask: torch.tensor([1.0], device=x.device),
    "copy_": lambda x, mask: x.copy_(torch.ones(3)),
    "mask": lambda x, mask: x[mask],
    "mask assigned": lambda x, mask: x.__setitem__(mask, torch.zeros((), device=x.device)),
    "list of indices": lambda x, mask: x[[0, 2]],
    "nonzero": lambda x, mask: mask.nonzero(),
    "repeat_interleave": lambda x, mask: x.repeat_interleave(mask.long()),
    "unique": lambda x, mask: x.unique_consecutive(),
    "a scalar of the host": lambda x, mask: x[0].copy_(torch.zeros(())),
}
FREE = {
    "arithmetic": lambda x, mask: (x * 2 + 1).where(mask, 0.0).cumsum(0),
    "masked_fill": lambda x, mask: x.masked_fill(mask, 0.0),
    "gather": lambda x, mask: x[torch.zeros(2, dtype=torch.long, device=x.device)],
    "factories": lambda x, mask: torch.zeros_like(x) + torch.arange(3, device=x.device),
    "copies that do not wait": lambda x, mask: (
        torch.ones(3).to(x.device, non_blocking=True).to("cpu", non_blocking=True)
    ),
    "repeat_interleave of a known size": lambda x, mask: x.repeat_interleave(mask.long(), output_size=3),
    "another dtype": lambda x, mask: x.to(torch.float64).to(x),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_noted(waits, name):
    x, mask = torch.randn(3, device="cuda"), torch.ones(3, dtype=torch.bool, device="cuda")
    WAITING[name](x, mask)
    assert len(waits) == 1 and waits[0].where.startswith("tests/simulated_cuda/test_device.py:") and not waits[0].ours


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not(waits, name):
    FREE[name](torch.randn(3, device="cuda"), torch.ones(3, dtype=torch.bool, device="cuda"))
    assert waits == []


def test_a_copy_is_there_once_somebody_has_waited(waits):
    x = torch.arange(3, device="cuda")
    copy, event = x.to("cpu", non_blocking=True), torch.cuda.Event()
    event.synchronize()
    assert copy.tolist() == [113] * 3 and waits == [], "the event was not recorded"
    event.record()
    event.synchronize()
    assert copy.tolist() == [0, 1, 2] and len(waits) == 1


def test_a_gradient_of_the_host_is_not_taken_for_autograds_zeros(waits):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return torch.ones(3)

    x = torch.randn(3, device="cuda", requires_grad=True)
    with pytest.raises((RuntimeError, AssertionError), match="host"):
        read(torch.autograd.grad((Wrong.apply(x) + x).sum(), x))
    with pytest.raises(AssertionError, match="left on the host"):
        read(torch.autograd.grad(Wrong.apply(x).sum(), x))


def test_afterwards_torch_is_as_before():
    before = {name: getattr(torch, name) for name in ("empty", "tensor", "compile", "Generator")}
    with simulated_cuda():
        assert torch.empty is not before["empty"]
    assert all(getattr(torch, name) is value for name, value in before.items())
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_the_meta_device_stays_what_it_is():
    """transformers loads models under it; the first such context remembers what the factories are."""
    _device_constructors.cache_clear()
    with simulated_cuda(), torch.device("meta"):
        assert torch.empty(2).is_meta
    with torch.device("meta"):
        assert torch.empty(2).is_meta
