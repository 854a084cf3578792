"""Which files of the project a benchmark's row depends on: what its op, its model and its own file import."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("soundwave_fast", "csrc_triton", "bench")
# What changes no provider.
MACHINERY = ("bench/harness.py", "bench/memory.py", "bench/sources.py", "soundwave_fast/cost_model.py")


def imported(names: Iterable[str]) -> set[str]:
    """Files of this project that these files import, and so on; of a folder, what the modules in it import.

    Packages count by the modules named, not by their __init__: `from soundwave_fast.ops import x` is no dependency on
    all ops. Names are relative to the checkout.
    """
    found: set[str] = set()
    roots = [ROOT / name for name in names]
    todo = [file for root in roots for file in (root.rglob("*.py") if root.is_dir() else [root])]
    while todo:
        for name in _imports(todo.pop()):
            if name not in found and name not in MACHINERY and (ROOT / name).exists():
                found.add(name)
                todo.append(ROOT / name)
    return found


@functools.cache
def _imports(path: Path) -> frozenset[str]:
    """Modules of this project that one file imports, as file names; some may not exist."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())) if path.suffix == ".py" else ():
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(f"{name.replace('.', '/')}.py" for name in modules if name.split(".")[0] in PACKAGES)
