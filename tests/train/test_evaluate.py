"""evaluate: scores of a stage directory, questions, bad audio skipped, and mistakes in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from soundwave_fast.model import checkpoint
from soundwave_fast.text import word_error_rate
from tests.model import tiny
from train import evaluate
from train.data.manifest import read


@pytest.fixture(scope="module")
def stage(tiny_parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    model, processor = tiny.make_model(tiny_parts)
    checkpoint.save_stage_directory(tiny.add_lora(model), folder, processor)
    return folder


def test_scores_and_examples(stage, speech_dir, tmp_path, capsys):
    target = tmp_path / "scores.json"
    questions = "first_word,slot,capitals"
    manifest = str(speech_dir / "train.jsonl")
    assert evaluate.main([str(stage), manifest, "--questions", questions, "--json", str(target)]) == 0
    out = json.loads(target.read_text())
    rows = read(speech_dir / "train.jsonl")
    assert (out["utterances"], out["skipped"]) == (12, 0)
    assert {task: asked for task, (_, asked) in out["answers"].items()} == {"first_word": 12, "slot": 4, "capitals": 12}
    asr = [example for example in out["examples"] if example["task"] == "asr"]
    assert sorted(e["id"] for e in asr) == sorted(row.id for row in rows)
    assert out["ctc_wer"] == word_error_rate([e["reference"] for e in asr], [e["ctc"] for e in asr])
    assert out["llm_wer"] == word_error_rate([e["reference"] for e in asr], [e["llm"] for e in asr])
    assert out["audio_seconds"] == pytest.approx(sum(row.duration for row in rows))
    assert out["compression"] == round(out["frames"] / out["audio_tokens"], 2) >= 1
    assert "CTC greedy WER" in capsys.readouterr().out
    assert not (tmp_path / "scores.json.tmp").exists()


def test_batches_do_not_matter(stage, speech_dir):
    from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor

    model = SoundwaveForConditionalGeneration.from_pretrained(stage)
    processor = SoundwaveProcessor.from_pretrained(stage)
    rows = read(speech_dir / "train.jsonl")[:5]
    one, five = (evaluate.evaluate(model, processor, rows, ("first_word",), n, max_new_tokens=6) for n in (1, 5))
    assert one.examples == five.examples
    assert (one.frames, one.audio_tokens) == (five.frames, five.audio_tokens)


def test_a_batch_of_transcripts_and_questions_counts_the_transcripts_alone(stage, speech_dir):
    from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor

    model = SoundwaveForConditionalGeneration.from_pretrained(stage)
    processor = SoundwaveProcessor.from_pretrained(stage)
    rows = read(speech_dir / "train.jsonl")[:3]
    plain, asked = (evaluate.evaluate(model, processor, rows, q, 16, 2) for q in ((), ("first_word",)))
    assert (plain.frames, plain.audio_tokens) == (asked.frames, asked.audio_tokens)


def test_right_and_wrong_answers(stage, speech_dir, monkeypatch):
    """An LLM that always says 'Turn.': right where the first word is 'turn', after normalisation."""
    from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor

    model = SoundwaveForConditionalGeneration.from_pretrained(stage)
    processor = SoundwaveProcessor.from_pretrained(stage)
    rows = read(speech_dir / "train.jsonl")
    says = torch.tensor(processor.answer_ids("Turn."))
    monkeypatch.setattr(model, "generate", lambda ids, *args, **kwargs: says.expand(len(ids), -1))
    scores = evaluate.evaluate(model, processor, rows, ("first_word", "then_first_word", "capitals"))
    assert scores.answers == {"first_word": (2, 12), "then_first_word": (2, 12), "capitals": (0, 12)}


def test_bad_audio_is_skipped_and_counted(stage, speech_dir, tmp_path, capsys):
    target = tmp_path / "scores.json"
    arguments = [str(stage), str(speech_dir / "broken.jsonl"), "--json", str(target), "--questions", "first_word"]
    assert evaluate.main(arguments) == 0
    out = json.loads(target.read_text())
    assert (out["utterances"], out["skipped"], out["answers"]["first_word"][1]) == (2, 3, 2)
    assert "3 more: audio that cannot be read" in capsys.readouterr().out


def test_stage_1_has_no_llm_scores(tiny_parts, speech_dir):
    model, processor = tiny.make_model(tiny_parts, with_language_model=False)
    scores = evaluate.evaluate(model, processor, read(speech_dir / "valid.jsonl"), ("first_word",))
    assert scores.llm_wer is None and not scores.answers and scores.ctc_wer is not None


def test_nothing_that_can_be_used(stage, speech_dir, tmp_path, capsys):
    path = tiny.write_manifest(tmp_path / "m.jsonl", [{"id": "a", "audio": "gone.wav", "duration": 1, "text": "x"}])
    capsys.readouterr()
    assert evaluate.main([str(stage), str(path)]) == 2
    assert capsys.readouterr().err.splitlines() == [f"evaluate: {path}: no audio that can be used"]


def test_the_padding_can_be_overridden(tiny_parts, speech_dir, tmp_path):
    """The same weights under both settings; the override gives what a checkpoint with that setting gives."""
    torch.manual_seed(5)
    model, processor = tiny.make_model(tiny_parts)
    tiny.add_lora(model)
    outcomes = {}
    for pad in ("longest", "30s"):
        model.config.encoder_pad = processor.encoder_pad = pad
        checkpoint.save_stage_directory(model, tmp_path / pad, processor)
        for option in ("longest", "30s", None):
            target = tmp_path / "out.json"
            arguments = [str(tmp_path / pad), str(speech_dir / "valid.jsonl"), "--json", str(target)]
            assert evaluate.main(arguments + (["--encoder-pad", option] if option else [])) == 0
            figures = json.loads(target.read_text())
            outcomes[pad, option] = {key: value for key, value in figures.items() if key != "seconds"}
    for pad in ("longest", "30s"):
        assert outcomes[pad, None] == outcomes[pad, pad] == outcomes["30s" if pad == "longest" else "longest", pad]
    assert outcomes["longest", "longest"] != outcomes["30s", "30s"], "they are heard differently"


def test_weights_cut_short(stage, speech_dir, tmp_path, capsys):
    shutil.copytree(stage, tmp_path / "stage")
    weights = tmp_path / "stage" / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert evaluate.main([str(tmp_path / "stage"), str(speech_dir / "valid.jsonl")]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and said.err.startswith(f"evaluate: {tmp_path / 'stage'}: ") and not said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["STAGE", "nowhere.jsonl"], "nowhere.jsonl: no such manifest"),
        (["nowhere", "VALID"], "evaluate: "),
        (["STAGE", "VALID", "--questions", "asr,sing"], "--questions: 'sing' is not one of"),
        (["STAGE", "VALID", "--questions", "emotoin"], "did you mean 'emotion'?"),
        (["STAGE", "VALID", "--limit", "-1"], "--limit: must be at least 0, got -1"),
        (["STAGE", "VALID", "--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(stage, speech_dir, capsys, arguments, message):
    names = {"STAGE": str(stage), "VALID": str(speech_dir / "valid.jsonl")}
    assert evaluate.main([names.get(argument, argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and message in said.err and not said.out
