"""Errors that a user can mend, and the one wrapper by which every command line reports them: one line, an exit code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

DEBUG = "SOUNDWAVE_DEBUG"  # environment: any value but 0 is --debug for every command
LONGEST = 400  # characters of a message that is not ours
WAIT = 5.0  # seconds that a rank leaves to the first one of its node before it says what both may have met


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),  # not to be written
)


def disk_error(path: Path, error: OSError, intact: str = "the last checkpoint is intact") -> UserError | None:
    """What to say of a full disk, or of a directory that cannot be written.

    Args:
        path: what was being written.
        error: what the system said of it.
        intact: what the line says of the work done so far.

    Returns:
        The error to raise instead; None for an `error` of another kind.
    """
    if error.errno in _DISK:
        return UserError(f"{path}: {os.strerror(error.errno).lower()}; {intact}")
    return None


@contextlib.contextmanager
def disk_errors(path: Path, intact: str = "the last checkpoint is intact") -> Iterator[None]:
    """A full disk or a directory that cannot be written becomes one clear line.

    Args:
        path: what is written inside the block.
        intact: what the line says of the work done so far.

    Yields:
        Nothing.

    Raises:
        UserError: the disk is full or the directory cannot be written; other errors pass.
    """
    try:
        yield
    except OSError as error:
        known = disk_error(path, error, intact)
        if known is None:
            raise
        raise known from None


def one_line(message: object, longest: int | None = LONGEST) -> str:
    """A message on one line, without runs of blanks.

    Args:
        message: anything that has a text, such as an exception.
        longest: characters after which it is cut; None: it is left whole.

    Returns:
        The line, without a line break at its end.
    """
    return " ".join(str(message).split())[:longest]


def say(prog: str, message: object, longest: int | None = LONGEST) -> None:
    """Print one line `PROG: message` on stderr; nothing where nobody reads stderr any more.

    Args:
        prog: what the line begins with.
        message: what is said, put on one line.
        longest: characters after which the message is cut; None: it is left whole.
    """
    with contextlib.suppress(BrokenPipeError):
        print(f"{prog}: {one_line(message, longest)}", file=sys.stderr, flush=True)


def _rank() -> int:
    rank = os.environ.get("RANK", "0")  # torchrun's
    return int(rank) if rank.isdecimal() else 0


def _tell(prog: str, text: str, at_once: bool) -> None:
    """Say why this rank ends; `at_once`: even if all ranks of its node may be about to say the same.

    Otherwise only the first rank of a node speaks at once. The others wait: where that one has ended by the same
    mistake, torchrun ends them meanwhile; where it has not, they met the mistake without it and say so.
    """
    rank = _rank()
    if rank and not at_once and os.environ.get("LOCAL_RANK") != "0":
        time.sleep(WAIT)
    say(f"{prog}, rank {rank}" if rank else prog, text, None)


class _Debug(argparse.Action):
    """`--debug` is `run_command`'s: it leaves nothing among a command's own arguments."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: object) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=str(more["help"]))

    def __call__(self, *_: object) -> None:
        pass


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line (--help says the rest), and there is always `--debug`."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.add_argument("--debug", action=_Debug, help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        _tell(self.prog, message, at_once=False)
        self.exit(2)


_CPU_MEMORY = "DefaultCPUAllocator: "  # torch has a class of its own for a GPU's memory alone


def _text(error: Exception, value_errors: bool) -> str | None:
    """What to say of an error that the user can mend; None for one that is ours."""
    if isinstance(error, UserError):
        return one_line(error, None)
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: their libraries are not imported for it
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return one_line(f"out of memory ({error})" if str(error) else "out of memory")
    if isinstance(error, RuntimeError) and _CPU_MEMORY in str(error):
        return one_line(f"out of memory ({_CPU_MEMORY}{str(error).partition(_CPU_MEMORY)[2]})")
    if kinds & {"SafetensorError", "LibsndfileError", "TemplateError"}:  # a damaged file, or a disk that refuses
        return one_line(f"{type(error).__name__}: {error}")
    if isinstance(error, OSError):
        if not error.strerror:
            return one_line(str(error) or type(error).__name__)
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return one_line(": ".join([*names, error.strerror.lower()]))
    return one_line(error) if value_errors and isinstance(error, ValueError) else None


def _show(error: BaseException) -> None:
    """The traceback, with the causes that a `raise ... from None` keeps from other readers."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = link.__cause__ is not None
        link = link.__cause__ or link.__context__
    traceback.print_exception(type(error), error, error.__traceback__)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that has lost its reader, rather than some other pipe of this process."""
    try:
        sys.stdout.flush()
        poll = select.poll()  # unbuffered, nothing is left to flush
        poll.register(sys.stdout, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # no file at all, or a system without poll
        return False


def _drop_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):  # python flushes stdout at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _debugging(argv: list[str]) -> Iterator[bool]:
    """Whether tracebacks are wanted: `--debug` or the environment, which tells the commands that a command starts."""
    before = os.environ.get(DEBUG)
    if "--debug" in argv:
        os.environ[DEBUG] = "1"
    try:
        yield os.environ.get(DEBUG, "0") not in ("", "0")
    finally:
        if before is None:
            os.environ.pop(DEBUG, None)
        else:
            os.environ[DEBUG] = before


def run_command(
    prog: str,
    body: Callable[[list[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
    value_errors: bool = True,
    in_step: bool = True,
) -> int:
    """Run a command line: every `main` of the project is a call of this.

    A `UserError`, an `OSError` (or what safetensors, libsndfile and jinja say of a file), running out of memory and, as
    the library's ValueErrors name a bad argument, a `ValueError` are one line `PROG: ...` on stderr and exit code 2.
    Anything else is a mistake of ours and keeps its traceback. `--debug` (or SOUNDWAVE_DEBUG=1) prints the traceback
    before the line.

    Under torchrun no rank ends without a word, and what all have met is said once a node: a `UserError`, a `ValueError`
    or a typing error is said by the first rank of each node at once, by the others after some seconds. torchrun has
    ended them by then, unless they met the mistake without the first. Everything else, and everything with `--debug`,
    each rank says at once. Lines of ranks other than 0 begin with `PROG, rank N: `.

    Args:
        prog: what the line begins with.
        body: takes the arguments (parsed with `ArgumentParser`) and returns the exit code, None for 0.
        argv: the arguments; the process's own where None.
        interrupted: what to say after Ctrl-C; rank 0 alone says it.
        value_errors: False where a ValueError would more probably be a mistake of ours, as in the middle of a
            training: it keeps its traceback there.
        in_step: whether the ranks of a torchrun do the same, so that all of them meet a mistake. False: each says its
            own at once.

    Returns:
        The exit code: the body's; 2; 130 after Ctrl-C; 141 where nobody reads stdout on.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    with _debugging(arguments) as debug:
        try:
            code = int(body(arguments) or 0)
            sys.stdout.flush()
            return code
        except (Exception, KeyboardInterrupt) as error:
            stopped = isinstance(error, KeyboardInterrupt)
            text = interrupted if stopped else _text(error, value_errors)
            if text is None:
                raise
            if debug:
                _show(error)
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                _drop_stdout()
                return 141
            if not stopped or debug or _rank() == 0:
                by_all = in_step and isinstance(error, (UserError, ValueError))
                _tell(prog, text, at_once=stopped or debug or not by_all)
            return 130 if stopped else 2
