"""Which implementation an op runs: Triton kernels on a GPU, the same algorithm in plain torch anywhere else.

Every op `name` has two modules of equal functions: `csrc_triton/name` (launchers and their kernels) and
`soundwave_fast/ops/pure_torch/name.py`. The op's custom ops call `implementation("name", tensor).function(...)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

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
    package = "csrc_triton" if runs_triton(x) else "soundwave_fast.ops.pure_torch"
    return importlib.import_module(f"{package}.{op}")


def refuse_dtensor(op: str, **tensors: Tensor | None) -> None:
    """TypeError, with the remedy, if an argument is a DTensor: the op would see a shard and take it for the whole.

    The class is told by its name, since importing torch.distributed.tensor costs as much as all of ours.
    """
    for name, x in tensors.items():
        if x is not None and any(cls.__name__ == "DTensor" for cls in type(x).__mro__[:-1]):
            raise TypeError(
                f"{name} is a DTensor: call {op} inside the forward of the module that owns {name} (fully_shard hands "
                f"it over whole there), or pass {name}.full_tensor()"
            )
