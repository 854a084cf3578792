"""The suite for a GPU: rehearsed from end to end, killed and resumed; and what its tuner lets win."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from bench import gpu_suite, harness, interpreter, profile_step, records, suite_steps, tune
from bench.suite_tunables import TUNABLES, Tunable
from csrc_triton import tuning

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")


@CPU
@pytest.mark.slow
def test_dry_run_leaves_everything(tmp_path):
    """Stage 2 is rehearsed by tests/gpu/test_rehearsal.py."""
    command = [sys.executable, "-m", "bench.gpu_suite", "--dry-run", "--stages", "1", "3", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    document = json.loads((tmp_path / "summary.json").read_text())
    assert all(step["state"] == "ok" for step in document["steps"].values())
    assert {row["op"] for row in document["rows"]} == {*suite_steps.OPS, *suite_steps.ADAPTERS, *suite_steps.MODELS}
    assert len(document["ceilings"]["rates"]) == 6 and all(rate > 0 for rate in document["ceilings"]["rates"].values())
    for step in document["train_steps"]:
        assert sum(step["shares"].values()) == pytest.approx(1.0, abs=0.1)
        assert step["losses"][-1] < step["losses"][0]
    assert len(document["train_steps"]) == 3
    assert set(document["tuned"]) == {tunable.name for tunable in TUNABLES}
    assert not any(result["out"] for result in document["tuned"].values()), "a candidate was refused"
    tuning.check(json.loads((tmp_path / "tune" / "tuned.json").read_text()))
    (results,) = tmp_path.glob("*_*_*.json")
    assert len(records.load(results)[1]) == len(document["rows"])
    assert "== tuned: " in done.stdout


def test_versions_whose_interpreter_fails_are_refused(monkeypatch, capsys, tmp_path):
    old = {"triton": "3.6.0", "numpy": "2.5.2"}
    refusal = interpreter.interpreter_error(old)
    assert "numpy<2.4" in refusal and "3.6.0" in refusal
    for versions in ({**old, "numpy": "2.3.5"}, {**old, "triton": "3.7+git1"}, {**old, "triton": "3.10.0"}):
        assert interpreter.interpreter_error(versions) is None
    monkeypatch.setattr(interpreter, "interpreter_error", lambda: refusal)
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(["--dry-run", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and refusal in capsys.readouterr().err and not (tmp_path / "out").exists()


# -- interrupted, failing and hanging steps --------------------------------------------------------------------------

DRIVER = """
import sys
from bench import gpu_suite, suite_steps
from bench.suite_steps import Step
def python(code):
    return (sys.executable, "-c", code)
def steps(out, rehearsal):
    return [
        Step(1, "quick", python(f"open(r'{out}/quick', 'a').write('x')"), 1),
        Step(1, "slow", python(f"import os, time\\nopen(r'{out}/pid', 'w').write(str(os.getpid()))\\n"
             f"while not os.path.exists(r'{out}/go'): time.sleep(0.05)"), 1),
        Step(2, "failing", python("print('why it failed'); raise SystemExit(3)"), 1),
        Step(2, "hanging", python("import time; time.sleep(60)"), 0.02),
        Step(3, "last", python(f"open(r'{out}/tries', 'a').write('x')\\n"
             f"raise SystemExit(len(open(r'{out}/tries').read()) < 2)"), 1, tries=3),
    ]
suite_steps.steps = steps
sys.exit(gpu_suite.main(sys.argv[1:]))
"""


def suite(out, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", DRIVER, "--dry-run", "--out", str(out), *arguments]
    return subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def states(out) -> dict[str, str]:
    return {name: step["state"] for name, step in json.loads((out / "suite.json").read_text()).items()}


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@CPU
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(tmp_path, how):
    first = suite(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(how)
    first.communicate(timeout=60)
    assert states(tmp_path) == {"quick": "ok", "slow": "running"}
    child = int((tmp_path / "pid").read_text())
    while alive(child):
        assert time.monotonic() < deadline, "the step outlived the suite"
        time.sleep(0.05)
    if how != signal.SIGKILL:
        return
    (tmp_path / "go").touch()
    second = suite(tmp_path)
    text = second.communicate(timeout=60)[0]
    ended = {"quick": "ok", "slow": "ok", "failing": "failed", "hanging": "timeout", "last": "ok"}
    assert (second.returncode, states(tmp_path)) == (1, ended), text
    assert (tmp_path / "quick").read_text() == "x", "what had ended ran again"
    assert (tmp_path / "tries").read_text() == "xx"
    record = json.loads((tmp_path / "summary.json").read_text())["steps"]["failing"]
    assert (record["code"], record["note"]) == (3, "why it failed")
    third = suite(tmp_path, "--stages", "1", "--again", "quick").communicate(timeout=60)[0]
    assert (tmp_path / "quick").read_text() == "xx" and "slow ..." not in third


@CPU
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main([])
    assert stopped.value.code == 2 and "torch sees no GPU" in capsys.readouterr().err


def test_wheels_reach_the_steps(tmp_path):
    name = tmp_path / "nought-1.0-py3-none-any.whl"
    with zipfile.ZipFile(name, "w") as wheel:
        wheel.writestr("nought.py", "value = 0\n")
        wheel.writestr("nought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: nought\nVersion: 1.0\n")
        wheel.writestr("nought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("nought-1.0.dist-info/RECORD", "")
    out = tmp_path / "out"
    out.mkdir()
    gpu_suite.unpack(tmp_path, out)
    command = (sys.executable, "-c", "import nought, bench; print(nought.value)")
    state = gpu_suite.run(command, out / "log", 60, gpu_suite.environment(out, True))
    assert state == ("ok", 0) and (out / "log").read_text().strip() == "0"
    with pytest.raises(ValueError, match="no wheel there"):
        gpu_suite.unpack(out, out)


def test_rehearsals_and_runs_do_not_mix(tmp_path):
    gpu_suite.claim(tmp_path, True)
    gpu_suite.claim(tmp_path, True)
    with pytest.raises(ValueError, match="holds a rehearsal"):
        gpu_suite.claim(tmp_path, False)


def test_steps_of_a_real_run(tmp_path):
    """Those of a GPU are not rehearsed one for one: their files exist, and the interpreter stays out."""
    found = suite_steps.steps(tmp_path, False)
    assert len({step.name for step in found}) == len(found)
    for step in found:
        for word in step.command[1:]:
            if word.startswith(("tests/", "bench/")):
                assert (harness.ROOT / word).exists(), word
    assert gpu_suite.environment(tmp_path, False)["TRITON_INTERPRET"] == "0"
    assert not any("--dry-run" in step.command for step in found)


def test_torn_files_do_not_stop_the_summary(tmp_path):
    (tmp_path / "ceilings.json").write_text('{"rates": ')
    (tmp_path / "tests_truth.xml").write_text("<testsuite")
    document = suite_steps.summary(tmp_path, {"ceilings": {"state": "timeout", "seconds": 3.0}})
    assert "ceilings                     timeout          3.0 s" in suite_steps.table(document)


# -- the tuner -------------------------------------------------------------------------------------------------------


def sleeper(results: dict[int, float]) -> Tunable:
    """Sleeps as many milliseconds as its size says; results[size] is what it computes (default 1)."""

    def make(fill, **shape):
        def step():
            ms = tuning.sizes("sleeper", "any", ms=80)["ms"]
            time.sleep(ms / 1e3)
            return (torch.full((3,), results.get(ms, 1.0)),)

        return step

    candidates = tuple({"ms": ms} for ms in (2, 4, 60, 160))
    return Tunable("sleeper", "a sleeper", make, {}, {}, candidates, 0.0, compiles=False)


def contest(results: dict[int, float]) -> tuple[tune.Contest, dict]:
    tunable = sleeper(results)
    made = tune.Contest(tunable, torch.device("cpu"), True, {})
    good = {tune.label(sizes): sizes for sizes in tunable.candidates if made.objection(sizes) is None}
    return made, good


def test_fastest_right_result_wins(monkeypatch):
    monkeypatch.setattr(tune, "SCREENING", 1)
    monkeypatch.setattr(tune, "FINAL", 3)
    made, good = contest({2: 1.5, 160: float("nan")})
    assert (made.key, list(good)) == ("any", ["ms 4", "ms 60"])
    result = tune.tune(made, good, rehearsal=False)
    assert result["winner"] == {"ms": 4} and result["gain"] > tune.GAIN
    assert result["default_ms"] >= 80


def test_a_gain_within_the_noise_does_not_win(monkeypatch):
    made, good = contest({2: 0.0, 4: 0.0})
    samples = {"default": [80.0], "ms 60": [78.0], "ms 160": [160.0]}
    monkeypatch.setattr(made, "times", lambda contenders, rounds: {name: samples[name] for name in contenders})
    assert tune.tune(made, good, rehearsal=False)["winner"] is None


def test_difference_sees_nan_and_shapes():
    one = (torch.ones(3),)
    assert tune.difference(one, one) == 0.0
    assert tune.difference((torch.tensor([1.0, float("nan"), 1.0]),), one) == float("inf")
    assert tune.difference((torch.ones(2),), one) == float("inf")
    assert tune.difference((torch.tensor([1.0, 1.0, 1.1]),), one) == pytest.approx(0.1)


def test_nan_does_not_pass_as_a_result():
    """max(0.0, nan) is 0.0 in Python."""
    assert harness._difference((torch.tensor([1.0, float("nan")]),), (torch.ones(2),)) == float("inf")


def test_table_keeps_what_others_wrote(tmp_path):
    path = tmp_path / "tuned.json"
    tune._enter(path, "sm_90", "a", "x", {"n": 1})
    tune._enter(path, "sm_90", "a", "y", {"n": 2})
    tune._enter(path, "gfx942", "b", "x", {"n": 3})
    tune._enter(path, "sm_90", "a", "x", None)
    assert json.loads(path.read_text()) == {"sm_90": {"a": {"y": {"n": 2}}}, "gfx942": {"b": {"x": {"n": 3}}}}
    tune._enter(path, "sm_90", "a", "y", None)
    assert json.loads(path.read_text()) == {"gfx942": {"b": {"x": {"n": 3}}}}


@CPU
def test_a_candidate_that_killed_the_process_is_not_tried_again(tmp_path):
    log = {"place": {"chip": "sm_90", "device": "interpreter"}}
    log["trying"] = {"name": "rows of splice", "sizes": "N 1 D 2048 warps 4", "out": {}}
    (tmp_path / "tune.json").write_text(json.dumps(log))
    command = [sys.executable, "-m", "bench.tune", "--dry-run", "--no-prune", "--only", "rows of splice"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "tune.json").read_text())["results"]["rows of splice"]
    assert result["out"] == {"N 1 D 2048 warps 4": "ended the process that tried it"} and result["winner"] is None


@pytest.mark.parametrize(("room", "batch"), [(1000, 256), (32, 32), (9, 8), (3, 2), (1, 1)])
def test_largest_batch(room, batch):
    training = profile_step.Training.__new__(profile_step.Training)
    training.fits = lambda B: room >= B
    assert training.largest_batch(8) == batch


def test_timeline_adds_up():
    timeline = profile_step.Timeline(torch.device("cpu"))
    for part in ("start", "a", "b", "a"):
        timeline.tick(part)
        time.sleep(0.01)
    parts = timeline.seconds()
    assert set(parts) == {"a", "b"} and parts["a"] > parts["b"] >= 0.01 and timeline.moments == []


def test_environment_is_not_shared_with_ours(tmp_path):
    before = dict(os.environ)
    gpu_suite.environment(tmp_path, True)
    assert dict(os.environ) == before
