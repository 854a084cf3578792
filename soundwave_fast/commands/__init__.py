"""The subcommands of `soundwave`, one module each; they print, and return exit codes."""

from pathlib import Path

from soundwave_fast import errors

DEFAULT_MODEL = "runs/nano/stage3"


def say(message: object) -> None:
    """One line `soundwave: message` on stderr."""
    errors.say("soundwave", message)


def check_default_model(name: str, otherwise: str) -> None:
    """Whether the model that nobody named is there.

    Args:
        otherwise: how another is named on this command line.

    Raises:
        UserError: `name` is the default, and `make demo`, which leaves it, has not run here.
    """
    if name == DEFAULT_MODEL and not Path(name).is_dir():
        raise errors.UserError(f"no model in {name} yet: run `make demo` first (it trains one there), or {otherwise}")
