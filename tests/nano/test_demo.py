"""`make demo` where it cannot go on: one line that says why, and what it asks of the stages."""

from __future__ import annotations

import os

import pytest

from soundwave_fast.errors import UserError
from train.nano import demo, parts


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The demo's exit code, and the lines it leaves on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "NEED_BYTES", 0)

    def call(*arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        return demo.main(["--out", "out", *arguments]), capsys.readouterr().err.splitlines()

    return call


def test_parts_that_cannot_be_had(run, monkeypatch):
    def refuse(cache=None):
        raise UserError("pip could not download a-part==1.0:\nno network")

    monkeypatch.setattr(parts, "prepare_all", refuse)
    assert run() == (2, ["demo: pip could not download a-part==1.0: no network"])


def test_no_index_for_the_real_pip(run, tmp_path, monkeypatch):
    """As on a machine without a network. What is to be downloaded is said before, as the download takes minutes."""
    monkeypatch.setenv("SOUNDWAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, said = run()
    assert code == 2 and len(said) == 2 and said[0].startswith("parts: downloading ")
    assert said[1].startswith("demo: pip could not download ") and "ERROR: " in said[1]
    assert os.listdir(tmp_path / "cache") == [], "nothing half-made stays"


def test_ctrl_c(run, monkeypatch):
    def interrupt(cache=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "prepare_all", interrupt)
    assert run() == (130, ["demo: interrupted; the same command goes on from here"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--utterances", "0"], "--utterances: must be at least 1, got 0"),
        (["--held-out", "-1"], "--held-out: must be at least 1, got -1"),
        (["--train", "a.jsonl"], "--train and --test go together"),
        (["--train", "a.jsonl", "--test", "b.jsonl"], "a.jsonl: no such manifest"),
        (["optim.stepz=3"], "did you mean optim.steps?"),
    ],
)
def test_mistakes(run, tmp_path, arguments, message):
    code, said = run(*arguments)
    assert code == 2 and len(said) == 1 and said[0].startswith("demo: ") and message in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "template"),
    [
        (["model.llm=some/llm"], "model.chat_template=null"),
        (["model.llm=some/llm", "model.chat_template=own"], "model.chat_template=own"),
        (["optim.steps=1"], None),
    ],
)
def test_the_nano_llms_template_is_for_no_other_llm(run, monkeypatch, speech_dir, settings, template):
    commands = []
    monkeypatch.setattr(parts, "prepare_all", dict)
    monkeypatch.setattr(demo, "_run", lambda command, what: commands.append(command))
    monkeypatch.setattr(demo, "_score", lambda *_: None)
    monkeypatch.setattr(demo, "_print", lambda *_: None)
    manifests = ["--train", str(speech_dir / "train.jsonl"), "--test", str(speech_dir / "valid.jsonl")]
    assert run(*manifests, *settings) == (0, [])
    assert len(commands) == 3 and all(command[command.index("--config") + 1] == "nano" for command in commands)
    for command in commands:
        assert [text for text in command if text.startswith("model.chat_template=")] == ([template] if template else [])
