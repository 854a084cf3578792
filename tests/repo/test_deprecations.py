"""Deprecations that our calls cause fail the test that makes them; those between dependencies do not."""

import importlib.util
import logging
import warnings

import pytest

from tests.deprecations import DeprecatedCall

DEPENDENCY = """
import functools, logging, warnings

def old(kind=DeprecationWarning):
    warnings.warn("old is deprecated", kind)

def also_old():
    warnings.warn("also_old is deprecated", FutureWarning, stacklevel=2)

def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        old()
        return function(*args)
    return wrapper

@decorated
def renamed():
    pass

def logs():
    logging.getLogger("transformers.some_model").warning("`past` is deprecated, use `cache`")
"""
USER = """
import dependency

def new():
    dependency.old()
    dependency.also_old()
    dependency.logs()
    return "done"
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A dependency that warns, and another that calls it."""
    monkeypatch.syspath_prepend(tmp_path)
    loaded = []
    for name, source in (("dependency", DEPENDENCY), ("user", USER)):
        (tmp_path / f"{name}.py").write_text(source)
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(__import__("sys").modules, name, module)
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded


@pytest.mark.parametrize("name", ["old", "also_old", "renamed", "logs"])
def test_our_call_of_something_deprecated_is_an_error(modules, name):
    logging.getLogger("transformers.some_model").setLevel(logging.WARNING)  # whatever the verbosity is by now
    with pytest.raises(DeprecatedCall, match="test_deprecations.py:.*deprecated"):
        getattr(modules[0], name)()


@pytest.mark.filterwarnings("ignore")
def test_a_dependency_that_calls_something_deprecated_is_not_ours(modules):
    assert modules[1].new() == "done"


def test_other_warnings_are_left_alone(modules):
    with pytest.warns(UserWarning, match="old is deprecated"):
        modules[0].old(UserWarning)
    with pytest.warns(DeprecationWarning, match="of a test's own"):
        warnings.warn("of a test's own", DeprecationWarning, stacklevel=1)
