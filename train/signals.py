"""Ctrl-C and a scheduler's SIGTERM: noted, acted on after the step, with the exit code each of them expects."""

from __future__ import annotations

import signal
from types import FrameType

EXIT = {signal.SIGINT: 130, signal.SIGTERM: 0}  # a scheduler takes anything but 0 for a failure


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state is saved. `code` is what the process should exit with."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Signals:
    """While entered, SIGINT and SIGTERM only set `number`; afterwards they are the caller's again."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._note) for number in EXIT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
