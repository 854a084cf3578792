"""Sizes that were measured to be the fastest on a chip, from tuned.json; launchers pass the default they stand with.

The table maps chip -> kernel -> key -> {name: number}; bench/tune.py writes it. {"backend": name} says which of several
implementations is the fastest (`choice`). It is read once and fixed from then on: what autotuning picks while it runs
may differ from run to run and from rank to rank, and the last bits with it. An entry that does not compile, or asks for
more than the chip has, is dropped with a warning and the default runs.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import triton

from csrc_triton.launch import INTERPRETED, chip

PATH = Path(__file__).with_name("tuned.json")
Sizes = dict[str, int]  # beside them "backend": str
Table = dict[str, dict[str, Sizes]]  # kernel -> key -> sizes

_forced: Table | None = None
_dropped: set[tuple[str, str]] = set()
_chips: dict[tuple, str] = {}


def sizes(kernel: str, key: str, **default: int) -> Sizes:
    """`default`, with the numbers that the table has for this chip, kernel and key in place of its own."""
    entry = _entry(kernel, key)
    return default if entry is None else {name: entry.get(name, value) for name, value in default.items()}


def choice(op: str, key: str, default: str) -> str:
    """The backend that the table names for this chip, op and key; whether it is there is for the caller to see."""
    entry = _entry(op, key)
    return default if entry is None else str(entry.get("backend", default))


def launch(kernel: str, key: str, default: Sizes, start: Callable[..., None]) -> None:
    """`start(**sizes)`, which launches a kernel; with the default sizes where those of the table fail.

    Compiling and loading come before anything is written, so that starting again is safe. Inside `use_table` nothing
    is caught: who tries sizes wants to know.
    """
    entry = _entry(kernel, key)
    if entry is None or _forced is not None:
        start(**sizes(kernel, key, **default))
        return
    try:
        start(**sizes(kernel, key, **default))
    except Exception as error:  # whatever Triton, its assembler or the driver may raise; what is not theirs comes again
        start(**default)
        _dropped.add((kernel, key))
        warnings.warn(
            f"{PATH.name}: {kernel}, {key} does not run on {_chip()} ({type(error).__name__}: {error}); "
            f"its default is used: run python -m bench.tune again",
            RuntimeWarning,
            stacklevel=3,
        )


@contextmanager
def use_table(table: Table) -> Iterator[None]:
    """Inside, `table` alone counts, whatever the chip; {} stands for all defaults. Not thread-safe."""
    global _forced
    before, _forced = _forced, table
    try:
        yield
    finally:
        _forced = before


def _entry(kernel: str, key: str) -> Sizes | None:
    table = _forced
    if table is None:
        tables = _tables()
        if not tables:
            return None
        table = tables.get(_chip(), {})
        if (kernel, key) in _dropped:
            return None
    return table.get(kernel, {}).get(key)


def _chip() -> str:
    """`launch.chip()`, asked once per driver and device: the question costs as much as a launch should.

    Interpreted kernels go by a name of their own: what is fastest on some chip does not concern them.
    """
    if INTERPRETED:
        return "interpreter"
    driver = triton.runtime.driver.active
    place = (driver, driver.get_current_device())
    if place not in _chips:
        _chips[place] = chip()
    return _chips[place]


@functools.cache
def _tables() -> dict[str, Table]:
    """tuned.json; nothing, with a warning, where it cannot be read or is no such table."""
    try:
        tables = json.loads(PATH.read_text(encoding="utf-8"))
        check(tables)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{PATH.name}: {error}; default sizes are used", RuntimeWarning, stacklevel=2)
        return {}
    return {name: table for name, table in tables.items() if table}


def check(tables: object) -> None:
    """Raises ValueError, naming the place, unless this is chip -> kernel -> key -> {name: positive int}.

    "backend" alone holds a name instead.
    """

    def mapping(x: object, where: str) -> dict:
        if not isinstance(x, dict):
            raise ValueError(f"{where} must map names, got {x!r}")
        return x

    for name, table in mapping(tables, "the table").items():
        for kernel, entries in mapping(table, name).items():
            for key, entry in mapping(entries, f"{name}, {kernel}").items():
                for size, number in mapping(entry, f"{name}, {kernel}, {key}").items():
                    if size == "backend":
                        if not isinstance(number, str):
                            raise ValueError(f"{name}, {kernel}, {key}: backend must be a name, got {number!r}")
                    elif type(number) is not int or number < 1:
                        raise ValueError(f"{name}, {kernel}, {key}: {size} must be a positive int, got {number!r}")
