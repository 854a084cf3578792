"""A run's identity is what changes its numbers: every setting in a class, and fingerprints of the files it reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from train import checkpoint
from train.config import Config, dump

DONE = "done.json"
SETTINGS = "config.yaml"
FILE = "identity.json"
FORMAT = 1  # of FILE; raised when a fingerprint is made otherwise, so that the old ones are not compared with


class Kind(Enum):
    """What another value of a setting means for a run that has begun."""

    FREE = "cannot change a number of the training: the run goes on, bit for bit"
    ROUNDING = "the same mathematics, rounded in another order or dropped out by other draws: the run goes on"
    LENGTH = "moves the schedule: the run goes on by the new one"
    FILES = "names files: what lies there counts, not where"
    IDENTITY = "another run"


_CLASSES: dict[Kind, tuple[str, ...]] = {
    Kind.FREE: (
        # of the same rows the same batches, whoever reads them; what bounds only ends a run, never bends it
        *("data.valid", "data.workers", "data.prefetch", "data.max_bad_share", "optim.max_bad_steps"),
        *("run.out", "run.log_every", "run.loggers", "run.save_every", "run.keep", "run.hang_seconds"),
        *("run.valid_every", "run.valid_utterances"),  # validation leaves no trace in the training
    ),
    Kind.ROUNDING: (
        *("model.attention", "run.threads", "run.replicate", "run.activation_checkpointing"),
        *("run.compile", "run.packed"),  # dropout's masks are drawn by other code, or in another shape
    ),
    Kind.LENGTH: ("optim.steps",),
    Kind.FILES: ("model.whisper", "model.llm", "data.train", "run.init"),
    Kind.IDENTITY: (
        *("model.semantics", "model.adapter_attention", "model.look_back_keys", "model.drop_blank"),
        *("model.mask_frames", "model.peak_select", "model.encoder_pad", "model.look_back", "model.ctc_head"),
        *("model.ctc_weight", "model.adapter_dropout", "model.chat_template", "model.dtype"),
        *("model.lora_rank", "model.lora_alpha", "model.lora_dropout", "model.lora_targets"),
        *("data.tasks", "data.more_phrasings", "data.batch_seconds", "data.batch_tokens", "data.batch_size"),
        *("data.buckets", "data.temperature", "data.min_seconds", "data.max_seconds", "data.speed"),
        *("data.spec_augment", "data.cache_frames"),  # cached frames are float16
        *("optim.trainable", "optim.warmup", "optim.decay_from", "optim.final_lr", "optim.weight_decay"),
        *("optim.betas", "optim.clip", "optim.accumulate", "optim.ctc_candidates"),
        *("run.seed", "run.mixed_precision"),  # the latter changes what is rounded, not just in which order
    ),
}
KINDS: dict[str, Kind] = {key: kind for kind, keys in _CLASSES.items() for key in keys}
_GONE = "(no such setting)"


@dataclass(frozen=True)
class Change:
    key: str
    was: Any
    now: Any

    @property
    def kind(self) -> Kind:
        """Of a setting that this version does not know: IDENTITY, since it may have meant anything."""
        return KINDS.get(self.key, Kind.IDENTITY)

    def __str__(self) -> str:
        """'optim.clip 1.0 -> 2.0'; of a mapping, the entries that differ."""
        if not (isinstance(self.was, dict) and isinstance(self.now, dict)) or self.was == self.now:
            order = " in another order" if self.was == self.now else ""
            return f"{self.key} {_short(self.was)} -> {_short(self.now)}{order}"
        keys = [key for key in {**self.was, **self.now} if self.was.get(key) != self.now.get(key)]
        entries = ((key, self.was.get(key, "none"), self.now.get(key, "none")) for key in keys)
        return "; ".join(f"{self.key}.{key} {_short(was)} -> {_short(now)}" for key, was, now in entries)


@dataclass(frozen=True)
class Held:
    """What `run.out` holds, seen from what is asked for.

    Attributes:
        there: a run, of whatever settings.
        finished: the very run asked for, to its last step or further (then it is `refused` as well: it cannot be cut).
        refused: why that run cannot go on with these settings, with the way out; '' where it can.
        changes: settings of a run that goes on which have another value now, moved files among them.
        fingerprints: of the files asked for, by setting.
    """

    there: bool
    finished: bool
    refused: str
    changes: tuple[Change, ...]
    fingerprints: dict[str, Any]

    @property
    def goes_on(self) -> bool:
        return self.there and not self.refused

    def changed(self, *kinds: Kind) -> list[Change]:
        """The changes of these kinds."""
        return [change for change in self.changes if change.kind in kinds]


def held(config: Config) -> Held:
    """Compare what is asked for with what `run.out` holds. Writes nothing, and is the same on all ranks.

    It reads the training manifests through once, a small part of what parsing them costs.
    """
    out = Path(config.run.out)
    prints = {key: fingerprint(key, _value(config, key)) for key in _CLASSES[Kind.FILES]}
    settings = out / SETTINGS
    if not settings.is_file():
        return Held(False, False, "", (), prints)
    try:
        was = dict(_flat(yaml.safe_load(settings.read_text()) or {}))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return Held(True, False, _way_out(out, "settings that cannot be read (config.yaml)"), (), prints)
    changes = _changes(was, config)
    noted = _noted(out)
    others = [str(change) for change in changes if change.kind is Kind.IDENTITY]
    replaced = []
    for key, now in prints.items():
        change = next((change for change in changes if change.key == key), None)
        differs = change is not None if key not in noted else _differ(noted[key], now, moved=change is not None)
        if differs and change is not None:
            others.append(str(change))
        elif differs:
            replaced.append(_replaced(key, _value(config, key), noted[key], now))
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        refused = _way_out(out, f"a run with other settings: {'; '.join([*others, *replaced][:4])}{more}")
    elif replaced:
        refused = _way_out(out, f"a run that began with other files: {'; '.join(replaced)}")
    else:
        refused = _too_short(config, changes)
    longer = any(change.kind is Kind.LENGTH for change in changes)
    finished = not others and not replaced and (out / DONE).is_file()
    finished = finished and (not longer or steps_done(out) >= config.optim.steps)
    return Held(True, finished, refused, () if refused else tuple(changes), prints)


def write(config: Config, fingerprints: dict[str, Any]) -> None:
    """Note in `run.out` what the run is: its fingerprints, then its settings, each whole or not at all."""
    out = Path(config.run.out)
    for name, text in ((FILE, json.dumps({"format": FORMAT, **fingerprints}, indent=1)), (SETTINGS, dump(config))):
        temporary = out / (name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, out / name)


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _flat(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """('section.key', value) of a config as YAML holds it."""
    sections = {field.name for field in fields(Config)}
    for section, values in tree.items():
        if section in sections:
            yield from ((f"{section}.{key}", value) for key, value in (values or {}).items())
        else:
            yield section, values


def _changes(was: dict[str, Any], config: Config) -> list[Change]:
    """What differs. A key that an older version did not write has its default; one that is unknown here is named."""
    now = dict(_flat(yaml.safe_load(dump(config))))
    defaults = dict(_flat(yaml.safe_load(dump(Config()))))
    before = {**defaults, **was}
    pairs = ((key, before[key], now.get(key, _GONE)) for key in before)
    return [Change(key, old, new) for key, old, new in pairs if not _same(old, new)]


def _same(one: Any, other: Any) -> bool:
    """The order of a mapping counts: the first pattern that matches decides, and tasks are drawn by number."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one.items()) == list(other.items())
    return one == other


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split()) or "''"
    return text if len(text) <= 70 else f"{text[:30]}...{text[-37:]}"


def _way_out(out: Path, what: str) -> str:
    resume = f" (--resume {out} starts from its state there)" if checkpoint.latest(out / "checkpoints") else ""
    return f"{out} holds {what}; --overwrite it or change --out{resume}"


def _too_short(config: Config, changes: list[Change]) -> str:
    """Why the run cannot have the length asked for, or ''."""
    length = next((change for change in changes if change.kind is Kind.LENGTH), None)
    if length is None:
        return ""
    out = Path(config.run.out)
    if not isinstance(length.was, int):
        return _way_out(out, f"a run with other settings: {length}")
    newest = checkpoint.latest(out / "checkpoints")
    made, done = checkpoint.step_of(newest) if newest else 0, steps_done(out)
    if max(made, done) > config.optim.steps:
        return _way_out(out, f"a run at step {max(made, done)}, past optim.steps={config.optim.steps}")
    if done and newest is None:  # versions before this one kept none of the last step
        return _way_out(out, f"a run finished after {done} steps, without a checkpoint to go on from")
    return ""


def steps_done(out: Path) -> int:
    """Steps of the finished run in `out`; 0 where there is none."""
    try:
        return int(json.loads((out / DONE).read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


# -- fingerprints ----------------------------------------------------------------------------------------------


def fingerprint(key: str, value: Any) -> Any:
    """What a setting of kind FILES stands for, wherever it lies.

    data.train: for each manifest a digest of its bytes (of the .gz as it is), and of the recordings beside lhotse's
    supervisions; the audio is not looked at. run.init: of the adapters and the LoRA. Models: of the files a folder's
    model and tokenizer are read from; a hub or package name stands for itself. Of weights only names, sizes and 1 MiB
    in 16 places are read: enough to tell one training from another, not to tell where a single tensor was edited.

    `run.init` counts to the end, not just to the first checkpoint: checkpoints hold what trains, and the adapters that
    a stage keeps frozen are read from there at every start.

    Returns:
        What JSON can hold; None, or a list with None in it, where there is nothing to read.
    """
    if key == "data.train":
        return [_manifest(Path(path)) for path in value]
    folder = Path(value)
    if key == "run.init":
        return _folder([(name, folder / name) for name in _TRAINED if (folder / name).is_file()]) if value else ""
    if not folder.is_dir() or not value:
        return _NAME + value
    found = sorted(path for path in folder.iterdir() if path.suffix in _MODEL or path.name in _VOCABULARIES)
    return _folder([(path.name, path) for path in found if path.is_file()])


_NAME = "name:"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_MODEL = (*_WEIGHTS, ".json", ".jinja", ".model")
_TRAINED = ("adapters.safetensors", "lora/adapter_config.json", "lora/adapter_model.safetensors")
_VOCABULARIES = ("merges.txt", "vocab.txt")
_BLOCKS, _BLOCK = 16, 1 << 16


def _manifest(path: Path) -> str | None:
    if not path.is_file():
        return None
    recordings = path.with_name(path.name.replace("supervisions", "recordings"))
    files = [path] if recordings == path or not recordings.is_file() else [path, recordings]
    return "+".join(_digest(file) for file in files)


def _folder(files: list[tuple[str, Path]]) -> str | None:
    if not files:
        return None
    return hashlib.sha256("".join(f"{name} {_digest(path)}\n" for name, path in files).encode()).hexdigest()


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


def _noted(out: Path) -> dict[str, Any]:
    """The fingerprints of the run in `out`; none where a version before this one made it."""
    try:
        noted = json.loads((out / FILE).read_text())
        return noted if noted.get("format") == FORMAT else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _differ(was: Any, now: Any, moved: bool) -> bool:
    """Files that are gone from where they were are another matter: whoever reads them will say so."""
    gone = None in now if isinstance(now, list) else now is None or now.startswith(_NAME)
    return was != now and (moved or not gone)


def _replaced(key: str, value: Any, was: Any, now: Any) -> str:
    """'data.train: the content of a.jsonl changed since the run began'."""
    if key == "data.train":
        value = ", ".join(path for path, one, other in zip(value, was, now, strict=False) if one != other)
    return f"{key}: the content of {value} changed since the run began"
