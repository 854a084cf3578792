"""Every kind of source on a tiny layout of its own: rows with absolute audio, text, duration, source."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from soundwave_fast.errors import UserError
from train.curation.sources import parse, without_tags
from train.data.manifest import read

RATE = 16_000


def sound(path: Path, seconds: float = 0.5, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(len(path.name)).standard_normal(int(seconds * rate))
    soundfile.write(path, wave, rate)
    return path


def rows(text: str, **more) -> list[dict]:
    found = list(parse(text, **more).rows())
    assert all(Path(row["audio"]).is_absolute() and row["source"] for row in found)
    return found


def test_jsonl_keeps_other_keys_and_reads_gzip(tmp_path):
    sound(tmp_path / "a.wav")
    row = {"id": 7, "audio": "a.wav", "duration": 0.5, "text": "hi", "slots": {"x": "y"}, "mine": [1]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n\n")
    (found,) = rows(str(tmp_path / "m.jsonl"), language="en")
    assert found == {**row, "audio": str(tmp_path / "a.wav"), "language": "en", "source": "m"}
    with gzip.open(tmp_path / "m.jsonl.gz", "wt") as file:
        file.write(json.dumps({**row, "language": "de"}) + "\n")
    (found,) = rows(f"named=jsonl:{tmp_path / 'm.jsonl.gz'}", language="en")
    assert found["language"] == "de" and found["source"] == "named"


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"id": "a", "audio": "a.wav"}', '{"id": "a", "audio": "b", "duration": -1}']
)
def test_bad_jsonl_names_the_line(tmp_path, line):
    (tmp_path / "m.jsonl").write_text('{"id": "a", "audio": "a.wav", "duration": 1}\n' + line + "\n")
    with pytest.raises(UserError, match="m.jsonl:2"):
        rows(str(tmp_path / "m.jsonl"))


def test_folder_finds_transcripts_beside_and_in_tables(tmp_path):
    for name in ("a/one.wav", "a/two.flac", "b/three.wav", "b/four.wav", "5-6-7.flac", "none.wav"):
        sound(tmp_path / name)
    (tmp_path / "corrupt.wav").write_text("no audio")
    (tmp_path / "a/one.txt").write_text(" first\n")
    (tmp_path / "transcripts.tsv").write_text("a/two.flac\tsecond\nthree\tthird one\n")
    (tmp_path / "b/metadata.csv").write_text("four|raw 4|fourth\n")
    (tmp_path / "5-6.trans.txt").write_text("5-6-7 FIFTH ONE\n")
    found = {row["id"]: row for row in rows(str(tmp_path))}
    assert {name: row["text"] for name, row in found.items()} == {
        "a-one": "first",
        "a-two": "second",
        "b-three": "third one",
        "b-four": "fourth",
        "5-6-7": "FIFTH ONE",
        "none": "",
        "corrupt": "",
    }
    assert found["a-one"]["duration"] == 0.5 and found["corrupt"]["duration"] == 0


def lhotse_sets(folder: Path):
    from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet

    recording = Recording.from_file(sound(folder / "meeting.wav", 4.0), recording_id="meeting")
    said = [
        SupervisionSegment("s1", "meeting", 0.5, 1.0, text="one", language="English", speaker="ann"),
        SupervisionSegment("s2", "meeting", 2.0, 1.5, text="two"),
    ]
    return RecordingSet.from_recordings([recording]), SupervisionSet.from_segments(said)


@pytest.mark.parametrize("way", ["cuts", "pair", "beside"])
def test_lhotse_manifests_give_a_row_a_supervision(tmp_path, way):
    from lhotse import CutSet

    recordings, supervisions = lhotse_sets(tmp_path)
    if way == "cuts":
        CutSet.from_manifests(recordings, supervisions).to_file(tmp_path / "cuts.jsonl.gz")
        text = str(tmp_path / "cuts.jsonl.gz")
    else:
        recordings.to_file(tmp_path / "x_recordings.jsonl.gz")
        supervisions.to_file(tmp_path / "x_supervisions.jsonl.gz")
        text = str(tmp_path / "x_supervisions.jsonl.gz")
        text = f"lhotse:{tmp_path / 'x_recordings.jsonl.gz'},{text}" if way == "pair" else text
    found = rows(text)
    assert [(row["id"], row["start"], row["duration"], row["text"]) for row in found] == [
        ("s1", 0.5, 1.0, "one"),
        ("s2", 2.0, 1.5, "two"),
    ]
    assert found[0]["speaker"] == "ann" and found[0]["audio"] == str(tmp_path / "meeting.wav")
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert [row.start for row in read(tmp_path / "kept.jsonl")] == [0.5, 2.0], "the trainer reads such segments"


def test_lhotse_audio_that_is_no_plain_file_is_refused(tmp_path):
    from lhotse import CutSet

    recordings, supervisions = lhotse_sets(tmp_path)
    CutSet.from_manifests(recordings.resample(8000), supervisions).to_file(tmp_path / "cuts.jsonl")
    with pytest.raises(UserError, match="one plain file"):
        rows(str(tmp_path / "cuts.jsonl"))


def test_librispeech(tmp_path):
    part = tmp_path / "LibriSpeech/dev-clean-2/84/121"
    for i in range(2):
        sound(part / f"84-121-000{i}.flac")
    (part / "84-121.trans.txt").write_text("84-121-0000 GO DO YOU HEAR\n84-121-0001 BUT\n84-121-0002 NO FILE\n")
    found = rows(f"librispeech:{tmp_path / 'LibriSpeech'}")
    assert [(row["id"], row["text"], row["speaker"]) for row in found] == [
        ("84-121-0000", "GO DO YOU HEAR", "84"),
        ("84-121-0001", "BUT", "84"),
    ]
    assert found[0]["duration"] == 0.5 and "start" not in found[0] and found[0]["source"] == "LibriSpeech"
    with pytest.raises(UserError, match="librispeech recipe"):
        rows(f"librispeech:{part}")


COLUMNS = ("client_id", "path", "sentence", "up_votes", "age", "gender", "accents", "variant", "locale", "segment")


def common_voice(folder: Path, columns: tuple[str, ...] = COLUMNS) -> Path:
    clips = [sound(folder / "cy/clips" / f"common_voice_cy_{i}.mp3", 1.0) for i in range(2)]
    lines = ["\t".join(columns)]
    for i, clip in enumerate(clips):
        values = {"client_id": f"speaker{i}", "path": clip.name, "sentence": f' "frawddeg {i}'}
        lines.append("\t".join(values.get(column, "") for column in columns))
    (folder / "cy/train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", ["", "cy"])
def test_common_voice(tmp_path, path):
    found = rows(f"cv=commonvoice:{common_voice(tmp_path) / path}")
    assert [(row["text"], row["speaker"], row["language"]) for row in found] == [
        ('"frawddeg 0', "speaker0", "cy"),
        ('"frawddeg 1', "speaker1", "cy"),
    ]
    assert found[0]["audio"].endswith(".mp3") and found[0]["duration"] == pytest.approx(1.0, abs=0.1)


def test_common_voice_of_an_old_release_says_what_is_missing(tmp_path):
    common_voice(tmp_path, COLUMNS[:6])
    with pytest.raises(UserError, match="columns accents, variant"):
        rows(f"commonvoice:{tmp_path}")


def test_voxpopuli_with_its_table_beside(tmp_path):
    sound(tmp_path / "raw_audios/en/2020/20200101-0900-PLENARY_en.ogg", 4.0)
    head = (
        "session_id|id_|original_text|normed_text|speaker_id|split|gender|is_gold_transcript|accent|start_time|end_time"
    )
    lines = [head]
    for i, split in enumerate(("train", "dev", "test")):
        lines.append(f"20200101-0900-PLENARY|{i}|Thank you {i}|thank you {i}|sp|{split}|f|||{i}.0|{i}.8")
    with gzip.open(tmp_path / "asr_en.tsv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    (found,) = rows(f"voxpopuli:{tmp_path}", parts=("dev",))
    assert (found["text"], found["start"], found["duration"]) == ("thank you 1", 1.0, 0.8)


@pytest.mark.skipif(importlib.util.find_spec("speechcolab") is not None, reason="speechcolab is installed")
def test_gigaspeech_says_what_it_needs(tmp_path):
    with pytest.raises(UserError, match="speechcolab"):
        rows(f"gigaspeech:{tmp_path}")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("AS THEY'RE LEAVING <COMMA> CAN KASH <QUESTIONMARK>", "AS THEY'RE LEAVING, CAN KASH?"),
        ("<MUSIC>", ""),
        ("A", "A"),
    ],
)
def test_gigaspeech_tags_become_punctuation(text, clean):
    assert without_tags(text) == clean


@pytest.mark.parametrize("text", ["nowhere.jsonl", "tar:.", "librispeech:nowhere"])
def test_what_is_no_source(text):
    with pytest.raises(UserError):
        parse(text)


def test_file_that_is_neither(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"hello": 1}\n')
    with pytest.raises(UserError, match="neither"):
        parse(str(tmp_path / "x.jsonl"))
