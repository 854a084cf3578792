"""LoRA around the LLM: weights without it, weights with it merged, and forward passes that leave it out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_BASE = "base_layer."  # where peft moves a wrapped layer's own parameters


def has_lora(language_model: nn.Module | None) -> bool:
    """Whether peft's LoRA is around the LLM (`get_peft_model`, `PeftModel.from_pretrained`)."""
    return hasattr(language_model, "peft_config") and hasattr(language_model, "get_base_model")


@contextmanager
def quietly() -> Iterator[None]:
    """peft asks transformers for a name that it deprecates (peft 0.21, transformers 5.23), once for every model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def llm_state_dict(language_model: nn.Module, merge: bool = False) -> dict[str, Tensor]:
    """The LLM's own parameter names, whether LoRA is around it or not; tensors are shared, not copied.

    Args:
        merge: add LoRA's share to the weights it acts on (new tensors, computed layer by layer in the weights' dtype);
            otherwise it is left out.
    """
    if not has_lora(language_model):
        return dict(language_model.state_dict())
    llm = language_model.get_base_model()
    state = {name: tensor for name, tensor in llm.state_dict().items() if "lora_" not in name}
    state = {name.replace(_BASE, ""): tensor for name, tensor in state.items()}
    if merge:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in llm.named_modules():
            if isinstance(module, BaseTunerLayer):
                layer = copy.deepcopy(module)  # one layer: merging in place could not be undone bit for bit
                layer.merge(safe_merge=True)
                for key, tensor in layer.get_base_layer().state_dict().items():
                    state[f"{name}.{key}"] = tensor
    return state


@contextmanager
def switched_off(language_model: nn.Module) -> Iterator[None]:
    """The LLM as if there were no LoRA around it."""
    if not has_lora(language_model):
        yield
        return
    with language_model.disable_adapter():
        yield


def row_adapters(language_model: nn.Module, with_audio: list[bool], copies: int = 1) -> dict[str, Any]:
    """Arguments of `generate` that switch LoRA off for the prompts without audio, row by row (peft's mixed batches).

    Args:
        with_audio: whether each prompt holds audio.
        copies: sequences sampled for each prompt; peft counts beams by itself.
    """
    if not has_lora(language_model) or all(with_audio):
        return {}
    active = language_model.active_adapter
    return {"adapter_names": [active if audio else "__base__" for audio in with_audio for _ in range(copies)]}
