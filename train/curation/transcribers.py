"""Whisper as a function from waveforms to transcripts: through transformers, or through faster-whisper."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soundwave_fast.audio import SAMPLE_RATE
from soundwave_fast.errors import UserError
from train.curation.scoring import language_code

MAX_NEW_TOKENS = 224  # half of Whisper's text context, as in its released code; 30 s of speech stay far below
TASKS = ("transcribe", "translate")


@dataclass(frozen=True)
class Transcript:
    text: str
    logprob: float  # mean log-probability of a token, the end of text among them
    language: str = ""  # heard; '' from a model that knows English alone
    probability: float = 0.0  # of that language


# (waveforms (samples,) float32 16 kHz, language code of each or '') -> a transcript of each
Transcriber = Callable[[list[np.ndarray], list[str]], list[Transcript]]


class TokenLogProbs:
    """A logits processor that changes nothing and adds up the log-probabilities of the tokens chosen.

    One step is held at a time; `output_scores` of generate would hold (steps, batch, vocabulary).
    """

    def __init__(self, eos: int):
        self.eos, self.last = eos, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.last is None:
            self.sum_B = torch.zeros(len(scores), device=scores.device)
            self.count_B = torch.zeros(len(scores), device=scores.device)
            self.done_B = torch.zeros(len(scores), device=scores.device, dtype=torch.bool)
        else:
            self._add(input_ids[:, -1])
        self.last = scores.float().log_softmax(-1)
        return scores

    def _add(self, token_B: Tensor) -> None:
        value_B = self.last.gather(1, token_B[:, None])[:, 0]
        self.sum_B += value_B.masked_fill(self.done_B, 0)
        self.count_B += ~self.done_B
        self.done_B |= token_B == self.eos

    def means(self, sequences: Tensor) -> list[float]:
        """Per row of generate's output (B, tokens); its last column is the token this processor has not seen."""
        self._add(sequences[:, -1])
        return (self.sum_B / self.count_B).tolist()


class TransformersWhisper:
    """Batched greedy decoding of up to 30 s each; the encoder runs once, for the language and for the text."""

    def __init__(self, name: str, device: torch.device, dtype: str = "auto", task: str = "transcribe"):
        from safetensors import SafetensorError
        from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        kind = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(dtype) or getattr(torch, dtype)
        folder = _folder(name)
        try:
            model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=kind)
            self.features = WhisperFeatureExtractor.from_pretrained(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--model {name}: cannot be loaded as a Whisper ({first[:200]})") from None
        self.model, self.device, self.task = model.to(device).eval(), device, task
        settings = model.generation_config
        if getattr(settings, "no_timestamps_token_id", None) is None:
            settings.no_timestamps_token_id = self.tokenizer.convert_tokens_to_ids("<|notimestamps|>")
        ids = getattr(settings, "lang_to_id", None) or {}
        self.multilingual = bool(getattr(settings, "is_multilingual", False) and ids)
        self.languages = (
            {token.strip("<|>"): number for token, number in ids.items()} if self.multilingual else {"en": 0}
        )
        if task == "translate" and not self.multilingual:
            raise UserError(f"--task translate: {name} knows English alone")

    @torch.inference_mode()
    def __call__(self, waves: list[np.ndarray], languages: list[str]) -> list[Transcript]:
        from transformers.modeling_outputs import BaseModelOutput

        batch = self.features(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt", device=str(self.device))
        features_BMT = batch.input_features.to(self.device, self.model.dtype)
        encoded = self.model.model.encoder(features_BMT).last_hidden_state
        heard = self._languages(encoded) if self.multilingual else [("", 0.0)] * len(waves)
        more = {}
        if self.multilingual:
            told = [
                wanted if wanted in self.languages else found
                for wanted, (found, _) in zip(languages, heard, strict=True)
            ]
            more = {"language": told, "task": self.task}
        tally = TokenLogProbs(self.model.generation_config.eos_token_id)
        sequences = self.model.generate(
            features_BMT,
            encoder_outputs=BaseModelOutput(encoded),
            logits_processor=[tally],
            max_new_tokens=MAX_NEW_TOKENS,
            num_beams=1,
            do_sample=False,
            return_timestamps=False,
            force_unique_generate_call=True,  # the plain tensor of tokens, prompt included
            **more,
        )
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return [
            Transcript(text.strip(), round(mean, 3), language, round(probability, 3))
            for text, mean, (language, probability) in zip(texts, tally.means(sequences), heard, strict=True)
        ]

    def _languages(self, encoded_BTD: Tensor) -> list[tuple[str, float]]:
        """(code, probability) of the language heard: one decoder step over the language tokens alone."""
        from transformers.modeling_outputs import BaseModelOutput

        names, ids = list(self.languages), list(self.languages.values())
        start_B1 = torch.full((len(encoded_BTD), 1), self.model.generation_config.decoder_start_token_id)
        logits = self.model(
            encoder_outputs=BaseModelOutput(encoded_BTD), decoder_input_ids=start_B1.to(self.device), use_cache=False
        ).logits[:, -1, ids]
        best = logits.float().softmax(-1).max(-1)
        return [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def _folder(name: str) -> str:
    """`package:whisper-tiny.en` -> its folder, made on first use; any other name is transformers' business.

    Not train/build.py's resolve_part: it would import the whole model.
    """
    if not name.startswith("package:"):
        return name
    from train.nano.parts import prepare_whisper

    if name != "package:whisper-tiny.en":
        raise UserError(f"--model {name}: the only packaged Whisper is package:whisper-tiny.en")
    return str(prepare_whisper())


class FasterWhisper:
    """The optional faster-whisper backend: CTranslate2 weights, one utterance at a time."""

    def __init__(self, name: str, device: torch.device, dtype: str = "auto", task: str = "transcribe"):
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise UserError("--backend faster-whisper: not installed (pip install faster-whisper)") from None
        kinds = {"auto": "bfloat16" if device.type == "cuda" else "float32"}
        try:
            self.model = WhisperModel(
                name, device=device.type, device_index=device.index or 0, compute_type=kinds.get(dtype, dtype)
            )
        except (OSError, ValueError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--model {name}: cannot be loaded by faster-whisper ({first[:200]})") from None
        self.task, self.multilingual = task, self.model.model.is_multilingual
        self.languages = self.model.supported_languages
        if task == "translate" and not self.multilingual:
            raise UserError(f"--task translate: {name} knows English alone")

    def __call__(self, waves: list[np.ndarray], languages: list[str]) -> list[Transcript]:
        return [self._one(wave, wanted) for wave, wanted in zip(waves, languages, strict=True)]

    def _one(self, wave: np.ndarray, wanted: str) -> Transcript:
        heard, probability = "", 0.0
        if self.multilingual:
            heard, probability, _ = self.model.detect_language(wave)
        known = wanted in self.languages
        segments, _ = self.model.transcribe(
            wave,
            language=(wanted if known else heard) if self.multilingual else "en",
            task=self.task,
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        parts = list(segments)
        tokens = sum(len(part.tokens) for part in parts)
        total = sum(part.avg_logprob * len(part.tokens) for part in parts)
        text = " ".join(part.text.strip() for part in parts)
        return Transcript(text, round(total / max(1, tokens), 3), heard, round(probability, 3))


BACKENDS = {"transformers": TransformersWhisper, "faster-whisper": FasterWhisper}


def identity(name: str) -> str:
    """What stands for a model in a shard's settings: its name; for a folder, what is in it, wherever it lies."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "generation_config.json", "tokenizer.json"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return f"folder:{digest.hexdigest()}"


def wanted_language(row: dict, language: str) -> str:
    """The code to transcribe a row in: the one asked for, else the manifest's, else '' (as heard)."""
    return language or (language_code(row["language"]) if row.get("language") else "")
