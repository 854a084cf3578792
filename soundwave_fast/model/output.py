"""What a forward returns, under the names that the installed transformers gives the LLM's cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

# transformers 5.24 renamed `past_key_values` to `cache`, in outputs and arguments. Its own outputs say which it is.
CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"
OLD_CACHE_NAME, NEW_CACHE_NAME = "past_key_values", "cache"


def with_cache_name(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the LLM: a cache, by either name, goes by the one that the installed transformers knows.

    Raises:
        ValueError: a cache by both names.
    """
    given = [name for name in (OLD_CACHE_NAME, NEW_CACHE_NAME) if kwargs.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: two names of one argument; give one of them")
    kept = {name: value for name, value in kwargs.items() if name not in (OLD_CACHE_NAME, NEW_CACHE_NAME)}
    return {**kept, CACHE: kwargs[given[0]]} if given else kept


@dataclass
class SoundwaveOutput(ModelOutput):
    """Losses come as sums with their counts; `loss` is their weighted mean over this batch alone.

    The LLM's cache is `past_key_values` and `cache`, whatever the version of transformers.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, M, V), only without labels
    if CACHE == NEW_CACHE_NAME:
        cache: Any = None
    else:
        past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None  # of the LLM
    attentions: tuple[Tensor, ...] | None = None
    audio_hidden_states: Tensor | None = None  # (total, D) audio tokens, packed; audio_lengths bound the utterances'
    ce_sum: Tensor | None = None
    ce_count: Tensor | None = None
    ctc_sum: Tensor | None = None
    ctc_count: Tensor | None = None
    audio_lengths: Tensor | None = None  # (N,) audio tokens each utterance became
    frame_lengths: Tensor | None = None  # (N,) adapter frames it had


def _cache_of(output: SoundwaveOutput) -> Any:
    return output.__dict__[CACHE]


# The other name, as an attribute; transformers' own alias in newer versions logs that it is deprecated.
setattr(SoundwaveOutput, OLD_CACHE_NAME if CACHE == NEW_CACHE_NAME else NEW_CACHE_NAME, property(_cache_of))
