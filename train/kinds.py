"""What changing a setting means for a run that has begun: every setting in one class, and how a change reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """What changing a setting means for a run that has begun."""

    FREE = "cannot change a number of the training: the run goes on, bit for bit"
    ROUNDING = "the same mathematics, but another order of rounding or other dropout masks: the run goes on"
    LENGTH = "moves the schedule: the run goes on with the new one"
    FILES = "names files: their content counts, not where they lie"
    IDENTITY = "makes it a different run"


CLASSES: dict[Kind, tuple[str, ...]] = {
    Kind.FREE: (
        # the batches do not depend on who reads the rows; the limits can only stop a run, not change its numbers
        *("data.valid", "data.workers", "data.prefetch", "data.max_bad_share", "optim.max_bad_steps"),
        *("run.out", "run.log_every", "run.loggers", "run.save_every", "run.keep", "run.hang_seconds"),
        *("run.valid_every", "run.valid_utterances"),  # validation leaves no trace in the training
    ),
    Kind.ROUNDING: (
        *("model.attention", "run.threads", "run.replicate", "run.activation_checkpointing"),
        *("run.compile", "run.packed"),  # dropout masks are drawn by other code, or in another shape
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
KINDS: dict[str, Kind] = {key: kind for kind, keys in CLASSES.items() for key in keys}


@dataclass(frozen=True)
class Change:
    """A setting with another value, or 'auto' with another meaning, than when the run was last started."""

    key: str
    was: Any
    now: Any

    @property
    def kind(self) -> Kind:
        """IDENTITY for a setting that this version does not know, since it may have meant anything."""
        return KINDS.get(self.key, Kind.IDENTITY)

    def __str__(self) -> str:
        """'optim.clip 1.0 -> 2.0'; of a mapping, the entries that differ."""
        if not (isinstance(self.was, dict) and isinstance(self.now, dict)) or self.was == self.now:
            order = " in another order" if self.was == self.now else ""
            return f"{self.key} {short(self.was)} -> {short(self.now)}{order}"
        keys = [key for key in {**self.was, **self.now} if self.was.get(key) != self.now.get(key)]
        entries = ((key, self.was.get(key, "none"), self.now.get(key, "none")) for key in keys)
        return "; ".join(f"{self.key}.{key} {short(was)} -> {short(now)}" for key, was, now in entries)


def short(value: Any) -> str:
    """A value as it is shown to people, on one line."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split()) or "''"
    return text if len(text) <= 70 else f"{text[:30]}...{text[-37:]}"
