"""What one sees of a run: a progress line, metrics.jsonl (one row a step), and the loss curves at the end."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

FILE = "metrics.jsonl"


def read(path: Path) -> list[dict]:
    """Rows of a metrics file, oldest first; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Metrics:
    """Rank 0 writes and prints, the others do nothing.

    Args:
        folder: the run's output directory.
        steps: how many there will be.
    """

    def __init__(self, folder: Path, main: bool, steps: int) -> None:
        self.path, self.main, self.steps = folder / FILE, main, steps
        self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True) if main and sys.stderr.isatty() else None
        self.recent: list[dict] = []
        self.started, self.first = 0.0, None

    def resume(self, step: int) -> None:
        """Forget rows past the checkpoint: they will be made again."""
        if not self.main:
            return
        kept = [row for row in read(self.path) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)
        if self.bar is not None:
            self.bar.update(step)

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def add(self, step: int, row: dict, tasks: dict[str, int], every: int) -> None:
        """One step's figures: {ce, ctc, step_s, audio_s, frames, audio_tokens, ...}."""
        if not self.main:
            return
        if self.first is None:  # timed from the end of the first step: it pays for warming up
            self.first, self.started = step, time.monotonic()
        self.recent = [*self.recent[-(every - 1) :], row] if every > 1 else [row]
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **row, "tasks": tasks}) + "\n")
        if self.bar is not None:
            self.bar.set_postfix_str(self._line())
            self.bar.update(1)
        elif step % every == 0 or step == self.steps or step == 1:
            spent = time.monotonic() - self.started
            left = spent / max(1, step - self.first) * (self.steps - step)
            print(f"step {step}/{self.steps}  {self._line()}  {left:.0f} s left", file=sys.stderr, flush=True)

    def _line(self) -> str:
        def mean(key: str) -> float:
            return sum(row[key] for row in self.recent) / len(self.recent)

        seconds = mean("step_s")
        parts = [f"ctc {mean('ctc'):.3f}"]
        if any(row["audio_tokens"] for row in self.recent):
            parts.insert(0, f"ce {mean('ce'):.3f}")
            parts.append(f"{mean('frames') / max(1, mean('audio_tokens')):.1f} frames/token")
        return "  ".join([*parts, f"{seconds:.2f} s/step", f"{mean('audio_s') / seconds:.0f}x real time"])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
