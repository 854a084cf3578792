"""From recordings to text: transcripts, answers, words and CTC peaks with their times, and the picture of them.

Recordings are paths (whatever libsndfile reads, any rate, any channels) or mono 16 kHz waveforms, of any length and
any number: long ones are cut into windows (`soundwave_fast.hearing`), windows go through the encoder in batches, and
the LLM answers in left-padded batches; the results are those of one recording at a time.

What odd audio gets: an empty or unreadable file, or one with samples that are not finite, a ValueError; less than 1 s
is padded with silence; clipped and over-loud audio is taken as it is; a window that is silent (never above 2^-13), or
in which CTC hears nothing, has no words and the LLM is not asked for any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from soundwave_fast import plots
from soundwave_fast.answering import answer, answers, stream_answer
from soundwave_fast.asking import Question, as_list, ask, need_llm, results
from soundwave_fast.audio import MAX_SECONDS, SAMPLE_RATE, load_audio
from soundwave_fast.hearing import Audio, HeardWindow, Unheard, hear
from soundwave_fast.plots import MAX_PICTURE_SECONDS
from soundwave_fast.words import Peak, Run, Word, group_words, time_words

TRANSCRIBE = "Transcribe the audio."

__all__ = ["Peak", "Transcript", "Word", "answer", "answers", "draw_peaks", "peaks", "stream_answer", "transcribe"]
__all__ += ["transcribe_ctc", "transcripts", "words"]


@dataclass(frozen=True)
class Transcript:
    """What is said in one recording, with the times (s) of its words and of the CTC peaks."""

    text: str
    duration: float  # s
    words: list[Word]
    peaks: list[Peak]


def transcripts(
    model: Any,
    processor: Any,
    audios: Iterable[Audio],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    window_seconds: float = MAX_SECONDS,
    llm: bool = True,
    progress: Callable[[float], None] | None = None,
    **options: Any,
) -> Iterator[Transcript | Exception]:
    """One `Transcript` a recording, in order, as they get ready; for one that cannot be read, its exception.

    Memory is bounded by `batch_size` windows times a constant: recordings may last hours.

    Args:
        audios: paths or mono 16 kHz waveforms (samples,).
        max_new_tokens: of the LLM for each window.
        window_seconds: longest window, 5 to 30 s; a model trained on short utterances may want shorter ones.
        llm: False takes the greedy CTC transcript; the model needs no LLM then.
        progress: called with the seconds of audio that have just been finished.
        options: what `GenerationMixin.generate` takes (num_beams, cache_implementation, ...).

    Raises:
        ValueError: batch_size or window_seconds out of range, or `llm` and the model was loaded without.
    """
    if llm:
        need_llm(model)
    heard = hear(model, processor, audios, batch_size, window_seconds, for_llm=llm)
    return _transcripts(model, processor, heard, batch_size, max_new_tokens, llm, progress, options)


def _transcripts(model, processor, heard, batch_size, max_new_tokens, llm, progress, options):
    decode, step = processor.tokenizer.decode, 1 / model.frames_per_second
    questions = (Question(h.source, None, None, h.error) if isinstance(h, Unheard) else _question(h) for h in heard)
    asked = ask(model, processor, questions, TRANSCRIBE, batch_size, max_new_tokens, options)
    whole: _Recording | None = None
    for question, text in asked if llm else ((question, "") for question in questions):
        if whole is not None and whole.source != question.source:
            yield whole.result()
            whole = None
        whole = whole or _Recording(question.source)
        if question.error is not None:
            whole.error = question.error
            continue
        window = question.window
        spoken = group_words(window.runs, decode, step)
        if llm:
            spoken = time_words(text, spoken, window.start * step, window.end * step)
        else:
            text = decode([run.id for run in window.runs]).strip() if window.runs else ""
        whole.add(window, text, spoken, _peaks(window.runs, decode, step))
        if progress is not None:
            progress((window.end - window.start) * step)
    if whole is not None:
        yield whole.result()


def _question(window: HeardWindow) -> Question:
    # Where CTC heard nothing one blank frame is left, and an LLM that is asked to transcribe it invents something.
    return Question(window.source, window.audio if window.runs else None, replace(window, audio=None))


@dataclass
class _Recording:
    """The windows of one recording, put together."""

    source: int
    texts: list[str] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    duration: float = 0.0
    error: Exception | None = None

    def add(self, window: HeardWindow, text: str, spoken: list[Word], found: list[Peak]) -> None:
        self.texts += [text] if text else []
        self.words += spoken
        self.peaks += found
        self.duration = window.stop_seconds

    def result(self) -> Transcript | Exception:
        return self.error or Transcript(" ".join(self.texts), self.duration, self.words, self.peaks)


def _peaks(runs: Sequence[Run], decode: Callable, step: float) -> list[Peak]:
    return [Peak(round(run.frame * step, 3), decode([run.id]), run.id, run.probability) for run in runs]


def transcribe(
    model: Any,
    processor: Any,
    audio: Audio | Sequence[Audio],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    **options: Any,
) -> str | list[str]:
    """The LLM's transcript of one recording, or the list of those of a list; `transcripts` says more, and goes on.

    Raises:
        FileNotFoundError, ValueError: a recording that cannot be read, or arguments out of range.
    """
    audios, several = as_list(audio)
    found = transcripts(model, processor, audios, max_new_tokens=max_new_tokens, batch_size=batch_size, **options)
    return results((x if isinstance(x, Exception) else x.text for x in found), several)


def _by_ctc(model: Any, processor: Any, audio: Audio | Sequence[Audio], batch_size: int, window_seconds: float) -> Any:
    audios, several = as_list(audio)
    settings = {"batch_size": batch_size, "window_seconds": window_seconds, "llm": False}
    return results(transcripts(model, processor, audios, **settings), several)


def transcribe_ctc(
    model: Any,
    processor: Any,
    audio: Audio | Sequence[Audio],
    batch_size: int = 8,
    window_seconds: float = MAX_SECONDS,
) -> str | list[str]:
    """Greedy CTC transcript of one recording, or a list of those of a list: no LLM involved.

    `window_seconds` (5 to 30 s), here and below: the longest window, as `transcripts` takes it.
    """
    found = _by_ctc(model, processor, audio, batch_size, window_seconds)
    return [one.text for one in found] if isinstance(found, list) else found.text


def peaks(
    model: Any, processor: Any, audio: Audio, batch_size: int = 8, window_seconds: float = MAX_SECONDS
) -> list[Peak]:
    """The frames the CTC head keeps in one recording of any length, blanks left out; times on a 40 ms grid."""
    return _by_ctc(model, processor, audio, batch_size, window_seconds).peaks


def words(
    model: Any, processor: Any, audio: Audio, batch_size: int = 8, window_seconds: float = MAX_SECONDS
) -> list[Word]:
    """The words of `transcribe_ctc` with their times, on a 40 ms grid; audio of any length.

    A word lasts from the frame in which CTC first says it to the end of its last token's run. CTC is late rather than
    early, and says a token in a frame or two: the end is when the head was through with a word, not the speaker.
    """
    return _by_ctc(model, processor, audio, batch_size, window_seconds).words


# -- the picture ---------------------------------------------------------------------------------------------------


def draw_peaks(
    model: Any,
    processor: Any,
    audio: Audio,
    path: str | Path,
    title: str = "",
    batch_size: int = 8,
    window_seconds: float = MAX_SECONDS,
) -> None:
    """PNG or SVG of the log-mel spectrogram with the CTC peaks, their tokens, and the head's certainty below.

    The peaks are those of `peaks` with the same `window_seconds`. Rows of a few seconds each; at most 120 s.

    Raises:
        FileNotFoundError: no such recording, or no folder to draw into.
        ValueError: longer, empty or unreadable audio, a kind of picture that cannot be drawn, arguments out of range.
    """
    plots.check_target(path)
    wave = audio if isinstance(audio, np.ndarray) else load_audio(audio)
    seconds = len(wave) / SAMPLE_RATE
    if seconds > MAX_PICTURE_SECONDS:
        raise ValueError(f"audio: {seconds:.0f} s long, a picture of its peaks takes at most {MAX_PICTURE_SECONDS:.0f}")
    decode, step = processor.tokenizer.decode, 1 / model.frames_per_second
    windows = list(hear(model, processor, [wave], batch_size, window_seconds, for_llm=False))
    if isinstance(windows[0], Unheard):
        raise windows[0].error
    frames = max(window.start + len(window.certainty) for window in windows)
    certainty, blank = np.zeros(frames, np.float32), np.ones(frames, bool)
    for window in windows:
        own = slice(window.start, window.start + len(window.certainty))
        certainty[own], blank[own] = window.certainty, window.blank
    runs = [run for window in windows for run in window.runs]
    found = [(peak.time, peak.token.strip() or "␣") for peak in _peaks(runs, decode, step)]
    text = " ".join(decode([run.id for run in window.runs]).strip() for window in windows if window.runs)
    plots.ctc_peaks(_mel(processor, wave), certainty, blank, found, path, title or text, step)


def _mel(processor: Any, wave: np.ndarray) -> np.ndarray:
    """Log-mel (mels, M) of a waveform of any length, 100 frames a second."""
    pieces, limit = [], int(MAX_SECONDS * SAMPLE_RATE)
    for start in range(0, len(wave), limit):
        piece = wave[start : start + limit]
        frames = -(-len(piece) // (SAMPLE_RATE // 100))
        mel = processor.log_mel(piece).numpy()[:, :frames]
        pieces.append(np.pad(mel, [(0, 0), (0, frames - mel.shape[1])], constant_values=mel.min()))
    return np.concatenate(pieces, 1)
