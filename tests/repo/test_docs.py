"""The documentation check holds for this repository, and finds what it is there to find."""

from __future__ import annotations

import pytest

from tests.repo import docs_check


def test_words_of_the_repository_hold():
    assert docs_check.problems() == []


@pytest.fixture
def tiny(tmp_path):
    """A repository of one module and a README whose map is not yet written."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train/stage1.py").write_text('"""Trains | the adapter.\n\nMore."""\n')
    (tmp_path / "README.md").write_text("# x\n<!-- file map -->\n<!-- /file map -->\nend\n")
    return tmp_path


def test_map_is_generated_from_docstrings_and_then_current(tiny):
    assert any("out of date" in line for line in docs_check.problems(tiny))
    docs_check.write_map(tiny)
    assert "| `train/stage1.py` | Trains \\| the adapter. |" in (tiny / "README.md").read_text()
    assert (tiny / "README.md").read_text().endswith("<!-- /file map -->\nend\n")
    assert docs_check.problems(tiny) == []


def test_readme_without_markers_is_a_problem(tiny):
    (tiny / "README.md").write_text("# x\n")
    assert any("needs one" in line for line in docs_check.problems(tiny))
    with pytest.raises(ValueError, match="needs one"):
        docs_check.write_map(tiny)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("see `train/stage1.py` and `train/`", []),
        ("see `train/stage1.py:12` or `train/stage1.py::test_x`", []),
        ("see `train/stage9.py`", ["train/stage9.py"]),
        ("read `NOTES.md`", ["NOTES.md"]),
        ("`train/<stage>.py`, `train/stage*.py`, `other/file.py`, `a / b`, `runs/x.md`", []),
        ("run\n```\npython -m train.stage9 --x\n```", ["-m train.stage9"]),
        ("run `python -m train.stage1 --x`", []),
    ],
)
def test_missing_paths(tiny, text, bad):
    assert docs_check.missing_paths(text, tiny, tiny) == bad


@pytest.mark.parametrize("word", ["/" + "home/someone/data", "file" + "://x", "http://" + "index.internal/simple"])
def test_machine_local_words_are_found(tiny, word):
    (tiny / "train/notes.txt").write_text(f"the data is in {word}\n")
    assert any("machine-local" in line for line in docs_check.problems(tiny))


def test_public_addresses_and_relative_paths_are_fine(tiny):
    text = "https://arxiv.org/abs/2502.12900 and home/page, ~/.cache, /tmp/x, /dev/null\n"
    (tiny / "train/notes.txt").write_text(text)
    assert not any("machine-local" in line for line in docs_check.problems(tiny))
