"""RESULTS.md and the README's block: ratios first, every figure dated, none dropped, nothing typed by hand."""

import json
import subprocess

import pytest

from bench import compare, kernel_tables, records, report
from bench.records import Changes

NOTHING = records.NOTHING_KNOWN


def results(commit: str, files: list[str], day: int = 1, ours: float = 0.1, ops: tuple = ("ctc_loss",)) -> dict:
    def row(op, provider, seconds, ratio, mib):
        info = {
            "op": op,
            "variant": "fp32",
            "shape": {"B": 8, "T": 150},
            "provider": provider,
            "baseline": "eager",
            "files": files,
            "ratio": ratio,
            "ratio_low": ratio - 0.1,
            "ratio_high": ratio + 0.1,
            "eager": "padded",
            "eager_ratio": ratio / 1.25,
            "eager_low": ratio / 1.25 - 0.1,
            "eager_high": ratio / 1.25 + 0.1,
            "extra_peak_mib": mib,
            "of_floor": 0.5,
        }
        stats = {"data": [seconds] * 5}
        return {"fullname": f"bench/bench_{op}.py::test[{provider}]", "extra_info": info, "stats": stats}

    machine = {"commit": commit, "dirty": False, "device": "CPU X", "threads": 2, "cpu_count": 2}
    machine |= {"versions": {"torch": "2.13.0"}, "command": ["pytest", "bench/", "-k", "ctc"]}
    rows = [
        row(op, *figures)
        for op in ops
        for figures in (
            ("eager", 0.2, 1.0, 80.0),
            ("padded", 0.16, 1.25, 80.0),
            ("ours", ours, 0.2 / ours, 8.0),
        )
    ]
    return {"machine_info": machine, "benchmarks": rows, "datetime": f"2026-01-0{day}T10:00:00"}


def written(folder, name: str, *given, **more):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results(*given, **more)))
    return path


def test_report_shows_the_ratio_first(tmp_path):
    path = written(tmp_path, "cpu_2026_abc", "abcdef0123", ["LICENSE"])
    text, block, devices = report.compose([path], NOTHING)
    ours = "| ours | **1.60 (1.50 ... 1.70)** | 2.00 (1.90 ... 2.10) | 100 / 100 / 100 | 8 | 50 % "
    assert ours + "| 2026-01-01, `abcdef0` | [1](#runs) |  |" in text
    assert "| padded | fastest eager | 1.25 (1.15 ... 1.35) |" in text and "| eager | **0.80" in text
    assert (
        "| `ctc_loss` | fp32, B 8 T 150 | **1.60** (padded) | 2.00 (eager) | 8 / 80 | 2026-01-01, `abcdef0` |" in block
    )
    assert "No GPU row exists yet" in text and len(devices["cpu"]) == 3


def test_every_row_leads_to_its_machine_and_command(tmp_path):
    text, _, _ = report.compose([written(tmp_path, "cpu_2026_abc", "abcdef0123", ["LICENSE"])], NOTHING)
    command = "`pytest bench/ -k ctc --benchmark-json=cpu_2026_abc.json`"
    assert f"| 1 | 2026-01-01 | `abcdef0123` | CPU X, 2 threads of 2 | torch 2.13.0 | {command} |" in text
    assert "### ctc_loss\n\nMeasured again by `pytest bench/bench_ctc_loss.py --benchmark-only`." in text


def test_a_row_whose_op_changed_stays_and_says_so(tmp_path):
    path = written(tmp_path, "cpu_2026_abc", "abcdef0123", ["op.py", "kernels", "csrc_triton"])
    before = report.compose([path], NOTHING)
    for name in ("op.py", "kernels/a.py"):
        changes = Changes("2026-02-01", "fedcba9876", False, {"abcdef0123": [name]})
        text, block, devices = report.compose([path], changes)
        assert text.count("| [1](#runs) | changed |") == 3 and devices == before[2]
        assert "`abcdef0`; op changed since |" in block and "Compared with 2026-02-01, `fedcba9`." in text
    kernels = ["csrc_triton/splice/forward.py"]  # which a CPU does not run
    for other in ["other.py", "kernels2/a.py"], kernels:
        text = report.compose([path], Changes("2026-02-01", "f", False, {"abcdef0123": other}))[0]
        assert text.count("| [1](#runs) |  |") == 3
    for unknown in {"another": ["op.py"]}, {"abcdef0123": None}:
        text = report.compose([path], Changes("2026-02-01", "f", True, unknown))[0]
        assert text.count("| [1](#runs) | unknown |") == 3 and "`f` with uncommitted changes." in text
    path = written(tmp_path, "h100_2026_abc", "abcdef0123", ["csrc_triton"])
    text = report.compose([path], Changes("2026-02-01", "f", False, {"abcdef0123": kernels}))[0]
    assert text.count("| [1](#runs) | changed |") == 3


def test_the_later_run_of_a_day_counts(tmp_path):
    early = written(tmp_path, "cpu_2026-01-01_fff", "f" * 40, ["x"])
    late = written(tmp_path, "cpu_2026-01-01_000", "0" * 40, ["x"])
    late.write_text(late.read_text().replace("T10:00:00", "T17:00:00"))
    assert {row["commit"][0] for row in records.newest_of_each_case([early, late])["cpu"]} == {"0"}


def test_a_run_of_one_op_leaves_the_others_standing(tmp_path):
    old = written(tmp_path, "cpu_2026-01-01_aaa", "a" * 40, ["x"], ops=("splice", "ctc_loss"))
    new = written(tmp_path, "cpu_2026-01-02_bbb", "b" * 40, ["x"], day=2, ours=0.05, ops=("ctc_loss",))
    gpu = written(tmp_path, "h100_2026-01-01_ccc", "c" * 40, ["x"])
    devices = records.newest_of_each_case([new, gpu, old])
    assert list(devices) == ["h100", "cpu"]
    assert {(row["op"], row["commit"][0]) for row in devices["cpu"]} == {("splice", "a"), ("ctc_loss", "b")}
    text, block, _ = report.compose([old, new, gpu], NOTHING)
    assert "No GPU row" not in text and "`ccccccc`" in block, "the README's block is the GPU's"
    assert text.count("-k ctc --benchmark-json=") == 3


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


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of two files, which bench looks into; call it with git's arguments."""

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "kernels").mkdir()
    for name in ("op.py", "kernels/a.py"):
        (tmp_path / name).write_text('"""What it is."""\n\n\ndef f(x):\n    return x + 1\n')
    git("add", "-A")
    git("commit", "-qm", "one")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    records.changed.cache_clear()
    yield git
    records.changed.cache_clear()


def test_code_that_changed_is_found_in_the_working_tree_and_in_commits(checkout, tmp_path):
    commit = checkout("rev-parse", "HEAD")
    (tmp_path / "kernels" / "a.py").write_text('"""What it is."""\n\n\ndef f(x):\n    return x + 2\n')
    assert records.changed(commit, ("op.py",)) == ()
    assert records.changed(commit, ("op.py", "kernels")) == ("kernels/a.py",)
    checkout("commit", "-qam", "two")
    (tmp_path / "op.py").unlink()
    found = records.look_at_changes([(commit, ["op.py"]), (commit, ["kernels"])])
    assert found.files == {commit: ["kernels/a.py", "op.py"]} and found.commit == checkout("rev-parse", "HEAD")
    assert found.dirty
    records.changed.cache_clear()
    (tmp_path / "kernels" / "new.py").write_text("x = 1\n")
    found = records.look_at_changes([(commit, ["kernels"]), ("0" * 40, ["op.py"])])
    assert found.files == {commit: ["kernels/a.py", "kernels/new.py"], "0" * 40: None}, "a commit nobody has"


def test_comments_docstrings_and_layout_are_no_change(checkout, tmp_path):
    commit = checkout("rev-parse", "HEAD")
    (tmp_path / "op.py").write_text(
        '"""Otherwise said."""\n\n\ndef f(x):\n    """Adds."""\n    return (x + 1)  # why\n'
    )
    assert records.changed(commit, ("op.py",)) == ()


def rows(**ratios: float) -> list[dict]:
    case = {"op": "splice", "variant": "right", "shape": {"B": 8}}
    eager = max((name for name in ratios if not name.startswith("ours")), key=ratios.get)
    found = []
    for name, ratio in ratios.items():
        against = ratio / ratios[eager]
        spread = {"eager_ratio": against, "eager_low": 0.9 * against, "eager_high": 1.1 * against}
        found.append({**case, **spread, "eager": eager, "provider": name, "ratio": ratio})
    return found


def test_what_is_level_is_said():
    said = "eager takes 0.98 of our time, which is level: ours is 0.88 to 1.08 times as fast, from round to round"
    assert report._notes(rows(eager=1.0, ours=0.98)) == [f"- right, B 8: {said}."]


def test_what_is_slower_is_said():
    assert report._notes(rows(eager=1.0, ours=2.0)) == []
    assert report._notes(rows(eager=1.0, ours=0.5)) == ["- right, B 8: eager takes 0.50 of our time."]
    assert report._notes(rows(eager=1.0, merge=1.5, ours=1.2, **{"ours, length known": 2.0})) == [
        "- right, B 8: merge takes 0.80 of our time."
    ]
    noted = rows(eager=1.0, ours=2.0)
    noted[1]["note"] = "why"
    assert report._notes(noted) == ["- right, B 8: why."]


def test_rates_of_generation_are_reported():
    generated = rows(eager=1.0, ours=2.0)
    generated[1] |= {"tokens_per_second": 40.04, "first_token_seconds": 0.25, "real_time_factor": 0.0625}
    (line,) = report._notes(generated)
    assert line == "- right, B 8: ours 40.0 new tokens/s, the first after 250 ms, real-time factor 0.062."


def test_what_is_committed_is_what_the_committed_json_gives(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_the_check_looks_at_no_code(monkeypatch, capsys):
    """Whatever has changed since, the committed pages stay what the committed JSON gives."""

    def never(*_):
        raise AssertionError("code was looked at")

    for name in ("_git", "changed", "look_at_changes"):
        monkeypatch.setattr(records, name, never)
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def kernel(name="k", target="sm_90", registers=64, spilled=0, shared=1024, matrix=""):
    sizes = {"registers": registers, "spill_bytes": spilled, "shared_bytes": shared, "warps": 4, "stages": 2}
    return {"name": name, "variant": "float32", "target": target, **sizes, "matrix": matrix}


def test_compiled_kernels_are_shown_with_their_limits():
    document = {"date": "2026-01-01", "commit": "abcdef0123", "dirty": False, "versions": {"triton": "3.7"}}
    document |= {"command": "make aot", "files": ["csrc_triton"], "spill_bytes": 64}
    document["shared_limits"] = {"sm_86": 101376, "sm_90": 232448}
    document["kernels"] = [kernel(matrix="wgmma"), kernel(target="sm_86", shared=101377), kernel("l", spilled=65)]
    text = kernel_tables.table(document)
    assert "| k | float32 | 4 | 2 | **64 / 0 / 99** | 64 / 0 / 1 wgmma |" in text
    assert "| l | float32 | 4 | 2 | n/a | **64 / 65 / 1** |" in text
    assert "| sm_90 | 2 | 64 | 65 (64) | 1 (227) | wgmma |" in report.compiled(document, NOTHING)
    said = "\n".join(
        report.compiled(document, Changes("2026", "f", False, {"abcdef0123": ["csrc_triton/splice/forward.py"]}))
    )
    assert "kernels have changed since" in said and "2026-01-01, `abcdef0`" in said


@pytest.mark.slow
def test_two_commits_are_compared(capsys):
    given = ["HEAD", "-k", "recursions and 150", "--repeats", "1"]
    assert compare.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["old", "ms"]
    old, new, ratio = map(float, lines[1].split()[:3])
    assert old > 0 and new > 0 and ratio == pytest.approx(old / new, rel=0.05) and "recursions" in lines[1]
    assert compare.main(["no-such-commit"]) == 2
