"""How a benchmark measures: providers of one case timed in turns, peak memory in a fresh process, share of the floor.

A `Case` is one op at one shape; its providers are ways to compute it (eager, ours, installed peers). All providers of
a case are timed in one process, round robin (A B C A B C ...), so a machine that slows down slows all of them and
the ratio holds. pytest-benchmark stores, compares and prints the samples; the clock is ours: CUDA events around one
call after an L2 flush on a GPU; on a CPU the wall clock over as many calls as fill 20 ms.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from types import ModuleType

# PyTorch's own switch, read at its first allocation: large tensors in huge pages. In pages of 4 KiB a short step is up
# to twice as slow in one process as in the next, depending on where they happen to lie (bench/LOG.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import pytest
import torch

from bench import memory
from bench.sources import ROOT, imported
from soundwave_fast import cost_model
from soundwave_fast.cost_model import Cost
from soundwave_fast.ops import gemm

ROUNDS = 7
LEAST_ROUNDS, LONGEST_SECONDS = 3, 8.0  # a case that takes longer ends early
TURN_SECONDS = 0.02  # of a turn on a CPU
FLUSH_BYTES = 256 << 20  # larger than any L2
INPUT_SETS = 2  # a GPU rotates among so many, so that no round finds its inputs in the cache

Step = Callable[[], tuple]
Maker = Callable[["Case", torch.device, int], Step]  # (case, device, seed) -> one call of the op, returning results


class Unavailable(Exception):
    """A peer that is not installed, or cannot run this case; its row is skipped with this reason."""


@dataclass(frozen=True)
class Case:
    """One op at one shape. `providers` maps a name to a maker; the first is the baseline of the ratios."""

    op: str  # the group, and the name of its tests: tests/ops/test_<op>.py
    variant: str
    shape: dict[str, int]
    providers: dict[str, Maker]
    dtype: str = "float32"
    cost: Cost | None = None
    sources: tuple[str, ...] = ()  # files that the figure depends on, besides the op's own
    tests: str = ""  # the file whose tests marked "conformance" must pass; tests/ops/test_<op>.py if empty
    budget: float = 2e-2  # providers' results may differ so much from the baseline's, relative to its largest value
    rounds: int = ROUNDS
    peers: tuple[str, ...] = ()  # providers that are neither eager code nor ours: kernels of others
    note: str = ""  # printed below the table: why ours is slower here, what a row leaves out
    compare: bool = field(default=True)  # False where the step returns nothing to compare

    @property
    def conformance(self) -> str:
        return self.tests or f"tests/ops/test_{self.op}.py"

    @property
    def eager(self) -> list[str]:
        """Providers that are written in eager torch: the fastest of them is what the report compares with first."""
        return [x for x in self.providers if not x.startswith(("ours", *self.peers)) and "compiled" not in x]

    @property
    def id(self) -> str:
        return "-".join([self.variant.replace(" ", "_"), *(f"{k}={v}" for k, v in self.shape.items())])

    @property
    def files(self) -> list[str]:
        """What the row depends on, so that the report can say what changed since: the op, its benchmark, their imports.

        Folders stand for all in them. The machinery (this file) is left out.
        """
        own = [f"soundwave_fast/ops/{self.op}.py", f"soundwave_fast/ops/pure_torch/{self.op}.py"]
        own += [f"csrc_triton/{self.op}.py", f"csrc_triton/{self.op}", f"bench/bench_{self.op}.py"]
        own = [name for name in (*own, *self.sources) if (ROOT / name).exists()]
        folders = tuple(f"{name}/" for name in own if (ROOT / name).is_dir())
        return sorted({*own, *(name for name in imported(own) if not name.startswith(folders))})


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def uncompiled(case: Case) -> Case:
    """On a CPU without the compiled providers: each case is a graph of its own, and compiling it takes ten seconds."""
    kept = {name: make for name, make in case.providers.items() if device().type == "cuda" or "compiled" not in name}
    return dataclasses.replace(case, providers=kept)


def rows(cases: list[Case]):
    """`@rows(CASES)`: one pytest row per case and provider; all cases but the first are `uncompiled`."""
    cases = [*cases[:1], *map(uncompiled, cases[1:])]
    pairs = [pytest.param(case, name, id=f"{case.id}-{name}") for case in cases for name in case.providers]
    return pytest.mark.parametrize(("case", "provider"), pairs)


# -- timing ------------------------------------------------------------------------------------------------------


def _clock_cuda(step: Step, flush: torch.Tensor) -> float:
    flush.zero_()  # also keeps the GPU busy while the host enqueues the step
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _clock_cpu(step: Step) -> float:
    """Seconds a call. A short step's first call is left out: it pays for what the others left in the caches."""
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    if first >= TURN_SECONDS:
        return first
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < TURN_SECONDS:
        step()
        calls += 1
    return elapsed / calls


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc's malloc reuse every block it is given back, as PyTorch's allocator does on a GPU.

    Left alone it returns large blocks to the system, small ones too at times, and faulting them in again can cost more
    than the op, now for one provider, now for another (bench/LOG.md).
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def _make(case: Case, where: torch.device) -> tuple[dict[str, list[Step]], dict[str, float], dict[str, str]]:
    """Steps of each provider, all run once; how far their results are from the baseline's; why others are missing."""
    steps, difference, missing, baseline = {}, {}, {}, None
    for name, make in case.providers.items():
        try:
            sets = INPUT_SETS if where.type == "cuda" else 1
            steps[name] = [make(case, where, seed) for seed in range(sets)]
            results = [step() for step in steps[name]][0]
        except (Unavailable, torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as reason:
            if name == "ours" and isinstance(reason, torch._dynamo.exc.TorchDynamoException):
                raise  # whereas a peer that does not compile is not our failure
            steps.pop(name, None)
            missing[name] = str(reason).strip().splitlines()[0]
            continue
        if case.compare:
            baseline = results if baseline is None else baseline
            difference[name] = _difference(results, baseline)
    return steps, difference, missing


def _difference(ours: tuple, baseline: tuple) -> float:
    worst = 0.0
    for x, y in zip(ours, baseline, strict=True):
        x, y = x.detach().double(), y.detach().double()
        if x.shape != y.shape:
            return float("inf")
        gap = float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) if x.numel() else 0.0
        worst = max(worst, gap if gap == gap else float("inf"))  # NaN is as far as can be
    return worst


@dataclass
class Measured:
    """Samples in seconds by provider, why others are missing, and how far each result is from the baseline's."""

    seconds: dict[str, list[float]]
    missing: dict[str, str]
    difference: dict[str, float]


_measured: dict[tuple[str, str], Measured | Exception] = {}


def measure(case: Case) -> Measured:
    """All providers of the case, timed in turns; once a session, whether that works or not."""
    key = (case.op, case.id)
    if key not in _measured:
        try:
            _measured[key] = _measure(case)
        except Exception as error:
            _measured[key] = error
        finally:
            gc.collect()
    found = _measured[key]
    if isinstance(found, Exception):
        raise found
    return found


def _measure(case: Case) -> Measured:
    warmup = case.rounds // 10  # each step has already run once by then
    where = device()
    if where.type == "cpu":
        _keep_freed_memory()
    torch._dynamo.reset()  # a shape that was compiled before would make this one's graph a dynamic one
    steps, difference, missing = _make(case, where)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=where) if where.type == "cuda" else None
    clock = functools.partial(_clock_cuda, flush=flush) if flush is not None else _clock_cpu
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for round_ in range(warmup + case.rounds):
        if round_ >= warmup + LEAST_ROUNDS and time.perf_counter() - begun > LONGEST_SECONDS:
            break  # steps of seconds: their median is one of few
        for name, sets in steps.items():
            sample = clock(sets[round_ % len(sets)])
            if round_ >= warmup:
                seconds[name].append(sample)
    return Measured(seconds, missing, difference)


# -- memory ------------------------------------------------------------------------------------------------------


def has_memory_row(provider: str) -> bool:
    """Not what is compiled on a CPU, where a process of its own would spend its time in the compiler."""
    return device().type == "cuda" or "compiled" not in provider


_peaks: dict[tuple[str, str], dict[str, float | None | str]] = {}


def extra_peak(module: str, case: Case, provider: str) -> float | None:
    """`memory.extra_peak_mib` of a provider; the first question about a case measures all that `measure` timed.

    On a GPU in this process: its allocator counts bytes, not pages, and a process more would pay for a context and
    compile again.
    """
    peaks = _peaks.setdefault((case.op, case.id), {})
    if provider not in peaks:
        names = [name for name in measure(case).seconds if has_memory_row(name)]
        if device().type == "cuda":
            peaks.update({name: _extra_peak(module, case.op, case.id, name) for name in names})
        else:
            jobs = [(module, case.op, case.id, name) for name in names]
            peaks.update(zip(names, memory.in_processes(_extra_peak, jobs), strict=True))
    if isinstance(peaks[provider], str):
        raise RuntimeError(f"memory of {case.op} {case.id} {provider}: {peaks[provider]}")
    return peaks[provider]


def _extra_peak(module: str, op: str, case_id: str, provider: str) -> float | None:
    bench = importlib.import_module(module)
    cases = [*bench.CASES, *(case for _, _, case in sweep_cases(bench))]
    case = next(case for case in cases if (case.op, case.id) == (op, case_id))
    return memory.extra_peak_mib(case.providers[provider](case, device(), 0), device())


def sweep_cases(bench: ModuleType) -> list[tuple[str, int, Case]]:
    """(dimension, value, case) of a bench module's SWEEP: its `case(**shape)` at BASE with one dimension changed."""
    sweep = getattr(bench, "SWEEP", {})
    return [
        (along, value, uncompiled(bench.case(**{**bench.BASE, along: value})))
        for along, values in sweep.items()
        for value in sorted({*values, bench.BASE[along]})
    ]


# -- floors ------------------------------------------------------------------------------------------------------


@functools.cache
def chip() -> cost_model.Chip | None:
    """The GPU by its data sheet; for a CPU the ceilings measured here and now (a large matmul, a large copy)."""
    if device().type == "cuda":
        try:
            return cost_model.chip(torch.cuda.get_device_name())
        except ValueError:
            return None
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1200, 4096).to(dtype), torch.randn(4096, 2048).to(dtype)
        out = torch.empty(1200, 2048, dtype=dtype)
        best = min(_clock_cpu(lambda a=a, b=b, out=out: gemm.mm(a, b, out)) for _ in range(6))
        rates[str(dtype).removeprefix("torch.")] = 2 * 1200 * 4096 * 2048 / best
    source, target = torch.ones(64 << 20), torch.empty(64 << 20)
    best = min(_clock_cpu(lambda: target.copy_(source)) for _ in range(4))
    return cost_model.Chip("this CPU, measured", rates, 2 * source.numel() * 4 / best)


# -- one row -----------------------------------------------------------------------------------------------------


class _Replay:
    """A clock that gives pytest-benchmark the samples taken in turns, one pair of readings a sample."""

    def __init__(self, samples: list[float]) -> None:
        self.readings = [reading for sample in samples for reading in (0.0, sample)]

    def __call__(self) -> float:
        return self.readings.pop(0) if self.readings else 0.0


def record(benchmark, request, case: Case, provider: str) -> None:
    """Fill one pytest-benchmark row: samples, ratio to the baseline, extra peak memory, share of the floor.

    Fails where the provider's results leave the case's budget; skips what is not installed. `--smoke` runs two rounds
    of each module's first case, to see that it works.
    """
    smoke = request.config.getoption("--smoke")
    if smoke:
        if case is not request.module.CASES[0]:
            pytest.skip("--smoke: the first case of a module alone")
        case = dataclasses.replace(uncompiled(case), rounds=2)
        if provider not in case.providers:
            pytest.skip("--smoke: on a CPU without compiled baselines, whose compiler takes the time")
    measured = measure(case)
    if provider in measured.missing:
        pytest.skip(f"{provider}: {measured.missing[provider]}")
    samples = measured.seconds[provider]
    if case.compare:
        assert measured.difference[provider] <= case.budget, (
            f"{provider} differs from the baseline by {measured.difference[provider]:.3g}"
        )
    benchmark.group = f"{case.op} {case.id}"
    baseline = next(iter(measured.seconds))
    ratios = sorted(b / s for b, s in zip(measured.seconds[baseline], samples))
    timed = [name for name in case.eager if name in measured.seconds]
    eager = min(timed, key=lambda name: median(measured.seconds[name]))
    against = sorted(e / s for e, s in zip(measured.seconds[eager], samples))
    info = benchmark.extra_info
    info.update(op=case.op, variant=case.variant, shape=case.shape, dtype=case.dtype, provider=provider)
    info.update(files=case.files, baseline=baseline, threads=torch.get_num_threads())
    info.update(ratio=median(ratios), ratio_low=ratios[0], ratio_high=ratios[-1])
    info.update(eager=eager, eager_ratio=median(against), eager_low=against[0], eager_high=against[-1])
    if case.compare:
        info["difference"] = measured.difference[provider]
    if case.cost is not None:
        info.update(flops=case.cost.flops, bytes=case.cost.bytes)
        ceilings = chip()
        if ceilings is not None and case.dtype in ceilings.flops:
            floor = cost_model.floor_seconds(case.cost, ceilings, case.dtype)
            info.update(floor_seconds=floor, of_floor=floor / median(samples))
    if case.note:
        info["note"] = case.note
    if not smoke and has_memory_row(provider) and not request.config.getoption("--no-memory"):
        info["extra_peak_mib"] = extra_peak(request.module.__name__, case, provider)
    timer, benchmark._timer = benchmark._timer, _Replay(samples)
    try:
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
    finally:
        benchmark._timer = timer
