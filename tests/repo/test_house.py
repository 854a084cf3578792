"""The house's rules: which way imports point, that every module says what it is, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.docs_check import ROOT, files, first_line

MAX_LINES = 400
OURS = ("csrc_triton", "soundwave_fast", "train", "bench", "tests")
BARE = {"torch", "triton", "numpy"}  # all that the ops may need: the dependencies of the bare library

MODULES = [path for path in files() if path.suffix == ".py" and path.parts[0] in OURS]
SHIPPED = [path for path in MODULES if path.parts[0] != "tests"]


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, path: Path) -> Iterator[str]:
    """Absolute names of the modules a file imports, wherever in it (`from a import b` counts as a.b)."""
    package = path.parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def forbidden(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None where it may."""
    top = imported.split(".")[0]
    ops = is_in(module, "soundwave_fast.ops", "soundwave_fast.packed")
    if is_in(module, "csrc_triton") or ops:
        if top not in OURS and top not in BARE and top not in sys.stdlib_module_names:
            return f"{top} is no dependency of the bare library"
    if is_in(module, "csrc_triton") and top in OURS and top != "csrc_triton":
        return "kernels import nothing of ours"
    if ops and top in OURS and not is_in(
        imported, "csrc_triton", "soundwave_fast.ops", "soundwave_fast.packed", "soundwave_fast.__version__"
    ):
        return "ops stand on kernels alone"
    if is_in(module, "soundwave_fast") and not ops and top in ("csrc_triton", "train", "bench", "tests"):
        return "the model calls ops, and knows neither kernels nor its users"
    if is_in(module, "train") and top in ("csrc_triton", "bench", "tests"):
        return "the trainer stands on the model and the ops"
    if is_in(module, "bench") and top == "tests":
        return "benchmarks do not need the tests"
    if top == "piper" and module != "train.nano.speech" and not is_in(module, "tests"):
        return "piper is GPL: only train/nano/speech.py calls it"
    return None


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    module = module_name(path)
    names = set(imports((ROOT / path).read_text(encoding="utf-8"), path))
    assert {name: why for name in sorted(names) if (why := forbidden(module, name))} == {}


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("csrc_triton.ctc.alpha", "import triton\nfrom csrc_triton.tile import x", True),
        ("csrc_triton.ctc.alpha", "from ..tile import x", True),
        ("csrc_triton.ctc.alpha", "from soundwave_fast import ops", False),
        ("soundwave_fast.ops.ctc", "from soundwave_fast.packed import Packed\nfrom csrc_triton import ctc", True),
        ("soundwave_fast.ops.ctc", "def f():\n    import transformers", False),
        ("soundwave_fast.ops.ctc", "from ..model import x", False),
        ("soundwave_fast.ops.ctc", "from .. import model", False),
        ("soundwave_fast.model.llm", "from soundwave_fast.ops import splice", True),
        ("soundwave_fast.model.llm", "import csrc_triton.ctc", False),
        ("soundwave_fast.cli", "import train", False),
        ("train.stage1", "from soundwave_fast.model import Soundwave", True),
        ("train.nano.demo", "from piper import PiperVoice", False),
    ],
)
def test_the_rule_itself(module, source, allowed):
    path = Path(*module.split(".")).with_suffix(".py")
    assert all(forbidden(module, name) is None for name in imports(source, path)) == allowed


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_module_says_what_it_is(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert source.startswith(('"""', 'r"""')), "the docstring begins on line 1"
    assert first_line(ROOT / path), "its first line is one sentence"


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_file_reads_in_one_sitting(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_bare_import_is_clean_and_light():
    code = "import sys, soundwave_fast; print(sorted({'torch', 'triton', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
