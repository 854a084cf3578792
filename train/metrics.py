"""What one sees of a run: a progress line, metrics.jsonl (one row a step), other loggers, and the curves."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from train import loggers as backends
from train import plots
from train.validation_figures import summary

FILE = "metrics.jsonl"
DRAW_SECONDS = 300.0  # between two drawings of the curves


def read(path: Path) -> list[dict]:
    """Rows of a metrics file, oldest first; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def duration(seconds: float) -> str:
    """'42 s', '3:07', '5:02:09'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Metrics:
    """Rank 0 writes and prints, the others do nothing.

    Args:
        folder: the run's output directory.
        steps: how many there will be.
        loggers: besides the JSONL: tensorboard, wandb. They start with the first step, once `folder` is the run's.

    Raises:
        UserError: a logger that is unknown or not installed, on every rank.
    """

    def __init__(self, folder: Path, main: bool, steps: int, loggers: Iterable[str] = ("jsonl",)) -> None:
        backends.check(loggers)
        self.path, self.main, self.steps = folder / FILE, main, steps
        self.wanted, self.loggers, self.resumed = tuple(loggers), None, 0
        self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True) if main and sys.stderr.isatty() else None
        self.recent: list[dict] = []
        self.started, self.first = 0.0, None
        self.drawn = time.monotonic()

    def resume(self, step: int) -> None:
        """Forget rows past the checkpoint: they will be made again."""
        if not self.main:
            return
        self.resumed = step
        kept = [row for row in read(self.path) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)
        if self.bar is not None:
            self.bar.update(step)

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def add(
        self, step: int, row: dict, tasks: dict[str, int], every: int, skipped: dict[str, int] | None = None
    ) -> None:
        """One step's figures; a key that is not there is not shown.

        Args:
            row: {ce, ctc, step_s, audio_s, frames, audio_tokens, tokens_s, audio_h_per_h, mfu, peak_gib, eta_s, ...},
                after a validation also its figures (valid_...).
            tasks: utterances of the step by task.
            every: steps that the line is a mean over, and after which it is printed.
            skipped: what could not be used so far, by cause.
        """
        if not self.main:
            return
        if self.first is None:  # timed from the end of the first step: it pays for warming up
            self.first, self.started = step, time.monotonic()
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        row = {"step": step, **row, "tasks": tasks, **({"skipped": dict(skipped)} if skipped else {})}
        self.recent = [*self.recent[-(every - 1) :], row] if every > 1 else [row]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.loggers is None:
            self.loggers = backends.start(self.wanted, self.path.parent, self.resumed)
        for logger in self.loggers:
            logger.add(step, backends.scalars(row))
        self._show(step, every)
        if figures := summary(row):
            self.say(f"step {step}: {figures}")
        if figures or time.monotonic() - self.drawn > DRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Curves of the run so far, beside its checkpoints."""
        if self.main:
            plots.curves(read(self.path), self.path.parent / plots.FILE)
            self.drawn = time.monotonic()

    def _show(self, step: int, every: int) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(self._line())
            self.bar.update(1)
        elif step % every == 0 or step == self.steps or step == 1:
            left = self.recent[-1].get("eta_s")
            if left is None and step > self.first:
                left = (time.monotonic() - self.started) / (step - self.first) * (self.steps - step)
            parts = [f"step {step}/{self.steps}", self._line(), "" if left is None else f"{duration(left)} left"]
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def _mean(self, key: str) -> float | None:
        values = [row[key] for row in self.recent if row.get(key) is not None]
        return sum(values) / len(values) if values else None

    def _line(self) -> str:
        """Means over the last steps: 'ce 1.20  ctc 0.81  8.1 frames/token  0.52 s/step  ...'."""
        formats = (
            ("ce", "ce {:.3f}"),
            ("ctc", "ctc {:.3f}"),
            ("step_s", "{:.2f} s/step"),
            ("tokens_s", "{:.0f} tokens/s"),
            ("audio_h_per_h", "{:.0f} audio h/h"),
            ("mfu", "MFU {:.1%}"),
        )
        parts = {key: text.format(value) for key, text in formats if (value := self._mean(key)) is not None}
        if not self._mean("audio_tokens"):  # stage 1: nothing for the LLM, and its loss is not one
            parts.pop("ce", None)
        elif frames := self._mean("frames"):
            ratio = frames / max(1.0, self._mean("audio_tokens"))
            parts["ctc"] = parts.get("ctc", "") + f"  {ratio:.1f} frames/token"
        peak = self.recent[-1].get("peak_gib")
        parts["peak"] = f"{peak:.1f} GiB" if peak is not None else ""
        parts["tasks"] = self._shares()
        return "  ".join(part for part in parts.values() if part)

    def _shares(self) -> str:
        """'asr 61 %, slot 39 %' of the last steps' utterances, where there is more than one task."""
        drawn = sum((Counter(row["tasks"]) for row in self.recent), Counter())
        if len(drawn) < 2:
            return ""
        return ", ".join(f"{task} {count / drawn.total():.0%}" for task, count in drawn.most_common())

    def close(self) -> None:
        self.draw()
        for logger in self.loggers or ():
            logger.close()
        if self.bar is not None:
            self.bar.close()
