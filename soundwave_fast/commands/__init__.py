"""The subcommands of `soundwave`, one module each; they print, and return exit codes."""


def say(message: object) -> None:
    """One line `soundwave: message` on stderr."""
    import sys

    print(f"soundwave: {' '.join(str(message).split())[:400]}", file=sys.stderr, flush=True)
