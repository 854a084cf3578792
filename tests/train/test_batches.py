"""Batches: ids, labels and CTC targets by hand; bad audio skipped and counted; silence where nothing is left."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from soundwave_fast.model import SoundwaveProcessor
from soundwave_fast.model.whisper import EDGE_MELS
from tests.model import tiny
from train.data.batches import BatchMaker
from train.data.manifest import Utterance, read


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
    assert batch.skipped == Counter({"audio: ValueError": 2, "audio: FileNotFoundError": 1})
    assert batch.task_counts == Counter(asr=2)


def test_audio_longer_than_a_window_is_skipped(rows, processor):
    long = dataclasses.replace(rows[0], duration=31.0)
    assert make([long, rows[1]], processor, [0, 1]).skipped == Counter({"audio: ValueError": 1})


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
