"""SoundwaveConfig: the sizes of the parts, and every point where the released code and the paper's text differ."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from soundwave_fast.ops.attention_backends import BACKENDS

# One row a point where the authors' released code (whose weights need it) and the paper's text differ.
SEMANTICS: dict[str, dict[str, Any]] = {
    "released": {
        "adapter_attention": "position",  # the layer attends over a length-1 axis there: no mixing in time
        "look_back_keys": "kept",  # key_padding_mask=~kept: only the kept frames of the utterance are keys
        "drop_blank": False,  # a blank run stays, as one frame
        "mask_frames": False,  # CTC and peaks run over the whole padded window
        "peak_select": "first",
        "encoder_pad": "30s",
    },
    "paper": {
        "adapter_attention": "time",
        "look_back_keys": "frames",
        "drop_blank": True,
        "mask_frames": True,
        "peak_select": "first",
        "encoder_pad": "longest",
    },
}
_CHOICES = {
    "adapter_attention": ("time", "position"),
    "look_back_keys": ("frames", "kept"),
    "drop_blank": (True, False),
    "mask_frames": (True, False),
    "peak_select": ("first", "peak"),
    "encoder_pad": ("longest", "30s"),
    "ctc_head": ("tied", "free"),
    "attention_backend": BACKENDS,
    "lora_without_audio": (True, False),
}


class SoundwaveConfig(PreTrainedConfig):
    """Configuration of a Soundwave model (paper section 3; released code `Soundwave.py`).

    Args:
        audio_config: Whisper configuration (object or dict); `d_model` is the encoder width.
        text_config: LLM configuration (object or dict); `hidden_size` is the width of both adapters.
        audio_tower, language_model: folder or hub name the frozen parts come from. A stage directory keeps only
            what was trained and finds the rest through these two.
        audio_token_id: id of the placeholder `<audio_patch>` in the prompt.
        ctc_blank_id: CTC blank; by default the placeholder's id, as in the released code.
        semantics: 'paper' or 'released': sets the six keys of `SEMANTICS` together; each may also be passed alone.
        look_back: False leaves the cross-attention out of the shrinking adapter (an ablation).
        ctc_head: 'tied' scores frames against the LLM's own (frozen) token embeddings and learns one row, the blank;
            'free' is a trainable `Linear(hidden, vocabulary)` as released.
        ctc_weight: weight of the CTC loss beside cross-entropy (0.3 in the paper).
        adapter_dropout: dropout of both adapters (0.1 as released).
        lora_without_audio: whether LoRA stays on in `generate` for prompts without audio. False gives them the LLM as
            it was before training. Weights with LoRA merged into them (the released ones) have nothing to switch off.
        released: what a released-format checkpoint came with, kept for writing it back: its config.json (`config`) and
            the prefixes of its parameter names (`layout`); see `released.py`.
        attention_backend: what computes the look-back attention: 'auto', 'triton', 'torch', or an installed peer,
            'varlen_attn', 'flash_attn' or 'xformers' (see `soundwave_fast.ops.varlen_cross_attention`).

    Raises:
        ValueError: an unknown choice for any of the above.
    """

    model_type = "soundwave"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        audio_config: Any = None,
        text_config: Any = None,
        audio_tower: str | None = None,
        language_model: str | None = None,
        audio_token_id: int | None = None,
        ctc_blank_id: int | None = None,
        semantics: str = "paper",
        look_back: bool = True,
        ctc_head: str = "tied",
        ctc_weight: float = 0.3,
        adapter_dropout: float = 0.1,
        attention_backend: str = "auto",
        lora_without_audio: bool = True,
        released: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if semantics not in SEMANTICS:
            raise ValueError(f"semantics: {semantics!r} is not one of {', '.join(SEMANTICS)}")
        self.audio_config = _sub_config(audio_config, "whisper")
        self.text_config = _sub_config(text_config, "llama")
        self.audio_tower = audio_tower
        self.language_model = language_model
        vocab = self.text_config.vocab_size
        self.audio_token_id = vocab if audio_token_id is None else audio_token_id
        self.ctc_blank_id = self.audio_token_id if ctc_blank_id is None else ctc_blank_id
        self.semantics = semantics
        self.look_back = look_back
        self.ctc_head = ctc_head
        self.ctc_weight = ctc_weight
        self.adapter_dropout = adapter_dropout
        self.attention_backend = attention_backend
        self.lora_without_audio = lora_without_audio
        self.released = released
        for key, value in SEMANTICS[semantics].items():
            setattr(self, key, kwargs.pop(key, value))
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(map(str, choices))}")
        if ctc_head == "tied" and self.ctc_blank_id != vocab:
            raise ValueError(
                f"ctc_blank_id: with ctc_head='tied' it is the one extra row, id {vocab}, got {self.ctc_blank_id}"
            )
        kwargs.pop("tie_word_embeddings", None)  # the LLM's own affair: text_config says it
        super().__init__(tie_word_embeddings=False, **kwargs)

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def ctc_vocab_size(self) -> int:
        """Number of CTC classes: the LLM's vocabulary and, where the blank lies past it, one more."""
        return max(self.text_config.vocab_size, self.ctc_blank_id + 1)


def _sub_config(value: Any, default_type: str) -> Any:
    if value is None:
        return AutoConfig.for_model(default_type)
    if isinstance(value, dict):
        value = dict(value)
        return AutoConfig.for_model(value.pop("model_type", default_type), **value)
    return value
