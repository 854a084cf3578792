"""Installs the newest transformers, peft and NumPy that pyproject.toml allows into this environment, over another.

`python -m tests.contract.newest VENV`, run by a new environment's own Python, puts VENV's packages behind its own and
installs the three (and what they newly need) before them. torch stays VENV's: a gigabyte is not fetched again.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("transformers", "peft", "numpy")
STAY = ("torch", "triton", "setuptools")


def requirements(pyproject: str) -> list[str]:
    """The requirements of NAMES as pyproject.toml states them: 'transformers>=5.17,<6', ..."""
    stated = re.findall(r'"([^"\n]+)"', pyproject)
    found = {name: [text for text in stated if re.match(rf"{name}(?![\w-])", text)] for name in NAMES}
    return [texts[0] for texts in found.values()]


def main(venv: str) -> int:
    behind = next(Path(venv).resolve().glob("lib/python*/site-packages"))
    own = Path(sysconfig.get_paths()["purelib"])
    (own / "behind.pth").write_text(f"import site; site.addsitedir({str(behind)!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    listed = subprocess.run([*pip, "freeze", "--all"], capture_output=True, text=True, check=True).stdout
    kept = [line for line in listed.splitlines() if line.split("==")[0] in STAY]
    constraints = own / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n")
    wanted = requirements((ROOT / "pyproject.toml").read_text())
    return subprocess.run([*pip, "install", "-q", "--upgrade", "-c", str(constraints), *wanted]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
