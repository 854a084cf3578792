"""The benchmarks' machinery: clocks, memory, staleness, the report and the cost model, on cases known beforehand."""

import json
import time

import pytest
import torch

from bench import harness, report
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

    peak = harness.extra_peak_mib(step, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    assert 60 <= peak <= 90


def test_replayed_samples_are_pytest_benchmarks_samples():
    clock = harness._Replay([0.25, 0.5])
    starts_and_ends = [clock() for _ in range(4)]
    assert starts_and_ends == [0.0, 0.25, 0.0, 0.5]


def results(commit: str, files: list[str]) -> dict:
    def row(provider, seconds, ratio, mib):
        info = {
            "op": "ctc_loss",
            "variant": "fp32",
            "shape": {"B": 8, "T": 150},
            "provider": provider,
            "baseline": "eager",
            "files": files,
            "ratio": ratio,
            "ratio_low": ratio - 0.1,
            "ratio_high": ratio + 0.1,
            "extra_peak_mib": mib,
            "of_floor": 0.5,
        }
        return {"fullname": f"test[{provider}]", "extra_info": info, "stats": {"data": [seconds] * 5}}

    machine = {"commit": commit, "dirty": False, "device": "CPU X", "threads": 2, "cpu_count": 2}
    machine["versions"] = {"torch": "2.13.0"}
    return {"machine_info": machine, "benchmarks": [row("eager", 0.2, 1.0, 80.0), row("ours", 0.1, 2.0, 8.0)]}


def test_report_shows_the_ratio_first(tmp_path):
    path = tmp_path / "cpu_2026_abc.json"
    path.write_text(json.dumps(results("HEAD", ["LICENSE"])))
    text, block, kept = report.compose([path])
    assert "| ours | **2.00** (1.90 ... 2.10) | 100 / 100 / 100 | 8 | 50 % |" in text
    assert "| `ctc_loss` | fp32, B 8 T 150 | 2.00 | 8 / 80 | eager |" in block
    assert "No GPU row exists yet" in text
    assert len(kept[0][2]) == 2


def test_report_refuses_rows_of_another_state(tmp_path):
    path = tmp_path / "cpu_2026_abc.json"
    path.write_text(json.dumps(results("0" * 40, ["LICENSE"])))  # a commit nobody has
    text, _, kept = report.compose([path])
    assert kept[0][2] == [] and "Refused" in text and "**2.00**" not in text


@pytest.mark.parametrize("content", ["", "[]", '{"benchmarks": []}'])
def test_report_of_something_else(tmp_path, content, capsys):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    assert "not a results file" in capsys.readouterr().err


def test_readme_block_is_replaced():
    readme = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    assert report.with_block(readme, "new") == f"a\n{report.BEGIN}\nnew\n{report.END}\nb\n"
    assert report.with_block("no markers", "new") == "no markers"


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
