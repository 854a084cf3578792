"""Which implementation an op runs: Triton kernels on a GPU, the same algorithm in plain torch anywhere else.

Every op `name` has two modules of equal functions: `csrc_triton/name` (launchers and their kernels) and
`soundwave_fast/ops/pure_torch/name.py`. The op's custom ops call `implementation("name", tensor).function(...)`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside on "triton" or "torch" whatever the device; not thread-safe, for tests and benchmarks.

    "triton" on CPU tensors needs Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).

    Raises ValueError for another name.
    """
    global _forced
    if name not in ("triton", "torch"):
        raise ValueError(f"name must be 'triton' or 'torch', got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def runs_triton(x: Tensor) -> bool:
    """Whether an op on x runs Triton kernels: on a CUDA or ROCm device, unless `use_backend` says otherwise."""
    return x.is_cuda if _forced is None else _forced == "triton"


def implementation(op: str, x: Tensor) -> ModuleType:
    """The module that computes `op` for x. Triton is imported here, so that a machine without it can use the rest."""
    return _module(f"csrc_triton.{op}" if runs_triton(x) else f"soundwave_fast.ops.pure_torch.{op}")


_module = functools.cache(importlib.import_module)  # which alone takes longer than a small step


def refuse_dtensor(op: str, **tensors: object) -> None:
    """TypeError, with the remedy, if an argument is a DTensor: the op would see a shard and take it for the whole.

    The class is told by its name, since importing torch.distributed.tensor costs as much as all of ours.
    """
    for name, x in tensors.items():
        if x is None or type(x) in _PLAIN:
            continue
        if any(cls.__name__ == "DTensor" for cls in type(x).__mro__[:-1]):
            raise TypeError(
                f"{name} is a DTensor: call {op} inside the forward of the module that owns {name} (fully_shard hands "
                f"it over whole there), or pass {name}.full_tensor()"
            )


def _traced(inputs: tuple) -> bool:
    """Whether something other than eager execution must see the op: a compiler, a dispatch mode, a tensor subclass."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return True
    for x in inputs:  # any() of a generator takes three times as long, on every call of every op
        if type(x) not in _PLAIN and isinstance(x, Tensor):
            return True
    return False


def shortcut(
    op: Callable, save: Callable | None = None, backward: Callable | None = None, native: bool = False
) -> Callable:
    """The custom op `op`; its body alone, where nothing traces it.

    Dispatching a Python custom op takes about 0.1 ms forward and as much backward, which is what the work of the small
    ops takes on a CPU (bench/LOG.md). With `save` and `backward`, those given to `op.register_autograd`, it is
    differentiable, once. `native`: in plain torch the body is differentiable as it stands, and torch's own backward is
    as good as ours; kernels still take `backward`.
    """
    body = getattr(op, "_init_fn", None)
    if body is None:  # a torch that keeps it elsewhere
        return op
    run: Any = body
    if backward is not None:

        def forward(ctx, *inputs):
            output = body(*inputs)
            save(ctx, inputs, output)
            return output

        once = torch.autograd.function.once_differentiable(backward)
        members = {"forward": staticmethod(forward), "backward": staticmethod(once)}
        run = type("Eager", (torch.autograd.Function,), members).apply

    def call(*inputs):
        if _traced(inputs):
            return op(*inputs)
        return body(*inputs) if native and not runs_triton(inputs[0]) else run(*inputs)

    return call
