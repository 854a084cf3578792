"""Where the tests' tensors live, and which torch operators a stretch of code runs."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class DTensor(torch.Tensor):
    """What the ops know a distributed tensor by: its class's name."""


class TorchOps(TorchDispatchMode):
    """`with TorchOps() as seen`: seen.names are the torch operators run inside, allocations and views left out."""

    HARMLESS = ("empty", "new_empty", "view", "select", "as_strided", "slice", "alias", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.HARMLESS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
