"""Activation checkpointing and compilation: the LLM layer by layer, the adapters whole; in training alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train.config import Run


def compiles(setting: bool | str, device: torch.device) -> bool:
    """'auto': on a GPU. On a CPU the first steps take half a minute longer, more than a short run gets back."""
    return device.type == "cuda" if setting == "auto" else bool(setting)


def wrap(model: nn.Module, run: Run, device: torch.device, backend: str = "inductor") -> None:
    """Replace the forwards of the LLM's layers and of the adapters, in place and before sharding.

    What wraps is inside a module's hooks (FSDP's among them), and steps aside in evaluation, whose shapes and cache
    would be compiled for nothing. The programs serve all layers and lengths: of the LLM's layer there is one for the
    first, whose input is a view, and one for the others, each with and without padding, for one prompt and for several.

    Args:
        backend: torch.compile's.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
    compiled = backend if compiles(run.compile, device) else None
    if model.language_model is not None:
        for layer in model.causal_lm.model.layers:
            _wrap(layer, compiled, run.activation_checkpointing, fullgraph=False)
        _wrap(model.shrinking_adapter, compiled, False, fullgraph=True)
    _wrap(model.alignment_adapter, compiled, False, fullgraph=True)


def _wrap(module: nn.Module, backend: str | None, checkpointed: bool, fullgraph: bool) -> None:
    if backend is None and not checkpointed:
        return
    plain: Callable = module.forward
    fast = plain
    if backend is not None:
        fast = torch.compile(plain, dynamic=True, fullgraph=fullgraph, backend=backend)

    def forward(*args, **kwargs):
        if not module.training:
            return plain(*args, **kwargs)
        if checkpointed:
            return checkpoint(fast, *args, use_reentrant=False, **kwargs)
        return fast(*args, **kwargs)

    module.forward = forward
