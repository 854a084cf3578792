"""Ahead-of-time proof: compiles every kernel for every supported GPU without one, and records what each needs.

`python -m bench.aot [--targets sm_90 gfx942 ...] [--dtypes bfloat16 ...] [--record FILE]` calls the public ops, forward
and backward, on small CPU tensors with a driver that compiles and never launches, so the kernels compiled are the ones
that a GPU would run: same arguments, same block sizes, same specialisation. Exit code 1 if a kernel spills more than
SPILL_BYTES per thread or needs more shared memory than the chip has. It cannot share a process with Triton's
interpreter. `make aot` records all chips in bench/results/aot.json, which `python -m bench.report` renders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from soundwave_fast.errors import ArgumentParser, run_command

# Shared memory that a block may have (CUDA programming guide, "compute capabilities"; AMD's CDNA 3 LDS).
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("float32", "bfloat16", "float16")
FILES = ("csrc_triton",)  # what the record depends on; nothing else of the tree need be clean
SPILL_BYTES = 64  # a few registers at a loop's edge; more would be traffic in the loop


@dataclass(frozen=True, order=True)
class Kernel:
    """What one compiled kernel needs on one chip."""

    name: str
    variant: str  # dtype and the compile-time sizes
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    stages: int
    matrix: str  # the matrix instruction used, or ""

    @property
    def limit(self) -> int:
        return SHARED_BYTES[int(self.target[3:]) if self.target.startswith("sm_") else self.target]

    @property
    def fits(self) -> bool:
        return self.spill_bytes <= SPILL_BYTES and self.shared_bytes <= self.limit


# -- the calls -----------------------------------------------------------------------------------------------------


def _ctc(dtype: torch.dtype, S: int) -> None:
    from soundwave_fast.ops import ctc_loss

    log_probs = torch.randn(20, 2, 300).log_softmax(-1).to(dtype).requires_grad_()
    lengths = torch.tensor([20, 20]), torch.tensor([S, S])
    ctc_loss(log_probs, torch.randint(1, 300, (2, S)), *lengths).sum().backward()


def _linear_ctc(dtype: torch.dtype, D: int, trainable: bool) -> None:
    from soundwave_fast.ops import linear_ctc_loss

    hidden = torch.randn(2, 20, D).to(dtype).requires_grad_()
    weight = torch.randn(300 if trainable else 20_000, D).to(dtype).requires_grad_(trainable)
    lengths = torch.tensor([20, 17]), torch.tensor([5, 4])
    loss, _ = linear_ctc_loss(hidden, weight, torch.randint(1, 300, (2, 5)), *lengths, return_argmax=True)
    loss.backward()


def _argmax(dtype: torch.dtype, D: int) -> None:
    from soundwave_fast.ops import linear_argmax

    linear_argmax(torch.randn(2, 20, D).to(dtype), torch.randn(20_000, D).to(dtype), torch.tensor([20, 17]))


def _peaks(dtype: torch.dtype, D: int, select: str) -> None:
    from soundwave_fast.ops import peak_gather

    features = torch.randn(2, 40, D).to(dtype).requires_grad_()
    scores = torch.rand(2, 40) if select == "peak" else None
    tokens = torch.randint(0, 4, (2, 40))
    packed = peak_gather(features, tokens, [40, 30], 0, True, select=select, scores=scores, capacity=256)
    packed.data.float().sum().backward()


def _splice(dtype: torch.dtype, D: int, layout: str) -> None:
    from soundwave_fast.ops import Packed, splice

    text, audio = torch.randn(2, 12, D).to(dtype).requires_grad_(), torch.randn(9, D).to(dtype).requires_grad_()
    # No segments: the counts that the host checks come from a kernel that does not run, and are 0.
    cu_seqlens = torch.zeros(1, dtype=torch.int32)
    packed = Packed(audio, cu_seqlens, cu_seqlens.diff(), 0)
    placeholders = torch.zeros(2, 12, dtype=torch.bool)
    labels = torch.randint(0, 9, (2, 12))
    out = splice(text, packed, placeholders, torch.ones(2, 12), labels, layout=layout, max_length=32)
    out.inputs_embeds.float().sum().backward()


def _attention(dtype: torch.dtype, d: int, queries: int, dropout_p: float) -> None:
    from soundwave_fast.ops import varlen_cross_attention

    q = torch.randn(2 * queries, 4, d).to(dtype).requires_grad_()
    k, v = (torch.randn(400, 2, d).to(dtype).requires_grad_() for _ in range(2))
    offsets = torch.tensor([0, queries, 2 * queries]), torch.tensor([0, 200, 400])
    cu_seqlens = [x.to(torch.int32) for x in offsets]
    varlen_cross_attention(q, k, v, *cu_seqlens, queries, 200, None, dropout_p).float().sum().backward()


def _calls(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    for S in (5, 100, 600, 1500, 3000):  # the last takes several launches
        yield partial(_ctc, dtype, S)
    for D in (64, 4096):
        for trainable in (False, True):
            yield partial(_linear_ctc, dtype, D, trainable)
        yield partial(_argmax, dtype, D)
        for select in ("first", "peak"):
            yield partial(_peaks, dtype, D, select)
        for layout in ("right", "left", "packed"):
            yield partial(_splice, dtype, D, layout)
    for d in (32, 64, 80, 96, 128):
        for queries in (16, 60, 300):  # the last takes the tiled backward
            yield partial(_attention, dtype, d, queries, 0.0)
    yield partial(_attention, dtype, 128, 60, 0.1)


# -- compiling without a device ------------------------------------------------------------------------------------


class _Driver:
    """Enough of a triton driver to compile for `target`; there is no device behind it."""

    def __init__(self, target) -> None:
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _gpu_target(name: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


@contextlib.contextmanager
def _zeroed_memory() -> Iterator[None]:
    """torch.empty gives zeros: nothing fills the outputs here, and the host checks some counts."""
    patched = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    before = [getattr(owner, name) for owner, name in patched]
    for (owner, name), function in zip(patched, before):
        setattr(owner, name, lambda *args, function=function, **kwargs: function(*args, **kwargs).zero_())
    try:
        yield
    finally:
        for (owner, name), function in zip(patched, before):
            setattr(owner, name, function)


@contextlib.contextmanager
def compiling(target: str) -> Iterator[dict]:
    """Inside, launching a kernel compiles it for `target` and does nothing else; yields {key: compiled kernel}."""
    import triton
    from triton.runtime.jit import JITFunction

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: interpreted kernels cannot be compiled, run this in another process")
    compiled: dict = {}
    run = JITFunction.run
    fresh: set[int] = set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        if id(self) not in fresh:
            self.device_caches.clear()  # keyed by device, not by target
            fresh.add(id(self))
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[(self.fn.__name__, kernel.hash)] = (self, kernel)
        return kernel

    driver = triton.runtime.driver
    before = driver._active if hasattr(driver, "_active") else None
    driver.set_active(_Driver(_gpu_target(target)))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        if before is not None:
            driver.set_active(before)


def _resources(kernel, target: str) -> tuple[int, int, str]:
    """Registers per thread, bytes spilled per thread, matrix instruction."""
    if not target.startswith("sm_"):
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:?\s+(\d+)", text).group(1)) for name in ("vgpr_count", "vgpr_spill_count")
        )
        return registers, 4 * spills, "mfma" if "v_mfma" in text else ""
    from triton.backends.nvidia.compiler import get_ptxas  # Triton brings several, each for some chips

    ptx = kernel.asm["ptx"]
    chip = re.search(r"\.target\s+(\w+)", ptx).group(1)
    assembler = get_ptxas(int(target[3:])).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={chip}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", report)))
    spills = max(map(int, re.findall(r"(\d+) bytes spill stores", report)), default=0)
    matrix = next((name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx), "")
    return registers, spills, matrix


def _variant(function, kernel, dtype: str) -> str:
    """The dtype and the block sizes that this kernel was compiled for."""
    constants = getattr(kernel.src, "constants", {})
    names = function.arg_names
    sizes = []
    for key, value in constants.items():
        name = names[key[0]] if isinstance(key, tuple) else names[key] if isinstance(key, int) else key
        if name.isupper() and not isinstance(value, bool) and isinstance(value, int) and name != "UPCAST":
            sizes.append(f"{name} {value}")
    return ", ".join([dtype, *sorted(set(sizes))])


def inspect(target: str, dtypes: tuple[str, ...] = DTYPES) -> list[Kernel]:
    """Compile what the ops launch for `target`, forward and backward, in each dtype.

    Args:
        target: one of TARGETS.
        dtypes: of DTYPES.

    Returns:
        What each kernel and variant needs there, in order.

    Raises:
        ValueError: an unknown target.
        RuntimeError: TRITON_INTERPRET=1.
    """
    from soundwave_fast.ops.backend import use_backend

    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    found: dict[tuple, Kernel] = {}
    for dtype in dtypes:
        with compiling(target) as compiled, use_backend("triton"), _zeroed_memory():
            for call in _calls(getattr(torch, dtype)):
                call()
        for (name, digest), (function, kernel) in compiled.items():
            if (name, digest) in found:
                continue
            registers, spills, matrix = _resources(kernel, target)
            data = kernel.metadata
            found[name, digest] = Kernel(
                name.strip("_").removesuffix("_kernel"),
                _variant(function, kernel, dtype),
                target,
                registers,
                spills,
                data.shared,
                data.num_warps,
                data.num_stages,
                matrix,
            )
    return sorted(found.values())


# -- the record ----------------------------------------------------------------------------------------------------


def record(kernels: list[Kernel]) -> dict:
    """What bench/results/aot.json holds: date, machine with commit and versions, and a row per compiled kernel.

    Args:
        kernels: what `inspect` found, of one or several chips.
    """
    from bench import records
    from bench.machine import describe_machine

    machine = describe_machine()
    return {
        "record": "aot",
        "date": datetime.date.today().isoformat(),
        "commit": machine["commit"],
        "dirty": records.changed(machine["commit"], (*FILES, "bench/aot.py")) != (),
        "versions": {name: machine["versions"].get(name, "?") for name in ("torch", "triton")},
        "command": "make aot",
        "files": list(FILES),
        "spill_bytes": SPILL_BYTES,
        "shared_limits": {kernel.target: kernel.limit for kernel in kernels},
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
    }


def _write(path: Path, document: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    rows = ",\n".join("  " + json.dumps(row) for row in document["kernels"])  # a line each: diffs can be read
    head = json.dumps({**document, "kernels": []}, indent=1)
    temporary.write_text(head.replace('"kernels": []', f'"kernels": [\n{rows}\n ]') + "\n")
    os.replace(temporary, path)


# -- the command ----------------------------------------------------------------------------------------------------


def _body(argv: list[str] | None) -> int:
    parser = ArgumentParser(prog="bench.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="CHIP")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what was found as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one per chip [%(default)s]")
    args = parser.parse_args(argv)
    kernels: list[Kernel] = []
    with ProcessPoolExecutor(max(args.jobs, 1), get_context("spawn")) as pool:
        jobs = {pool.submit(inspect, target, tuple(args.dtypes)): target for target in args.targets}
        for job in as_completed(jobs):
            found = job.result()
            unfit = sum(not kernel.fits for kernel in found)
            print(f"{jobs[job]}: {len(found)} kernels, {unfit} do not fit", file=sys.stderr, flush=True)
            kernels += found
    kernels.sort()
    if args.record:
        _write(args.record, record(kernels))
        print(f"wrote {args.record}")
    wrong = [kernel for kernel in kernels if not kernel.fits]
    for kernel in wrong:
        print(f"aot: {kernel} is over its budget ({SPILL_BYTES} bytes spilled, {kernel.limit} shared)", file=sys.stderr)
    return int(bool(wrong))


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s, or 1 where a kernel is over its budget."""
    return run_command("aot", _body, argv)


if __name__ == "__main__":
    sys.exit(main())
