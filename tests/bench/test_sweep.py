"""The sweep over sizes: points of known growth, stopped and given again, drawn and put in the report."""

import json
import sys
import time
import types

import pytest
import torch

from bench import harness, plots, records, report, sweep


def sleeper(power: float, unit: float):
    def make(case, where, seed):
        seconds = unit * case.shape["T"] ** power

        def step():
            time.sleep(seconds)
            return (torch.zeros(3),)

        return step

    return make


@pytest.fixture
def toy(monkeypatch):
    """A bench module whose eager grows with T squared, ours with T."""
    module = types.ModuleType("bench.bench_toy")
    module.BASE, module.SWEEP = {"B": 2, "T": 2}, {"T": (1, 4)}
    module.case = lambda **shape: harness.Case(
        "toy", "sleeps", shape, {"eager": sleeper(2, 0.02), "ours": sleeper(1, 0.02)}, sources=("bench/harness.py",)
    )
    module.CASES = [module.case(**module.BASE)]
    monkeypatch.setitem(sys.modules, "bench.bench_toy", module)
    monkeypatch.setattr(sweep, "modules", lambda: ["bench.bench_toy"])
    monkeypatch.setattr(harness, "_measured", {})
    return module


def test_exponent():
    assert plots.exponent([(x, 3.0 * x**1.5) for x in (1, 2, 5, 90)]) == pytest.approx(1.5)
    assert plots.exponent([(2, 1.0)]) != plots.exponent([(2, 1.0)])  # NaN


def test_a_sweep_finds_how_its_providers_grow(toy, tmp_path, monkeypatch, capsys):
    given = ["--rounds", "1", "--no-memory", "--no-conformance", "--out", str(tmp_path)]
    assert sweep.main(given) == 0
    path = tmp_path / f"{harness.device().type}.json"
    points = json.loads(path.read_text())["points"]
    assert [(p["value"], p["provider"]) for p in points] == [(T, name) for T in (1, 2, 4) for name in ("eager", "ours")]
    grows = {
        name: plots.exponent([(p["value"], p["seconds"]) for p in points if p["provider"] == name])
        for name in ("eager", "ours")
    }
    assert grows["eager"] == pytest.approx(2, abs=0.3) and grows["ours"] == pytest.approx(1, abs=0.3)
    assert (tmp_path / f"{path.stem}_toy.png").stat().st_size > 10_000

    lines = report.scaling(path, records.NOTHING_KNOWN)
    eager, ours = (line for line in lines if line.startswith("|") and ("eager" in line or "ours" in line))
    assert eager.startswith("| toy sleeps | T 1 ... 4 | eager |") and "T^2." in eager.replace("T^1.9", "T^2.")
    assert "T^1." in ours.replace("T^0.9", "T^1.") and ours.endswith("` |  |")
    assert f"![toy sleeps](results/scaling/{path.stem}_toy.png)" in lines

    changes = records.Changes("2026-01-01", "abc", False, {points[0]["commit"]: ["bench/harness.py"]})
    eager, ours = (x for x in report.scaling(path, changes) if x.startswith("|") and ("eager" in x or "ours" in x))
    assert eager.endswith("| changed |") and ours.endswith("| changed |"), "it stays, and says so"


def test_a_sweep_that_was_stopped_goes_on(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "changed", lambda commit, files: ())
    given = ["--rounds", "1", "--no-memory", "--no-conformance", "--out", str(tmp_path)]
    measure, seen = harness.measure, []

    def stops_at_4(case):
        seen.append(case.shape["T"])
        if case.shape["T"] == 4 and len(seen) == 3:
            raise KeyboardInterrupt
        return measure(case)

    monkeypatch.setattr(harness, "measure", stops_at_4)
    assert sweep.main(given) == 130
    assert sweep.main(given) == 0
    assert seen == [1, 2, 4, 4]
    path = tmp_path / f"{harness.device().type}.json"
    assert len(json.loads(path.read_text())["points"]) == 6
    assert sweep.main(given) == 0 and len(seen) == 4, "nothing left to do"
    monkeypatch.setattr(records, "changed", lambda commit, files: files)  # the op has changed
    monkeypatch.setattr(harness, "_measured", {})
    before = json.loads(path.read_text())["points"]

    def stops_at_2(case):
        seen.append(case.shape["T"])
        if case.shape["T"] == 2 and len(seen) == 6:
            raise KeyboardInterrupt
        return measure(case)

    monkeypatch.setattr(harness, "measure", stops_at_2)
    assert sweep.main(given) == 130
    points = json.loads(path.read_text())["points"]
    assert len(points) == 6, "what is to be measured again stays until it is"
    assert [p for p in points if p["value"] > 1] == [p for p in before if p["value"] > 1]
    assert sweep.main(given) == 0 and seen[4:] == [1, 2, 1, 2, 4]
    assert len(json.loads(path.read_text())["points"]) == 6


def test_points_of_another_device_are_left_alone(toy, tmp_path, monkeypatch):
    given = ["--rounds", "1", "--no-memory", "--no-conformance", "--out", str(tmp_path)]
    assert sweep.main(given) == 0
    real = sweep.describe_machine
    monkeypatch.setattr(sweep, "describe_machine", lambda: {**real(), "device": "Another CPU!", "threads": 3})
    assert sweep.main(given) == 0
    kind = harness.device().type
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{kind}.json", f"{kind}-another-cpu-3-threads.json"}


def test_a_sweep_of_wrong_results_stops(toy, tmp_path, capsys):
    case = toy.case

    def wrong(**shape):
        def make(case, where, seed):
            return lambda: (torch.ones(3),)

        made = case(**shape)
        made.providers["ours"] = make
        return made

    toy.case = wrong
    assert sweep.main(["--rounds", "1", "--no-memory", "--no-conformance", "--out", str(tmp_path)]) == 1
    assert "ours differs from the baseline" in capsys.readouterr().err
