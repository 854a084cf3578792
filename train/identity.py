"""A run's identity: what changing each setting means for a run that has begun, and whether that run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from soundwave_fast.errors import UserError
from train import checkpoint, fingerprints, layers
from train.config import Config, dump
from train.kinds import CLASSES, Change, Kind, short

DONE = "done.json"
SETTINGS = "config.yaml"
FILE = "identity.json"
FORMAT = 1  # of FILE; raised when fingerprints are made in another way, so that old ones are not compared with new
_DTYPE = "model.dtype"
_GONE = "(no such setting)"


@dataclass(frozen=True)
class Existing:
    """What `run.out` holds, compared with the run that was asked for.

    Attributes:
        there: it holds a run, with whatever settings.
        finished: it holds this very run with all its steps, or more (then it is `refused` as well: it cannot be cut).
        refused: why that run cannot go on with these settings, and what to do instead; '' if it can.
        changes: settings of a run that goes on which have a new value or, being 'auto', a new meaning; moved files too.
        fingerprints: of the files asked for, by setting.
        resolved: what settings that may be 'auto' mean here, as far as it is known.
        resolved_before: what they meant when the run was last started; empty if an older version started it.
        origin: {path, checkpoint, step, fingerprint} of the `--resume PATH` outside `run.out` that began the run.
    """

    there: bool
    finished: bool = False
    refused: str = ""
    changes: tuple[Change, ...] = ()
    fingerprints: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    resolved_before: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] | None = None

    @property
    def goes_on(self) -> bool:
        return self.there and not self.refused

    def changed(self, *kinds: Kind) -> list[Change]:
        """The changes of these kinds."""
        return [change for change in self.changes if change.kind in kinds]

    def came_from(self, path: str) -> bool:
        """Whether `--resume path` began this run: the same command again then means to go on with it."""
        return self.origin is not None and self.origin["path"] == str(Path(path).resolve())

    def with_resolved(self, config: Config, resolved: dict[str, Any]) -> Existing:
        """The same, once more is known of what 'auto' means here (`resolved`: setting -> its meaning)."""
        changes = _by_meaning(self.changes, config, self.resolved_before, resolved) if self.goes_on else self.changes
        return replace(self, changes=tuple(changes), resolved={**self.resolved, **resolved})


def existing_run(config: Config, device: torch.device) -> Existing:
    """Compare the run that is asked for with what `run.out` holds. Writes nothing; all ranks get the same answer.

    It reads the training manifests through once, which takes a small part of the time to parse them.
    """
    out = Path(config.run.out)
    prints = {key: fingerprints.fingerprint(key, _value(config, key)) for key in CLASSES[Kind.FILES]}
    resolved = _resolved(config, device)
    settings = out / SETTINGS
    if not settings.is_file():
        return Existing(False, fingerprints=prints, resolved=resolved)
    try:
        was = dict(_flat(yaml.safe_load(settings.read_text()) or {}))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        refused = _way_out(out, "settings that cannot be read (config.yaml)")
        return Existing(True, refused=refused, fingerprints=prints, resolved=resolved)
    noted = _noted(out)
    dtype = was.get(_DTYPE, "auto")
    before = {**({} if dtype == "auto" else {_DTYPE: dtype}), **noted.get("resolved", {})}
    changes = _by_meaning(_changes(was, config), config, before, resolved)
    different = [change for change in changes if change.kind is Kind.IDENTITY]
    replaced = []
    for key, now in prints.items():
        change = next((change for change in changes if change.key == key), None)
        differs = change is not None if key not in noted else _differ(noted[key], now, moved=change is not None)
        if differs and change is not None:
            different.append(change)
        elif differs:
            replaced.append(_replaced(key, _value(config, key), noted[key], now))
    other_machine = [change.key for change in different] == [_DTYPE] and not replaced
    other_machine = other_machine and dtype == config.model.dtype == "auto"
    if different:
        said = [*map(str, different), *replaced]
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        what = f"a run with different settings: {'; '.join(said[:4])}{more}"
        refused = _way_out(out, what, f"set {_DTYPE}={before[_DTYPE]} to go on with it" if other_machine else "")
    elif replaced:
        refused = _way_out(out, f"a run that began with different files: {'; '.join(replaced)}")
    else:
        refused = _too_short(config, changes)
    longer = any(change.kind is Kind.LENGTH for change in changes)
    finished = (other_machine or not different) and not replaced and (out / DONE).is_file()
    finished = finished and (not longer or steps_done(out) >= config.optim.steps)
    changed = () if refused else tuple(changes)
    origin = noted.get("origin")
    if origin and Path(origin["path"]).is_relative_to(out.resolve()):
        origin = None  # the run was moved to where it came from; that path now means one of its own checkpoints
    return Existing(True, finished, refused, changed, prints, resolved, before, origin)


def write(config: Config, existing: Existing, keep_origin: bool = False) -> None:
    """Note in `run.out` what the run is, each file whole or not at all: FILE, then its settings.

    Args:
        existing: by `existing_run` of this config.
        keep_origin: the run that is there goes on, and with it the note of where it came from.
    """
    out = Path(config.run.out)
    notes = {"format": FORMAT, **existing.fingerprints, "resolved": existing.resolved}
    _replace(out / FILE, json.dumps({**notes, "origin": existing.origin if keep_origin else None}, indent=1))
    _replace(out / SETTINGS, dump(config))


def note_origin(out: Path, origin: dict[str, Any] | None) -> None:
    """Note which `--resume PATH` began the run in `out`, once no checkpoint of another run is left in it."""
    if noted := _noted(out):
        _replace(out / FILE, json.dumps({**noted, "origin": origin}, indent=1))


def origin_of(path: str, start: Path, step: int) -> dict[str, Any]:
    """The note on a run that begins with `--resume path`, which led to the checkpoint `start`."""
    return {
        "path": str(Path(path).resolve()),
        "checkpoint": str(start.resolve()),
        "step": step,
        "fingerprint": fingerprints.checkpoint(start),
    }


def origin_changed(existing: Existing, path: str) -> str:
    """What `--resume path` would start from now, if that is not what it began the run with; else ''."""
    try:
        start = checkpoint.find(path)
    except UserError:
        return ""  # gone, and no longer needed
    return "" if fingerprints.checkpoint(start) == existing.origin["fingerprint"] else str(start)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# -- what 'auto' means -----------------------------------------------------------------------------------------


def _resolved(config: Config, device: torch.device) -> dict[str, Any]:
    """What is known before there is a model; the trainer adds model.attention and run.packed.

    run.mixed_precision is not among them: 'auto' is 'yes' everywhere, and what that does follows from the dtype.
    """
    dtype = config.model.dtype
    if dtype == "auto":
        from train import build  # which takes seconds, for transformers

        dtype = str(build.frozen_dtype(config.model, device)).removeprefix("torch.")
    return {_DTYPE: dtype, "run.compile": layers.compiles(config.run.compile, device)}


def _by_meaning(changes: Iterable[Change], config: Config, before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The changes, but settings whose meaning was noted are compared by that, not by how it was asked for."""
    found = {change.key: change for change in changes}
    for key in (key for key in now if key in before):
        asked = _value(config, key)
        was = found[key].was if key in found else asked
        found.pop(key, None)
        if before[key] != now[key]:
            found[key] = Change(key, _meaning(was, before[key]), _meaning(asked, now[key]))
    return list(found.values())


def _meaning(value: Any, resolved: Any) -> Any:
    """'auto (bfloat16)'; what says itself what it means stays as it is."""
    return f"{value} ({short(resolved)})" if value == "auto" else value


# -- settings --------------------------------------------------------------------------------------------------


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
    """What differs. A key that an older version did not write counts as its default; an unknown one as a change."""
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


def _way_out(out: Path, what: str, first: str = "") -> str:
    resume = f" (--resume {out} starts from its state there)" if checkpoint.latest(out / "checkpoints") else ""
    return f"{out} holds {what}; {first}{', ' * bool(first)}--overwrite it or change --out{resume}"


def _too_short(config: Config, changes: list[Change]) -> str:
    """Why the run cannot have the length asked for, or ''."""
    length = next((change for change in changes if change.kind is Kind.LENGTH), None)
    if length is None:
        return ""
    out = Path(config.run.out)
    if not isinstance(length.was, int):
        return _way_out(out, f"a run with different settings: {length}")
    newest = checkpoint.latest(out / "checkpoints")
    made, done = checkpoint.step_of(newest) if newest else 0, steps_done(out)
    if max(made, done) > config.optim.steps:
        return _way_out(out, f"a run at step {max(made, done)}, past optim.steps={config.optim.steps}")
    if done and newest is None:  # older versions kept no checkpoint of the last step
        return _way_out(out, f"a run finished after {done} steps, without a checkpoint to go on from")
    return ""


def steps_done(out: Path) -> int:
    """Steps of the finished run in `out`; 0 where there is none."""
    try:
        return int(json.loads((out / DONE).read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _noted(out: Path) -> dict[str, Any]:
    """What `write` noted of the run in `out`; nothing if an older version made it."""
    try:
        noted = json.loads((out / FILE).read_text())
        return noted if noted.get("format") == FORMAT else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _differ(was: Any, now: Any, moved: bool) -> bool:
    """Whether files changed. Files that are gone from where they were do not count here: reading them will fail."""
    gone = None in now if isinstance(now, list) else now is None or now.startswith(fingerprints.NAME)
    return was != now and (moved or not gone)


def _replaced(key: str, value: Any, was: Any, now: Any) -> str:
    """'data.train: the content of a.jsonl changed since the run began'."""
    if key == "data.train":
        value = ", ".join(path for path, one, other in zip(value, was, now, strict=False) if one != other)
    return f"{key}: the content of {value} changed since the run began"
