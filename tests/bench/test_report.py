"""RESULTS.md and the README's block: ratios first, rows of another state refused, nothing typed by hand."""

import json
import subprocess

import pytest

from bench import compare, report


def results(commit: str, files: list[str], day: int = 1) -> dict:
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
            "eager": "padded",
            "eager_ratio": ratio / 1.25,
            "eager_low": ratio / 1.25 - 0.1,
            "eager_high": ratio / 1.25 + 0.1,
            "extra_peak_mib": mib,
            "of_floor": 0.5,
        }
        return {"fullname": f"test[{provider}]", "extra_info": info, "stats": {"data": [seconds] * 5}}

    machine = {"commit": commit, "dirty": False, "device": "CPU X", "threads": 2, "cpu_count": 2}
    machine |= {"versions": {"torch": "2.13.0"}, "command": ["pytest", "bench/", "-k", "ctc"]}
    rows = [row("eager", 0.2, 1.0, 80.0), row("padded", 0.16, 1.25, 80.0), row("ours", 0.1, 2.0, 8.0)]
    return {"machine_info": machine, "benchmarks": rows, "datetime": f"2026-01-0{day}"}


def test_report_shows_the_ratio_first(tmp_path):
    path = tmp_path / "cpu_2026_abc.json"
    path.write_text(json.dumps(results("HEAD", ["LICENSE"])))
    text, block, kept = report.compose([path])
    assert "| ours | **1.60 (1.50 ... 1.70)** | 2.00 (1.90 ... 2.10) | 100 / 100 / 100 | 8 | 50 % |" in text
    assert "| padded | fastest eager | 1.25 (1.15 ... 1.35) |" in text and "| eager | **0.80" in text
    assert "| `ctc_loss` | fp32, B 8 T 150 | **1.60** (padded) | 2.00 (eager) | 8 / 80 |" in block
    assert "No GPU row exists yet" in text and "`pytest bench/ -k ctc --benchmark-json=cpu_2026_abc.json`" in text
    assert len(kept[0][2]) == 3


def test_report_refuses_rows_of_another_state(tmp_path):
    path = tmp_path / "cpu_2026_abc.json"
    path.write_text(json.dumps(results("0" * 40, ["LICENSE"])))  # a commit nobody has
    text, _, kept = report.compose([path])
    assert kept[0][2] == [] and "Refused" in text and "(1.90 ... 2.10)" not in text


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


def test_a_row_is_stale_when_its_files_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    for name in ("op.py", "other.py"):
        (tmp_path / name).write_text("1\n")
    git("add", "-A")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "other.py").write_text("2\n")
    report.stale.cache_clear()
    assert not report.stale(commit, ("op.py",)) and report.stale(commit, ("op.py", "other.py"))
    git("commit", "-qam", "two")
    report.stale.cache_clear()
    assert not report.stale(commit, ("op.py",)) and report.stale(commit, ("other.py",))
    report.stale.cache_clear()


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


def test_rates_of_generation_are_told():
    generated = rows(eager=1.0, ours=2.0)
    generated[1] |= {"tokens_per_second": 40.04, "first_token_seconds": 0.25, "real_time_factor": 0.0625}
    (line,) = report._notes(generated)
    assert line == "- right, B 8: ours 40.0 new tokens/s, the first after 250 ms, real-time factor 0.062."


def test_the_newest_file_of_a_device_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name, day in (("cpu_2026-01-01_bbb", 1), ("cpu_2026-01-01_aaa", 2), ("h100_2026-01-01_ccc", 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results("HEAD", ["LICENSE"], day)))
    assert [path.stem for path in report.newest()] == ["h100_2026-01-01_ccc", "cpu_2026-01-01_aaa"]


def test_what_is_committed_is_what_would_be_generated(capsys):
    for path in report.newest():
        commit = report.load(path)[0]["commit"]
        if subprocess.run(["git", "cat-file", "-e", commit], cwd=report.ROOT, capture_output=True).returncode:
            pytest.skip(f"a shallow checkout: commit {commit[:7]} is not in it")
    assert report.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_two_commits_are_compared(capsys):
    given = ["HEAD", "-k", "recursions and 150", "--repeats", "1"]
    assert compare.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["old", "ms"]
    old, new, ratio = map(float, lines[1].split()[:3])
    assert old > 0 and new > 0 and ratio == pytest.approx(old / new, rel=0.05) and "recursions" in lines[1]
    assert compare.main(["no-such-commit"]) == 2
