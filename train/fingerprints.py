"""Fingerprints of what a run reads: manifests, models, the stage before, and the checkpoint it started from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

NAME = "name:"  # begins the fingerprint of what is known by its name alone
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_MODEL = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model")
_TRAINED = ("adapters.safetensors", "lora/adapter_config.json", "lora/adapter_model.safetensors")
_VOCABULARIES = ("merges.txt", "vocab.txt")
_STATE = ("rank0.pt", "__0_0.distcp")  # rank 0's part of a checkpoint
_BLOCKS, _BLOCK = 16, 1 << 16


def fingerprint(key: str, value: Any) -> Any:
    """What a setting of kind FILES refers to, wherever it lies.

    data.train: see `manifests`. run.init: the adapters and the LoRA. Models: the files that a folder's model and
    tokenizer are read from; a hub or package name stands for itself. Of weights, only names, sizes and 1 MiB in 16
    places are read: enough to tell one training from another, not to notice that a single tensor was edited.

    `run.init` matters to the end, not just up to the first checkpoint: checkpoints hold what trains, and the adapters
    that a stage keeps frozen are read from there at every start.

    Returns:
        What JSON can hold; None, or a list with None in it, where there is nothing to read.
    """
    if key == "data.train":
        return manifests(value)
    folder = Path(value)
    if key == "run.init":
        return _folder(folder, _TRAINED) if value else ""
    if not folder.is_dir() or not value:
        return NAME + value
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _MODEL or path.name in _VOCABULARIES)
    return _folder(folder, found)


def manifests(paths: Iterable[str]) -> list[str | None]:
    """For each manifest a digest of its bytes (a .gz is not unpacked), with lhotse's recordings beside supervisions.

    The audio is not looked at.
    """
    return [_manifest(Path(path)) for path in paths]


def checkpoint(folder: Path) -> str | None:
    """Of a run's `step-N`: enough to notice that another one lies there now; None where there is none."""
    return _folder(folder, _STATE)


def _manifest(path: Path) -> str | None:
    if not path.is_file():
        return None
    recordings = path.with_name(path.name.replace("supervisions", "recordings"))
    files = [path] if recordings == path or not recordings.is_file() else [path, recordings]
    return "+".join(_digest(file) for file in files)


def _folder(folder: Path, names: Iterable[str]) -> str | None:
    """Of those of the named files that there are; None where there are none of them."""
    lines = [f"{name} {_digest(folder / name)}\n" for name in names if (folder / name).is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _digest(path: Path) -> str:
    stat = path.stat()
    return _read(path, path.suffix in _WEIGHTS, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=1024)
def _read(path: Path, weights: bool, size: int, *_: int) -> str:
    """sha256 of a file, or of a weights file's size and blocks; once for each state of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if not weights or size <= _BLOCKS * _BLOCK:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            digest.update(str(size).encode())
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
