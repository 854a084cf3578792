"""What this machine reaches at best: copy bandwidth, and bf16 products at the CTC head's shapes, aligned and odd.

`python -m bench.ceilings [--out FILE] [--dry-run]` prints the environment and the figures, and writes both as JSON.
Every floor is judged by these and not by the data sheet alone. An odd vocabulary gives logits whose rows begin at odd
addresses, which rules out the fastest kernels: that ratio is what an op with chunks of its own can win.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

import torch

from bench import harness
from bench.machine import describe_machine
from soundwave_fast.errors import ArgumentParser, run_command

N, D, V, ALIGNED, CUBE = 6000, 4096, 128257, 128320, 8192
GIB = 4 << 30


def _median(step, where: torch.device, rounds: int) -> float:
    flush = torch.empty(harness.FLUSH_BYTES, dtype=torch.int8, device=where) if where.type == "cuda" else None
    clock = (lambda: harness._clock_cuda(step, flush)) if flush is not None else (lambda: harness._clock_cpu(step))
    samples = [clock() for _ in range(3 + rounds)][3:]
    return statistics.median(samples)


def copy_bandwidth(where: torch.device, size: int, rounds: int) -> float:
    """Bytes read and written a second by a copy within the device's memory."""
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=where)
    target = torch.empty_like(source)
    return 2 * size / _median(lambda: target.copy_(source), where, rounds)


def product_rate(where: torch.device, rows: int, inner: int, columns: int, rounds: int, transposed: bool) -> float:
    """FLOP/s of (rows, inner) x (inner, columns) in bf16 on random numbers; transposed: the right side is (columns,
    inner) in memory, as a linear layer's weight.
    """
    a = torch.randn(rows, inner, device=where, dtype=torch.bfloat16)
    b = torch.randn(*((columns, inner) if transposed else (inner, columns)), device=where, dtype=torch.bfloat16)
    b = b.t() if transposed else b
    return 2.0 * rows * inner * columns / _median(lambda: a @ b, where, rounds)


def measure(where: torch.device, tiny: bool) -> dict[str, float]:
    """All ceilings, in bytes or FLOP a second."""
    n, d, odd, aligned, cube, size = (N, D, V, ALIGNED, CUBE, GIB) if not tiny else (32, 64, 513, 576, 128, 1 << 20)
    rounds = 3 if tiny else 15
    return {
        "copy": copy_bandwidth(where, size, rounds),
        f"bf16 {cube} cubed": product_rate(where, cube, cube, cube, rounds, True),
        f"bf16 logits {n} x {d} x {aligned}": product_rate(where, n, d, aligned, rounds, True),
        f"bf16 logits {n} x {d} x {odd}": product_rate(where, n, d, odd, rounds, True),
        f"bf16 logits' gradient {n} x {aligned} x {d}": product_rate(where, n, aligned, d, rounds, False),
        f"bf16 logits' gradient {n} x {odd} x {d}": product_rate(where, n, odd, d, rounds, False),
    }


def _run(argv: list[str]) -> None:
    parser = ArgumentParser(prog="bench.ceilings", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes")
    args = parser.parse_args(argv)
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name}: {value}")
    rates = measure(harness.device(), args.dry_run)
    for name, rate in rates.items():
        print(f"{name:45} {rate / 1e12:10.3f} {'TB/s' if name == 'copy' else 'TFLOP/s'}")
    if args.out:
        temporary = args.out.with_name(f"{args.out.name}.tmp")
        temporary.write_text(json.dumps({"machine": machine, "rates": rates}, indent=1) + "\n")
        os.replace(temporary, args.out)


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("ceilings", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
