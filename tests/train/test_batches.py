"""Batches: ids, labels and CTC targets by hand; bad audio skipped and counted; silence where nothing is left."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch

from soundwave_fast.model import SoundwaveProcessor
from soundwave_fast.model.whisper import EDGE_MELS
from tests.model import tiny
from train.config import Data
from train.data import batches
from train.data.batches import Batch, BatchMaker, untally
from train.data.loader import batches_of, make_loader
from train.data.manifest import read
from train.data.utterance import Utterance


@pytest.fixture(scope="module")
def processor(tiny_parts) -> SoundwaveProcessor:
    return SoundwaveProcessor.from_parts(tiny_parts.whisper, tiny_parts.llm)


@pytest.fixture
def rows(speech_dir) -> list[Utterance]:
    return read(speech_dir / "train.jsonl")


def make(rows, processor, picks, task="asr", with_prompts=True, cached=()):
    maker = BatchMaker(rows, processor, seed=0, with_prompts=with_prompts, cached=cached)
    return maker.collate([(rows[i], task, draw) for draw, i in enumerate(picks)])


def test_prompt_answer_labels_and_targets(rows, processor):
    batch = make(rows, processor, [0, 5, 8])
    tokenizer = processor.tokenizer
    for i, row in enumerate([rows[0], rows[5], rows[8]]):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()].tolist()
        answer = [t for t in batch.labels[i].tolist() if t != -100]
        assert answer == tokenizer(row.text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        assert ids[-len(answer) :] == answer
        assert ids.count(processor.audio_token_id) == 1
        assert tokenizer.decode(ids[: -len(answer)]).endswith("assistant\n")
        target = batch.ctc_targets[i, : batch.ctc_target_lengths[i]].tolist()
        assert tokenizer.decode(target) == " " + row.text
    padding = batch.attention_mask == 0
    assert (batch.input_ids[padding] == tokenizer.pad_token_id).all() and (batch.labels[padding] == -100).all()
    assert batch.ids == [str(rows[i].audio) for i in (0, 5, 8)]
    assert batch.task_counts == Counter(asr=3) and not batch.skipped
    assert [mel.shape[1] - EDGE_MELS for mel in batch.mels] == batch.mel_lengths.tolist()
    assert batch.seconds == pytest.approx(sum(rows[i].duration for i in (0, 5, 8)))
    assert batch.counts.tolist() == [float((batch.labels != -100).sum()), 3.0]


def test_stage_1_has_no_prompts(rows, processor):
    batch = make(rows, processor, [0, 1], with_prompts=False)
    assert (batch.labels == -100).all() and (batch.attention_mask == 0).all()
    assert batch.counts.tolist() == [0.0, 2.0]


def test_a_draw_decides_the_phrasing(rows, processor):
    ids = [make(rows, processor, [0] * 8).input_ids for _ in range(2)]
    assert torch.equal(*ids)
    assert len({tuple(row.tolist()) for row in ids[0]}) > 1


def test_broken_audio_is_skipped_and_counted(speech_dir, processor):
    rows = read(speech_dir / "broken.jsonl")
    batch = make(rows, processor, range(5))
    assert batch.ids == [str(row.audio) for row in rows[:2]]
    assert batch.skipped == Counter({"audio: corrupt": 1, "audio: empty": 1, "audio: missing": 1})
    assert batch.task_counts == Counter(asr=2)


def test_audio_longer_than_a_window_is_skipped(rows, processor):
    long = dataclasses.replace(rows[0], duration=31.0)
    assert make([long, rows[1]], processor, [0, 1]).skipped == Counter({"audio: too long": 1})


def sound(tmp_path, name: str, wave: np.ndarray, duration: float | None = None) -> Utterance:
    """A row over a wav of these samples; `duration` where it says otherwise."""
    soundfile.write(tmp_path / f"{name}.wav", wave, tiny.RATE, subtype="FLOAT")
    return Utterance(name, tmp_path / f"{name}.wav", duration or len(wave) / tiny.RATE, text="stop")


def test_every_cause_has_its_name(rows, processor, tmp_path):
    wave = tiny.make_wave(0, 2.0)
    holes = wave.copy()
    holes[100] = float("nan")
    items = {
        "audio: not finite": sound(tmp_path, "nan", holes),
        "audio: too short": sound(tmp_path, "short", wave[:800]),
        "audio: too long": sound(tmp_path, "lies", tiny.make_wave(1, 4.0), duration=1.0),
        "audio: empty": dataclasses.replace(rows[2], start=50.0, is_segment=True),
        "audio: missing": dataclasses.replace(rows[2], audio=tmp_path / "gone.wav"),
        "audio: corrupt": dataclasses.replace(rows[2], channel=1),
    }
    for cause, row in items.items():
        batch = make([row, rows[1]], processor, [0, 1])
        assert batch.skipped == Counter({cause: 1}) and len(batch.ids) == 1, cause


def test_tallies_add_up_over_ranks(rows, processor, speech_dir):
    broken = read(speech_dir / "broken.jsonl")
    one = make(broken, processor, range(5))
    other = make([*broken, dataclasses.replace(rows[2], text="z" * 40)], processor, [0, 3, 5], task="first_word")
    drawn, skipped = untally(one.tally + other.tally)
    assert drawn == one.task_counts + other.task_counts == Counter(asr=2, first_word=2)
    assert skipped == one.skipped + other.skipped and skipped["audio: empty"] == 2 and len(skipped) == 4
    silent = Batch([""], 0.0, [None], *[torch.zeros(1)] * 6)
    assert untally(silent.tally) == (Counter(), Counter())


def test_a_stretch_of_a_file_is_heard_alone(processor, tmp_path):
    first, second = tiny.make_wave(0, 1.5), tiny.make_wave(1, 1.25)
    row = sound(tmp_path, "both", np.concatenate([first, second]))
    part = dataclasses.replace(row, start=1.5, duration=1.25, is_segment=True)
    alone = sound(tmp_path, "second", second)
    one, other = make([part, row], processor, [0, 1]), make([alone], processor, [0])
    assert torch.equal(one.mels[0], other.mels[0])
    assert len(set(one.ids)) == 2, "their cached frames are kept apart"


@pytest.mark.parametrize("with_prompts", [True, False])
def test_nothing_left_gives_silence(speech_dir, processor, with_prompts):
    rows = read(speech_dir / "broken.jsonl")
    batch = make(rows, processor, [2, 3, 4], with_prompts=with_prompts)
    assert batch.ids == [""] and batch.seconds == 0.0
    assert batch.counts.tolist() == [0.0, 0.0]
    assert batch.skipped.total() == 3 and not batch.task_counts
    assert (batch.labels == -100).all()
    placeholders = int((batch.input_ids == processor.audio_token_id).sum())
    assert placeholders == (1 if with_prompts else 0)
    assert len(batch.mels) == 1 and batch.mels[0].isfinite().all()


@pytest.mark.parametrize("with_prompts", [True, False])
def test_the_model_takes_silence(tiny_parts, speech_dir, with_prompts):
    """A rank whose batch is all bad runs every module: finite sums of zero, gradients of zero, none missing."""
    model, processor = tiny.make_model(tiny_parts, with_language_model=with_prompts)
    batch = make(read(speech_dir / "broken.jsonl"), processor, [2, 3, 4], with_prompts=with_prompts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("alignment_adapter", "ctc_head", "shrinking_adapter")))
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels if with_prompts else None,
        input_features=processor.pad_mels(batch.mels),
        feature_lengths=batch.mel_lengths,
        ctc_targets=batch.ctc_targets,
        ctc_target_lengths=batch.ctc_target_lengths,
    )
    assert out.ctc_sum.item() == 0 and out.ctc_count.item() == 0
    assert not with_prompts or (out.ce_sum.item() == 0 and out.ce_count.item() == 0)
    out.loss.backward()
    used = [n for n, p in model.named_parameters() if p.requires_grad and (with_prompts or "shrinking" not in n)]
    for name in used:
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.isfinite().all() and not gradient.any(), name


def test_a_transcript_that_cannot_fit_gets_no_ctc(rows, processor):
    long = dataclasses.replace(rows[2], text="z" * 40)
    batch = make([long, rows[0]], processor, [0, 1])
    assert batch.ctc_target_lengths[0] == 0 and batch.ctc_target_lengths[1] > 0
    assert batch.skipped == Counter({"transcript longer than its frames (no CTC)": 1})
    assert batch.ids == [str(rows[2].audio), str(rows[0].audio)], "it still trains the LLM"
    assert batch.counts[1] == 1


def test_repeats_need_a_blank_between(processor, rows):
    """A second has 25 frames; n equal tokens in a row take 2 n - 1 of them."""
    outcomes = set()
    for count in range(8, 20):
        row = dataclasses.replace(rows[2], text="z" * count)
        assert row.duration < 1
        ids = processor.ctc_ids(row.text)
        fits = len(ids) + sum(a == b for a, b in zip(ids, ids[1:])) <= 25
        assert bool(make([row], processor, [0]).ctc_target_lengths[0]) == fits
        outcomes.add((fits, len(ids) <= 25))
    assert outcomes == {(True, True), (False, True)}, "it is the repeats that decide here, not the number of tokens"


def test_cached_audio_is_not_read(rows, processor, tmp_path):
    gone = dataclasses.replace(rows[0], audio=tmp_path / "gone.wav")
    batch = make([gone], processor, [0], cached={str(gone.audio): torch.zeros(50, 32)})
    assert batch.mels == [None] and batch.mel_lengths.tolist() == [100]


def test_equal_ids_of_two_manifests_are_two_utterances(rows, processor):
    """Cached encoder frames are found by what `ids` holds."""
    twin = dataclasses.replace(rows[1], id=rows[0].id)
    assert len(set(make([rows[0], twin], processor, [0, 1]).ids)) == 2


@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_a_placeholder_in_a_rows_own_text_is_refused(rows, processor, key):
    """It would be taken for audio, and end the run in the middle."""
    row = dataclasses.replace(rows[0], **{"prompt": "Who?", "answer": "Joe", key: "What is <audio_patch>?"})
    batch = make([row, dataclasses.replace(row, prompt="Who?", answer="Joe")], processor, [0, 1], task="given")
    assert batch.skipped.total() == 1 and len(batch.ids) == 1


# -- the loader ------------------------------------------------------------------------------------------------

FIELDS = ("mel_lengths", "input_ids", "attention_mask", "labels", "ctc_targets", "ctc_target_lengths")
AUGMENTED = Data(
    tasks={"asr": 1.0, "slot": 1.0, "then_slot": 1.0}, batch_seconds=9, batch_tokens=300, batch_size=4, buckets=2,
    speed=(0.9, 1.0, 1.1), spec_augment=(2, 10, 2, 20), more_phrasings=True,
)  # fmt: skip


def assert_equal(one, other):
    assert one.ids == other.ids and one.skipped == other.skipped and one.task_counts == other.task_counts
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)
    assert all(torch.equal(a, b) for a, b in zip(one.mels, other.mels, strict=True))


def test_workers_make_the_same_batches(rows, processor):
    own, worked = (
        make_loader(rows, processor, dataclasses.replace(AUGMENTED, workers=workers), seed=0) for workers in (0, 2)
    )
    for one, other in islice(zip(own, worked, strict=True), 8):
        assert_equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_reads_no_audio_of_the_batches_before(rows, processor, workers, tmp_path, monkeypatch):
    """After 6 batches come batches 7, 8, 9; the files only they do not name may be gone by then."""
    data = dataclasses.replace(AUGMENTED, workers=workers)
    loader = make_loader(rows, processor, data, seed=0)
    stream = iter(loader)
    for _ in range(6):
        next(stream)
    state = copy.deepcopy(loader.state_dict())
    wanted = [next(stream) for _ in range(3)]
    del stream
    again = make_loader(rows, processor, data, seed=0)
    again.sampler.skip = batches_of(state)
    assert again.sampler.skip == 6
    log = tmp_path / "read.txt"
    real = batches.load

    def noted(row, *args):
        with log.open("a") as file:  # a worker is another process
            file.write(f"{row.key}\n")
        return real(row, *args)

    monkeypatch.setattr(batches, "load", noted)
    for one, other in zip(wanted, again, strict=False):
        assert_equal(one, other)
    read_now = log.read_text().splitlines()
    if not workers:
        assert sorted(read_now) == sorted(key for batch in wanted for key in batch.ids)
    else:  # and what the workers read ahead
        assert len(read_now) <= (3 + 2 * data.prefetch) * data.batch_size


def test_what_does_not_fit_is_counted_by_the_loader(rows, processor):
    data = dataclasses.replace(AUGMENTED, batch_tokens=45)
    counted = sum((batch.skipped for batch in islice(make_loader(rows, processor, data, seed=0), 20)), Counter())
    assert counted["batch: an utterance does not fit"] > 0
    for batch in islice(make_loader(rows, processor, data, seed=0), 20):
        assert batch.input_ids.numel() <= 45


def test_token_bounds_hold_for_the_real_tokens(rows, processor):
    sizes = [batch.input_ids.numel() for batch in islice(make_loader(rows, processor, AUGMENTED, seed=0), 30)]
    assert max(sizes) <= 300 and max(sizes) > 150
