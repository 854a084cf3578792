"""From an audio file to text: transcript, answer, CTC peaks with their times, and the picture of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soundwave_fast.audio import MAX_SECONDS, SAMPLE_RATE, load_audio, windows
from soundwave_fast.ops import ctc_peaks
from soundwave_fast.text import collapse

TRANSCRIBE = "Transcribe the audio."


@dataclass(frozen=True)
class Peak:
    """One kept frame: when (s), which token, how sure."""

    time: float
    token: str
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
    kept = index[: int(cu_seqlens[-1])].long()
    token, probability = tokens.flatten()[kept], log_probs.flatten()[kept].exp()
    return [
        Peak(float(t) / model.frames_per_second, processor.tokenizer.decode([int(k)]), float(p))
        for t, k, p in zip(kept, token, probability, strict=True)
        if int(k) != model.config.ctc_blank_id
    ]


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
