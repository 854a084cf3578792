"""Generation: `generate()` with audio in some prompts or none, whatever options the LLM's own generate takes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from soundwave_fast.model.lora import row_adapters, switched_off
from soundwave_fast.model.output import with_cache_name
from soundwave_fast.ops import Packed, PromptCounts

# What decides on a cache by itself; with any of these the default is left alone.
_CACHE_OPTIONS = (
    "cache_implementation",
    "past_key_values",
    "cache",
    "use_cache",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
)


class AudioGenerationMixin(GenerationMixin):
    """`generate` of a model that has `get_audio_features`, `get_placeholder_mask`, `_splice`, and a `language_model`.

    The LLM's `generation_config` is the model's own: one object, saved and loaded with the model.
    """

    @property
    def generation_config(self) -> GenerationConfig | None:
        llm = self._modules.get("language_model")
        return self.__dict__.get("_own_generation_config") if llm is None else self.causal_lm.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        if self._modules.get("language_model") is None:
            self.__dict__["_own_generation_config"] = value
        else:
            self.causal_lm.generation_config = value

    def compile_adapters(self, **options: Any) -> Any:
        """Compile alignment adapter, CTC head and shrinking adapter in place (`torch.compile`, any shapes); self.

        The first batch after it takes the compiler's time. Values stay eager's but for the order of summation.
        Parameters, their names and training are as before.

        Args:
            options: of `torch.compile`; `dynamic=True` unless given.
        """
        for module in (self.alignment_adapter, self.ctc_head, self.shrinking_adapter):
            module.compile(**{"dynamic": True, **options})
        self._adapters_compiled = True
        return self

    _adapters_compiled = False

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # (B, L) left-padded prompts
        attention_mask: Tensor | None = None,  # (B, L)
        input_features: Tensor | None = None,  # (N, mels, M), one a placeholder, in their order
        feature_lengths: Tensor | None = None,  # (N,)
        encoder_frames: Tensor | None = None,  # (N, T50, d_enc) instead of input_features, with frame_lengths
        frame_lengths: Tensor | None = None,
        audio: Packed | None = None,  # audio tokens instead of either: (n, D), N segments
        input_features_mask: Tensor | None = None,  # (N, M), 1 = counts; instead of feature_lengths
        lora_without_audio: bool | None = None,
        compile_adapters: bool | None = None,
        **kwargs: Any,  # whatever `GenerationMixin.generate` takes
    ) -> Any:  # (B, new tokens), or what return_dict_in_generate asks for
        """New tokens only. A prompt may hold any number of placeholders; one without any is answered by the LLM alone.

        Args:
            lora_without_audio: False switches LoRA off for prompts without audio, which are then answered as by the
                LLM before training; None: as `config.lora_without_audio` says (True by default). Merged LoRA stays.
            compile_adapters: compile the adapters before the first batch (see `compile_adapters`); None: on CUDA.
            kwargs: on CUDA `cache_implementation` is 'static' unless any of it says otherwise: transformers then
                compiles the decoding step. 'dynamic' switches that off.

        Raises:
            ValueError: placeholders and audio that differ in number; no LLM loaded.
        """
        llm = self.language_model
        if llm is None:
            raise ValueError("language_model: the model was loaded without it, there is nothing to generate with")
        kwargs = with_cache_name(kwargs)
        on_cuda = input_ids.device.type == "cuda" and not _distributed()
        keep_lora = self.config.lora_without_audio if lora_without_audio is None else lora_without_audio
        placeholder = self.get_placeholder_mask(input_ids)
        if audio is None and input_features is None and encoder_frames is None:
            if bool(placeholder.any()):
                raise ValueError(f"input_ids: {int(placeholder.sum())} placeholders, but no audio is given")
            with nullcontext() if keep_lora else switched_off(llm):
                out = llm.generate(
                    input_ids=input_ids, attention_mask=attention_mask, **_with_cache(kwargs, llm, on_cuda)
                )
            return _new_tokens(out, input_ids.shape[1])
        counts = PromptCounts(placeholder, attention_mask)
        if audio is None:
            if compile_adapters or (compile_adapters is None and on_cuda and not self.training):
                if not self._adapters_compiled:
                    self.compile_adapters()
            audio = self.get_audio_features(
                input_features, feature_lengths, encoder_frames, frame_lengths, input_features_mask
            )
        spliced = self._splice(input_ids, attention_mask, None, audio, "left", counts)
        rows = {}
        if not keep_lora:
            config = kwargs.get("generation_config") or self.generation_config
            beams = kwargs.get("num_beams") or config.num_beams or 1
            copies = kwargs.get("num_return_sequences") or config.num_return_sequences or 1
            rows = row_adapters(llm, [n > 0 for n in counts.placeholders()], 1 if beams > 1 else copies)
            if rows and beams > 1:
                kwargs["num_beams"] = beams  # peft looks for it among the arguments
        if not rows:
            kwargs = _with_cache(kwargs, llm, on_cuda)
        return llm.generate(
            inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, **rows, **kwargs
        )


def _distributed() -> bool:
    """Whether weights may be sharded: neither the decoding step nor the adapters are compiled then."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _with_cache(kwargs: dict, llm: Any, on_cuda: bool) -> dict:
    """A static cache, and with it the compiled decoding step, on CUDA where nobody has chosen."""
    config = kwargs.get("generation_config") or llm.generation_config
    chosen = any(kwargs.get(name) is not None for name in _CACHE_OPTIONS) or config.cache_implementation is not None
    if not on_cuda or chosen or not getattr(config, "use_cache", True):
        return kwargs
    return {**kwargs, "cache_implementation": "static"}


def _new_tokens(out: Any, prompt: int) -> Any:
    """Without the prompt, which the LLM returns with text and does not with embeddings."""
    if isinstance(out, Tensor):
        return out[:, prompt:]
    out.sequences = out.sequences[:, prompt:]
    return out
