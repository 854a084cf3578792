"""Deprecation warnings that our own calls cause are errors; what dependencies do to each other is theirs to mend."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / name}/" for name in ("csrc_triton", "soundwave_fast", "train", "bench", "tests", "examples"))
KINDS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
# What stands between a caller and the function that it calls: decorators, and a module's __call__ before its forward.
_BETWEEN = (
    "/typing_extensions.py",
    "/functools.py",
    "/contextlib.py",
    "/warnings.py",
    "/logging/__init__.py",
    "/torch/nn/modules/module.py",
    "/torch/utils/_contextlib.py",
    "/transformers/utils/deprecation.py",
    "/transformers/utils/generic.py",
    "/transformers/utils/logging.py",
    __file__,
)


class DeprecatedCall(AssertionError):
    """Our code calls something that a dependency is going to take away."""


def our_caller(frame: FrameType | None) -> str | None:
    """'file:line' of ours that called the function which warns, or None where a dependency did.

    Args:
        frame: the frame that calls `warnings.warn` or logs.
    """
    warns = None  # the file of the function that warns: it may be called by its neighbours
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return None if warns is None and name.startswith(str(ROOT / "tests")) else f"{name}:{frame.f_lineno}"
        if not name.endswith(_BETWEEN):
            if warns is not None and name != warns:
                return None
            warns = name
        frame = frame.f_back
    return None


def install() -> None:
    """From now on a deprecation that our call causes raises `DeprecatedCall`, whether it is warned of or logged."""
    warn = warnings.warn

    def strict(message, category=None, stacklevel=1, source=None, **more):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, KINDS) and (place := our_caller(sys._getframe(1))):
            raise DeprecatedCall(f"{place}: {message}")
        return warn(message, category, stacklevel + 1, source, **more)

    warnings.warn = strict
    logging.getLogger("transformers").addFilter(_logged)  # of this logger; those below it get it as they are made
    logging.setLoggerClass(_Logger)


def _logged(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING and "deprecated" in record.getMessage():
        if place := our_caller(sys._getframe(1)):
            raise DeprecatedCall(f"{place}: {record.getMessage()}")
    return True


class _Logger(logging.getLoggerClass()):
    """Loggers of transformers look at what is logged; a filter of a parent would not see it."""

    def __init__(self, name: str, level: int = logging.NOTSET) -> None:
        super().__init__(name, level)
        if name.startswith(("transformers", "peft", "accelerate")):
            self.addFilter(_logged)
