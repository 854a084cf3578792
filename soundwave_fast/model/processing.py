"""SoundwaveProcessor: waveforms -> log-mel, conversations -> prompt ids with one placeholder per audio."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, WhisperFeatureExtractor
from transformers.processing_utils import ProcessorMixin

from soundwave_fast.audio import MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, as_mono_16k, load_audio, trim_end
from soundwave_fast.model.whisper import EDGE_MELS

AUDIO_TOKEN = "<audio_patch>"  # the released tokenizer's name for the placeholder
HOP = 160  # samples per mel frame
MEL_MULTIPLE = 4  # conv2's stride 2 x the alignment adapter's stack of 2


class SoundwaveProcessor(ProcessorMixin):
    """Feature extractor and tokenizer of one model.

    The number of audio tokens depends on the CTC peaks, so the placeholder is not expanded here (as other audio
    processors do) but in the model.

    Args:
        encoder_pad: 'longest' pads a batch to its longest utterance, '30s' every utterance to 30 s (released).
    """

    def __init__(
        self, feature_extractor=None, tokenizer=None, chat_template: str | None = None, encoder_pad: str = "longest"
    ):
        if tokenizer.convert_tokens_to_ids(AUDIO_TOKEN) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.encoder_pad = encoder_pad
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
        content = (AUDIO_TOKEN + "\n") * audios + instruction
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer and the end of its turn."""
        return self.tokenizer(answer, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]

    # -- both --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: Any = None,
        sampling_rate: int = SAMPLE_RATE,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for generation: left-padded ids, log-mel and mel lengths.

        Args:
            text: prompts, each with one `<audio_patch>` per audio (see `prompt`).
            audio: one or a list of paths or waveforms (samples,), in the order of the placeholders.
            sampling_rate: Hz of the waveforms.

        Raises:
            ValueError: counts of placeholders and audios that differ, or bad audio.
        """
        out: dict[str, Any] = {}
        audios = [] if audio is None else list(audio) if isinstance(audio, (list, tuple)) else [audio]
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            wanted = sum(t.count(AUDIO_TOKEN) for t in texts)
            if wanted != len(audios):
                raise ValueError(f"audio: {len(audios)} given, the prompts have {wanted} placeholders {AUDIO_TOKEN}")
            out.update(
                self.tokenizer(
                    texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
                )
            )
        if audios:
            waves = [load_audio(a) if not hasattr(a, "shape") else as_mono_16k(a, sampling_rate) for a in audios]
            out["input_features"] = self.pad_mels([self.log_mel(w) for w in waves])
            out["feature_lengths"] = torch.tensor([self.mel_length(w) for w in waves])
        return BatchFeature(out)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "feature_lengths"]
