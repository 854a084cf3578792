"""`soundwave transcribe --peaks`: the picture shows the peaks that are printed, and never costs the transcript."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from soundwave_fast import generate, plots
from soundwave_fast.commands import speech
from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor
from tests.model import tiny


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are saved."""
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def lines_in(axes) -> list[float]:
    """Times of the upright lines, which are what each axis draws first of its collections."""
    return [segment[0, 0] for axis in axes for segment in axis.collections[0].get_segments()]


def check_picture(figure, peaks: list[tuple[float, str]]) -> None:
    """Lines in both halves of each row stand at the peaks' times, labels are their tokens in this order."""
    assert len(peaks) > 3
    for axes in (figure.axes[::2], figure.axes[1::2]):
        assert lines_in(axes) == pytest.approx([time for time, _ in peaks])
    labels = [text.get_text() for axis in figure.axes[::2] for text in axis.texts]
    assert labels == [(token.strip() or "␣").replace("$", r"\$") for _, token in peaks]


def printed(line: str) -> list[tuple[float, str]]:
    return [(peak["time"], peak["token"]) for peak in json.loads(line)["peaks"]]


def test_the_picture_shows_the_models_peaks(soundwave, stage, sounds, tmp_path, drawn):
    target = tmp_path / "peaks.png"
    code, out, err = soundwave("transcribe", sounds["a.wav"], "--format", "json", "--ctc", "--peaks", str(target))
    assert (code, len(out), err) == (0, 1, [])
    assert target.read_bytes().startswith(b"\x89PNG") and [path.name for path in tmp_path.iterdir()] == ["peaks.png"]
    model = SoundwaveForConditionalGeneration.from_pretrained(stage).eval()
    found = generate.peaks(model, SoundwaveProcessor.from_pretrained(stage), sounds["a.wav"])
    [figure] = drawn
    check_picture(figure, [(peak.time, peak.token) for peak in found])
    check_picture(figure, printed(out[0]))


def test_the_picture_has_the_windows_of_the_transcript(soundwave, sounds, tmp_path, drawn):
    common = ("transcribe", sounds["long.wav"], "--ctc", "--format", "json", "--peaks", str(tmp_path / "p.svg"))
    told = []
    for window in ("8", "30"):
        code, out, err = soundwave(*common, "--window", window)
        assert (code, err) == (0, [])
        check_picture(drawn[-1], printed(out[0]))
        told.append(printed(out[0]))
    assert told[0] != told[1], "a recording whose peaks depend on the windows"


def test_a_long_file_with_a_long_pause(soundwave, tmp_path, drawn):
    wave = np.concatenate([tiny.make_wave(0, 3.0), np.zeros(29 * 16_000), tiny.make_wave(1, 1.0)])
    soundfile.write(tmp_path / "long.wav", wave, 16_000)
    target = tmp_path / "p.png"
    code, out, err = soundwave(
        "transcribe", str(tmp_path / "long.wav"), "--ctc", "--format", "json", "--peaks", str(target)
    )
    assert (code, err) == (0, []) and target.read_bytes().startswith(b"\x89PNG")
    check_picture(drawn[0], printed(out[0]))


# -- what is known before anything is loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/p.png", "p.png: no folder "),
        ("p.xyz", "p.xyz: .xyz is no kind of picture; there are "),
        ("p", "p: its name has no suffix"),
        ("folder.png", "folder.png: is a directory"),
    ],
)
def test_a_target_that_cannot_be_written(soundwave, sounds, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(speech, "_load", lambda args: pytest.fail("the model was loaded"))
    (tmp_path / "folder.png").mkdir()
    code, out, err = soundwave("transcribe", sounds["a.wav"], "--peaks", str(tmp_path / name))
    assert (code, out, len(err)) == (2, [], 1) and err[0].startswith("soundwave: --peaks ") and message in err[0]


def test_it_takes_one_file(soundwave, sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "_load", lambda args: pytest.fail("the model was loaded"))
    code, out, err = soundwave("transcribe", *[sounds["a.wav"]] * 2, "--peaks", str(tmp_path / "p.png"))
    assert (code, out, err) == (2, [], ["soundwave: --peaks draws one file"])


@pytest.fixture
def too_long(tmp_path) -> str:
    soundfile.write(tmp_path / "l.wav", np.zeros(121 * 8_000, np.float32), 8_000)
    return str(tmp_path / "l.wav")


def test_a_header_that_tells_too_long(soundwave, too_long, tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "_load", lambda args: pytest.fail("the model was loaded"))
    code, out, err = soundwave("transcribe", too_long, "--peaks", str(tmp_path / "p.png"))
    assert (code, out, err) == (2, [], [f"soundwave: --peaks draws at most 120 s, {too_long} is 121 s long"])


# -- what is known later costs the picture alone -------------------------------------------------------------------


def test_a_header_that_does_not_tell(soundwave, too_long, tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "seconds_of", lambda names: 0.0)
    code, out, err = soundwave("transcribe", too_long, "--format", "json", "--peaks", str(tmp_path / "p.png"))
    assert (code, len(out), len(err)) == (1, 1, 1) and json.loads(out[0])["duration"] == 121.0
    assert err[0].startswith(f"soundwave: --peaks {tmp_path / 'p.png'}: ") and "121 s long" in err[0]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("odd"), RuntimeError("no memory")], ids=repr)
def test_a_picture_that_fails(soundwave, sounds, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    plain = soundwave("transcribe", sounds["a.wav"])
    assert plain[0] == 0 and plain[1][0]
    monkeypatch.setattr(plots, "ctc_peaks", fail)
    target = str(tmp_path / "p.png")
    told = [f"soundwave: --peaks {target}: {error}"]
    assert soundwave("transcribe", sounds["a.wav"], "--peaks", target) == (1, plain[1], told)
    into = ("--output-dir", str(tmp_path / "out"))
    assert soundwave("transcribe", sounds["a.wav"], "--peaks", target, *into) == (1, [], told)
    assert (tmp_path / "out" / "a.txt").read_text().splitlines() == plain[1]


def test_a_file_that_cannot_be_read_is_told_once(soundwave, sounds, tmp_path):
    code, out, err = soundwave("transcribe", sounds["broken.wav"], "--peaks", str(tmp_path / "p.png"))
    assert (code, out, len(err)) == (2, [], 1) and "cannot be read as audio" in err[0] and not list(tmp_path.iterdir())
