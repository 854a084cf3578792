"""Stages 2 and 3 over every task, from a lhotse manifest and a JSONL together: drawn, learned, validated, drawn up."""

from __future__ import annotations

import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from soundwave_fast.model import checkpoint
from tests.model import tiny
from tests.train import runs
from train.data import tasks
from train.data.manifest import read


@pytest.fixture(scope="module")
def labelled(speech_dir, tmp_path_factory):
    """Two manifests: gzipped cuts with every label, and rows of ours with questions."""
    folder = tmp_path_factory.mktemp("labelled")
    cuts, rows = [], []
    for i, row in enumerate(read(speech_dir / "train.jsonl")):
        custom = {"emotion": ("sad", "happy")[i % 2], "age": 20 + i, "speaker_count": 1, "sound": "tones"}
        custom |= {"translation": f"satz {i}", "target_language": "de", "slots": {"number": str(i)}}
        recording = Recording.from_file(row.audio)
        said = SupervisionSegment(row.id, recording.id, 0, recording.duration, text=row.text, gender="f", custom=custom)
        cuts.append(MonoCut(row.id, 0, recording.duration, 0, supervisions=[said], recording=recording))
        question = {"prompt": "Which number?"} if i % 3 == 0 else {"task": ("spoken_qa", "instruction")[i % 2]}
        rows.append(
            {"id": f"q{i}", "audio": str(row.audio), "duration": row.duration, "text": row.text, "answer": str(i)}
        )
        rows[-1] |= question
    CutSet.from_cuts(cuts).to_file(folder / "cuts.jsonl.gz")
    return folder / "cuts.jsonl.gz", tiny.write_manifest(folder / "questions.jsonl", rows)


def test_a_run_over_every_task(tiny_parts, speech_dir, labelled, tmp_path, capsys):
    model, processor = tiny.make_model(tiny_parts)
    checkpoint.save_stage_directory(tiny.add_lora(model), tmp_path / "init", processor)
    tree = {"data": {"tasks": {name: 1.0 for name in tasks.NAMES}}, "optim": {"trainable": runs.LORA}}
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir, stage3=tree)
    manifests = [str(path) for path in labelled]
    more = ("--init", str(tmp_path / "init"), "--train", *manifests, "--valid", *manifests, "optim.steps=20")
    more += ("run.valid_every=10", "run.valid_utterances=8", "data.batch_size=16", "data.batch_seconds=40")
    assert runs.run(3, config, tmp_path / "out", *more, "run.log_every=20") == 0
    rows = runs.rows(tmp_path / "out")
    assert {task for row in rows for task in row["tasks"]} == set(tasks.NAMES)
    scored = {key for row in rows for key in row if key.startswith("valid_")}
    assert {"valid_llm_wer", "valid_emotion", "valid_translate", "valid_then_age", "valid_capitals"} <= scored
    said = capsys.readouterr().err
    assert "step 10: CTC WER" in said and "% right" in said
    assert (tmp_path / "out" / "curves.png").exists()
