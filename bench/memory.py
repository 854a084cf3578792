"""Peak memory of a benchmark's step: on a CPU in a fresh process, whose heap nothing else has shaped."""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import torch

from bench.sources import ROOT

LONGEST = 300  # s that a process may take
AT_ONCE = 2  # processes: none is timed, and most of their time they build a model on one core


def _status_kib(field_name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field_name))


def extra_peak_mib(step: Callable[[], tuple], where: torch.device) -> float | None:
    """How far one call of step lifts memory above where it stood; None where the system does not tell."""
    step()  # libraries' own one-time buffers
    gc.collect()
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - before) / 1024


def in_processes(target: Callable[..., float | None], jobs: list[tuple]) -> list[float | None | str]:
    """target(*job) of each job in a process of its own; a text says what went wrong in it."""
    server = _server()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda job: _in_process(server, target, job), jobs))


def _in_process(server, target: Callable, job: tuple) -> float | None | str:
    ours, theirs = server.Pipe(duplex=False)
    child = server.Process(target=_answer, args=(theirs, target, job))
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LONGEST) else f"no answer within {LONGEST} s"
    except EOFError:
        return "the process died"
    finally:
        child.kill()
        child.join()


def _answer(pipe, target: Callable, job: tuple) -> None:
    try:
        pipe.send(target(*job))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}"[-2000:])


@functools.cache
def _server():
    """Where processes are forked from that have imported what every benchmark needs and computed nothing yet."""
    # A fixed threshold keeps glibc from holding on to large freed blocks, which would hide their next use.
    wanted = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    wanted["OMP_WAIT_POLICY"] = "PASSIVE"  # the processes share the cores
    wanted["THP_MEM_ALLOC_ENABLE"] = "0"  # huge pages would round everything up
    before = {name: os.environ.get(name) for name in wanted}
    context = multiprocessing.get_context("forkserver")
    benches = sorted(path.stem for path in (ROOT / "bench").glob("bench_*.py"))
    context.set_forkserver_preload(["bench.parts", *(f"bench.{name}" for name in benches)])
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context
