"""From an audio file to text: transcript, answer, CTC peaks and words with their times, and the picture of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soundwave_fast.audio import MAX_SECONDS, SAMPLE_RATE, load_audio, windows
from soundwave_fast.ops import ctc_peaks, peak_times
from soundwave_fast.text import collapse

TRANSCRIBE = "Transcribe the audio."


@dataclass(frozen=True)
class Peak:
    """One kept frame: when (s), which token, how sure."""

    time: float
    token: str
    probability: float


@dataclass(frozen=True)
class Word:
    """One word of the CTC transcript: from when to when (s), and how sure the head was of its least sure token."""

    start: float
    end: float
    text: str
    probability: float


def _waveform(audio: str | Path | np.ndarray) -> np.ndarray:
    return audio if isinstance(audio, np.ndarray) else load_audio(audio)


def _inputs(model: Any, processor: Any, waves: list[np.ndarray], instruction: str | None) -> dict:
    text = None if instruction is None else [processor.prompt(instruction) for _ in waves]
    if text is None:
        mels = processor.pad_mels([processor.log_mel(w) for w in waves])
        lengths = torch.tensor([processor.mel_length(w) for w in waves])
        inputs = {"input_features": mels, "feature_lengths": lengths}
    else:
        inputs = processor(text=text, audio=waves)
    device = model.alignment_adapter.out_norm.weight.device
    return {key: value.to(device) for key, value in inputs.items()}


def answer(model: Any, processor: Any, audio: str | Path | np.ndarray, prompt: str, max_new_tokens: int = 128) -> str:
    """The LLM's answer to `prompt` about one audio of at most 30 s (path, or mono waveform at 16 kHz).

    Raises:
        ValueError: audio that is longer, empty or unreadable.
    """
    wave = _waveform(audio)
    if len(wave) > MAX_SECONDS * SAMPLE_RATE:
        raise ValueError(f"audio: {len(wave) / SAMPLE_RATE:.0f} s long, questions take at most {MAX_SECONDS:.0f} s")
    return _generate(model, processor, [wave], prompt, max_new_tokens)[0]


def _generate(model: Any, processor: Any, waves: list[np.ndarray], prompt: str, max_new_tokens: int) -> list[str]:
    tokens = model.generate(
        **_inputs(model, processor, waves, prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def transcribe(
    model: Any, processor: Any, audio: str | Path | np.ndarray, max_new_tokens: int = 128, batch_size: int = 8
) -> str:
    """The LLM's transcript; audio over 30 s is cut at quiet places and its windows are joined."""
    pieces, texts = windows(_waveform(audio)), []
    for start in range(0, len(pieces), batch_size):
        texts += _generate(model, processor, pieces[start : start + batch_size], TRANSCRIBE, max_new_tokens)
    return " ".join(text for text in texts if text)


@torch.no_grad()
def _hear(model: Any, processor: Any, wave: np.ndarray):
    inputs = _inputs(model, processor, [wave], None)
    frames, lengths = model.encode(inputs["input_features"], inputs["feature_lengths"])
    hidden = model.hear(frames, lengths, need_tokens=False)
    embedding = model.get_input_embeddings().weight if model.ctc_head.tied else None
    tokens, log_probs = model.ctc_head.greedy(hidden.hidden_BTD, embedding)
    return tokens, log_probs, hidden.lengths


def transcribe_ctc(model: Any, processor: Any, audio: str | Path | np.ndarray) -> str:
    """Greedy CTC transcript: no LLM involved."""
    texts = []
    for wave in windows(_waveform(audio)):
        tokens, _, lengths = _hear(model, processor, wave)
        kept = collapse(tokens[0, : int(lengths[0])].tolist(), model.config.ctc_blank_id)
        texts.append(processor.tokenizer.decode(kept).strip())
    return " ".join(text for text in texts if text)


def peaks(model: Any, processor: Any, audio: str | Path | np.ndarray) -> list[Peak]:
    """The frames the CTC head keeps in one audio of at most 30 s, blanks left out; times on a 40 ms grid."""
    wave = _waveform(audio)
    tokens, log_probs, lengths = _hear(model, processor, wave)
    index, cu_seqlens = ctc_peaks(tokens, lengths, blank=model.config.ctc_blank_id, drop_blank=True)
    times = peak_times(index[: int(cu_seqlens[-1])], tokens, log_probs, 1 / model.frames_per_second)
    return [
        Peak(second, processor.tokenizer.decode([token]), probability)
        for second, token, probability in zip(*(x.tolist() for x in times), strict=True)
        if token != model.config.ctc_blank_id
    ]


def words(model: Any, processor: Any, audio: str | Path | np.ndarray) -> list[Word]:
    """The words of `transcribe_ctc` with their times, on a 40 ms grid; audio of any length.

    A word lasts from the frame in which CTC first says it to the end of its last token's run. CTC is late rather than
    early, and says a token in a frame or two: the end is when the head was through with a word, not the speaker.
    """
    found, offset = [], 0.0
    for wave in windows(_waveform(audio)):
        tokens, log_probs, lengths = _hear(model, processor, wave)
        index, cu_seqlens = ctc_peaks(tokens, lengths)  # blanks too: the next run's begin is this one's end
        times = peak_times(index[: int(cu_seqlens[-1])], tokens, log_probs, 1 / model.frames_per_second)
        starts, ids, probabilities = (x.tolist() for x in times)
        ends = [*starts[1:], int(lengths[0]) / model.frames_per_second]
        runs = [
            (id_, offset + start, offset + end, probability)
            for id_, start, end, probability in zip(ids, starts, ends, probabilities, strict=True)
            if id_ != model.config.ctc_blank_id
        ]
        found += _group_words(runs, processor.tokenizer.decode)
        offset += len(wave) / SAMPLE_RATE
    return found


def _group_words(runs: list[tuple[int, float, float, float]], decode: Callable[[list[int]], str]) -> list[Word]:
    """Words of the decoded tokens; each takes its times from the tokens that share a character with it."""
    ids = [run[0] for run in runs]
    reach = [0]  # characters written once so many tokens are in; a token may hold part of one, hence the maximum
    for count in range(1, len(ids) + 1):
        reach.append(max(reach[-1], len(decode(ids[:count]))))
    found = []
    for match in re.finditer(r"\S+", decode(ids) if ids else ""):
        own = [run for run, a, b in zip(runs, reach, reach[1:]) if min(a, b - 1) < match.end() and b > match.start()]
        if own:
            found.append(Word(own[0][1], own[-1][2], match.group(), min(run[3] for run in own)))
    return found


def draw_peaks(model: Any, processor: Any, audio: str | Path | np.ndarray, path: str | Path, title: str = "") -> None:
    """PNG or SVG of the log-mel spectrogram with the CTC peaks and the head's certainty below."""
    from soundwave_fast import plots

    wave = _waveform(audio)
    tokens, log_probs, lengths = _hear(model, processor, wave)
    count = int(lengths[0])
    mel = processor.log_mel(wave)[:, : processor.mel_length(wave)].numpy()
    found = [(peak.time, peak.token.strip() or "␣") for peak in peaks(model, processor, wave)]
    plots.ctc_peaks(
        mel,
        log_probs[0, :count].exp().float().cpu().numpy(),
        (tokens[0, :count] == model.config.ctc_blank_id).cpu().numpy(),
        found,
        path,
        title=title or transcribe_ctc(model, processor, wave),
        seconds_per_frame=1 / model.frames_per_second,
    )
