"""lhotse's manifests, written by lhotse itself: cuts, supervisions with recordings, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet

from soundwave_fast.errors import UserError
from tests.model import tiny
from train.data import reading, split
from train.data.manifest import read


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """(folder, recordings): 'mono' of 3 s, 'stereo' of 2 s whose channels differ."""
    folder = tmp_path_factory.mktemp("lhotse")
    soundfile.write(folder / "mono.wav", tiny.make_wave(0, 3.0), tiny.RATE)
    both = np.stack([tiny.make_wave(1, 2.0), tiny.make_wave(2, 2.0)], 1)
    soundfile.write(folder / "stereo.wav", both, tiny.RATE)
    return folder, {name: Recording.from_file(folder / f"{name}.wav") for name in ("mono", "stereo")}


def segment(recording: str, start: float, duration: float, text: str, **more) -> SupervisionSegment:
    return SupervisionSegment(f"{recording}-{start}", recording, start, duration, text=text, **more)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_cuts(sounds, tmp_path, suffix):
    _, recordings = sounds
    mono, stereo = recordings["mono"], recordings["stereo"]
    said = [segment("mono", 1.0, 1.0, "door", speaker="ann"), segment("mono", 0.0, 0.9, "open the", speaker="bob")]
    labelled = segment(
        "stereo", 0, 2.0, "hello", language="en", gender="F", custom={"emotion": "sad", "translation": "hallo"}
    )
    labelled.custom["target_language"] = "de"
    cuts = [
        MonoCut("whole", 0, mono.duration, 0, supervisions=said, recording=mono),
        MonoCut("part", 0.5, 1.25, 0, supervisions=[], recording=mono),
        MonoCut("right", 0, stereo.duration, 1, supervisions=[labelled], recording=stereo, custom={"age": 40}),
    ]
    path = tmp_path / f"cuts{suffix}"
    CutSet.from_cuts(cuts).to_file(path)
    whole, part, right = read(path)
    assert (whole.id, whole.text, whole.speaker, whole.is_segment) == ("whole", "open the door", "bob", False)
    assert (part.start, part.duration, part.text, part.is_segment) == (0.5, 1.25, "", True)
    assert (right.channel, right.language, right.translation) == (1, "en", "hallo")
    assert right.labels == {"gender": "F", "emotion": "sad", "age": "40"}
    for row, cut in zip((whole, part, right), cuts, strict=True):
        assert np.array_equal(reading.load(row), cut.load_audio()[0]), cut.id


def test_supervisions_find_their_recordings(sounds, tmp_path):
    _, recordings = sounds
    RecordingSet.from_recordings(recordings.values()).to_file(tmp_path / "tiny_recordings_train.jsonl.gz")
    said = [segment("mono", 0.5, 1.0, "one"), segment("stereo", 0.0, 2.0, "two", channel=[1])]
    path = tmp_path / "tiny_supervisions_train.jsonl.gz"
    SupervisionSet.from_segments(said).to_file(path)
    one, two = read(path)
    assert (one.text, one.start, one.duration, one.is_segment) == ("one", 0.5, 1.0, True)
    assert (two.text, two.channel, two.is_segment) == ("two", 1, False)
    assert len(reading.load(one)) == tiny.RATE
    with pytest.raises(UserError, match="jsonl.gz:1: a lhotse recording; name its cuts or its supervisions instead"):
        read(tmp_path / "tiny_recordings_train.jsonl.gz")
    (tmp_path / "tiny_recordings_train.jsonl.gz").unlink()
    with pytest.raises(UserError, match="tiny_recordings_train.jsonl.gz: no such manifest"):
        read(path)


def changed(sounds, tmp_path, change) -> str:
    """The complaint about a cut as lhotse writes it, changed."""
    cut = MonoCut("a", 0, 3.0, 0, recording=sounds[1]["mono"]).to_dict()
    change(cut)
    path = tmp_path / "cuts.jsonl"
    path.write_text(json.dumps(cut))
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:1: ")
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cut: cut.update(type="MixedCut"), "a lhotse MixedCut"),
        (lambda cut: cut.pop("recording"), "a cut without a recording"),
        (lambda cut: cut.pop("duration"), "a cut without 'duration'"),
        (lambda cut: cut.update(duration=-1), "duration -1 is not a positive number"),
        (lambda cut: cut["recording"].update(transforms=[{"name": "Speed"}]), "use data.speed"),
        (lambda cut: cut["recording"]["sources"][0].update(type="command"), "is not one audio file"),
        (lambda cut: cut["recording"].update(sources=[]), "is not one audio file"),
    ],
)
def test_what_a_row_cannot_hold_is_refused(sounds, tmp_path, change, message):
    assert message in changed(sounds, tmp_path, change)


def test_relative_paths(sounds, tmp_path, monkeypatch):
    """lhotse writes paths as it was given them: beside the manifest, or from where it was called."""
    folder, recordings = sounds
    recording = dataclasses.replace(
        recordings["mono"], sources=[dataclasses.replace(recordings["mono"].sources[0], source="mono.wav")]
    )
    for place in (folder, tmp_path):
        CutSet.from_cuts([MonoCut("a", 0, 3.0, 0, recording=recording)]).to_file(place / "cuts.jsonl")
    assert read(folder / "cuts.jsonl")[0].audio == folder / "mono.wav"
    monkeypatch.chdir(folder)
    assert read(tmp_path / "cuts.jsonl")[0].audio == folder / "mono.wav"


def test_split_writes_rows_of_ours(sounds, tmp_path):
    _, recordings = sounds
    cuts = [
        MonoCut(
            f"c{i}", i * 0.5, 0.5, 0, recording=recordings["mono"],
            supervisions=[segment("mono", 0, 0.5, f"text {i}", speaker=f"s{i}", gender="F")],
        )
        for i in range(5)
    ]  # fmt: skip
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    assert split.main([str(tmp_path / "cuts.jsonl.gz"), "--held-out", "0.4", "--out", str(tmp_path)]) == 0
    rows = sorted(read(tmp_path / "train.jsonl") + read(tmp_path / "test.jsonl"), key=lambda row: row.id)
    assert rows == read(tmp_path / "cuts.jsonl.gz")
