"""The benchmarks' machinery: clocks, memory, sources of a row and the cost model, on cases known beforehand."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import conformance, harness, memory, sources
from soundwave_fast import cost_model


def sleeper(seconds: float, value: float = 1.0):
    def make(case, where, seed):
        def step():
            time.sleep(seconds)
            return (torch.full((3,), value),)

        return step

    return make


def absent(case, where, seed):
    raise harness.Unavailable("not installed")


def case(name: str, **providers) -> harness.Case:
    return harness.Case("ctc_loss", name, {"B": 2}, providers, rounds=5)


def test_providers_are_timed_in_turns():
    calls = []

    def noting(name):
        def make(case, where, seed):
            def step():
                calls.append(name)
                time.sleep(0.02)  # long enough to be called once a turn
                return ()

            return step

        return make

    harness.measure(case("turns", eager=noting("a"), padded=noting("b"), ours=noting("c")))
    assert "".join(calls) == "abc" * 6, "once to begin with, then five rounds"


def test_the_fastest_eager_provider_is_known():
    names = dict.fromkeys(["eager as released", "eager, padded", "eager, padded, compiled", "ours", "ours, x", "peer"])
    assert harness.Case("x", "y", {}, names, peers=("peer",)).eager == ["eager as released", "eager, padded"]


def test_a_long_case_ends_early_but_not_before_three_rounds(monkeypatch):
    monkeypatch.setattr(harness, "LONGEST_SECONDS", 0.01)
    long = harness.Case("ctc_loss", "long", {"B": 2}, {"eager": sleeper(0.02)}, rounds=21)
    assert len(harness.measure(long).seconds["eager"]) == 3, "beside the rounds that warm up"


def test_a_case_that_fails_is_tried_once():
    made = []

    def broken(case, where, seed):
        made.append(1)
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            harness.measure(case("broken", eager=sleeper(0.0), ours=broken))
    assert len(made) == 1


def test_a_peer_that_does_not_compile_is_missing_and_ours_is_an_error():
    def uncompilable(case, where, seed):
        raise torch._dynamo.exc.InternalTorchDynamoError("cannot")

    measured = harness.measure(case("peer", eager=sleeper(0.0), compiled=uncompilable, ours=sleeper(0.0)))
    assert list(measured.missing) == ["compiled"] and "ours" in measured.seconds
    with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError):
        harness.measure(case("own", eager=sleeper(0.0), ours=uncompilable))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has them all")
def test_a_cpu_compiles_the_first_case_alone():
    providers = {"eager": sleeper(0.0), "eager, compiled": sleeper(0.0), "ours": sleeper(0.0)}
    cases = [harness.Case("toy", name, {}, providers) for name in ("first", "second")]
    pairs = [(x.values[0].variant, x.values[1]) for x in harness.rows(cases).args[1]]
    first = [("first", name) for name in providers]
    assert pairs == [*first, ("second", "eager"), ("second", "ours")]


def test_sources_follow_imports():
    files = harness.Case("peak_gather", "", {}, {}).files
    assert {"bench/bench_peak_gather.py", "csrc_triton/ragged.py", "soundwave_fast/packed.py"} <= set(files)
    assert not any("ctc_loss" in name or "harness" in name for name in files)
    fused = "soundwave_fast/ops/pure_torch/fused_attention.py"
    assert fused in harness.Case("varlen_cross_attention", "", {}, {}).files
    assert fused in sources.imported(["soundwave_fast/ops/pure_torch"]), "of a folder, what is in it"


def test_an_op_whose_tests_fail_is_not_timed(tmp_path, monkeypatch):
    kept = {}
    cache = SimpleNamespace(get=kept.get, set=kept.__setitem__)
    tests = tmp_path / "test_op.py"
    op, other = (harness.Case(name, "", {}, {}, tests=f"{tmp_path}/test_{name}.py") for name in ("op", "other"))
    head = "import pytest\n@pytest.mark.conformance\ndef test_it():\n    assert "
    tests.write_text(head + "1 == 2\n")
    Path(other.tests).write_text(head + "3 == 3\n")
    said = conformance.nonconforming([op, other, op], cache)
    assert "assert 1 == 2" in said[op.tests] and said[other.tests] == "" and len(kept) == 1
    tests.write_text(head + "2 == 2\n")
    assert conformance.nonconforming([op, other], cache) == {op.tests: "", other.tests: ""} and len(kept) == 2
    with monkeypatch.context() as patched:
        patched.setattr(conformance.subprocess, "run", lambda *_, **__: pytest.fail("a pass is remembered"))
        assert conformance.nonconforming([op], cache) == {op.tests: ""}
    for text in ("def test_it():\n    pass\n", "import nothing_of_the_kind\n"):
        tests.write_text(text)
        said = conformance.nonconforming([op, other])
        assert said[op.tests] and not said[other.tests], "nothing that says it conforms, and nothing against the other"


def test_peak_memory_in_a_process_of_its_own():
    from bench import bench_peak_gather

    where = "bench.bench_peak_gather", "peak_gather", bench_peak_gather.CASES[0].id
    mib, nothing = memory.in_processes(harness._extra_peak, [(*where, "ours"), (*where, "nobody")])
    gradient = 8 * 750 * 576 * 4 / 2**20
    assert gradient < mib < 1.5 * gradient
    assert "KeyError" in nothing


def test_a_process_that_dies_or_hangs_is_told(monkeypatch):
    monkeypatch.setattr(memory, "LONGEST", 1)
    assert memory.in_processes(time.sleep, [(9,), (0,)]) == ["no answer within 1 s", None]
    assert memory.in_processes(os._exit, [(3,)]) == ["the process died"]


def test_memory_of_a_case_is_measured_once(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "in_processes", lambda _, jobs: asked.append(jobs) or [1.0, "it broke"][: len(jobs)])
    toy = case("remembered", eager=sleeper(0.0), ours=sleeper(0.0))
    assert harness.extra_peak("bench.toy", toy, "eager") == 1.0
    with pytest.raises(RuntimeError, match="ours: it broke"):
        harness.extra_peak("bench.toy", toy, "ours")
    assert [job[-1] for job in asked[0]] == ["eager", "ours"] and len(asked) == 1


def test_providers_that_are_not_installed_are_named():
    measured = harness.measure(case("sleepers", eager=sleeper(0.03), ours=sleeper(0.01), peer=absent))
    assert measured.missing == {"peer": "not installed"}
    assert all(len(samples) == 5 for samples in measured.seconds.values())
    assert min(measured.seconds["eager"]) >= 0.03 and min(measured.seconds["ours"]) >= 0.01
    assert min(measured.seconds["eager"]) > min(measured.seconds["ours"])


def test_a_short_step_is_repeated_and_its_first_call_left_out():
    sleeps = iter([0.015] + [0.001] * 1000)
    assert 0.001 <= harness._clock_cpu(lambda: time.sleep(next(sleeps))) < 0.005
    assert next(sleeps) == 0.001 and len(list(sleeps)) < 998, "several calls in the turn"
    once = iter([0.03])
    assert harness._clock_cpu(lambda: time.sleep(next(once))) >= 0.03, "a long one is called once"


def test_results_far_from_the_baseline_are_seen():
    measured = harness.measure(case("liars", eager=sleeper(0), ours=sleeper(0, 1.5)))
    assert measured.difference == {"eager": 0.0, "ours": pytest.approx(0.5)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the resident set of a CPU process")
def test_peak_memory_of_a_known_allocation():
    def step():
        return (torch.ones(16 << 20),)  # 64 MiB

    peak = memory.extra_peak_mib(step, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    assert 60 <= peak <= 90


def test_replayed_samples_are_pytest_benchmarks_samples():
    clock = harness._Replay([0.25, 0.5])
    starts_and_ends = [clock() for _ in range(4)]
    assert starts_and_ends == [0.0, 0.25, 0.0, 0.5]


def test_floors():
    h100 = cost_model.chip("NVIDIA H100 80GB HBM3")
    assert h100 is cost_model.CHIPS["H100-SXM"]
    assert cost_model.chip("RTX-4090").name == "RTX-4090"
    with pytest.raises(ValueError, match="name"):
        cost_model.chip("Voodoo 2")
    # one GEMM of B 8 x T 750, D 4096, V 128257 is 6.3 TFLOP
    frozen = cost_model.linear_ctc_loss(6000, 4096, 128257, "bfloat16", trainable=False)
    assert frozen.flops == 2 * 2 * 6000 * 4096 * 128257
    assert cost_model.floor_seconds(frozen, h100, "bfloat16") == pytest.approx(frozen.flops / 989e12)
    trainable = cost_model.linear_ctc_loss(6000, 4096, 128257, "bfloat16", trainable=True)
    assert trainable.flops == pytest.approx(1.5 * frozen.flops) and trainable.bytes > frozen.bytes
    gather = cost_model.peak_gather(8, 750, 4096, 800, "bfloat16", backward=False)
    assert gather.flops == 0 and gather.bytes == 8 * 750 * 8 + 2 * 800 * 4096 * 2
    assert cost_model.floor_seconds(gather, h100, "bfloat16") == gather.bytes / 3.35e12
