"""Mistakes on a stage's command line: one line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.model.tiny import write_manifest
from tests.train import runs


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_parts, speech_dir):
    return runs.write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_parts, speech_dir)


@pytest.fixture(scope="module")
def stage2(tmp_path_factory, config):
    """A finished stage 2 beside its stage 1."""
    folder = tmp_path_factory.mktemp("stages")
    more = ("optim.steps=0", "run.valid_utterances=0")
    assert runs.run(1, config, folder / "stage1", *more) == 0
    assert runs.run(2, config, folder / "stage2", "--init", str(folder / "stage1"), *more) == 0
    return folder / "stage2"


@pytest.fixture
def fails(config, tmp_path, capsys):
    """Run a stage, expect one line that holds `message`; returns it. The output directory must not appear."""

    def check(message: str, *arguments: str, number: int = 1, preset=config, out=tmp_path / "out", kept=()) -> str:
        capsys.readouterr()
        assert runs.run(number, preset, out, *arguments) == 2
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"stage {number}: "), said.err
        assert message in lines[0] and not said.out
        left = sorted(p.name for p in out.rglob("*")) if out.is_dir() else []
        assert left == sorted(kept), "nothing half-written stays"
        return lines[0]

    return check


def test_missing_manifest(fails):
    fails("nowhere.jsonl: no such manifest", "--train", "nowhere.jsonl")


def test_missing_validation_manifest(fails):
    """Said before the training, not after it."""
    fails("nowhere.jsonl: no such manifest", "--valid", "nowhere.jsonl")


def test_empty_manifest(fails, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    fails("the manifest is empty", "--train", str(empty))


def test_bad_line_in_a_manifest(fails, tmp_path):
    bad = write_manifest(tmp_path / "bad.jsonl", [{"id": "a", "audio": "a.wav", "duration": 1}, {"id": "b"}])
    fails(f"{bad}:2: no 'audio'", "--train", str(bad))


def test_no_manifest_at_all(fails):
    fails("--train: no manifest", "data.train=[]")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.stepz=3", "unknown key optim.stepz; did you mean optim.steps?"),
        ("optim.steps=few", "optim.steps: takes int, got 'few'"),
        ("model.semantics=papers", "semantics: 'papers' is not one of released, paper"),
        ("model.ctc_head=loose", "ctc_head: 'loose' is not one of tied, free"),
        ("run.compile=perhaps", "run.compile: takes auto, true or false, got 'perhaps'"),
        ("run.replicate=2", "run.replicate: 2 does not divide 1 ranks"),
        ("run.keep=0", "run.keep: must be at least 1, got 0"),
        ("model.dtype=float8", "model.dtype: 'float8' is not one of auto, float32, bfloat16"),
        ("model.whisper=package:large", "no package part 'large'"),
        ("model.llm=", "takes str, got None"),
        ("model.llm=nowhere/llm", "model.llm: "),
        ("data.tasks={sing: 1}", "data.tasks: 'sing' is not one of"),
        ("data.tasks={given: 1}", "no row of the training manifests has what 'given' needs"),
        ('optim.trainable={"adaptor": 1}', "optim.trainable: 'adaptor' matches no parameter"),
        ('optim.trainable={"(": 1}', "is no regular expression"),
        ("optim.trainable={}", "nothing would train"),
    ],
)
def test_wrong_settings(fails, setting, message):
    fails(message, setting)


@pytest.mark.parametrize(
    "setting",
    [
        "optim.accumulate=0",
        "optim.steps=-1",
        "optim.clip=0",
        "data.batch_size=0",
        "data.batch_seconds=0",
        "data.tasks={asr: -1}",
        "data.tasks={asr: 0}",
        "data.temperature=[0, 1]",
        "run.log_every=0",
        "run.seed=100000000000000000000",
        "run.seed=-1",
        "run.threads=5000",
        "optim.betas=[2, 0.9]",
        "optim.betas=[0.9, .nan]",
        "optim.weight_decay=-1",
        "optim.weight_decay=.nan",
        "optim.final_lr=-0.1",
        "optim.decay_from=1.5",
        "optim.decay_from=-0.5",
        "optim.trainable={lora_: -1}",
        "model.lora_dropout=1.5",
        "model.ctc_weight=-1",
    ],
)
def test_numbers_that_make_no_sense(fails, setting):
    fails(setting.split("=")[0], setting)


def test_wrong_lora_targets(fails, tmp_path, config):
    stage1 = tmp_path / "stage1"
    assert runs.run(1, config, stage1, "optim.steps=0", "run.valid_utterances=0") == 0
    for targets in ("nothing_like_it", "'['"):
        fails("model.lora_targets: ", "--init", str(stage1), f"model.lora_targets={targets}", number=2)


def test_broken_yaml(fails, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {whisper: [")
    fails(f"{broken}: not valid YAML", preset=broken)


def test_no_checkpoint_to_resume_from(fails, tmp_path):
    fails("no checkpoint there", "--resume", str(tmp_path / "nowhere"))


def test_attention_that_is_not_there(fails, stage2):
    fails("nothing_like_it", "--init", str(stage2), "model.attention=nothing_like_it", number=3)


def test_no_such_preset(fails, tmp_path):
    fails("no such file or preset", preset=tmp_path / "none.yaml")


@pytest.mark.parametrize("number", [2, 3])
def test_later_stages_need_init(fails, number):
    fails(f"stage {number} starts from stage {number - 1}: pass --init DIRECTORY", number=number)


@pytest.mark.parametrize("number", [2, 3])
def test_init_must_be_a_finished_stage(fails, tmp_path, number):
    (tmp_path / "empty").mkdir()
    fails("not the output of a finished stage", "--init", str(tmp_path / "empty"), number=number)


@pytest.mark.parametrize(
    ("file", "text"), [("config.json", "[]"), ("config.json", "{"), ("lora/adapter_config.json", "[]")]
)
def test_init_damaged(fails, tmp_path, stage2, file, text):
    damaged = shutil.copytree(stage2, tmp_path / "damaged")
    (damaged / file).write_text(text)
    fails(f"--init {damaged}: ", "--init", str(damaged), number=3)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"hidden_size": "wide"}),
        ("config.json", {"num_attention_heads": 0}),
        ("tokenizer.json", {"model": 5}),  # tokenizers raises a plain Exception
        ("tokenizer.json", {"added_tokens": 5}),
    ],
)
def test_a_damaged_llm(fails, tmp_path, tiny_parts, file, change):
    damaged = shutil.copytree(tiny_parts.llm, tmp_path / "damaged")
    (damaged / file).write_text(json.dumps(json.loads((damaged / file).read_text()) | change))
    fails("model.llm: ", "--llm", str(damaged))


def test_a_damaged_checkpoint(config, tmp_path, capsys):
    out, more = tmp_path / "out", ("run.valid_utterances=0",)
    assert runs.run(1, config, out, *more, "optim.steps=1") == 0
    capsys.readouterr()
    (out / "checkpoints" / "step-0000001" / "rank0.pt").write_bytes(b"no pickle at all")
    assert runs.run(1, config, out, *more, "optim.steps=2") == 2
    assert "step-0000001: does not fit this run, or is damaged (" in capsys.readouterr().err.splitlines()[-1]


def test_init_with_another_architecture(fails, tmp_path, config):
    stage1 = tmp_path / "stage1"
    assert runs.run(1, config, stage1, "optim.steps=0", "run.valid_utterances=0") == 0
    fails(
        "does not fit: ctc_head was 'tied' there, is 'free' here",
        "--init",
        str(stage1),
        "model.ctc_head=free",
        number=2,
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.lora_rank=8", "does not fit: model.lora_rank was 4 there, is 8 here"),
        ("model.drop_blank=false", "does not fit: drop_blank was True there, is False here"),
        ("model.semantics=released", "does not fit: adapter_attention was 'time' there, is 'position' here"),
    ],
)
def test_init_trained_otherwise(fails, stage2, setting, message):
    fails(message, "--init", str(stage2), setting, number=3)


def test_stage_1_knows_nothing_of_shrinking(config, stage2, tmp_path):
    """What only the shrinking adapter does may still be chosen in stage 2."""
    more = ("--init", str(stage2.parent / "stage1"), "model.drop_blank=false", "run.valid_utterances=0")
    assert runs.run(2, config, tmp_path / "out", *more, "optim.steps=1") == 0


def test_out_holds_another_run(fails, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("optim: {steps: 1}\n")
    (out / "precious.txt").write_text("x")
    fails("holds a run with different settings", kept=("config.yaml", "precious.txt"))
    assert (out / "config.yaml").read_text() == "optim: {steps: 1}\n"


def test_out_is_a_file(fails, tmp_path):
    out = tmp_path / "out"
    out.write_text("a file")
    fails(str(out))
    assert out.read_text() == "a file"


def test_out_below_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("a file")
    fails(str(tmp_path / "file"), out=tmp_path / "file" / "out")


def test_a_corrected_command_works(fails, config, tmp_path):
    """After a mistake the same directory can be used: it does not 'hold a run with different settings'."""
    fails("no such manifest", "--train", "nowhere.jsonl")
    assert runs.run(1, config, tmp_path / "out", "optim.steps=1", "run.valid_utterances=0") == 0


def test_overwrite_throws_the_other_run_away(config, tmp_path):
    out = tmp_path / "out"
    assert runs.run(1, config, out, "optim.steps=1", "run.valid_utterances=0") == 0
    more = ("optim.steps=2", "optim.clip=2", "run.valid_utterances=0")
    assert runs.run(1, config, out, *more) == 2
    assert runs.run(1, config, out, *more, "--overwrite") == 0
    assert json.loads((out / "done.json").read_text())["steps"] == 2
    assert [row["step"] for row in runs.rows(out)] == [1, 2]
