"""Synthesises the demo's speech set: grammar sentences spoken by a piper voice, 16 kHz FLAC plus JSONL manifests.

`python -m train.nano.speech --out DIR [--train 400] [--test 40] [--seed 1] [--workers 2]` writes DIR/train.jsonl,
DIR/test.jsonl and DIR/audio/*.flac. One row: {"id", "audio" (relative to the manifest), "duration" (seconds), "text",
"speaker", "slots"}. No test sentence is in train. One recorded voice becomes many by speed, noise and pitch; where an
`espeak-ng` binary is installed, it speaks a fifth of the utterances.

Texts and voices follow from the seed alone. Utterances are made in blocks; a block's noise is seeded too, so the same
onnxruntime gives the same samples whatever --workers is. An interrupted run goes on where it stopped: blocks whose
audio is complete are kept, manifests come last.

piper-tts is GPL-3.0-or-later. It is imported by this file alone, inside one function, and only when speech is made;
nothing of it is shipped with this project or needed to train, run or import it.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from soundwave_fast.errors import ArgumentParser, UserError, run_command
from train.nano.grammar import Sentence, sample
from train.nano.parts import VOICE_FILE, prepare_voice

SAMPLE_RATE = 16000  # Hz, what Whisper takes
_FORMAT = 1  # raise it when the same arguments give another set: older sets are then made anew
_BLOCK = 20  # utterances per task: long enough to hide loading the voice (0.3 s), short enough to share out
_PITCHES = (0.88, 0.94, 1.0, 1.06, 1.12)
_ESPEAK_VOICES = ("en-us", "en-gb", "en-us+f2", "en-us+m3", "en-gb+f4", "en-us+f5", "en-gb-scotland")
_OURS = re.compile(r"(train|test)-\d{5}\.flac")


@dataclass(frozen=True)
class Utterance:
    """What to say and how; everything here follows from (seed, split, index)."""

    id: str
    sentence: Sentence
    engine: str  # "piper" or "espeak-ng"
    speaker: str
    pitch: float  # > 1 is higher; piper's audio is played faster by it, its speech slowed down as much
    slowness: float  # 1.25 lasts a quarter longer
    noise: float  # piper's noise_scale, how lively the voice is
    level: float  # peak amplitude in (0, 1)


def plan(train: int, test: int, seed: int, espeak: bool) -> list[Utterance]:
    """The utterances of both splits, test first; ValueError naming the argument that is out of range."""
    for name, value in (("train", train), ("test", test)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    try:
        sentences = sample(train + test, random.Random(seed))
    except ValueError as error:
        raise ValueError(f"train: with test={test}, {train} are too many sentences ({error})") from error
    names = [f"test-{i:05d}" for i in range(test)] + [f"train-{i:05d}" for i in range(train)]
    return [_cast(name, sentence, seed, espeak) for name, sentence in zip(names, sentences, strict=True)]


def _cast(name: str, sentence: Sentence, seed: int, espeak: bool) -> Utterance:
    rng = random.Random(f"{seed}/{name}")  # its own stream: a larger set keeps the voices of the smaller one
    use_espeak, voice, pitch = rng.random() < 0.2, rng.choice(_ESPEAK_VOICES), rng.choice(_PITCHES)
    engine, speaker = ("espeak-ng", voice) if espeak and use_espeak else ("piper", f"joe{pitch * 100:.0f}")
    return Utterance(name, sentence, engine, speaker, pitch, round(rng.uniform(0.85, 1.25), 3),
                     round(rng.uniform(0.5, 0.9), 3), round(rng.uniform(0.3, 0.95), 3))


@lru_cache(maxsize=1)
def _piper(model: Path, seed: int):
    """A piper voice on one thread whose noise starts at `seed`."""
    import onnxruntime
    from piper import PiperVoice
    from piper.config import PiperConfig

    onnxruntime.set_seed(seed)  # read when a session is made, so each block makes its own
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), sess_options=options, providers=["CPUExecutionProvider"])
    config = PiperConfig.from_dict(json.loads(Path(f"{model}.json").read_text(encoding="utf-8")))
    return PiperVoice(session=session, config=config)


def _speak(utterance: Utterance, model: Path, block_seed: int) -> np.ndarray:
    """float32 mono samples at 16 kHz, peak at `utterance.level`."""
    import soxr

    text = utterance.sentence.text
    if utterance.engine == "piper":
        from piper import SynthesisConfig

        voice = _piper(model, block_seed)
        how = SynthesisConfig(length_scale=utterance.slowness * utterance.pitch, noise_scale=utterance.noise)
        samples = np.concatenate([chunk.audio_float_array for chunk in voice.synthesize(text, how)])
        rate = voice.config.sample_rate * utterance.pitch  # claiming a higher rate raises pitch (and formants)
    else:
        import soundfile

        command = ["espeak-ng", "-v", utterance.speaker, "-s", str(round(165 / utterance.slowness)),
                   "-p", str(round(50 * utterance.pitch)), "--stdout", text]
        wave = subprocess.run(command, capture_output=True, check=True).stdout
        samples, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    samples = soxr.resample(samples, rate, SAMPLE_RATE)
    samples *= utterance.level / max(float(np.abs(samples).max(initial=0)), 1e-4)
    return np.pad(samples, SAMPLE_RATE // 10)  # speech that starts on sample 0 loses its first consonant


def _duration(path: Path) -> float | None:
    """Length in seconds of a FLAC file that decodes as 16 kHz mono speech, else None."""
    import soundfile

    try:
        samples, rate = soundfile.read(path)
    except (OSError, RuntimeError):
        return None
    return len(samples) / rate if rate == SAMPLE_RATE and samples.ndim == 1 and len(samples) > rate // 5 else None


def _make_block(block: list[Utterance], audio: Path, model: Path, block_seed: int) -> dict[str, float]:
    """Speaks a block unless all of it is there; returns id -> seconds. Runs in a worker process."""
    import soundfile

    kept = {utterance.id: _duration(audio / f"{utterance.id}.flac") for utterance in block}
    if all(kept.values()):
        return kept
    _piper.cache_clear()  # the noise of a block is one stream: it is made whole, from its first utterance
    for utterance in block:
        path, tmp = audio / f"{utterance.id}.flac", audio / f".{utterance.id}.{os.getpid()}.tmp"
        soundfile.write(tmp, _speak(utterance, model, block_seed), SAMPLE_RATE, "PCM_16", format="FLAC")
        os.replace(tmp, path)
        kept[utterance.id] = _duration(path)
        if not kept[utterance.id]:
            raise UserError(f"{utterance.engine} gave no speech for {utterance.sentence.text!r}")
    return kept


@contextmanager
def _progress(total: int) -> Iterator:
    """Yields advance(n): a tqdm bar on a terminal, a plain line every tenth elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc="speech", unit="utt") as bar:
            yield bar.update
        return
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        if (done + n) * 10 // total > done * 10 // total:
            print(f"speech: {done + n}/{total} utterances", file=sys.stderr, flush=True)
        done += n

    yield advance


def _write(path: Path, text: str) -> None:
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def _claim(out: Path, settings: dict) -> None:
    """Make `out` ours for `settings`: clears what other settings made, refuses files we did not write."""
    note = out / "speech.json"
    (out / "audio").mkdir(parents=True, exist_ok=True)
    before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if before is None and any((out / f"{split}.jsonl").exists() for split in ("train", "test")):
        raise UserError(f"{out} holds manifests this tool did not write; choose another --out")
    if before is not None and before != settings:
        print(f"speech: {out} was made with other settings ({before}); making it anew", file=sys.stderr)
        for path in [out / "train.jsonl", out / "test.jsonl", *(out / "audio").iterdir()]:
            if path.suffix == ".jsonl" or _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)
    _write(note, json.dumps(settings) + "\n")


def make_speech(out: Path, train: int = 400, test: int = 40, seed: int = 1, workers: int = 2,
                cache: Path | None = None) -> tuple[Path, Path]:
    """Make the set in `out`, or complete it. Call it under `if __name__ == "__main__"`: workers are spawned.

    Args:
        out: folder for the two manifests and audio/.
        train: utterances to train on.
        test: held-out utterances.
        seed: of texts, voices and noise.
        workers: processes, one thread each.
        cache: folder of the ready-made voice (see parts.py).

    Returns:
        Paths of train.jsonl and test.jsonl.

    Raises:
        ValueError: a bad argument; it is named.
        UserError: there is no voice, `out` holds files of another kind, or synthesis fails.
    """
    if workers < 1:
        raise ValueError(f"workers: must be at least 1, got {workers}")
    out, espeak = Path(out), shutil.which("espeak-ng") is not None
    utterances = plan(train, test, seed, espeak)
    model = prepare_voice(cache) / VOICE_FILE
    seconds: dict[str, float] = {}
    try:
        _claim(out, {"format": _FORMAT, "train": train, "test": test, "seed": seed, "espeak": espeak})
        blocks = [utterances[i : i + _BLOCK] for i in range(0, len(utterances), _BLOCK)]
        spawn = get_context("spawn")  # onnxruntime and torch threads do not survive a fork
        # Ctrl-C reaches the workers too: they finish their block in silence while this process stops the rest.
        quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        with ProcessPoolExecutor(workers, mp_context=spawn, **quiet) as pool, _progress(len(utterances)) as advance:
            futures = [pool.submit(_make_block, block, out / "audio", model, seed * 100003 + i)
                       for i, block in enumerate(blocks)]
            try:
                for future in as_completed(futures):
                    seconds.update(future.result())
                    advance(len(future.result()))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for split in ("train", "test"):
            rows = [{"id": u.id, "audio": f"audio/{u.id}.flac", "duration": round(seconds[u.id], 4),
                     "text": u.sentence.text, "speaker": u.speaker, "slots": u.sentence.slots}
                    for u in utterances if u.id.startswith(split)]
            _write(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'soundwave_fast[model,demo]'") from error
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:  # a dead worker among them
        raise UserError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    return out / "train.jsonl", out / "test.jsonl"


def speak(texts: dict[str, str], audio: Path, seed: int = 1, cache: Path | None = None) -> dict[str, float]:
    """Speak texts in this process. Files that are there and decode are kept.

    Args:
        texts: id -> what is said in `audio`/ID.flac.
        audio: folder of the files, made where it is not there.
        seed: of voices and noise.
        cache: folder of the ready-made voice (see parts.py).

    Returns:
        id -> seconds.

    Raises:
        UserError: there is no voice, or synthesis fails.
    """
    model = prepare_voice(cache) / VOICE_FILE
    block = [_cast(name, Sentence(text, {}), seed, espeak=False) for name, text in texts.items()]
    try:
        audio.mkdir(parents=True, exist_ok=True)
        return _make_block(block, audio, model, seed)
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'soundwave_fast[model,demo]'") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def describe(manifests: tuple[Path, Path]) -> str:
    """A line for each manifest: how many utterances it has, and how long they are."""
    lines = []
    for path in manifests:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        total = sum(row["duration"] for row in rows)
        lines.append(f"{path}: {len(rows)} utterances, {total / 60:.1f} min, {total / len(rows):.2f} s on average")
    return "\n".join(lines)


def _run(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m train.nano.speech", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifests and audio/")
    parser.add_argument("--train", type=int, default=400, help="utterances to train on (%(default)s)")
    parser.add_argument("--test", type=int, default=40, help="held-out utterances (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="texts, voices and noise (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (%(default)s)")
    parser.add_argument("--cache", type=Path, help="folder of the ready-made voice (see train/nano/parts.py)")
    print(describe(make_speech(**vars(parser.parse_args(argv)))))


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("speech", _run, argv, interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
