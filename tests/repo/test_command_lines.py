"""Every command line: a typing error and a mistake of the user's are one line and exit code 2, and --help is 0."""

from __future__ import annotations

import ast
import runpy
import signal
import sys
from pathlib import Path

import pytest

from soundwave_fast import errors
from tests.repo.docs_check import ROOT, files


def is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def run_as_main() -> list[Path]:
    """Files that do something when they are run. Scripts that tests start for themselves are no command lines."""
    found = []
    for path in files():
        if path.suffix == ".py" and (path.parts[0] != "tests" or path.name == "docs_check.py"):
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            found += [path] if any(map(is_guard, tree.body)) else []
    return found


SCRIPTS = run_as_main()
COMMANDS = [path for path in SCRIPTS if path.parts[0] != "examples"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a file as `python FILE ARGUMENTS` would, in this process; exit code, lines of stdout and of stderr."""
    terminated = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("RANK", errors.DEBUG):
        monkeypatch.delenv(name, raising=False)

    def run(path: Path, *arguments: str) -> tuple[object, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        said = capsys.readouterr()
        return stop.value.code, said.out.splitlines(), said.err.splitlines()

    yield run
    signal.signal(signal.SIGTERM, terminated)


@pytest.mark.parametrize("path", COMMANDS, ids=str)
def test_it_goes_through_the_wrapper(path, command, monkeypatch):
    code, out, err = command(path, "--no-such-option")
    assert (code, out, len(err)) == (2, [], 1), err
    code, out, err = command(path, "--help")
    assert (code, err) == (0, []) and any("--debug" in line for line in out)

    def plant(*_, **__):
        raise errors.UserError("a planted\nmistake")

    monkeypatch.setattr(errors.ArgumentParser, "parse_known_args", plant)
    code, out, err = command(path)
    assert (code, out, len(err)) == (2, [], 1) and err[0].endswith(": a planted mistake")


def test_the_list_is_whole():
    """What pyproject.toml installs and README names is among them."""
    names = {path.as_posix() for path in COMMANDS}
    assert {"soundwave_fast/cli.py", "train/stage1.py", "train/nano/demo.py", "bench/gpu_suite.py"} <= names
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]\n")[2].split("\n\n")[0]
    assert lines.strip() == 'soundwave = "soundwave_fast.cli:main"'


@pytest.mark.parametrize("path", sorted(set(SCRIPTS) - set(COMMANDS)), ids=str)
def test_examples_take_no_arguments(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert "argparse" not in source and "argv" not in source, "an example with options is a command line"


def test_nobody_parses_arguments_by_a_parser_of_another_kind():
    bare = []
    for path in files():
        if path.suffix == ".py":
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
            bare += [str(path)] if "argparse.ArgumentParser" in calls else []
    assert bare == [], "soundwave_fast.errors.ArgumentParser says a typing error in one line"
