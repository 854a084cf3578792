"""Options, gate and output of `pytest bench/ --benchmark-only`."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from bench.conformance import nonconforming
from bench.harness import Case
from bench.machine import describe_machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soundwave_fast")
    group.addoption("--no-memory", action="store_true", help="do not measure peak memory (a fresh process a row)")
    group.addoption("--smoke", action="store_true", help="two rounds of the first case of each file, nothing else")
    group.addoption("--no-conformance", action="store_true", help="time ops without running their tests first")


_NONCONFORMING = pytest.StashKey[dict[str, str]]()


@pytest.fixture(autouse=True)
def conformance(request: pytest.FixtureRequest) -> None:
    """An op whose tests fail is not timed. A pass is remembered until the op, its tests or torch change."""
    case, config = _case(request.node), request.config
    if case is None or config.getoption("--no-conformance") or config.getoption("--smoke"):
        return
    if _NONCONFORMING not in config.stash:
        cases = [case for item in request.session.items if (case := _case(item)) is not None]
        config.stash[_NONCONFORMING] = nonconforming(cases, config.cache)
    if said := config.stash[_NONCONFORMING][case.conformance]:
        pytest.fail(said, pytrace=False)


def _case(item: pytest.Item) -> Case | None:
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for private in ("node", "cpu"):  # a host's name and its full cpuid table are nobody's business
        machine_info.pop(private, None)
    machine_info.update(describe_machine())
    given = [str(x) for x in config.invocation_params.args]
    machine_info["command"] = ["pytest", *(x for x in given if not x.startswith("--benchmark-json"))]


def pytest_terminal_summary(terminalreporter) -> None:
    """The ratios, which are what counts, under pytest-benchmark's absolute times."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", ()) if "ratio" in bench.extra_info]
    if rows:
        terminalreporter.section("times faster than the baseline: median (lowest ... highest of the rounds)")
    for bench in rows:
        info = bench.extra_info
        ratio = f"{info['ratio']:6.2f} ({info['ratio_low']:.2f} ... {info['ratio_high']:.2f})"
        case = f"{info['op']}, {info['variant']}, " + " ".join(f"{k} {v}" for k, v in info["shape"].items())
        terminalreporter.write_line(f"{ratio}  {info['provider']:<28} {case}")
