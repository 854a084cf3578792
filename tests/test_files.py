"""Which files a command line means, what their results are called, and when there is a progress bar."""

from __future__ import annotations

import shutil

import pytest
import soundfile

from soundwave_fast.audio import load_audio
from soundwave_fast.commands.files import expand, output_paths, progress_bar, seconds_of
from tests.model import tiny


def test_patterns_and_directories(tmp_path):
    folder, other = tmp_path / "sounds", tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    for name in ("a.wav", "b.wav", "c.flac", "sub/a.flac"):
        soundfile.write(folder / name, tiny.make_wave(0, 0.1), 16_000)
    wavs, every = [str(folder / "a.wav"), str(folder / "b.wav")], ["a.wav", "b.wav", "c.flac", "sub/a.flac"]
    assert expand([str(folder / "*.wav")]) == wavs == expand([str(folder / "[ab]*.wav")])
    assert expand([str(folder)]) == [str(folder / name) for name in every]
    assert expand([str(folder / "**" / "a.flac"), wavs[0]]) == [str(folder / "sub/a.flac"), wavs[0]]
    (other / "notes.md").write_text("no audio")
    for names, message in (([other], "holds no audio files"), ([other / "*.ogg"], "no file matches")):
        with pytest.raises(ValueError, match=message):
            expand([str(name) for name in names])
    with pytest.raises(ValueError, match="no such file"):
        expand([wavs[0], str(folder / "z.wav")])
    odd = str(shutil.copy(wavs[0], other / "[1].WAV"))
    assert expand([odd]) == [odd] == expand([str(other)])  # a file is a file, whatever it is called


def test_names_of_results(tmp_path):
    assert output_paths(["x/a.wav", "x/b.wav"], tmp_path, ".srt") == [tmp_path / "a.srt", tmp_path / "b.srt"]
    assert output_paths(["a.wav", "a.flac"], tmp_path, ".srt") == [tmp_path / "a.wav.srt", tmp_path / "a.flac.srt"]
    with pytest.raises(ValueError, match="a.wav.txt would be the result of several files"):
        output_paths(["x/a.wav", "y/a.wav"], tmp_path, ".txt")


def test_seconds_by_the_headers(tmp_path):
    soundfile.write(tmp_path / "a.wav", tiny.make_wave(0, 1.5), 16_000)
    (tmp_path / "b.wav").write_text("no audio")
    assert seconds_of([str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]) == 1.5


@pytest.mark.parametrize("kind", ["ogg", "mp3", "aiff", "au", "caf"])
def test_other_kinds_of_files(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    try:
        soundfile.write(path, tiny.make_wave(0, 1.0), 16_000)
    except (soundfile.LibsndfileError, ValueError) as error:
        pytest.skip(f"this libsndfile cannot write {kind}: {error}")
    assert abs(len(load_audio(path)) - 16_000) < 2000 and expand([str(tmp_path)]) == [str(path)]


def test_a_bar_where_there_is_something_to_wait_for(capsys):
    assert progress_bar(["a.wav"] * 3).disable  # stderr is no terminal here
    bar = progress_bar(["a.wav"] * 20, by_seconds=False)
    assert not bar.disable and bar.total == 20
    bar.close()
    assert capsys.readouterr().out == ""
