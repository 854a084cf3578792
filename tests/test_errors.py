"""The wrapper of every command line: which errors are one line, what they say, exit codes, tracebacks on demand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soundwave_fast import errors
from soundwave_fast.errors import ArgumentParser, UserError, disk_errors, run_command

ROOT = Path(__file__).resolve().parents[1]


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class SafetensorError(Exception):
    """As safetensors names it."""


def raising(error: BaseException):
    def body(argv: list[str]) -> int:
        raise error

    return body


def missing_file(argv: list[str]) -> int:
    return len(open("nowhere/to be found").read())


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", errors.DEBUG):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("--out: no\n  such   place"), "--out: no such place"),
        (UserError("x" * 900), "x" * 900),
        (ValueError("batch_size: at least 1"), "batch_size: at least 1"),
        (FileNotFoundError(2, "No such file or directory", "a.wav"), "a.wav: no such file or directory"),
        (OSError("from a hub:\nno such model"), "from a hub: no such model"),
        (ConnectionError(), "ConnectionError"),
        (OSError(28, "No space left on device"), "no space left on device"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "a: b: invalid cross-device link"),
        (MemoryError(), "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), "out of memory (CUDA out of memory. Tried 2 GiB.)"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "out of memory (DefaultCPUAllocator: can't allocate memory: 9 bytes)",
        ),
        (
            RuntimeError("[alloc_cpu.cpp:1] . DefaultCPUAllocator: not enough memory: 9 bytes"),
            "out of memory (DefaultCPUAllocator: not enough memory: 9 bytes)",
        ),
        (BrokenPipeError(32, "Broken pipe"), "broken pipe"),
        (SafetensorError("header too small"), "SafetensorError: header too small"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_line(error, line, capsys):
    assert run_command("prog", raising(error), []) == 2
    assert capsys.readouterr() == ("", f"prog: {line}\n")


def test_a_file_is_named(capsys):
    assert run_command("prog", missing_file, []) == 2
    assert capsys.readouterr().err == "prog: nowhere/to be found: no such file or directory\n"


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("x"), RuntimeError("x"), TypeError("x")])
def test_mistakes_of_ours_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_command("prog", raising(error), [])


def test_a_value_error_in_the_middle_of_a_training_is_ours():
    with pytest.raises(ValueError, match="shapes"):
        run_command("prog", raising(ValueError("shapes")), [], value_errors=False)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_code_is_the_bodys(returned, code):
    assert run_command("prog", lambda argv: returned, ["a"]) == code


def test_the_processs_own_arguments_are_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "a", "b"])
    assert run_command("prog", len) == 2


def test_ctrl_c(capsys):
    assert run_command("prog", raising(KeyboardInterrupt()), [], interrupted="the same command goes on") == 130
    assert capsys.readouterr().err == "prog: the same command goes on\n"


def test_what_torch_says_of_a_cpus_memory(capsys):
    import torch

    assert run_command("prog", lambda argv: torch.empty(10**15).numel(), []) == 2
    assert capsys.readouterr().err.startswith("prog: out of memory (DefaultCPUAllocator: ")


@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_nobody_reads_on(options):
    """`... | head -1`: no traceback, not even of the flush at python's end."""
    code = "import sys; from soundwave_fast.errors import run_command; "
    code += "sys.exit(run_command('prog', lambda argv: print('a line\\n' * 100_000), []))"
    command = [sys.executable, *options, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_another_pipe_that_broke_is_no_reader_gone():
    """A dead worker's, say: it is said, with stdout a pipe that is still read."""
    code = "import os, sys; from soundwave_fast.errors import run_command; there, here = os.pipe(); os.close(there); "
    code += "sys.exit(run_command('prog', lambda argv: os.write(here, b'x'), []))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "prog: broken pipe\n")


def nested(argv: list[str]) -> int:
    try:
        return {}["the cause"]
    except KeyError:
        raise UserError("the mistake") from None


@pytest.mark.parametrize("way", ["option", "environment"])
def test_debug_shows_the_traceback_and_what_caused_it(way, capsys, monkeypatch):
    if way == "environment":
        monkeypatch.setenv(errors.DEBUG, "1")
    assert run_command("prog", nested, ["--debug"] if way == "option" else []) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "KeyError: 'the cause'" in said and said.endswith("\nprog: the mistake\n")
    assert os.environ.get(errors.DEBUG) == ("1" if way == "environment" else None), "left as it was"


def test_debug_is_passed_on_to_the_commands_a_command_starts():
    seen = []
    assert run_command("prog", lambda argv: seen.append(os.environ.get(errors.DEBUG)), ["--debug"]) == 0
    assert seen == ["1"]


def test_without_debug_there_is_no_traceback(capsys, monkeypatch):
    monkeypatch.setenv(errors.DEBUG, "0")
    assert run_command("prog", nested, []) == 2
    assert capsys.readouterr().err == "prog: the mistake\n"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long ranks have waited before they said something: nothing really waits."""
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    return waited


def disk_full(argv: list[str]) -> None:
    with disk_errors(Path("out")):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("body", [raising(UserError("x")), raising(ValueError("x")), disk_full])
def test_what_all_ranks_may_have_met_the_first_of_a_node_says(body, capsys, monkeypatch, waits):
    for rank, local, waited, begins in (
        ("0", "0", [], "prog: "),
        ("8", "0", [], "prog, rank 8: "),
        ("1", "1", [errors.WAIT], "prog, rank 1: "),
        ("1", None, [errors.WAIT], "prog, rank 1: "),  # not torchrun's: nobody ends the others
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local is not None:
            monkeypatch.setenv("LOCAL_RANK", local)
        waits.clear()
        assert run_command("prog", body, []) == 2
        said = capsys.readouterr().err
        assert (waits, said.count("\n")) == (waited, 1) and said.startswith(begins)
        waits.clear()
        assert run_command("prog", body, ["--debug"]) == 2
        assert waits == [] and "Traceback" in capsys.readouterr().err


def test_a_rank_that_waits_can_be_ended():
    code = "import sys; from soundwave_fast import errors; print(flush=True); errors.WAIT = 60; "
    code += "sys.exit(errors.run_command('prog', lambda argv: int('x'), []))"
    there = {**os.environ, "RANK": "1", "LOCAL_RANK": "1"}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=there)
    process.stdout.readline()
    time.sleep(0.5)
    process.terminate()
    assert (process.communicate()[1], process.returncode) == (b"", -signal.SIGTERM)


def test_ctrl_c_is_said_by_one_rank(capsys, monkeypatch, waits):
    monkeypatch.setenv("RANK", "1")
    assert run_command("prog", raising(KeyboardInterrupt()), []) == 130
    assert (capsys.readouterr(), waits) == (("", ""), [])


def test_a_rank_says_at_once_what_it_alone_has_met(capsys, monkeypatch, waits):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run_command("prog", raising(MemoryError()), []) == 2
    assert run_command("prog", raising(UserError("disk full")), [], in_step=False) == 2
    assert capsys.readouterr().err == "prog, rank 3: out of memory\nprog, rank 3: disk full\n"
    assert waits == []


def test_a_typing_error_is_one_line(capsys, monkeypatch, waits):
    parser = ArgumentParser(prog="prog")
    parser.add_subparsers(required=True, dest="command").add_parser("sub").add_argument("--n", type=int)
    for arguments, begins in ((["sub", "--n", "x"], "prog sub: "), (["other"], "prog: "), ([], "prog: ")):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(arguments)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(begins) and said.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert waits == [errors.WAIT] and capsys.readouterr().err.startswith("prog, rank 1: ")


def test_debug_is_everywhere_and_no_argument_of_the_command():
    parser = ArgumentParser(prog="prog")
    sub = parser.add_subparsers(dest="command").add_parser("sub")
    sub.add_argument("files", nargs="*")
    for arguments in (["--debug", "sub", "a"], ["sub", "--debug", "a"], ["sub", "a", "--debug"]):
        assert vars(parser.parse_args(arguments)) == {"command": "sub", "files": ["a"]}


@pytest.mark.parametrize("more", [(), ("finished shards are intact",)])
def test_disk_errors_name_the_folder_and_what_is_intact(tmp_path, more):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error, disk_errors(tmp_path, *more):
        (tmp_path / "file" / "below").mkdir()
    assert str(error.value) == f"{tmp_path}: not a directory; {(*more, 'the last checkpoint is intact')[0]}"


def test_it_needs_the_standard_library_alone():
    code = "import sys; before = set(sys.modules); import soundwave_fast.errors; "
    code += "new = {name.split('.')[0] for name in set(sys.modules) - before} - {'soundwave_fast'}; "
    code += "print(sorted(new - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
