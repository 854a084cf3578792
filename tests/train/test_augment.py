"""Speed perturbation and SpecAugment: what they change, that a draw decides it, and where they may not be used."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from soundwave_fast.errors import UserError
from soundwave_fast.model import SoundwaveProcessor
from tests.model import tiny
from tests.train import runs
from train.config import Data, load
from train.data.augment import change_speed, mask_spectrogram, speed_of
from train.data.batches import BatchMaker
from train.data.manifest import read


def test_speed_changes_length_and_pitch():
    """A tone of 440 Hz played 1.1 times as fast: 484 Hz, and 1 / 1.1 of the samples."""
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * tiny.RATE) / tiny.RATE).astype(np.float32)
    for factor in (0.9, 1.1):
        fast = change_speed(tone, factor)
        assert len(fast) == pytest.approx(len(tone) / factor, abs=2)
        spectrum = np.abs(np.fft.rfft(fast * np.hanning(len(fast))))
        assert spectrum.argmax() * tiny.RATE / len(fast) == pytest.approx(440 * factor, abs=1)
    assert change_speed(tone, 1.0) is tone


def test_a_draw_decides_the_speed():
    factors = (0.9, 1.0, 1.1)
    drawn = [speed_of(factors, 3.0, 0, draw) for draw in range(300)]
    assert drawn == [speed_of(factors, 3.0, 0, draw) for draw in range(300)]
    assert drawn != [speed_of(factors, 3.0, 1, draw) for draw in range(300)]
    assert all(70 < drawn.count(factor) < 130 for factor in factors)
    assert {speed_of(factors, 28.0, 0, draw) for draw in range(50)} == {1.0, 1.1}, "30 s are all the encoder takes"
    assert speed_of((), 3.0, 0, 1) == 1.0


def test_spec_augment_masks_stripes():
    mel = torch.rand(80, 240) + 1.0
    before = mel.clone()
    seen = 0
    for draw in range(40):
        out = mask_spectrogram(mel, 200, (2, 20, 2, 30), 0, draw)
        assert torch.equal(out, mask_spectrogram(mel, 200, (2, 20, 2, 30), 0, draw))
        zero = out == 0
        rows, columns = zero.all(1), zero.all(0)
        assert torch.equal(zero, rows[:, None] | columns[None, :]), "whole bands and whole stretches"
        assert int(rows.sum()) <= 40 and int(columns.sum()) <= 60 and not columns[200:].any()
        assert torch.equal(out[~zero], before[~zero])
        seen += int(zero.any())
    assert seen > 30 and torch.equal(mel, before), "a copy is masked"
    assert mask_spectrogram(mel, 200, (), 0, 0) is mel


def test_a_time_mask_leaves_four_fifths_of_the_speech():
    mel = torch.ones(80, 60)
    masked = [int((mask_spectrogram(mel, 20, (0, 0, 1, 100), 0, draw) == 0).all(0).sum()) for draw in range(60)]
    assert max(masked) == 4


def test_batches_are_augmented_by_their_draws(tiny_parts, speech_dir):
    processor = SoundwaveProcessor.from_parts(tiny_parts.whisper, tiny_parts.llm)
    rows = read(speech_dir / "train.jsonl")
    items = [(rows[11], "asr", draw) for draw in range(12)]
    plain, once, again = (
        BatchMaker(rows, processor, 0, False, data=data).collate(items)
        for data in (Data(), *[Data(speed=(0.8, 1.0), spec_augment=(1, 20, 1, 20))] * 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once.mels, again.mels, strict=True))
    slowed = [speed_of((0.8, 1.0), rows[11].duration, 0, draw) == 0.8 for draw in range(12)]
    longer = [int(a) > int(b) for a, b in zip(once.mel_lengths, plain.mel_lengths, strict=True)]
    assert longer == slowed and True in slowed and False in slowed
    assert len({tuple(mel.flatten().tolist()) for mel in plain.mels}) == 1
    assert len({tuple(mel.flatten().tolist()) for mel in once.mels}) > 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.speed=[0.9,1.1]", "data.cache_frames=true"], "data.speed: changes the audio at every draw"),
        (["data.spec_augment=[1,2,3,4]", "data.cache_frames=true"], "data.spec_augment: changes the audio"),
        (["data.spec_augment=[1,2]"], "data.spec_augment: takes frequency masks, bins, time masks, frames"),
        (["data.speed=[0]"], "data.speed: factors lie between 0.5 and 2, got 0"),
        (["data.max_seconds=40"], "data.max_seconds: must be above data.min_seconds and at most 30"),
        (["data.temperature=[1,-1]"], "data.temperature: must not fall with the epochs, got -1"),
        (["data.prefetch=0"], "data.prefetch: must be at least 1"),
        (["data.batch_tokens=-1"], "data.batch_tokens: must be at least 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    (tmp_path / "a.yaml").write_text("{}")
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "a.yaml"), 1, settings=settings)


def test_an_augmented_run_resumes_bit_for_bit(tiny_parts, speech_dir, tmp_path, monkeypatch):
    """Speed, masks, phrasings, tasks and a worker process: a run cut after step 3 repeats the one that was not."""
    tree = {"data": {"train": [str(speech_dir / "train.jsonl")], "speed": [0.9, 1.1], "spec_augment": [2, 20, 2, 20]}}
    tree["data"] |= {"batch_seconds": 8, "batch_tokens": 400, "batch_size": 4, "more_phrasings": True, "workers": 1}
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir, **tree)
    more = ("optim.steps=6", "run.valid_utterances=0", "run.log_every=100")
    assert runs.run(1, config, tmp_path / "whole", *more) == 0
    with monkeypatch.context() as patch:
        runs.stop_after(3, patch, signal.SIGINT)
        assert runs.run(1, config, tmp_path / "cut", *more) == 130
    assert runs.run(1, config, tmp_path / "cut", *more) == 0
    assert runs.losses(tmp_path / "cut") == runs.losses(tmp_path / "whole")
    assert runs.run(1, config, tmp_path / "own", *more, "data.workers=0") == 0
    assert runs.losses(tmp_path / "own") == runs.losses(tmp_path / "whole")
    assert runs.run(1, config, tmp_path / "plain", *more, "data.speed=[]", "data.spec_augment=[]") == 0
    assert runs.losses(tmp_path / "plain") != runs.losses(tmp_path / "whole")
