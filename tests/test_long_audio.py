"""Recordings of any length: windows cut in pauses or overlapping, every word once at a seam, bounded memory."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from soundwave_fast import generate
from soundwave_fast.answering import _whole
from soundwave_fast.audio import SAMPLE_RATE, load_audio, read_blocks, read_windows
from soundwave_fast.hearing import HeardWindow, _joined, hear, seam
from soundwave_fast.words import Run
from tests.model import tiny


@pytest.fixture(scope="module")
def paper(tiny_parts):
    torch.manual_seed(1)
    return tiny.make_model(tiny_parts)


def noise(seconds: float, pauses: dict[float, float] | None = None) -> np.ndarray:
    wave = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * SAMPLE_RATE)).astype(np.float32)
    for start, length in (pauses or {}).items():
        wave[int(start * SAMPLE_RATE) : int((start + length) * SAMPLE_RATE)] *= 0.001
    return wave


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_blocks_are_the_whole_file(tmp_path, rate):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (int(25.3 * rate), 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", wave, rate)
    blocks = list(read_blocks(tmp_path / "a.flac", seconds=4.0))
    assert len(blocks) > 5 and all(len(block) for block in blocks)
    assert np.array_equal(np.concatenate(blocks), load_audio(tmp_path / "a.flac"))
    assert abs(sum(map(len, blocks)) - 25.3 * SAMPLE_RATE) <= 2


def test_a_headerless_format_is_no_audio(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"\0" * 4000)
    with pytest.raises(ValueError, match="cannot be read as audio"):
        load_audio(tmp_path / "a.raw")


def test_a_file_cut_short(tmp_path):
    soundfile.write(tmp_path / "a.flac", tiny.make_wave(0, 30.0), SAMPLE_RATE)
    (tmp_path / "b.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:200_000])
    try:
        wave = load_audio(tmp_path / "b.flac")
        assert 0 < len(wave) < 30 * SAMPLE_RATE
    except ValueError as error:
        assert "b.flac" in str(error)


def test_windows_are_cut_in_pauses():
    wave = noise(70, {25.0: 0.6, 27.0: 0.3, 48.0: 0.4})
    found = list(read_windows(wave))
    assert np.array_equal(np.concatenate([window.wave for window in found]), wave)
    assert [window.overlap for window in found] == [0.0] * 3
    assert 25.2 <= found[1].start <= 25.4, "the middle of the longer pause"
    assert 48.1 <= found[2].start <= 48.3


def test_windows_overlap_where_nobody_pauses():
    wave = noise(70)
    found = list(read_windows(wave))
    assert [(window.start, window.overlap) for window in found] == [(0.0, 0.0), (26.0, 4.0), (52.0, 4.0)]
    for window in found:
        first = int(window.start * SAMPLE_RATE)
        assert np.array_equal(window.wave, wave[first : first + 30 * SAMPLE_RATE])
    assert {window.overlap for window in read_windows(wave, 8.0)} == {0.0, 2.0}
    for window in read_windows(wave[: 60 * SAMPLE_RATE + 137], 7.3):
        assert (window.start / 0.04) == pytest.approx(round(window.start / 0.04))


# -- seams ---------------------------------------------------------------------------------------------------------

NAMES = "zero one two three four five six seven eight nine ten no no no yes the the a".split()


def decode(ids: list[int]) -> str:
    return "".join(f" {NAMES[i % 100]}" if i < 100 else NAMES[i % 100][1:] for i in ids)


def heard_in(window, spoken, rng, fps=25) -> HeardWindow:
    """A window that hears the spoken (second, name) words, each up to 0.12 s off, but for half words at its edges."""
    start, end = round(window[0] * fps), round(window[1] * fps)
    runs = []
    for second, name in spoken:
        frame = round(second * fps + rng.uniform(-3, 3))
        if window[0] - 0.1 <= second <= window[1]:
            edge = (second < window[0] + 0.1 and window[0] > 0) or second > window[1] - 0.3
            # at an edge half a word is heard, as another word or as none
            wrong = edge and rng.uniform() < 0.7
            if wrong and rng.uniform() < 0.5:
                continue
            frame = min(max(frame, start, runs[-1].frame + 1 if runs else start), end - 1)
            runs.append(Run(frame, frame + 1, int(rng.integers(len(NAMES))) if wrong else name, 0.9))
    audio = torch.tensor([[run.id] for run in runs], dtype=torch.float32)
    overlap = round(window[2] * fps)
    return HeardWindow(0, start, end, overlap, runs, audio, [run.frame for run in runs], stop_seconds=window[1])


@pytest.mark.parametrize("seed", range(20))
def test_every_word_once_at_a_seam(seed):
    """Fast speech without pauses, repeated words among it, heard by overlapping windows each a little differently."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.25, 0.55, 200))
    spoken = [(second, int(rng.integers(len(NAMES)))) for second in times]
    windows = [(s, s + 30.0, 4.0 if s else 0.0) for s in np.arange(0, times[-1], 26.0)]
    joined = list(_joined((heard_in(w, spoken, rng) for w in windows), decode, 0.04))
    assert len(joined) == len(windows) > 2
    names = [run.id for window in joined for run in window.runs]
    inside = [name for second, name in spoken if second < windows[-1][1]]
    assert [NAMES[i] for i in names[:-1]] == [NAMES[i] for i in inside[: len(names) - 1]]
    assert len(inside) - len(names) <= 2  # the end of the last window itself
    for window in joined:  # the LLM is given the same
        assert window.audio[:, 0].tolist() == [run.id for run in window.runs]
        assert window.frames == [run.frame for run in window.runs]


def test_a_seam_where_the_windows_agree_on_nothing():
    before = HeardWindow(0, 0, 750, 0, [Run(655, 660, 1, 0.9), Run(680, 690, 2, 0.9)])
    after = HeardWindow(0, 650, 1000, 100, [Run(661, 668, 4, 0.9), Run(740, 745, 5, 0.9)])
    assert seam(before, after, decode) == (715, 715)  # the longest gap: frames 690 to 740
    nothing = HeardWindow(0, 0, 750), HeardWindow(0, 650, 1000, 100)
    assert seam(*nothing, decode) == (700, 700)


def test_a_word_that_one_of_two_windows_missed_is_kept():
    coffee, brown = Run(668, 670, 2, 0.9), Run(694, 696, 9, 0.9)
    before = HeardWindow(0, 500, 699, 0, [coffee, brown])
    after = HeardWindow(0, 662, 900, 37, [Run(669, 671, 2, 0.9), Run(679, 680, 5, 0.9), brown])
    joined = list(_joined([before, after], decode, 0.04))
    assert [NAMES[run.id] for window in joined for run in window.runs] == [NAMES[i] for i in (2, 5, 9)]


def test_windows_of_the_model_join_up(paper):
    model, processor = paper
    wave = tiny.make_wave(4, 40.0)  # tones without a pause
    raw = [w for w in read_windows(wave, 10.0)]
    assert sum(w.overlap > 0 for w in raw) == len(raw) - 1
    found = list(hear(model, processor, [wave], 2, 10.0))
    assert len(found) == len(raw) and found[0].start == 0 and found[-1].stop_seconds == 40.0
    frames = [run.frame for window in found for run in window.runs]
    assert frames == sorted(frames) and len(set(frames)) == len(frames)
    for window in found:
        assert all(window.start <= run.frame < window.end for run in window.runs)
        assert len(window.audio) == len(window.frames) > 0
        assert window.audio.shape[1] == tiny.HIDDEN
    for one, two in zip(found, found[1:]):  # a word may be heard up to half a second later by one of them
        assert abs(one.end - two.start) <= 13


# -- the LLM -------------------------------------------------------------------------------------------------------


def test_a_long_recording_is_one_prompt(paper):
    """The windows' audio tokens in place of the placeholder: what the model does with them given as one segment."""
    from soundwave_fast.ops import Packed, splice

    model, processor = paper
    wave = tiny.make_wave(6, 34.0)
    rows = torch.cat([window.audio for window in hear(model, processor, [wave])])
    ids = torch.tensor([processor.tokenizer(processor.prompt("What?"), add_special_tokens=False).input_ids])
    at = ids == processor.audio_token_id
    embeds = model.get_input_embeddings()(ids.masked_fill(at, 0))
    spliced = splice(embeds, Packed.from_list([rows]), at, torch.ones_like(ids), layout="left")
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    tokens = model.language_model.generate(
        inputs_embeds=spliced.inputs_embeds,
        attention_mask=spliced.attention_mask,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    expected = processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    assert generate.answer(model, processor, wave, "What?", max_new_tokens=8) == expected != ""


def test_windows_without_a_word_are_not_asked_about():
    audio = torch.arange(6.0).reshape(3, 2)
    blank = HeardWindow(0, 0, 100, audio=audio[:1], frames=[0])
    word = HeardWindow(0, 100, 200, runs=[Run(110, 112, 1, 0.9)], audio=audio[1:], frames=[110, 115])
    assert generate._question(blank).audio is None and generate._question(word).audio is word.audio
    asked = list(_whole([blank, word, replace(blank, source=1), replace(word, source=2, audio=None)], room=10))
    assert [question.source for question in asked] == [0, 1, 2] and asked[2].audio is None
    assert torch.equal(asked[0].audio, audio[1:]) and torch.equal(asked[1].audio, audio[:1])


def test_more_audio_than_the_context_holds(paper, monkeypatch):
    model, processor = paper
    wave = tiny.make_wave(6, 34.0)
    rows = sum(len(window.audio) for window in hear(model, processor, [wave]))
    prompt = len(processor.tokenizer(processor.prompt("What?"), add_special_tokens=False).input_ids) - 1
    settings = {"max_new_tokens": 8, "batch_size": 1}
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", rows + prompt + 8)
    assert generate.answer(model, processor, wave, "What?", **settings)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", rows + prompt + 7)
    with pytest.raises(ValueError, match=rf"more than the {rows - 1} audio tokens"):
        generate.answer(model, processor, wave, "What?", **settings)
    short = list(generate.answers(model, processor, [wave, wave[:SAMPLE_RATE]], "What?", **settings))
    assert isinstance(short[0], ValueError) and isinstance(short[1], str)
    with pytest.raises(ValueError, match="no room for audio"):
        generate.answer(model, processor, wave, "What?", max_new_tokens=100_000)


# -- memory --------------------------------------------------------------------------------------------------------


def peak_mib() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_minutes(paper, tmp_path):
    """The whole hour's waveform would be 220 MiB, its log-mel 110 MiB."""
    model, processor = paper
    minutes = np.concatenate([np.zeros(110 * 8_000, np.float32), tiny.make_wave(7, 70.0)[::2]])
    for name, times in ((3, 1), (12, 4), (60, 20)):
        with soundfile.SoundFile(tmp_path / f"{name}.flac", "w", 8_000, 1) as file:
            for _ in range(times):
                file.write(minutes)
    try:
        forget_peak()
    except OSError:
        pytest.skip("this system does not tell a process's peak memory")
    extra, done = {}, []
    for name in (3, 12, 60):  # the first time libraries set up their own buffers
        forget_peak()
        before, done = peak_mib(), []
        settings = {"batch_size": 2, "max_new_tokens": 2, "progress": done.append}
        found = next(generate.transcripts(model, processor, [tmp_path / f"{name}.flac"], **settings))
        extra[name] = peak_mib() - before
    assert found.duration == pytest.approx(3600, abs=0.01) and sum(done) == pytest.approx(3600, abs=20)
    assert len(found.peaks) > 1000 and found.peaks[-1].time > 3590
    print({f"{name} minutes": f"{mib:.0f} MiB" for name, mib in extra.items()})
    assert extra[60] < extra[12] + 70
