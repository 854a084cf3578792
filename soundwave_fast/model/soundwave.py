"""SoundwaveForConditionalGeneration: waveform features -> encoder -> adapters -> peaks -> splice -> LLM -> losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import can_return_tuple

from soundwave_fast.model import checkpoint, released_reading
from soundwave_fast.model.alignment_adapter import STACK, AlignmentAdapter
from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.model.ctc_head import CTCHead
from soundwave_fast.model.generation import AudioGenerationMixin
from soundwave_fast.model.hub import local_directory
from soundwave_fast.model.lora import has_lora, llm_state_dict
from soundwave_fast.model.losses import next_token_loss
from soundwave_fast.model.output import CACHE, SoundwaveOutput, with_cache_name
from soundwave_fast.model.shrinking_adapter import ShrinkingAdapter
from soundwave_fast.model.whisper import EDGE_MELS, MEL_PER_FRAME, count_mels, encode_frames
from soundwave_fast.ops import Packed, PromptCounts, splice
from soundwave_fast.ops.splice import Spliced


@dataclass
class Heard:
    """What the audio side makes of a batch: frames, the CTC head's tokens, and the packed audio tokens for the LLM."""

    hidden_BTD: Tensor
    lengths: Tensor
    tokens_BT: Tensor | None
    log_probs_BT: Tensor | None
    ctc: tuple[Tensor, Tensor] | None


class SoundwaveForConditionalGeneration(PreTrainedModel, AudioGenerationMixin):
    """Soundwave (arXiv 2502.12900): frozen Whisper encoder, alignment and shrinking adapter, LLM (with LoRA).

    Args:
        config: sizes and semantics; see `SoundwaveConfig`.
        audio_tower, language_model: ready modules; built from the config with random weights where None.
        with_language_model: False keeps only the LLM's token embedding (all that stage 1 needs).
    """

    config_class = SoundwaveConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["WhisperEncoderLayer", "LlamaDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: SoundwaveConfig,
        audio_tower: nn.Module | None = None,
        language_model: nn.Module | None = None,
        with_language_model: bool = True,
    ) -> None:
        super().__init__(config)
        self.audio_tower = audio_tower if audio_tower is not None else WhisperEncoder._from_config(config.audio_config)
        self.alignment_adapter = AlignmentAdapter(config)
        self.ctc_head = CTCHead(config)
        self.shrinking_adapter = ShrinkingAdapter(config)
        self.language_model = language_model
        self.token_embedding = None
        if language_model is None and with_language_model:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        elif language_model is None:
            self.token_embedding = nn.Embedding(config.text_config.vocab_size, config.hidden_size).requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules keep torch's own initialisation; the adapters' scale is set by `match_embedding`."""

    # -- loading and saving ------------------------------------------------------------------------------------

    @classmethod
    def from_parts(cls, config: SoundwaveConfig, **kwargs: Any) -> SoundwaveForConditionalGeneration:
        """Fresh adapters between the frozen parts named in the config; see `checkpoint.from_parts`."""
        return checkpoint.from_parts(cls, config, **kwargs)

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> SoundwaveForConditionalGeneration:
        """Load a whole saved model, a stage directory (adapters and LoRA beside the names of the frozen parts), or a
        released-format directory; or a Hub repository that is one of these.

        Args:
            name: directory or hub name; with a hub name `cache_dir`, `revision`, `local_files_only`, `force_download`
                and `token` are heeded (for this repository; parts it names are looked up as usual).
            dtype: of all parameters ('bfloat16', torch.bfloat16, ...); 'auto' and None: as saved (a stage directory's
                frozen parts as float32).
            attn_implementation: a name, or one a part: `{"audio_config": "eager", "text_config": "sdpa"}`.
            with_language_model: False loads of the LLM its token embedding alone.
            kwargs: of a whole saved model, whatever `PreTrainedModel.from_pretrained` takes.

        Raises:
            FileNotFoundError, OSError: the directory, repository or one of the parts it names is missing.
            TypeError: an argument that only whole saved models take.
            ValueError: weights that do not fit the config.
        """
        path = local_directory(name, kwargs)
        for known, load in (
            (checkpoint.is_stage_directory, checkpoint.from_stage_directory),
            (released_reading.is_released_directory, released_reading.from_released_directory),
        ):
            if known(path):
                return load(cls, path, *args, **checkpoint.own_arguments(kwargs))
        with_language_model = kwargs.pop("with_language_model", None)
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if with_language_model is False:  # the embedding is saved inside the LLM: load both, keep the one
            model.token_embedding, model.language_model = model.get_input_embeddings().requires_grad_(False), None
        else:
            checkpoint.load_lora(model, path, as_saved=True)
        return loaded

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The whole model, as `PreTrainedModel.save_pretrained`; LoRA beside it as an ordinary PEFT folder, `lora/`."""
        checkpoint.save_lora(self, Path(save_directory))
        if has_lora(self.language_model) and kwargs.get("state_dict") is None:
            state = {k: v for k, v in self.state_dict().items() if not k.startswith("language_model.")}
            state.update({f"language_model.{k}": v for k, v in llm_state_dict(self.language_model).items()})
            if self.config.text_config.tie_word_embeddings:
                state.pop("language_model.lm_head.weight")
            kwargs["state_dict"] = state
        super().save_pretrained(save_directory, *args, **kwargs)

    # -- the LLM, with or without LoRA around it ---------------------------------------------------------------

    @property
    def causal_lm(self) -> nn.Module:
        """The LLM itself; peft's LoRA layers live inside it."""
        llm = self.language_model
        return llm.get_base_model() if hasattr(llm, "get_base_model") else llm

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding if self.language_model is None else self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.language_model is None else self.language_model.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # -- the audio side ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, input_features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frozen Whisper: log-mel (N, mels, M), lengths -> frames (N, M // 2, d_enc), 50 a second, and lengths."""
        encoded = None
        if self.config.encoder_pad == "longest":
            encoded = (feature_lengths + EDGE_MELS).clamp_max(input_features.shape[-1])
        frames = encode_frames(self.audio_tower, input_features, encoded)
        return frames, feature_lengths // MEL_PER_FRAME

    def hear(
        self,
        frames_BTE: Tensor,
        frame_lengths: Tensor,
        ctc_targets: Tensor | None = None,
        ctc_target_lengths: Tensor | None = None,
        ctc_candidates: Tensor | None = None,
        need_tokens: bool = True,
    ) -> Heard:
        """Alignment adapter and CTC head: adapter frames (25 a second), their tokens, and the CTC loss if targets."""
        if not self.config.mask_frames:
            frame_lengths = torch.full_like(frame_lengths, frames_BTE.shape[1])
        embedding = self.get_input_embeddings().weight if self.ctc_head.tied else None
        frames_BTE = frames_BTE.to(self.alignment_adapter.out_norm.weight.dtype)
        hidden, lengths = self.alignment_adapter(frames_BTE, frame_lengths)
        tokens = log_probs = ctc = None
        by_probability = self.config.peak_select == "peak"
        if ctc_targets is not None:
            *ctc, tokens = self.ctc_head.loss(
                hidden,
                lengths,
                ctc_targets,
                ctc_target_lengths,
                embedding,
                return_argmax=need_tokens and not by_probability and ctc_candidates is None,
                candidates=ctc_candidates,
            )
        if need_tokens and tokens is None:
            tokens, log_probs = self.ctc_head(hidden, lengths, embedding)
        return Heard(hidden, lengths, tokens, log_probs, None if ctc is None else tuple(ctc))

    def shrink(self, heard: Heard) -> Packed:
        """Shrinking adapter: the kept frames, packed; .index tells where each came from."""
        return self.shrinking_adapter(heard.hidden_BTD, heard.tokens_BT, heard.lengths, heard.log_probs_BT)

    def get_audio_features(
        self,
        input_features: Tensor | None = None,  # (N, mels, M)
        feature_lengths: Tensor | None = None,  # (N,)
        encoder_frames: Tensor | None = None,  # (N, T50, d_enc) instead, with frame_lengths
        frame_lengths: Tensor | None = None,
        input_features_mask: Tensor | None = None,  # (N, M), 1 = counts; instead of feature_lengths
    ) -> Packed:  # .data (audio tokens in all, D), N segments
        """From log-mel (or encoder frames) to the audio tokens that take the placeholders' place."""
        if encoder_frames is None:
            lengths = count_mels(input_features, feature_lengths, input_features_mask)
            encoder_frames, frame_lengths = self.encode(input_features, lengths)
        return self.shrink(self.hear(encoder_frames, frame_lengths))

    # -- the whole ---------------------------------------------------------------------------------------------

    def get_placeholder_mask(self, input_ids: Tensor) -> Tensor:
        """(B, L) bool: where an utterance's audio tokens go, however many they turn out to be."""
        return input_ids == self.config.audio_token_id

    def _count(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> PromptCounts | None:
        """The prompts' counts, for `_splice` once the audio is there. A graph has no use for what the host knows."""
        if torch.compiler.is_compiling():
            return None
        return PromptCounts(self.get_placeholder_mask(input_ids), attention_mask, labels)

    def _splice(
        self, input_ids, attention_mask, labels, audio: Packed, layout: str, counts: PromptCounts | None = None
    ) -> Spliced:
        placeholder = self.get_placeholder_mask(input_ids)
        length = None if counts is None else counts.max_length(audio, layout)
        # the placeholder's id may lie past the embedding; its row is replaced anyway
        embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholder, 0))
        return splice(embeds, audio, placeholder, attention_mask, labels, layout=layout, max_length=length)

    @can_return_tuple  # return_dict=False, or the config's: a tuple of what is not None
    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, L) prompts (and answers), one placeholder an utterance
        attention_mask: Tensor | None = None,  # (B, L)
        input_features: Tensor | None = None,  # (N, mels, M) log-mel of the N utterances, in the placeholders' order
        feature_lengths: Tensor | None = None,  # (N,) mel frames that count
        labels: Tensor | None = None,  # (B, L) token ids, -100 where nothing is to be predicted
        ctc_targets: Tensor | None = None,  # (N, S)
        ctc_target_lengths: Tensor | None = None,  # (N,)
        ctc_candidates: Tensor | None = None,
        encoder_frames: Tensor | None = None,  # (N, T50, d_enc) instead of input_features, with frame_lengths
        frame_lengths: Tensor | None = None,
        packed: bool = False,  # the LLM sees the prompts end to end in one row, without padding
        input_features_mask: Tensor | None = None,  # (N, M), 1 = counts; instead of feature_lengths
        inputs_embeds: Tensor | None = None,  # (B, L, D) instead of input_ids; this and the next two without audio
        position_ids: Tensor | None = None,  # (B, L)
        past_key_values: Any = None,  # the LLM's cache of what came before
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Any = None,  # another name of past_key_values, from transformers 5.24 on
    ) -> SoundwaveOutput:
        """Training step or scoring. Without `language_model` (stage 1) only the CTC loss is computed.

        Returns logits only where no `labels` are given: with labels, only positions that predict something are scored.
        Nor does a training step keep the audio tokens alive: `audio_hidden_states` come without labels or gradients.
        Without audio it is the LLM's own forward (with labels, no cache unless asked for).

        Raises:
            ValueError: arguments that do not go together, named. With audio, `inputs_embeds`, `position_ids` and
                `past_key_values` make no sense: where the text stands is known only once the audio is heard. Nor does
                `use_cache=True` but for one prompt: the ends of several do not line up (`generate` aligns them).
        """
        reading = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        reading = {name: value for name, value in reading.items() if value is not None}
        before = {"inputs_embeds": inputs_embeds, "position_ids": position_ids}
        before |= {"past_key_values": past_key_values, "cache": cache}
        use_llm = self.language_model is not None
        if encoder_frames is None and input_features is None:
            if not use_llm:
                raise ValueError("language_model: the model was loaded without it, and no audio is given")
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("input_ids, inputs_embeds: exactly one of them must be given")
            reading["use_cache"] = use_cache if labels is None else bool(use_cache)
            reading.update(with_cache_name(before), input_ids=input_ids, attention_mask=attention_mask)
            return self._read({}, 0.0, labels, None, **reading)
        if wrong := [name for name, value in before.items() if value is not None]:
            raise ValueError(f"{', '.join(wrong)}: cannot be given with audio, whose length only the model knows")
        if use_llm and input_ids is None:
            raise ValueError("input_ids: needed with audio, one placeholder an utterance")
        if use_cache and use_llm and (packed or len(input_ids) > 1):
            raise ValueError("use_cache: with audio, for one prompt alone and not packed; generate takes several")
        counts = self._count(input_ids, attention_mask, labels) if use_llm else None
        if encoder_frames is None:
            lengths = count_mels(input_features, feature_lengths, input_features_mask)
            encoder_frames, frame_lengths = self.encode(input_features, lengths)
        heard = self.hear(
            encoder_frames, frame_lengths, ctc_targets, ctc_target_lengths, ctc_candidates, need_tokens=use_llm
        )
        out: dict[str, Any] = {"frame_lengths": heard.lengths}
        loss = 0.0
        if heard.ctc is not None:
            out["ctc_sum"], out["ctc_count"] = heard.ctc
            weight = self.config.ctc_weight if use_llm else 1.0
            loss = weight * out["ctc_sum"] / out["ctc_count"].clamp_min(1)
        if use_llm:
            audio = self.shrink(heard)
            out["audio_lengths"] = audio.lengths
            if labels is None or not torch.is_grad_enabled():
                out["audio_hidden_states"] = audio.data
            # packed: no mask; positions that start anew tell every attention of transformers where a prompt begins
            layout = "packed" if packed else "right"
            spliced = self._splice(input_ids, attention_mask, labels, audio, layout, counts)
            return self._read(
                out,
                loss,
                spliced.labels,
                None if labels is None or counts is None else counts.labels(),
                inputs_embeds=spliced.inputs_embeds,
                attention_mask=spliced.attention_mask,
                position_ids=spliced.position_ids,
                use_cache=bool(use_cache),
                **reading,
            )
        return SoundwaveOutput(loss=loss if isinstance(loss, Tensor) else None, **out)

    def _read(
        self, out: dict[str, Any], loss: Tensor | float, labels: Tensor | None, most: int | None, **inputs: Any
    ) -> SoundwaveOutput:
        """The LLM over its inputs; logits, or with labels (`most` of which count) the loss, beside what is in `out`."""
        llm = self.causal_lm
        read = llm.model(**inputs)
        if labels is None:
            out["logits"] = llm.lm_head(read.last_hidden_state)
        else:
            out["ce_sum"], out["ce_count"] = next_token_loss(read.last_hidden_state, llm.lm_head, labels, most)
            loss = loss + out["ce_sum"] / out["ce_count"].clamp_min(1)
        out.update({name: read.get(name) for name in (CACHE, "hidden_states", "attentions")})
        return SoundwaveOutput(loss=loss if isinstance(loss, Tensor) else None, **out)

    @property
    def frames_per_second(self) -> float:
        """Adapter frames a second: 100 mel frames / 2 (encoder) / 2 (stacking) = 25."""
        return 100 / MEL_PER_FRAME / STACK
