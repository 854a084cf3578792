"""`soundwave`: transcribe, chat, CTC alone, the picture of the peaks; what it says when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from soundwave_fast import cli, generate
from soundwave_fast.model import checkpoint
from tests.model import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def stage(tiny_parts, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("stage")
    torch.manual_seed(1)  # the same random adapters, hence the same transcripts, whichever tests ran before
    model, processor = tiny.make_model(tiny_parts)
    checkpoint.save_stage_directory(tiny.add_lora(model), folder, processor)
    return str(folder)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[str, str]:
    """One second as 16 kHz wav, 8 kHz stereo wav and flac; one of 35 s; one that is no audio."""
    folder = tmp_path_factory.mktemp("sounds")
    wave = tiny.make_wave(0, 1.0)
    soundfile.write(folder / "a.wav", wave, 16_000)
    soundfile.write(folder / "stereo.wav", np.stack([wave[::2], wave[::2]], 1), 8_000)
    soundfile.write(folder / "a.flac", wave, 16_000)
    soundfile.write(folder / "long.wav", tiny.make_wave(1, 35.0), 16_000)
    (folder / "broken.wav").write_text("this is no audio")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def soundwave(stage, capsys):
    """Run the command; (exit code, lines on stdout, lines on stderr)."""

    def run(command: str, *arguments: str, model: str = stage):
        capsys.readouterr()
        code = cli.main([command, *arguments, "--model", model, "--max-new-tokens", "6"])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "stereo.wav", "long.wav"])
def test_transcribe(soundwave, sounds, name):
    code, out, err = soundwave("transcribe", sounds[name])
    assert (code, len(out), err) == (0, 1, [])


def test_wav_and_flac_say_the_same(soundwave, sounds):
    _, out, _ = soundwave("transcribe", sounds["a.wav"], sounds["a.flac"])
    names, texts = zip(*(line.split("\t") for line in out))
    assert names == (sounds["a.wav"], sounds["a.flac"])
    assert texts[0] == texts[1] != ""


def test_ctc_alone(soundwave, sounds):
    code, out, err = soundwave("transcribe", sounds["a.wav"], "--ctc")
    assert (code, len(out), err) == (0, 1, [])


@pytest.mark.parametrize(("name", "seconds"), [("a.wav", 1.0), ("long.wav", 35.0)])
def test_timestamps(soundwave, sounds, name, seconds):
    code, out, err = soundwave("transcribe", sounds[name], "--timestamps")
    assert (code, err) == (0, []) and out
    begins, ends, words = zip(*(line.split("\t") for line in out))
    begins, ends = [float(t) for t in begins], [float(t) for t in ends]
    assert all(begin < end for begin, end in zip(begins, ends)) and begins == sorted(begins)
    assert 0 <= begins[0] and ends[-1] <= seconds + 0.04
    assert soundwave("transcribe", sounds[name], "--ctc")[1] == [" ".join(words)]
    if name == "long.wav":  # the second window's words come after the first's
        assert begins[-1] > 30


def test_timestamps_of_several_files(soundwave, sounds):
    _, alone, _ = soundwave("transcribe", sounds["a.wav"], "--timestamps")
    _, out, _ = soundwave("transcribe", sounds["a.wav"], sounds["a.flac"], "--timestamps")
    assert out == [f"{sounds[name]}\t{line}" for name in ("a.wav", "a.flac") for line in alone]


def test_words_take_their_times_from_their_tokens():
    pieces = {1: "tur", 2: "n", 3: " on", 4: " the", 5: "\ufffd", 6: " "}
    runs = [(1, 0.0, 0.04, 0.9), (2, 0.2, 0.28, 0.5), (3, 0.4, 0.44, 0.8), (6, 0.5, 0.54, 0.1), (4, 0.6, 0.64, 0.7)]

    def decode(ids):  # two halves of a character are one character
        return "".join(pieces[i] for i in ids).replace("\ufffd\ufffd", "é")

    assert generate._group_words(runs, decode) == [
        generate.Word(0.0, 0.28, "turn", 0.5),
        generate.Word(0.4, 0.44, "on", 0.8),
        generate.Word(0.6, 0.64, "the", 0.7),
    ]
    halves = [(3, 0.0, 0.04, 0.9), (5, 0.2, 0.24, 0.8), (5, 0.24, 0.32, 0.7), (4, 0.4, 0.44, 0.6)]
    assert [(word.text, word.start, word.end) for word in generate._group_words(halves, decode)] == [
        ("oné", 0.0, 0.32),
        ("the", 0.4, 0.44),
    ]
    assert generate._group_words([], decode) == []


def test_chat(soundwave, sounds):
    code, out, err = soundwave("chat", sounds["a.wav"], "--prompt", "What is it?")
    assert (code, err) == (0, []) and len(out) >= 1


def test_chat_takes_one_window(soundwave, sounds):
    code, out, err = soundwave("chat", sounds["long.wav"], "--prompt", "What is it?")
    assert (code, out, len(err)) == (2, [], 1) and "35 s long, questions take at most 30 s" in err[0]


def test_peaks_png(soundwave, sounds, tmp_path):
    target = tmp_path / "peaks.png"
    code, out, err = soundwave("transcribe", sounds["a.wav"], "--ctc", "--peaks", str(target))
    assert (code, len(out), err) == (0, 1, [])
    assert target.read_bytes().startswith(b"\x89PNG") and [path.name for path in tmp_path.iterdir()] == ["peaks.png"]


def test_peaks_of_a_long_file(soundwave, sounds, tmp_path):
    code, _, err = soundwave("transcribe", sounds["long.wav"], "--ctc", "--peaks", str(tmp_path / "p.png"))
    assert code == 2 and len(err) == 1 and "one window holds 30 s" in err[0]


def test_peaks_takes_one_file(soundwave, sounds, tmp_path):
    code, out, err = soundwave("transcribe", *[sounds["a.wav"]] * 2, "--peaks", str(tmp_path / "p.png"))
    assert (code, out, err) == (2, [], ["soundwave: --peaks draws one file"])


def test_peaks_into_a_folder_that_is_not_there(soundwave, sounds, tmp_path):
    code, _, err = soundwave("transcribe", sounds["a.wav"], "--ctc", "--peaks", str(tmp_path / "no" / "p.png"))
    assert code == 2 and len(err) == 1 and "p.png" in err[0]


def test_peaks_of_a_kind_that_cannot_be_drawn(soundwave, sounds, tmp_path):
    code, _, err = soundwave("transcribe", sounds["a.wav"], "--ctc", "--peaks", str(tmp_path / "p.xyz"))
    assert code == 2 and len(err) == 1 and "xyz" in err[0]


def test_a_missing_file(soundwave, sounds):
    code, out, err = soundwave("transcribe", sounds["a.wav"], "nowhere.wav")
    assert (code, out, err) == (2, [], ["soundwave: nowhere.wav: no such file"])


def test_a_broken_file_among_good_ones(soundwave, sounds):
    code, out, err = soundwave("transcribe", sounds["a.wav"], sounds["broken.wav"], sounds["a.flac"])
    assert code == 1 and len(out) == 2 and len(err) == 1
    assert err[0].startswith(f"soundwave: {sounds['broken.wav']}: cannot be read as audio")


def test_only_broken_files(soundwave, sounds):
    code, out, err = soundwave("transcribe", sounds["broken.wav"])
    assert (code, out, len(err)) == (2, [], 1)


def test_no_such_model(soundwave, sounds, tmp_path):
    code, out, err = soundwave("transcribe", sounds["a.wav"], model=str(tmp_path / "none"))
    assert (code, out) == (2, []) and err == [f"soundwave: --model {tmp_path / 'none'}: no such directory"]


def test_a_directory_that_is_no_model(soundwave, sounds, tmp_path):
    code, out, err = soundwave("transcribe", sounds["a.wav"], model=str(tmp_path))
    assert (code, out, len(err)) == (2, [], 1)


def test_a_stage_whose_weights_are_cut_short(soundwave, sounds, stage, tmp_path):
    import shutil

    folder = shutil.copytree(stage, tmp_path / "cut")
    weights = folder / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, out, err = soundwave("transcribe", sounds["a.wav"], model=str(folder))
    assert (code, out, len(err)) == (2, [], 1) and "adapters.safetensors" in err[0]


def test_a_model_saved_before_llm_training(tiny_parts, soundwave, sounds, tmp_path):
    """A stage-1 directory has no LoRA: CTC works, and so does the bare LLM."""
    model, processor = tiny.make_model(tiny_parts, with_language_model=False)
    checkpoint.save_stage_directory(model, tmp_path, processor)
    for extra in ([], ["--ctc"]):
        code, out, err = soundwave("transcribe", sounds["a.wav"], *extra, model=str(tmp_path))
        assert (code, len(out), err) == (0, 1, [])


def test_a_whole_saved_model(tiny_parts, stage, soundwave, sounds, tmp_path):
    model, processor = tiny.make_model(tiny_parts)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    checkpoint.save_stage_directory(model, tmp_path / "stage", processor)
    for extra in ([], ["--ctc"]):
        both = [soundwave("transcribe", sounds["a.wav"], *extra, model=str(tmp_path / n)) for n in ("whole", "stage")]
        assert both[0] == both[1] and both[0][0] == 0


def test_as_a_command(sounds):
    command = [sys.executable, "-m", "soundwave_fast.cli", "transcribe", "nowhere.wav"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "soundwave: nowhere.wav: no such file\n")
