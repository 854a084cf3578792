"""The curation folder: shards and digests, claims, selection and report; the command line's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from soundwave_fast.errors import UserError
from train import curate
from train.curation.engine import Engine, scored_row
from train.curation.reasons import Limits
from train.curation.report import write_report
from train.curation.selection import WORST, scored_rows, select
from train.curation.shards import Job
from train.curation.sound import Sound
from train.curation.transcribers import Transcript

SETTINGS = {"model": "m", "language": "en", "task": "transcribe"}


def manifest(path: Path, count: int, **more) -> Path:
    lines = [{"id": f"u{i}", "audio": f"{i}.wav", "duration": 3.0, "text": "turn it on", **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def scored(job: Job, name: str, said: str, text: str = "turn it on", hash: str = "", source: str = "one") -> dict:
    row = {"id": name, "audio": name, "duration": 3.0, "text": text, "source": source}
    return scored_row(row, Sound(np.zeros(1), 3.0, -20.0, 0.0, hash or name), Transcript(said, -0.1), "en")


@pytest.fixture
def job(tmp_path) -> Job:
    """Two shards of two, prepared."""
    source = manifest(tmp_path / "m.jsonl", 4)
    assert curate.main(["prepare", str(source), "--out", str(tmp_path / "out"), "--shard-size", "2"]) == 0
    return Job(tmp_path / "out")


def finish(job: Job, rows: list[list[dict]], settings: dict = SETTINGS) -> None:
    for shard, block in zip(job.inputs(), rows, strict=True):
        job.finish(shard, block, settings)


def test_prepare_cuts_shards_once(job, tmp_path, capsys):
    assert [path.name for path in job.inputs()] == ["shard-00000.jsonl", "shard-00001.jsonl"]
    assert job.note()["rows"] == 4
    again = ["prepare", str(tmp_path / "m.jsonl"), "--out", str(job.out)]
    assert curate.main([*again, "--shard-size", "2"]) == 0 and "is prepared: 4" in capsys.readouterr().err
    assert curate.main(again) == 2 and "other sources" in capsys.readouterr().err
    assert curate.main([*again, "--again"]) == 0 and len(job.inputs()) == 1


def test_ids_become_unique(tmp_path):
    one = manifest(tmp_path / "m.jsonl", 2)
    assert curate.main(["prepare", str(one), str(one), "--out", str(tmp_path / "out")]) == 0
    (shard,) = Job(tmp_path / "out").inputs()
    assert [json.loads(line)["id"] for line in shard.read_text().splitlines()] == ["u0", "u1", "u0~2", "u1~2"]


def test_prepare_that_fails_leaves_the_old_shards(job, tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text('{"id": "a", "audio": "a", "duration": 1}\n{broken\n')
    before = [path.read_bytes() for path in job.inputs()]
    assert curate.main(["prepare", str(tmp_path / "m.jsonl"), "--out", str(job.out), "--again"]) == 2
    assert "m.jsonl:2" in capsys.readouterr().err and [path.read_bytes() for path in job.inputs()] == before


def test_finished_is_proved_by_input_settings_and_output(job):
    shard = job.inputs()[0]
    assert job.finished(shard) is None
    job.finish(shard, [scored(job, "u0", "turn it on")], SETTINGS)
    assert job.finished(shard)["rows"] == 1 and job.finished(shard, SETTINGS)
    assert job.finished(shard, {**SETTINGS, "model": "other"}) is None
    output, note = job.scored(shard), job.scored(shard).with_suffix(".done")
    kept = {path: path.read_bytes() for path in (shard, output, note)}
    for path in kept:
        path.write_bytes(kept[path][:-3])
        assert job.finished(shard) is None, path
        path.write_bytes(kept[path])
        assert job.finished(shard)
    output.unlink()
    assert job.finished(shard) is None


HOLD = "import sys, time; from train.curation.shards import *\nwith Job(Path(sys.argv[1])).claim(Path('s.jsonl')) as c:"
HOLD += " print(c, flush=True); time.sleep(60)"


def test_claim_is_exclusive_and_dies_with_its_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        with Job(tmp_path).claim(Path("s.jsonl")) as mine:
            assert mine is False
        with Job(tmp_path).claim(Path("t.jsonl")) as mine:
            assert mine is True
    finally:
        process.kill()
        process.wait()
    with Job(tmp_path).claim(Path("s.jsonl")) as mine:
        assert mine is True


class Echo:
    """Says its waveform's length; dies at call `last`."""

    def __init__(self, last: int = 1000):
        self.calls, self.last = 0, last

    def __call__(self, waves, languages):
        self.calls += 1
        if self.calls > self.last:
            raise KeyboardInterrupt
        return [Transcript(f"heard {len(wave)} samples", -0.5) for wave in waves]


@pytest.fixture
def sounds(tmp_path):
    import soundfile

    from tests.model.tiny import RATE, make_wave

    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", make_wave(i, 0.5 + 0.1 * i), RATE)


def engine(job: Job, transcriber=None, **more) -> Engine:
    return Engine(job, transcriber or Echo(), SETTINGS, batch_size=1, **more)


def outputs(job: Job) -> list[bytes]:
    return [job.scored(path).read_bytes() for path in job.inputs()]


def test_interrupted_run_goes_on_and_ranks_share(job, sounds, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        engine(job, Echo(last=3)).run()
    assert [bool(job.finished(path)) for path in job.inputs()] == [True, False]
    second = Echo()
    assert engine(job, second).run() == 0 and second.calls == 2
    whole = outputs(job)
    idle = Echo()
    assert engine(job, idle).run() == 0 and idle.calls == 0
    for path in (job.out / "scored").iterdir():
        path.unlink()
    late = engine(job, rank=1, world=2)  # rank 0 never comes: rank 1 does its own and then the rest
    assert late.run() == 0 and late.shards == 2 and outputs(job) == whole


def test_shard_that_another_process_holds_is_left_to_it(job, sounds):
    with job.claim(job.inputs()[0]):
        assert engine(job).run() == 1
    assert [bool(job.finished(path)) for path in job.inputs()] == [False, True]


def test_batch_that_does_not_fit_is_halved(job, sounds):
    import torch

    class Small(Echo):
        def __call__(self, waves, languages):
            if len(waves) > 1:
                raise torch.OutOfMemoryError
            return super().__call__(waves, languages)

    small = Small()
    assert Engine(job, small, SETTINGS, batch_size=2).run() == 0 and small.calls == 4


def test_select_judges_across_shards(job, tmp_path, capsys):
    with pytest.raises(UserError, match="2 of 2 shards"):
        select(scored_rows(job), Limits(), tmp_path)
    rows = [
        [scored(job, "wrong", "what is that", hash="same"), scored(job, "good", "turn it on", hash="same")],
        [scored(job, "copy", "turn it on", hash="same"), scored(job, "near", "turn it off", source="two")],
    ]
    finish(job, rows)
    tally = select(scored_rows(job), Limits(), tmp_path / "a")
    kept = [json.loads(line) for line in (tmp_path / "a/kept.jsonl").read_text().splitlines()]
    dropped = [json.loads(line) for line in (tmp_path / "a/dropped.jsonl").read_text().splitlines()]
    assert [row["id"] for row in kept] == ["good"], "a bad copy does not shut out a good one"
    assert {row["id"]: row["reason"] for row in dropped} == {"wrong": "wer", "copy": "duplicate", "near": "wer"}
    summary = tally.summary()
    assert summary["counts"] == {"kept": 1, "wer": 2, "duplicate": 1}
    assert summary["hours"]["wer"] == pytest.approx(6 / 3600, abs=1e-4)
    assert summary["sources"]["two"] == {"wer": {"hours": pytest.approx(3 / 3600, abs=1e-4), "utterances": 1}}
    assert summary["wer"] == pytest.approx(4 / 12, abs=1e-4)
    assert select(scored_rows(job), Limits(max_wer=0.5), tmp_path / "b").summary()["kept"] == 2


def test_select_refuses_shards_of_unlike_settings(job, tmp_path):
    for shard, model in zip(job.inputs(), ("a", "b"), strict=True):
        job.finish(shard, [scored(job, shard.stem, "turn it on")], {**SETTINGS, "model": model})
    with pytest.raises(UserError, match="unlike settings"):
        select(scored_rows(job), Limits(), tmp_path)


def test_partial_takes_what_is_there(job, tmp_path):
    job.finish(job.inputs()[1], [scored(job, "u2", "turn it on")], SETTINGS)
    assert select(scored_rows(job, partial=True), Limits(), tmp_path).rows == 1


class Page(HTMLParser):
    """Tags and text of a page; void tags aside, each must be closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_escaped_page(job, tmp_path):
    nasty = '<script>alert("x")</script> & co'
    rows = [scored(job, f"u{i}", f"turn it {'off ' * i}", text=f"{nasty} {i}") for i in range(30)]
    finish(job, [rows, [scored(job, "good", "turn it on", source="<b>s</b>")]])
    tally = select(scored_rows(job), Limits(), tmp_path)
    page = Page()
    page.feed(write_report(tally, Limits(), SETTINGS, tmp_path).read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert not page.open and "script" not in page.tags and "b" in page.tags and nasty in text and "<b>s</b>" in text
    assert [source[:22] for source in page.sources] == ["data:image/png;base64,"]
    assert len(tally.worst) == WORST and text.count(nasty) == WORST and f"{nasty} 29" in text
    assert (tmp_path / "wer.png").read_bytes()[:4] == b"\x89PNG"
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["kept"] == 1 and figures["limits"]["max_wer"] == 0.1 and figures["transcription"] == SETTINGS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nowhere.jsonl", "--out", "o"], "nowhere.jsonl: no such"),
        (["prepare", "m.jsonl", "--out", "o", "--shard-size", "0"], "--shard-size: must be at least 1"),
        (["transcribe", "nowhere", "--model", "m"], "nowhere: no prepared"),
        (["transcribe", "out", "--model", "nowhere/folder"], "--model nowhere/folder: cannot be loaded"),
        (["transcribe", "out", "--model", "package:big"], "package:whisper-tiny.en"),
        (["transcribe", "out", "--model", "m", "--device", "warp"], "--device warp"),
        (["transcribe", "out", "--model", "m", "--backend", "faster-whisper"], "faster-whisper"),
        (["select", "out", "--max-wer", "-1"], "--max-wer"),
        (["select", "out"], "2 of 2 shards are not transcribed"),
        (["instruct", "m.jsonl", "--out", "i.jsonl", "--templates", "x"], "--templates: 'x'"),
        (["spoken-qa", "--out", "o", "--questions", "nowhere"], "--questions nowhere"),
    ],
)
def test_mistakes_are_one_line(job, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert curate.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("curate: ") and message in error and "\n" not in error
    assert not Path("o").exists() and not Path("i.jsonl").exists()


def test_run_is_for_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = manifest(tmp_path / "m.jsonl", 1)
    assert curate.main(["run", str(source), "--out", str(tmp_path / "o"), "--model", "m"]) == 2
    assert "under torchrun use prepare" in capsys.readouterr().err
