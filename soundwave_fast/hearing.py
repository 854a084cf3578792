"""Recordings of any length through the audio side: windows in batches, their CTC runs and audio tokens, joined.

Everything here is a generator over a stream of windows: memory is bounded by one pool of windows, however many
recordings come in and however long they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soundwave_fast.audio import MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, Window, check_window, is_silent, read_windows
from soundwave_fast.ops import Packed, ctc_peaks, peak_times
from soundwave_fast.words import Run, Word, group_words, plain

Audio = str | Path | np.ndarray
POOL_BATCHES = 4  # so many batches are collected before they are sorted by length
SAME_WORD_SECONDS = 0.5  # how far apart two windows may hear the same word: CTC places it anew in each
_nothing = partial(np.zeros, 0)


@dataclass(frozen=True)
class HeardWindow:
    """What one window holds. Frames are adapter frames (40 ms) counted from the beginning of the recording."""

    source: int  # which of the recordings
    start: int  # frame
    end: int  # frame, exclusive
    overlap: int = 0  # frames at the beginning that the window before heard too
    runs: list[Run] = field(default_factory=list)  # CTC, blanks left out
    audio: Tensor | None = None  # (n, D) audio tokens for the LLM; None: silent, or there is no LLM
    frames: list[int] = field(default_factory=list)  # the frame of each audio token
    certainty: np.ndarray = field(default_factory=_nothing)  # (frames,) probability of the best CTC class
    blank: np.ndarray = field(default_factory=_nothing)  # (frames,) whether that is the blank
    stop_seconds: float = 0.0  # where in the recording it ends, to the sample

    def of(self, source: int, start: int, overlap: int, stop_seconds: float) -> HeardWindow:
        """The same window, which began its own recording, `start` frames into recording `source`."""
        return replace(
            self,
            source=source,
            start=self.start + start,
            end=self.end + start,
            overlap=overlap,
            runs=[replace(run, frame=run.frame + start, end=run.end + start) for run in self.runs],
            frames=[frame + start for frame in self.frames],
            stop_seconds=stop_seconds,
        )

    def cut(self, begin: int | None = None, end: int | None = None) -> HeardWindow:
        """The same window with what begins in frames begin ... end - 1 alone; None leaves that side as it is."""
        low = self.start if begin is None else begin
        high = 1 << 62 if end is None else end  # there may be audio tokens past its end (`hear_batch`)
        inside = [i for i, frame in enumerate(self.frames) if low <= frame < high]
        own = slice(low - self.start, high - self.start)
        return replace(
            self,
            start=low,
            end=min(self.end, high),
            overlap=0,
            runs=[run for run in self.runs if low <= run.frame < high],
            audio=None if self.audio is None else self.audio[inside],
            frames=[self.frames[i] for i in inside],
            certainty=self.certainty[own],
            blank=self.blank[own],
        )


@dataclass(frozen=True)
class Unheard:
    """A recording that could not be read (to its end), and why."""

    source: int
    error: Exception


def hear(
    model: Any,
    processor: Any,
    audios: Iterable[Audio],
    batch_size: int = 8,
    window_seconds: float = MAX_SECONDS,
    for_llm: bool = True,
) -> Iterator[HeardWindow | Unheard]:
    """Windows of the recordings in order, heard `batch_size` at a time, joined so that every word is in one of them.

    Args:
        audios: paths or 16 kHz waveforms (samples,); read as they are needed.
        for_llm: False leaves the audio tokens out: CTC alone.

    Raises:
        ValueError: batch_size or window_seconds out of range. What is wrong with a recording comes as `Unheard`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1, got {batch_size}")
    check_window(window_seconds)
    windows = _heard(model, processor, _read(audios, window_seconds), batch_size, for_llm)
    return _joined(windows, processor.tokenizer.decode, 1 / model.frames_per_second)


def _read(audios: Iterable[Audio], seconds: float) -> Iterator[tuple[int, Window | Exception]]:
    for source, audio in enumerate(audios):
        try:
            for window in read_windows(audio, seconds):
                yield source, window
        except (OSError, ValueError, TypeError) as error:  # TypeError: an array of what is no audio
            yield source, error


def batches(items: Iterable, size: int, length: Callable[[Any], int]) -> Iterator[tuple[list, list[list[int]]]]:
    """(pool of items in order, its indices in batches of like length, longest first): memory for POOL_BATCHES."""
    items = iter(items)
    while pool := list(islice(items, size * POOL_BATCHES)):
        order = sorted((i for i, item in enumerate(pool) if length(item) > 0), key=lambda i: -length(pool[i]))
        yield pool, [order[at : at + size] for at in range(0, len(order), size)]


def _samples(item: tuple[int, Window | Exception]) -> int:
    window = item[1]
    return len(window.wave) if isinstance(window, Window) and not is_silent(window.wave) else 0


def _heard(model, processor, windows, batch_size: int, for_llm: bool) -> Iterator[HeardWindow | Unheard]:
    fps = model.frames_per_second
    for pool, groups in batches(windows, batch_size, _samples):
        found: dict[int, HeardWindow] = {}
        for group in groups:
            waves = [pool[i][1].wave for i in group]
            found.update(zip(group, hear_batch(model, processor, waves, for_llm), strict=True))
        for i, (source, window) in enumerate(pool):
            if isinstance(window, Exception):
                yield Unheard(source, window)
                continue
            seconds = len(window.wave) / SAMPLE_RATE
            heard = found.pop(i, None) or HeardWindow(0, 0, int(np.ceil(seconds * fps)))  # silence
            yield heard.of(source, round(window.start * fps), round(window.overlap * fps), window.start + seconds)


@torch.no_grad()
def hear_batch(model: Any, processor: Any, waves: Sequence[np.ndarray], for_llm: bool = True) -> list[HeardWindow]:
    """What the audio side makes of a batch of 16 kHz waveforms (samples,) of at most 30 s, each as its own recording.

    Where padding is not masked (`released`) audio tokens come from all 30 s, as there; CTC runs end with the audio.

    Raises:
        ValueError: a waveform that is empty, longer, or not finite.
    """
    device = model.alignment_adapter.out_norm.weight.device
    mels = processor.pad_mels([processor.log_mel(wave) for wave in waves]).to(device)
    mel_lengths = torch.tensor([processor.mel_length(wave) for wave in waves]).to(device)
    heard = model.hear(*model.encode(mels, mel_lengths))
    tokens, log_probs = heard.tokens_BT, heard.log_probs_BT
    index, cu_seqlens = ctc_peaks(tokens, heard.lengths)  # blanks too: the next run's begin is this one's end
    bounds, T = cu_seqlens.tolist(), tokens.shape[1]
    times = peak_times(index[: bounds[-1]], tokens, log_probs, 1.0)
    firsts, ids, probabilities = (x.tolist() for x in times)
    frames, lengths = [int(first) for first in firsts], heard.lengths.tolist()
    certainty, blank = log_probs.float().exp().cpu().numpy(), (tokens == model.config.ctc_blank_id).cpu().numpy()
    audio, rows, kept = _audio_tokens(model.shrink(heard), T) if for_llm else ([None] * len(waves), [0], [])
    out = []
    for b, (low, high) in enumerate(zip(bounds, bounds[1:])):
        seconds = len(waves[b]) / SAMPLE_RATE
        end = min(lengths[b], int(np.ceil(max(seconds, MIN_SECONDS) * model.frames_per_second)))
        ends = [*frames[low + 1 : high], lengths[b]]
        runs = [
            Run(first, min(last, end), id_, probability)
            for first, last, id_, probability in zip(frames[low:high], ends, ids[low:high], probabilities[low:high])
            if id_ != model.config.ctc_blank_id and first < end
        ]
        own = kept[rows[b] : rows[b + 1]] if for_llm else []
        stop = int(np.ceil(seconds * model.frames_per_second))
        out.append(
            HeardWindow(b, 0, stop, 0, runs, audio[b], own, certainty[b, :end], blank[b, :end], stop_seconds=seconds)
        )
    return out


def _audio_tokens(packed: Packed, T: int) -> tuple[list[Tensor], list[int], list[int]]:
    """Audio tokens of each utterance, where each utterance's begin, and the frame of each."""
    rows = packed.cu_seqlens.tolist()
    return packed.unbind(), rows, (packed.index[: rows[-1]] % T).tolist()


# -- seams ---------------------------------------------------------------------------------------------------------


def _joined(windows: Iterable[HeardWindow | Unheard], decode: Callable, seconds_per_frame: float):
    before = None
    for window in windows:
        if isinstance(window, HeardWindow) and window.overlap and isinstance(before, HeardWindow):
            left, right = seam(before, window, decode, seconds_per_frame)
            before, window = before.cut(end=left), window.cut(begin=right)
        if before is not None:
            yield before
        before = window
    if before is not None:
        yield before


def seam(
    before: HeardWindow, after: HeardWindow, decode: Callable[[list[int]], str], seconds_per_frame: float = 0.04
) -> tuple[int, int]:
    """(end, begin): of two overlapping windows the first counts to frame `end`, the second from frame `begin`.

    Both heard the words of the overlap, each with times of its own. The seam lies before a word that they agree on:
    the one whose neighbours agree too, and nearest the middle, where both windows hear well. Where they agree on
    none it lies in the middle of the longest gap between words.
    """
    low, high = after.start * seconds_per_frame, (after.start + after.overlap) * seconds_per_frame
    middle = (low + high) / 2
    first = [w for w in group_words(before.runs, decode, seconds_per_frame) if low <= w.start]
    second = [w for w in group_words(after.runs, decode, seconds_per_frame) if w.start < high]
    one, two = [plain(w.text) for w in first], [plain(w.text) for w in second]
    best, choice = (0.0,), None
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            shift = abs(a.start - b.start)
            if one[i] != two[j] or shift > SAME_WORD_SECONDS:
                continue
            agree = (i > 0 and j > 0 and one[i - 1] == two[j - 1]) + (one[i + 1 : i + 2] == two[j + 1 : j + 2] != [])
            kept = i + len(second) - j  # where one heard a word that the other missed, it counts
            score = (1 + agree, 0.2 * kept - 4 * shift - abs(a.start - middle))
            if score > best:
                best, choice = score, (a.start, b.start)
    if choice is None:
        gap = _longest_gap(first + second, low, high)
        choice = (gap, gap)
    return round(choice[0] / seconds_per_frame), round(choice[1] / seconds_per_frame)


def _longest_gap(words: list[Word], low: float, high: float) -> float:
    """The middle (s) of the longest stretch of [low, high] in which nobody speaks."""
    best, centre, free = -1.0, (low + high) / 2, low
    for start, end in sorted((w.start, w.end) for w in words) + [(high, high)]:
        if start - free > best:
            best, centre = start - free, (start + free) / 2
        free = max(free, end)
    return centre
