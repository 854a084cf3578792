"""Checks the repository's words: paths named in *.md exist, README's file map is current, nothing is machine-local.

`python -m tests.repo.docs_check` prints one line per problem and exits 1 if there are any; `--write` first rewrites
README.md's file map, between `<!-- file map -->` and `<!-- /file map -->`, from the module docstrings' first lines.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from soundwave_fast.errors import ArgumentParser, UserError, run_command

ROOT = Path(__file__).resolve().parents[2]
HOUSES = ("csrc_triton", "soundwave_fast", "train", "bench", "tests", "docs", ".ci")
OPENING, CLOSING = "<!-- file map -->", "<!-- /file map -->"

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_CODE = re.compile(r"`([^`\n]+)`")
_MODULE = re.compile(r"-m\s+((?:train|bench|tests|soundwave_fast|csrc_triton)[\w.]*)")
# Hosts and folders that mean something on one machine only. (`/tmp` and `~` mean the same everywhere.)
_LOCAL = re.compile(
    r"(?<![\w./~-])/(?:work|workspace|home|root|Users|mnt|opt)/[\w.-]+"
    r"|file:/{2}|https?://(?:localhost|127\.|10\.|192\.168\.|[\w.-]+\.(?:internal|local|corp|lan)\b)"
)


def files(root: Path = ROOT) -> list[Path]:
    """The repository's files that git knows or would add, relative to `root`, sorted; those deleted are left out."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
        found = {Path(name) for name in listed if name}
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive without git
        hidden = {".git", ".venv", "__pycache__", "build", "dist", "runs"}
        found = {p.relative_to(root) for p in root.rglob("*") if not hidden & set(p.relative_to(root).parts)}
    return sorted(path for path in found if (root / path).is_file())


def _is_placeholder(token: str) -> bool:
    return any(mark in token for mark in "<>{}$*?…") or "..." in token or token.startswith(("/", "~", "-", "http"))


def missing_paths(text: str, folder: Path, root: Path = ROOT) -> list[str]:
    """Code spans of a markdown `text` (a file in `folder`) that name a file of the repository which is not there.

    A span is taken for a path if it starts with one of HOUSES and a slash, or is a bare *.md; `-m package.module` is
    checked everywhere, in fenced blocks too. Placeholders (<name>, *.py, ...) are left alone.
    """
    bad = []
    prose = _FENCE.sub("", text)
    for span in _CODE.findall(prose):
        token = re.sub(r"(::[\w\[\]-]+)+$|:\d+(-\d+)?$", "", span.strip())
        if " " in token or _is_placeholder(token):
            continue
        is_path = "/" in token and token.split("/")[0] in HOUSES
        if (is_path or re.fullmatch(r"[\w-]+\.md", token)) and not any((b / token).exists() for b in (root, folder)):
            bad.append(token)
    for module in _MODULE.findall(text):
        path = root / module.rstrip(".").replace(".", "/")
        if not (path.is_dir() or path.with_suffix(".py").is_file()):
            bad.append(f"-m {module}")
    return bad


def first_line(path: Path) -> str:
    """The first line of a module's docstring, '' without one; SyntaxError if it does not parse."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0].strip()


def file_map(root: Path = ROOT) -> str:
    """The generated section: a table per top-level folder with every module that has a docstring."""
    rows: dict[str, list[str]] = {}
    for path in files(root):
        if path.suffix == ".py" and path.parts[0] in HOUSES and (says := first_line(root / path)):
            name = f"{path.parent.as_posix()}/" if path.name == "__init__.py" else path.as_posix()
            rows.setdefault(path.parts[0], []).append(f"| `{name}` | {says.replace('|', chr(92) + '|')} |")
    order = sorted(rows, key=HOUSES.index)
    return "\n\n".join("\n".join([f"| {top} | |", "|---|---|", *rows[top]]) for top in order)


def _split(readme: str) -> tuple[str, str, str] | None:
    """(before, the map, after) of README's text, None where it lacks the two markers in order."""
    if readme.count(OPENING) != 1 or readme.count(CLOSING) != 1 or readme.index(OPENING) > readme.index(CLOSING):
        return None
    before, rest = readme.split(OPENING)
    old, after = rest.split(CLOSING)
    return before + OPENING, old, CLOSING + after


def write_map(root: Path = ROOT) -> None:
    """Rewrite the file map in README.md; ValueError where README.md lacks the markers."""
    readme = root / "README.md"
    parts = _split(readme.read_text(encoding="utf-8")) if readme.is_file() else None
    if parts is None:
        raise ValueError(f"README.md: needs one {OPENING} and one {CLOSING} after it")
    tmp = readme.with_suffix(".md.tmp")
    tmp.write_text(f"{parts[0]}\n{file_map(root)}\n{parts[2]}", encoding="utf-8")
    os.replace(tmp, readme)


def problems(root: Path = ROOT) -> list[str]:
    """Everything that is wrong, one line each."""
    found = []
    for path in files(root):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture, a recording
            continue
        found += [f"{path}: machine-local: {match[0]}" for match in _LOCAL.finditer(text)]
        if path.suffix == ".md":
            found += [f"{path}: no such file: {token}" for token in missing_paths(text, (root / path).parent, root)]
    readme = root / "README.md"
    parts = _split(readme.read_text(encoding="utf-8")) if readme.is_file() else None
    if parts is None:
        found.append(f"README.md: needs one {OPENING} and one {CLOSING} after it")
    elif parts[1].strip() != file_map(root):
        found.append("README.md: the file map is out of date: run python -m tests.repo.docs_check --write")
    return found


def _run(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m tests.repo.docs_check", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite README's file map first")
    try:
        if parser.parse_args(argv).write:
            write_map()
        found = problems()
    except SyntaxError as error:
        raise UserError(f"{error.filename}: {error}") from None
    print("\n".join(found) if found else "docs_check: all words hold")
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 if all is well, 1 with problems, 2 if --write cannot work."""
    return run_command("docs_check", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
