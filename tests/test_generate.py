"""From recordings to text in Python: batches equal one by one, order, odd audio, answers about anything, streaming."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from soundwave_fast import generate
from soundwave_fast.audio import SAMPLE_RATE
from soundwave_fast.words import Run, Word, group_words, time_words
from tests.model import tiny

SECONDS = (1.3, 0.4, 2.6, 7.2, 0.01, 3.1, 12.0, 1.9)


@pytest.fixture(scope="module", params=["paper", "released"])
def pair(request, tiny_parts):
    torch.manual_seed(1)
    semantics = request.param
    head = {} if semantics == "paper" else {"ctc_head": "free"}
    model, processor = tiny.make_model(tiny_parts, semantics=semantics, **head)
    return tiny.add_lora(model), processor


@pytest.fixture(scope="module")
def paper(tiny_parts):
    torch.manual_seed(1)
    model, processor = tiny.make_model(tiny_parts)
    return tiny.add_lora(model), processor


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    return [tiny.make_wave(i, seconds) for i, seconds in enumerate(SECONDS)]


def test_a_batch_says_what_each_says_alone(pair, waves):
    model, processor = pair
    settings = {"max_new_tokens": 6, "window_seconds": 5.0}  # 7.2 s and 12 s: several windows
    alone = [next(generate.transcripts(model, processor, [wave], **settings)) for wave in waves]
    for batch_size in (3, 8):
        together = list(generate.transcripts(model, processor, waves, batch_size=batch_size, **settings))
        assert [t.text for t in together] == [t.text for t in alone]
        assert [[(w.text, w.start, w.end) for w in t.words] for t in together] == [
            [(w.text, w.start, w.end) for w in t.words] for t in alone
        ]
        for one, two in zip(together, alone):
            assert [(p.time, p.id) for p in one.peaks] == [(p.time, p.id) for p in two.peaks]
            assert np.allclose([p.probability for p in one.peaks], [p.probability for p in two.peaks], atol=1e-4)
    texts = {t.text if model.config.semantics == "paper" else str(t.peaks) for t in alone}
    assert len(texts) > len(waves) // 2, "results that tell the recordings apart"
    assert [t.duration for t in alone] == pytest.approx(SECONDS, abs=1e-3)


def test_answers_in_a_batch_are_those_alone(pair, waves):
    model, processor = pair
    alone = [generate.answer(model, processor, wave, "Which?", max_new_tokens=6) for wave in waves]
    assert generate.answer(model, processor, waves, "Which?", max_new_tokens=6, batch_size=3) == alone
    assert len(set(alone)) > (len(waves) // 2 if model.config.semantics == "paper" else 1)


def test_one_short_recording_equals_the_models_own_generate(paper):
    model, processor = paper
    wave = tiny.make_wave(5, 2.0)
    inputs = processor(text=processor.prompt(generate.TRANSCRIBE), audio=wave)
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=pad)
    expected = processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert generate.transcribe(model, processor, wave, max_new_tokens=8) == expected != ""


def test_one_recording_or_a_list(paper, waves):
    model, processor = paper
    assert isinstance(generate.transcribe_ctc(model, processor, waves[0]), str)
    assert generate.transcribe_ctc(model, processor, waves[:1]) == [generate.transcribe_ctc(model, processor, waves[0])]
    assert generate.transcribe(model, processor, [], max_new_tokens=2) == []


def test_options_reach_the_llm(paper, waves):
    model, processor = paper
    greedy = generate.transcribe(model, processor, waves[0], max_new_tokens=6)
    static = generate.transcribe(model, processor, waves[0], max_new_tokens=6, cache_implementation="static")
    beams = generate.transcribe(model, processor, waves[0], max_new_tokens=6, num_beams=3, length_penalty=-5.0)
    assert static == greedy != beams


def test_windows_of_the_ctc_functions(paper, waves):
    """Those of `transcripts`: 12 s in one window, or cut into several of 5 s."""
    model, processor = paper
    seen = []
    for window in ({}, {"window_seconds": 5.0}):
        [whole] = generate.transcripts(model, processor, [waves[6]], llm=False, **window)
        assert generate.transcribe_ctc(model, processor, waves[6], **window) == whole.text
        assert generate.transcribe_ctc(model, processor, [waves[6]], **window) == [whole.text]
        assert generate.words(model, processor, waves[6], **window) == whole.words
        assert generate.peaks(model, processor, waves[6], **window) == whole.peaks
        seen.append(whole)
    assert seen[0].words != seen[1].words and seen[0].text != seen[1].text
    for function in (generate.transcribe_ctc, generate.words, generate.peaks):
        with pytest.raises(ValueError, match="window_seconds"):
            function(model, processor, waves[0], window_seconds=31.0)


# -- odd audio -----------------------------------------------------------------------------------------------------


def test_a_bad_recording_among_good_ones(paper, waves, tmp_path):
    model, processor = paper
    (tmp_path / "text.wav").write_text("no audio")
    bad = waves[0].copy()
    bad[100] = np.nan
    audios = [waves[0], tmp_path / "text.wav", waves[1], bad, np.zeros(0, np.float32), tmp_path / "gone.wav", waves[2]]
    found = list(generate.transcripts(model, processor, audios, max_new_tokens=4, batch_size=2))
    kinds = [type(one).__name__ for one in found]
    assert kinds == ["Transcript", "ValueError", "Transcript", "ValueError", "ValueError"] + [
        "FileNotFoundError",
        "Transcript",
    ]
    assert "text.wav" in str(found[1]) and "not finite" in str(found[3]) and "holds no samples" in str(found[4])
    good = generate.transcribe(model, processor, waves[:3], max_new_tokens=4)
    assert [found[i].text for i in (0, 2, 6)] == good
    told = list(generate.answers(model, processor, audios, "What?", max_new_tokens=4, batch_size=2))
    assert [isinstance(one, str) for one in told] == [isinstance(one, generate.Transcript) for one in found]
    with pytest.raises(ValueError, match="not finite"):
        generate.transcribe(model, processor, [waves[0], bad])


def test_nan_late_in_a_long_recording(paper):
    model, processor = paper
    wave = tiny.make_wave(0, 40.0)
    wave[-5] = np.inf
    found = list(generate.transcripts(model, processor, [wave, wave[:SAMPLE_RATE]], max_new_tokens=2, batch_size=1))
    assert isinstance(found[0], ValueError) and isinstance(found[1], generate.Transcript)


@pytest.mark.parametrize("loudest", [0.0, 1e-4])
def test_silence_has_no_words(paper, loudest):
    model, processor = paper
    wave = np.full(2 * SAMPLE_RATE, loudest, np.float32)
    assert next(generate.transcripts(model, processor, [wave])) == generate.Transcript("", 2.0, [], [])
    assert generate.answer(model, processor, wave, "What?", max_new_tokens=4) != ""  # the LLM alone


def test_clipped_loud_and_integer_audio(paper):
    model, processor = paper
    wave = tiny.make_wave(3, 2.0)
    clipped = np.clip(wave * 8, -1, 1)
    for odd in (clipped, wave * 64, wave * 1e9):  # taken as it is, and nothing overflows
        found = next(generate.transcripts(model, processor, [odd], max_new_tokens=4))
        assert found.text and all(np.isfinite(peak.probability) for peak in found.peaks)
    integers = (wave * 2**15).astype(np.int16)  # scaled as soundfile scales them
    scaled = integers.astype(np.float32) / 2**15
    assert generate.transcribe_ctc(model, processor, integers) == generate.transcribe_ctc(model, processor, scaled)
    with pytest.raises(ValueError, match="beyond"):
        generate.transcribe_ctc(model, processor, wave * 1e30)
    wide = integers.astype(np.int64)  # of what full scale?
    found = list(generate.transcripts(model, processor, [wide, wave], max_new_tokens=2))
    assert isinstance(found[0], TypeError) and "int64" in str(found[0]) and found[1].text


def test_ten_milliseconds(paper, tmp_path):
    model, processor = paper
    soundfile.write(tmp_path / "short.wav", tiny.make_wave(0, 0.01), SAMPLE_RATE)
    found = next(generate.transcripts(model, processor, [tmp_path / "short.wav"], max_new_tokens=4))
    assert found.duration == 0.01 and all(0 <= word.start <= word.end <= 1.04 for word in found.words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 0}, "batch_size"), ({"window_seconds": 31}, "window"), ({"window_seconds": 1.0}, "window")],
)
def test_arguments_out_of_range(paper, waves, settings, message):
    with pytest.raises(ValueError, match=message):
        list(generate.transcripts(*paper, waves[:1], **settings))


def test_without_an_llm(tiny_parts, waves):
    model, processor = tiny.make_model(tiny_parts, with_language_model=False)
    assert isinstance(generate.transcribe_ctc(model, processor, waves[0]), str)
    for ask in (generate.transcribe, lambda *x: generate.answer(*x, "What?")):
        with pytest.raises(ValueError, match="without its LLM"):
            ask(model, processor, waves[0])


# -- streaming -----------------------------------------------------------------------------------------------------


def test_a_stream_is_the_answer_in_pieces(paper, waves):
    model, processor = paper
    pieces = list(generate.stream_answer(model, processor, waves[2], "Why?", max_new_tokens=24))
    assert "".join(pieces).strip() == generate.answer(model, processor, waves[2], "Why?", max_new_tokens=24)
    assert sum(map(bool, pieces)) > 1


def test_a_stream_can_be_closed(paper, waves):
    model, processor = paper
    settings = {"max_new_tokens": 1500, "min_new_tokens": 1500}
    stream = generate.stream_answer(model, processor, waves[0], "Why?", **settings)
    steps = []
    handle = model.language_model.register_forward_hook(lambda *_: steps.append(1))
    next(stream)
    stream.close()  # joins the thread that writes
    count = len(steps)
    handle.remove()
    assert count < 1500


def test_a_stream_keeps_the_callers_stopping_criteria(paper, waves):
    from transformers import StoppingCriteriaList

    model, processor = paper
    settings = {"max_new_tokens": 24, "min_new_tokens": 24}
    whole = generate.answer(model, processor, waves[2], "Why?", **settings)
    seen: list[int] = []

    def after_three(ids, scores, **_):
        seen.append(ids.shape[1])
        return torch.full((len(ids),), ids.shape[1] >= 3)

    for criteria in ([after_three], StoppingCriteriaList([after_three])):
        seen.clear()
        options = {**settings, "stopping_criteria": criteria}
        short = "".join(generate.stream_answer(model, processor, waves[2], "Why?", **options)).strip()
        assert seen == [1, 2, 3] and whole.startswith(short) and short != whole
    steps = []
    handle = model.language_model.register_forward_hook(lambda *_: steps.append(1))
    never = [lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)]
    options = {"max_new_tokens": 1500, "min_new_tokens": 1500, "stopping_criteria": never}
    stream = generate.stream_answer(model, processor, waves[0], "Why?", **options)
    next(stream)
    stream.close()  # it still stops when nobody reads on
    handle.remove()
    assert len(steps) < 1500
    with pytest.raises(TypeError, match="stopping_criteria: a list"):
        next(generate.stream_answer(model, processor, waves[0], "Why?", stopping_criteria=after_three))
    with pytest.raises(ValueError, match="streamer"):
        next(generate.stream_answer(model, processor, waves[0], "Why?", streamer=object()))


def test_a_stream_tells_what_went_wrong(paper, waves, tmp_path):
    model, processor = paper
    with pytest.raises(FileNotFoundError):
        list(generate.stream_answer(model, processor, tmp_path / "gone.wav", "Why?"))
    with pytest.raises(ValueError, match="no_such_option"):
        list(generate.stream_answer(model, processor, waves[0], "Why?", no_such_option=1))


# -- words ---------------------------------------------------------------------------------------------------------


def test_words_take_their_times_from_their_tokens():
    pieces = {1: "tur", 2: "n", 3: " on", 4: " the", 5: "\ufffd", 6: " "}
    runs = [Run(0, 1, 1, 0.9), Run(5, 7, 2, 0.5), Run(10, 11, 3, 0.8), Run(12, 13, 6, 0.1), Run(15, 16, 4, 0.7)]

    def decode(ids):  # two halves of a character are one character
        return "".join(pieces[i] for i in ids).replace("\ufffd\ufffd", "é")

    assert group_words(runs, decode) == [
        Word(0.0, 0.28, "turn", 0.5),
        Word(0.4, 0.44, "on", 0.8),
        Word(0.6, 0.64, "the", 0.7),
    ]
    halves = [Run(0, 1, 3, 0.9), Run(5, 6, 5, 0.8), Run(6, 8, 5, 0.7), Run(10, 11, 4, 0.6)]
    assert [(word.text, word.start, word.end) for word in group_words(halves, decode)] == [
        ("oné", 0.0, 0.32),
        ("the", 0.4, 0.44),
    ]
    assert group_words([], decode) == []


def test_another_transcript_takes_the_times_of_the_words_it_shares():
    spoken = [Word(0.2, 0.4, "turn", 0.9), Word(0.5, 0.6, "of", 0.4), Word(0.9, 1.1, "the", 0.8)]
    timed = time_words("Turn off the lamp, please.", spoken, 0.0, 2.0)
    assert [word.text for word in timed] == ["Turn", "off", "the", "lamp,", "please."]
    assert timed[0] == Word(0.2, 0.4, "Turn", 0.9) and timed[2] == Word(0.9, 1.1, "the", 0.8)
    assert timed[1] == Word(0.5, 0.6, "off", None)  # what CTC heard there
    assert [(word.start, word.end) for word in timed[3:]] == [(1.1, 1.475), (1.475, 2.0)]  # 5 to 7 characters
    assert [w.start for w in time_words("two words", [], 1.0, 3.0)] == [1.0, 1.75]
    assert time_words("", spoken, 0.0, 2.0) == []
    alone = time_words("before turn", spoken[:1], 0.1, 2.0)
    assert alone[0] == Word(0.1, 0.2, "before", None)
