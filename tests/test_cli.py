"""`soundwave`: transcribe, chat, CTC alone; what it says when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from soundwave_fast import cli, generate
from soundwave_fast.commands import speech
from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor, checkpoint
from tests.model import tiny

ROOT = Path(__file__).resolve().parents[1]


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


def test_chat(soundwave, sounds):
    code, out, err = soundwave("chat", sounds["a.wav"], "--prompt", "What is it?")
    assert (code, err) == (0, []) and len(out) >= 1


def test_chat_about_a_long_file(soundwave, sounds):
    code, out, err = soundwave("chat", sounds["long.wav"], "--prompt", "What is it?")
    assert (code, len(out), err) == (0, 1, [])


def test_chat_streams_the_same_answer(soundwave, sounds):
    names = [sounds[name] for name in ("a.wav", "broken.wav", "long.wav")]
    plain = soundwave("chat", *names, "--prompt", "What is it?")
    assert plain[0] == 1 and len(plain[1]) == 2 and len(plain[2]) == 1
    assert soundwave("chat", *names, "--prompt", "What is it?", "--stream") == plain


def test_chat_goes_on_after_audio_too_long_for_the_context(tiny_parts, soundwave, sounds, stage, tmp_path):
    folder = shutil.copytree(stage, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    names = [sounds["long.wav"], sounds["a.wav"]]
    code, out, err = soundwave("chat", *names, "--prompt", "What is it?", model=str(folder))
    assert (code, len(out), len(err)) == (1, 1, 1) and out[0].startswith(sounds["a.wav"])
    assert err[0].startswith(f"soundwave: {sounds['long.wav']}: audio: ") and "context" in err[0]


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


@pytest.mark.parametrize("arguments", [["transcribe", "FILE"], ["chat", "FILE", "--prompt", "What?"], ["info"]])
def test_before_there_is_any_model(sounds, tmp_path, monkeypatch, capsys, arguments):
    """The default is what `make demo` leaves; it is not looked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([sounds["a.wav"] if argument == "FILE" else argument for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("soundwave: no model in runs/nano/stage3 yet: run `make demo` first") and "name " in said
    assert said.count("\n") == 1


def test_a_directory_that_is_no_model(soundwave, sounds, tmp_path):
    code, out, err = soundwave("transcribe", sounds["a.wav"], model=str(tmp_path))
    assert (code, out, len(err)) == (2, [], 1)


def test_a_stage_whose_weights_are_cut_short(soundwave, sounds, stage, tmp_path):
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


@pytest.mark.parametrize("arguments", [["bogus"], ["transcribe"], ["transcribe", "a.wav", "--batch-size", "two"], []])
def test_typing_errors_take_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    said = capsys.readouterr()
    assert (stop.value.code, said.out, len(said.err.splitlines())) == (2, "", 1) and said.err.startswith("soundwave")


def test_as_a_command(sounds):
    command = [sys.executable, "-m", "soundwave_fast.cli", "transcribe", "nowhere.wav"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "soundwave: nowhere.wav: no such file\n")


# -- formats -------------------------------------------------------------------------------------------------------


def test_json(soundwave, sounds):
    code, out, err = soundwave("transcribe", sounds["a.wav"], sounds["long.wav"], "--format", "json")
    assert (code, len(out), err) == (0, 2, [])
    rows = [json.loads(line) for line in out]
    assert [(row["file"], row["duration"]) for row in rows] == [(sounds["a.wav"], 1.0), (sounds["long.wav"], 35.0)]
    for row in rows:
        assert row["text"].split() == [word["text"] for word in row["words"]]
        assert all(0 <= word["start"] <= word["end"] <= row["duration"] + 0.04 for word in row["words"])
        assert {"time", "token", "id", "probability"} == set(row["peaks"][0])
    texts = soundwave("transcribe", sounds["a.wav"], sounds["long.wav"])[1]
    assert [line.split("\t")[1] for line in texts] == [row["text"] for row in rows]
    [line] = soundwave("transcribe", sounds["a.wav"], "--format", "json", "--ctc")[1]
    times = soundwave("transcribe", sounds["a.wav"], "--timestamps")[1]
    assert [f"{w['start']:.2f}\t{w['end']:.2f}\t{w['text']}" for w in json.loads(line)["words"]] == times


@pytest.mark.parametrize(("kind", "first", "arrow"), [("srt", "1", ","), ("vtt", "WEBVTT", ".")])
def test_subtitles(soundwave, sounds, kind, first, arrow):
    code, out, err = soundwave("transcribe", sounds["long.wav"], "--format", kind, "--ctc")
    assert (code, err) == (0, []) and out[0] == first and f"00:00:3{0}{arrow}" in "\n".join(out).replace("31", "30")
    code, out, err = soundwave("transcribe", sounds["long.wav"], sounds["a.wav"], "--format", kind)
    assert (code, out, err) == (2, [], [f"soundwave: --format {kind} of several files needs --output-dir"])


def test_output_dir(soundwave, sounds, tmp_path):
    folder = tmp_path / "new" / "out"
    names = [sounds[name] for name in ("a.wav", "broken.wav", "a.flac", "stereo.wav")]
    arguments = ("--format", "vtt", "--output-dir", str(folder), "--skip-existing")
    code, out, err = soundwave("transcribe", *names, *arguments)
    assert (code, out, len(err)) == (1, [], 1)
    made = sorted(path.name for path in folder.iterdir())
    assert made == ["a.flac.vtt", "a.wav.vtt", "stereo.vtt"]  # two files are called a
    (folder / "stereo.vtt").write_text("mine")
    (folder / "a.wav.vtt").unlink()
    assert soundwave("transcribe", *names, *arguments)[0] == 1
    assert (folder / "stereo.vtt").read_text() == "mine" and (folder / "a.wav.vtt").read_text().startswith("WEBVTT")
    assert soundwave("transcribe", sounds["stereo.wav"], *arguments) == (0, [], [])


def test_output_dir_mistakes(soundwave, sounds, tmp_path):
    for arguments, message in (
        (("--skip-existing",), "--skip-existing needs --output-dir"),
        (("--output-dir", sounds["a.wav"]), f"--output-dir {sounds['a.wav']}: is no directory"),
    ):
        code, out, err = soundwave("transcribe", sounds["a.wav"], *arguments)
        assert (code, out, err) == (2, [], [f"soundwave: {message}"])


# -- files ---------------------------------------------------------------------------------------------------------


def test_odd_audio(soundwave, tmp_path):
    rate = 16_000
    waves = {"empty": np.zeros(0), "nan": np.full(rate, np.nan), "short": tiny.make_wave(0, 0.01)}
    waves.update(silent=np.zeros(rate), clipped=np.clip(9 * tiny.make_wave(0, 1.0), -1, 1))
    for name, wave in waves.items():
        soundfile.write(tmp_path / f"{name}.wav", wave.astype(np.float32), rate, subtype="FLOAT")
    code, out, err = soundwave("transcribe", str(tmp_path))
    assert code == 1 and [line.split("\t")[0].rsplit("/", 1)[1] for line in out] == [
        "clipped.wav",
        "short.wav",
        "silent.wav",
    ]
    assert out[2].endswith("\t") and not out[0].endswith("\t")
    assert len(err) == 2 and "empty.wav: holds no samples" in err[0] and "nan.wav: holds samples that are" in err[1]


# -- options -------------------------------------------------------------------------------------------------------


def test_any_batch_size_says_the_same(soundwave, sounds):
    names = [sounds[name] for name in ("long.wav", "a.wav", "stereo.wav")]
    one, eight = (soundwave("transcribe", *names, "--batch-size", size, "--window", "6") for size in ("1", "8"))
    assert one == eight and one[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "0"), "at least 1"),
        (("--window", "40"), "--window: 5 to 30 s, got 40"),
        (("--device", "nonsense"), "--device nonsense"),
    ],
)
def test_mistakes_in_options(soundwave, sounds, arguments, message):
    code, out, err = soundwave("transcribe", sounds["a.wav"], *arguments)
    assert (code, out, len(err)) == (2, [], 1) and message in err[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(soundwave, sounds):
    code, out, err = soundwave("transcribe", sounds["a.wav"], "--device", "cuda")
    assert (code, out, len(err)) == (2, [], 1) and err[0].startswith("soundwave: --device cuda: ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(soundwave, stage, sounds, dtype):
    arguments = ["transcribe", sounds["long.wav"], "--dtype", dtype, "--no-compile"]
    code, out, err = soundwave(*arguments)
    processor = SoundwaveProcessor.from_pretrained(stage)
    model = SoundwaveForConditionalGeneration.from_pretrained(stage, dtype=getattr(torch, dtype)).eval()
    settings = {"max_new_tokens": 6, "cache_implementation": "dynamic"}
    text = generate.transcribe(model, processor, sounds["long.wav"], **settings)
    assert (code, out, err) == (0, [text], []) and text
    loaded, _ = speech._load(cli._parser().parse_args([*arguments, "--model", stage]))
    assert {weight.dtype for weight in loaded.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("arguments", "compiled"), [(["--compile"], True), (["--no-compile"], False)])
def test_compile_is_passed_on(stage, sounds, arguments, compiled):
    """That the compiled adapters say the same is tested in tests/model/test_compile.py."""
    args = cli._parser().parse_args(["transcribe", sounds["a.wav"], "--model", stage, "--ctc", *arguments])
    model, _ = speech._load(args)
    assert model._adapters_compiled is compiled
    assert speech._settings(args).get("cache_implementation") == (None if compiled else "dynamic")


# -- the other commands, and being stopped -------------------------------------------------------------------------


def test_convert(tiny_parts, stage, tmp_path, capsys):
    assert cli.main(["convert", stage, str(tmp_path / "out")]) == 2  # its semantics are not the released code's
    assert "force" in capsys.readouterr().err
    assert cli.main(["convert", stage, str(tmp_path / "out"), "--force"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: soundwave_fast to released\n"
    assert cli.main(["convert", stage, str(tmp_path / "out"), "--force"]) == 2
    assert cli.main(["convert", str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("soundwave: ") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert cli.main(["convert", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert cli.main(["info", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path / 'back'}: saved model"


def test_curate_is_the_trainers(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["curate", "--help"])
    assert stop.value.code == 0 and "curate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["transcribe", "nowhere", "--model", "nowhere"],
        ["chat", "nowhere", "--prompt", "What?", "--model", "nowhere"],
        ["info", "nowhere"],
        ["convert", "nowhere", "out"],
        ["curate", "run", "nowhere", "--out", "out", "--model", "m"],
        ["curate", "prepare", "nowhere", "--out", "out"],
        ["curate", "transcribe", "nowhere", "--model", "m"],
        ["curate", "select", "nowhere"],
        ["curate", "instruct", "nowhere", "--out", "out"],
        ["curate", "spoken-qa", "--out", "out", "--questions", "nowhere"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_debug_before_and_behind_every_command(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "nowhere" in line
    for place in {0, 1, len(arguments)}:
        assert cli.main([*arguments[:place], "--debug", *arguments[place:]]) == 2
        said = capsys.readouterr().err
        assert "Traceback" in said and said.endswith("\n" + line)


def test_debug_and_curate_alone(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--debug", "curate"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("soundwave curate: the following arguments")


def test_curate_without_the_trainer(tmp_path):
    for name in ("soundwave_fast", "csrc_triton"):  # as an installed library: without train/ beside it
        (tmp_path / name).symlink_to(ROOT / name)
    code = "import sys; sys.path[0] = ''; sys.modules['train'] = None; from soundwave_fast import cli; "
    code += "sys.exit(cli.main(['curate', 'run', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("soundwave: curate: the train package")


def test_ctrl_c_keeps_what_is_done(stage, sounds):
    """Two windows a pool: the first files are told while a thousand more wait."""
    command = [sys.executable, "-m", "soundwave_fast.cli", "transcribe", *[sounds["a.wav"]] * 1000]
    command += ["--model", stage, "--max-new-tokens", "2", "--batch-size", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and first.startswith(sounds["a.wav"] + "\t")
    assert len(out.splitlines()) < 999 and (out == "" or out.endswith("\n"))
    assert err.splitlines()[-1] == "soundwave: interrupted" and "Traceback" not in err


def test_nobody_reads_on(stage, sounds, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["transcribe", sounds["a.wav"], sounds["a.flac"], "--model", stage, "--ctc"]) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
