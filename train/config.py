"""What a run is: frozen dataclasses filled from a YAML preset, its stage's section, and `key=value` settings."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from soundwave_fast.errors import UserError

PRESETS = Path(__file__).parent / "configs"
NANO, NEUTRAL = "nano", "default"  # what is taken where no preset is named: see `preset_for`


Switch = bool | str  # true, false, or "auto"


@dataclass(frozen=True)
class Model:
    whisper: str = ""  # folder, hub name, or package:NAME (see train/nano/parts.py)
    llm: str = ""
    semantics: str = "paper"  # or released; the six keys below override single points of it
    adapter_attention: str | None = None
    look_back_keys: str | None = None
    drop_blank: bool | None = None
    mask_frames: bool | None = None
    peak_select: str | None = None
    encoder_pad: str | None = None
    look_back: bool = True
    ctc_head: str = "tied"
    ctc_weight: float = 0.3
    adapter_dropout: float = 0.1
    chat_template: str | None = None  # Jinja; the tokenizer's own where null
    attention: str = "auto"  # the LLM's, by transformers' name: sdpa, eager, flash_attention_2, ...; auto: its default
    dtype: str = "auto"  # of the frozen parts and the arithmetic: float32, bfloat16, or what the device does fast
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_targets: str = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Data:
    train: tuple[str, ...] = ()  # manifests: JSONL, lhotse cuts or supervisions, also gzipped (train/data/manifest.py)
    valid: tuple[str, ...] = ()
    tasks: dict[str, float] = field(default_factory=lambda: {"asr": 1.0})  # task -> weight of its row count
    more_phrasings: bool = False  # also the additional ones of train/data/prompts.py
    batch_seconds: float = 60.0  # audio per batch and rank, padding included; never more
    batch_tokens: int = 0  # prompts and answers likewise, in tokens; the audio adds 25 a second at most; 0: no bound
    batch_size: int = 16  # at most so many utterances
    buckets: int = 8
    temperature: tuple[float, float] = (1.0, 5.0)  # T = first + second * epoch; p_i ~ n_i ** (1 / T)
    min_seconds: float = 0.1  # shorter and longer audio is skipped
    max_seconds: float = 30.0
    speed: tuple[float, ...] = ()  # speed perturbation: a factor drawn for each utterance, e.g. 0.9, 1.0, 1.1
    spec_augment: tuple[int, ...] = ()  # frequency masks, most bins of each, time masks, most 10 ms frames of each
    workers: int = 0  # processes that read audio ahead; the batches are the same as without
    prefetch: int = 2  # batches each of them keeps ready
    cache_frames: bool = False  # keep the frozen encoder's output in memory, by utterance (float16)
    max_bad_share: float = 0.1  # stop when more than this share of the audio cannot be used


@dataclass(frozen=True)
class Optim:
    steps: int = 1000
    trainable: dict[str, float] = field(default_factory=dict)  # regex over parameter names -> peak learning rate
    warmup: int = 50
    decay_from: float = 0.0  # share of the steps after which the cosine decay starts
    final_lr: float = 0.05  # of the peak
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    accumulate: int = 1  # batches per optimizer step
    ctc_candidates: int = 0  # stage 1 only: softmax over the corpus' tokens and so many random others; 0: all
    max_bad_steps: int = 20  # stop after so many steps in a row with a loss or gradient that is not finite


@dataclass(frozen=True)
class Run:
    out: str = ""
    init: str = ""  # the previous stage's output directory
    seed: int = 0
    threads: int = 0  # CPU threads per process; 0: torch's choice
    log_every: int = 10
    loggers: tuple[str, ...] = ("jsonl",)  # besides the JSONL, which is always written: tensorboard, wandb
    save_every: int = 60  # seconds between checkpoints
    keep: int = 2  # newest checkpoints that stay; the best by validation stays besides
    valid_every: int = 0  # steps between validations; 0: only at the end
    valid_utterances: int = 40  # validation at the end of a stage; 0: none
    hang_seconds: float = 600.0  # several ranks: no progress for so long ends the run and names the rank; 0: never
    replicate: int = 1  # HSDP: copies of the sharded model
    mixed_precision: Switch = "auto"  # FSDP gathers weights in model.dtype, reduces gradients in float32; auto: yes
    activation_checkpointing: bool = False  # the LLM's layers run again in backward instead of keeping activations
    compile: Switch = "auto"  # adapters whole and the LLM layer by layer: auto (on a GPU), true, false
    packed: Switch = "auto"  # LLM batches without padding; auto: where its attention takes them as they are


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


def load(preset: str, stage: int, overrides: dict[str, Any] | None = None, settings: Iterable[str] = ()) -> Config:
    """A preset's name (train/configs) or a YAML file: its common part, its `stageN` part, then what was asked for.

    Args:
        overrides: dotted key -> value, from named options.
        settings: 'key=value' texts, applied last.

    Raises:
        UserError: no such preset, broken YAML, an unknown key (with the nearest known one), a value of the wrong type.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise UserError(f"--config {preset}: no such file or preset (presets: {known})")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that there is not
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the file takes keys, got {tree!r}")
    stages = {key: tree.pop(key) or {} for key in list(tree) if key in ("stage1", "stage2", "stage3")}
    config = _merge(Config(), tree, str(path))
    config = _merge(config, stages.get(f"stage{stage}", {}), f"{path}: stage{stage}")
    config = _overridden(config, overrides or {}, settings)
    _check_numbers(config)
    return config


def _overridden(config: Config, overrides: dict[str, Any], settings: Iterable[str]) -> Config:
    for key, value in [*overrides.items(), *map(_split, settings)]:
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = _merge(config, nested, "command line")
    return config


def preset_for(overrides: dict[str, Any], settings: Iterable[str] = ()) -> tuple[str, str]:
    """The preset of a command line that names none: nano, or the neutral one where it names other parts than nano's.

    Nano's chat template, threads and frames kept in memory are of use to nano's own parts.

    Args:
        overrides, settings: what else the command line asks for, as for `load`.

    Returns:
        The preset, and one line that says why it is not nano, '' where it is.

    Raises:
        UserError: a setting that `load` would refuse, too.
    """
    own = load(NANO, 1).model
    asked = _overridden(Config(model=own), overrides, settings).model
    for part, what in (("llm", "LLM"), ("whisper", "Whisper")):
        name = getattr(asked, part)
        if name != getattr(own, part):
            return NEUTRAL, f"--config not given: train/configs/{NEUTRAL}.yaml, since the {what} is {name}"
    return NANO, ""


_LEAST = {
    "model.lora_rank": 1,
    "data.batch_size": 1,
    "data.buckets": 1,
    "data.workers": 0,
    "data.prefetch": 1,
    "data.batch_tokens": 0,
    "data.min_seconds": 0,
    "data.max_bad_share": 0,
    "optim.steps": 0,
    "optim.warmup": 0,
    "optim.accumulate": 1,
    "optim.ctc_candidates": 0,
    "optim.max_bad_steps": 0,
    "optim.decay_from": 0,
    "optim.final_lr": 0,
    "optim.weight_decay": 0,
    "model.ctc_weight": 0,
    "run.seed": 0,
    "run.threads": 0,
    "run.log_every": 1,
    "run.save_every": 0,
    "run.valid_utterances": 0,
    "run.valid_every": 0,
    "run.keep": 1,
    "run.hang_seconds": 0,
    "run.replicate": 1,
}


_MOST = {
    "optim.decay_from": 1,
    "run.seed": 2**32 - 1,
    "run.threads": 4096,
}


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_numbers(config: Config) -> None:
    """Ranges; NaN lies in none of them."""
    least = {key: (_value(config, key), bound) for key, bound in _LEAST.items()}
    least |= {f"optim.trainable: {pattern}": (rate, 0) for pattern, rate in config.optim.trainable.items()}
    for key, (value, bound) in least.items():
        if not value >= bound:
            raise UserError(f"{key}: must be at least {bound}, got {value}")
    for key, bound in _MOST.items():
        if not _value(config, key) <= bound:
            raise UserError(f"{key}: must be at most {bound}, got {_value(config, key)}")
    shares = {f"model.{name}": (getattr(config.model, name),) for name in ("adapter_dropout", "lora_dropout")}
    for key, values in {**shares, "optim.betas": config.optim.betas}.items():
        for value in values:
            if not 0 <= value < 1:
                raise UserError(f"{key}: must be at least 0 and below 1, got {value}")
    positive = {f"data.tasks.{task}": weight for task, weight in config.data.tasks.items()}
    positive["data.batch_seconds"] = config.data.batch_seconds
    positive["data.temperature"] = config.data.temperature[0]
    positive["optim.clip"] = config.optim.clip
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"{key}: must be above 0, got {value}")
    _check_data(config.data)


def _check_data(data: Data) -> None:
    if not data.min_seconds < data.max_seconds <= 30:
        raise UserError(f"data.max_seconds: must be above data.min_seconds and at most 30, got {data.max_seconds}")
    if data.temperature[1] < 0:
        raise UserError(f"data.temperature: must not fall with the epochs, got {data.temperature[1]} an epoch")
    if data.speed and not all(0.5 <= factor <= 2 for factor in data.speed):
        raise UserError(f"data.speed: factors lie between 0.5 and 2, got {', '.join(map(str, data.speed))}")
    if data.spec_augment and (len(data.spec_augment) != 4 or min(data.spec_augment) < 0):
        raise UserError(
            f"data.spec_augment: takes frequency masks, bins, time masks, frames, got {list(data.spec_augment)}"
        )
    for name in ("speed", "spec_augment"):
        if data.cache_frames and getattr(data, name):
            raise UserError(f"data.{name}: changes the audio at every draw, so data.cache_frames must be false")


def _split(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"{text}: overrides look like optim.steps=100")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that there is not
        raise UserError(f"{text}: {value!r} is not a YAML value") from None


def _merge(config: Any, tree: dict[str, Any], where: str, prefix: str = "") -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{where}: {prefix or 'the file'} takes keys, got {tree!r}")
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(hints)}"
            raise UserError(f"{where}: unknown key {prefix}{key}{hint}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _merge(current, value, where, f"{prefix}{key}.")
        else:
            changes[key] = _typed(value, hints[key], f"{where}: {prefix}{key}")
    return dataclasses.replace(config, **changes)


def _typed(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == Switch:
        if value == "auto" or isinstance(value, bool):
            return value
        raise UserError(f"{where}: takes auto, true or false, got {value!r}")
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _typed(value, args[0], where)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise UserError(f"{where}: takes {len(args)} values, got {value!r}")
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        return tuple(_typed(item, kind, where) for item, kind in zip(items, kinds, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: takes a mapping, got {value!r}")
        return {str(key): _typed(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if hint is int and isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where}: too large a number")
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where}: too large a number") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}: takes {hint.__name__}, got {value!r}")
    return value


def dump(config: Config) -> str:
    """YAML of the whole resolved config; `load` reads it back."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
