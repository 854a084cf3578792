"""Whether Triton's interpreter can run kernels here: what the tests and rehearsals ask before they begin."""

from __future__ import annotations

import re
from importlib import metadata


def interpreter_error(versions: dict[str, str] | None = None) -> str | None:
    """Why kernels cannot be interpreted, with the remedy; None where they can, or where Triton is not installed.

    Args:
        versions: of "triton" and "numpy"; None: those installed.
    """
    try:
        versions = versions or {name: metadata.version(name) for name in ("triton", "numpy")}
    except metadata.PackageNotFoundError:
        return None
    triton, numpy = (tuple(map(int, re.findall(r"\d+", versions[name])[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):  # it converts arrays of one element to int, which NumPy 2.4 refuses
        found = f"the interpreter of Triton {versions['triton']} fails under NumPy {versions['numpy']}"
        return f"{found}: install 'numpy<2.4', or Triton 3.7"
    return None
