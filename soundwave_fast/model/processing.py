"""SoundwaveProcessor: waveforms -> log-mel, conversations -> prompt ids with one placeholder per audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, WhisperFeatureExtractor
from transformers.processing_utils import ProcessorMixin

from soundwave_fast.audio import MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, as_mono_16k, load_audio, trim_end
from soundwave_fast.model.chat import AUDIO_TOKEN, RELEASED_TEMPLATE, flatten, read_item
from soundwave_fast.model.checkpoint import BY_AUTO_CLASSES
from soundwave_fast.model.hub import local_directory
from soundwave_fast.model.released_reading import is_released_directory, read_config
from soundwave_fast.model.whisper import EDGE_MELS

HOP = 160  # samples per mel frame
MEL_MULTIPLE = 4  # conv2's stride 2 x the alignment adapter's stack of 2


class SoundwaveProcessor(ProcessorMixin):
    """Feature extractor and tokenizer of one model.

    The number of audio tokens depends on the CTC peaks, so the placeholder is not expanded here (as other audio
    processors do) but in the model.

    Args:
        encoder_pad: 'longest' pads a batch to its longest utterance, '30s' every utterance to 30 s (released).
        audio_separator: what follows a placeholder in a message that goes on.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        chat_template: str | None = None,
        encoder_pad: str = "longest",
        audio_separator: str = "\n",
    ):
        if tokenizer.convert_tokens_to_ids(AUDIO_TOKEN) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.encoder_pad = encoder_pad
        self.audio_separator = audio_separator
        self.audio_token = AUDIO_TOKEN
        self.audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_parts(
        cls, whisper: str, llm: str, chat_template: str | None = None, encoder_pad: str = "longest"
    ) -> SoundwaveProcessor:
        """From a Whisper folder or hub name and an LLM's; the placeholder is added to the LLM's tokenizer."""
        extractor = WhisperFeatureExtractor.from_pretrained(whisper)
        return cls(extractor, AutoTokenizer.from_pretrained(llm), chat_template=chat_template, encoder_pad=encoder_pad)

    @classmethod
    def from_released(cls, path: str | Path, audio_tower: str | None = None) -> SoundwaveProcessor:
        """Of a released-format directory: its tokenizer, the feature extractor of its Whisper, the authors' prompts.

        Raises:
            OSError, ValueError: no tokenizer there, or no such Whisper.
        """
        config = read_config(path, audio_tower)
        try:
            extractor = WhisperFeatureExtractor.from_pretrained(config.audio_tower)
        except OSError:  # a Whisper folder with a model alone
            extractor = WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins)
        tokenizer = AutoTokenizer.from_pretrained(path)
        llama3 = "<|start_header_id|>" in tokenizer.get_vocab()
        template, separator = (RELEASED_TEMPLATE, "") if llama3 else (None, "\n")
        return cls(extractor, tokenizer, template, encoder_pad=config.encoder_pad, audio_separator=separator)

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> SoundwaveProcessor:
        """Of a stage directory, a saved model, or a released-format directory, or of a Hub repository that is any.

        Args:
            audio_tower: of a released-format directory: Whisper folder or hub name instead of the one it names.
            kwargs: `cache_dir`, `revision`, `local_files_only`, ... (see `hub.local_directory`), and what
                `ProcessorMixin.from_pretrained` takes where the directory is not of the released format.

        Raises:
            OSError: nothing to be found under that name.
            TypeError: an argument that a released-format directory does not take.
        """
        path = local_directory(name, kwargs, weights=False)
        if not is_released_directory(path):
            return super().from_pretrained(path, *args, **kwargs)
        audio_tower = kwargs.pop("audio_tower", None)
        tolerated = (*BY_AUTO_CLASSES, "config")
        if unknown := sorted(k for k, v in kwargs.items() if k not in tolerated and v is not None):
            raise TypeError(f"from_pretrained: {', '.join(unknown)} cannot be given for a released-format directory")
        return cls.from_released(path, audio_tower)

    # -- audio -------------------------------------------------------------------------------------------------

    def log_mel(self, wave: np.ndarray) -> Tensor:
        """Log-mel (mels, M) of one 16 kHz waveform (samples,), 100 frames a second, with silence behind the audio.

        M is a multiple of 4: `mel_length` and the encoder's edge, or the whole 30 s.

        Raises:
            ValueError: longer than 30 s, empty, or not finite.
        """
        if not len(wave):
            raise ValueError("audio: holds no samples")
        if not np.isfinite(wave).all():
            raise ValueError("audio: holds samples that are not finite")
        if len(wave) > MAX_SECONDS * SAMPLE_RATE:
            raise ValueError(f"audio: {len(wave) / SAMPLE_RATE:.1f} s, one window holds {MAX_SECONDS:.0f} s")
        frames = self.mel_length(wave)
        if self.encoder_pad == "longest":
            frames = min(frames + EDGE_MELS, int(MAX_SECONDS * SAMPLE_RATE) // HOP)
        wave = self._speech(wave)
        wave = np.pad(wave, (0, max(0, frames * HOP - len(wave))))
        padding = "max_length" if self.encoder_pad == "30s" else False
        mel = self.feature_extractor(
            wave, sampling_rate=SAMPLE_RATE, padding=padding, truncation=True, return_tensors="np"
        ).input_features[0]
        return torch.from_numpy(np.ascontiguousarray(mel))

    def mel_length(self, wave: np.ndarray) -> int:
        """Mel frames that count: the speech's own (at least 1 s), without the silence `log_mel` adds behind it."""
        samples = max(len(self._speech(wave)), int(MIN_SECONDS * SAMPLE_RATE))
        return -(-samples // (HOP * MEL_MULTIPLE)) * MEL_MULTIPLE

    def _speech(self, wave: np.ndarray) -> np.ndarray:
        return trim_end(wave) if self.encoder_pad == "longest" else wave

    @staticmethod
    def pad_mels(mels: list[Tensor]) -> Tensor:
        """(N, mels, longest M), zeros past each utterance's end."""
        batch = torch.zeros(len(mels), mels[0].shape[0], max(mel.shape[1] for mel in mels))
        for row, mel in zip(batch, mels, strict=True):
            row[:, : mel.shape[1]] = mel
        return batch

    # -- text --------------------------------------------------------------------------------------------------

    def ctc_ids(self, text: str) -> list[int]:
        """CTC target of a transcript: the LLM's tokens of ' ' + text, so that a first word is spelt as any other."""
        return self.tokenizer(" " + text.strip(), add_special_tokens=False).input_ids

    def prompt(self, instruction: str, audios: int = 1) -> str:
        """One user turn (placeholders, then the instruction) in the LLM's chat format, ready for the answer."""
        content = (AUDIO_TOKEN + self.audio_separator) * audios + instruction
        return self._render([{"role": "user", "content": content}], add_generation_prompt=True)

    def _render(self, messages: list[dict], chat_template: str | None = None, **kwargs: Any) -> str:
        template = chat_template or self.chat_template
        return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping] | Sequence[Sequence[Mapping]],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> Any:
        """Prompts of one conversation or a list of them, with audio among the contents of their messages.

            [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}, {"type": "text", "text": "Who speaks?"}]}]

        An audio item names its source as `path`, `url`, or `audio` (a path, or a waveform (samples,) with
        `sampling_rate`); see `soundwave_fast.model.chat.read_item`. Any number of them may stand anywhere, each of at
        most 30 s: longer audio goes through `soundwave_fast.generate` or the command line, which cut it into windows.

        Args:
            tokenize: False returns the text with one placeholder per audio; True reads the audio.
            return_dict: with `tokenize`, True returns all the model's inputs, as `processor(...)` makes them; False
                the ids alone.
            kwargs: what the tokenizer's `apply_chat_template` takes (`add_generation_prompt`, `tools`, ...).

        Raises:
            FileNotFoundError: audio that is not there.
            ValueError: a conversation of another form, audio that is no good, a URL while offline.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: {return_tensors!r}; only 'pt' is made")
        one = not conversation or isinstance(conversation[0], Mapping)
        texts, items = [], []
        for single in [conversation] if one else conversation:
            messages, found = flatten(single, AUDIO_TOKEN, self.audio_separator)
            texts.append(self._render(messages, chat_template, **kwargs))
            items += found
        if not tokenize:
            return texts[0] if one else texts
        inputs = self(text=texts, audio=[read_item(item) for item in items])
        return inputs if return_dict else inputs["input_ids"]

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer and the end of its turn."""
        return self.tokenizer(answer, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]

    # -- both --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: Any = None,
        sampling_rate: int = SAMPLE_RATE,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Model inputs for generation: left-padded ids, log-mel and mel lengths.

        Args:
            text: prompts, each with one `<audio_patch>` per audio (see `prompt`).
            audio: one or a list of paths or waveforms (samples,) of at most 30 s, in the order of the placeholders.
            sampling_rate: Hz of the waveforms.

        Raises:
            ValueError: counts of placeholders and audios that differ, bad audio, `return_tensors` other than 'pt'.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: {return_tensors!r}; only 'pt' is made")
        out: dict[str, Any] = {}
        audios = [] if audio is None else list(audio) if isinstance(audio, (list, tuple)) else [audio]
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            wanted = sum(t.count(AUDIO_TOKEN) for t in texts)
            if wanted != len(audios):
                raise ValueError(f"audio: {len(audios)} given, the prompts have {wanted} placeholders {AUDIO_TOKEN}")
            out.update(
                self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
            )
        if audios:
            waves = [as_mono_16k(a, sampling_rate) if hasattr(a, "shape") else load_audio(a) for a in audios]
            out["input_features"] = self.pad_mels([self.log_mel(w) for w in waves])
            out["feature_lengths"] = torch.tensor([self.mel_length(w) for w in waves])
        return BatchFeature(out)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "feature_lengths"]
