"""Speech with planted faults: what is wrong with each utterance is known, and everything else is good."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import soundfile

from train.nano import grammar

RATE = 16_000
GOOD = 24
# unlike each other and unlike everything the grammar says
STORIES = (
    "grandmother sold purple umbrellas",
    "elephants danced quietly",
    "nobody believed that fisherman",
)


def texts() -> dict[str, str]:
    """id -> sentence of the good utterances and of those that faults are made from."""
    sentences = grammar.sample(GOOD + 4, random.Random(5))
    return {f"u{i:02d}": sentence.text for i, sentence in enumerate(sentences)}


def plant(folder: Path, spoken: Path) -> dict[str, str]:
    """Write folder/all.jsonl of `spoken`/uNN.flac and faults made of them; id -> expected reason ('' good)."""
    said = texts()
    names = list(said)
    waves = {name: soundfile.read(spoken / f"{name}.flac", dtype="float32")[0] for name in names}
    faults: dict[str, tuple[str, str, np.ndarray | None]] = {}  # id -> reason, text, audio (None: no new file)
    base = waves[names[GOOD]]
    for i, story in enumerate(STORIES):
        faults[f"wrong{i}"] = ("wer", story, waves[names[GOOD + 1 + i]])
    loud = np.clip(base * (6 / np.abs(base).max()), -1, 1)
    loop = np.tile(base, 5)
    sentence = said[names[GOOD]]
    faults |= {
        "silence": ("silent", sentence, np.zeros(2 * RATE, dtype=np.float32)),
        "hum": ("silent", sentence, 1e-4 * np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)),
        "clipped": ("clipped", sentence, loud),
        "clipped_then_quiet": ("clipped", sentence, 0.3 * loud),
        "heard_loop": ("repetition_loop", sentence, loop),
        "read_loop": ("repetition_loop", " ".join([sentence] * 4), base),
        "empty": ("empty_reference", " - ", base[200:]),
        "cyrillic": ("wrong_language", "сегодня хорошая погода", base[300:]),
        "long_text": ("characters_per_second", " ".join(STORIES * 2), base[400:]),
        "long": ("too_long", sentence, np.tile(base, 1 + 31 * RATE // len(base))),
        "short": ("too_short", sentence, base[: RATE // 10]),
    }
    (folder / "audio").mkdir()
    rows = [
        {"id": name, "audio": str(spoken / f"{name}.flac"), "duration": len(waves[name]) / RATE, "text": said[name]}
        for name in names[:GOOD]
    ]
    for name, (_, text, wave) in faults.items():
        path = folder / "audio" / f"{name}.flac"
        soundfile.write(path, wave, RATE, "PCM_16")
        rows.append({"id": name, "audio": f"audio/{name}.flac", "duration": len(wave) / RATE, "text": text})
    expected = {row["id"]: faults[row["id"]][0] if row["id"] in faults else "" for row in rows}
    rows += _broken(folder, spoken, said[names[0]])
    expected |= {"corrupt": "unreadable", "missing": "unreadable", "twin": "duplicate"}
    # faults first and last: some shards hold nothing but them
    rows = rows[GOOD : GOOD + 6] + rows[:GOOD] + rows[GOOD + 6 :]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return expected


def _broken(folder: Path, spoken: Path, text: str) -> list[dict]:
    """A file cut short after its header, one that is not there, and the first utterance again as WAV."""
    whole = (spoken / "u00.flac").read_bytes()
    (folder / "audio" / "corrupt.flac").write_bytes(whole[:40])
    soundfile.write(folder / "audio" / "twin.wav", soundfile.read(spoken / "u00.flac", dtype="int16")[0], RATE)
    files = {"corrupt": "corrupt.flac", "missing": "nowhere.flac", "twin": "twin.wav"}
    return [{"id": name, "audio": f"audio/{file}", "duration": 2.0, "text": text} for name, file in files.items()]
