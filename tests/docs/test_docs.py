"""Documentation that is executed: every public name has some, and every example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import pydoc
import re
from pathlib import Path

import pytest

import fastlars

MODULES = ["fastlars"] + [
    module.name
    for module in pkgutil.walk_packages(fastlars.__path__, "fastlars.")
    if not module.name.endswith((".__main__", "._C"))
]
PUBLIC = [name for name in fastlars.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(fastlars, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", [n for n in PUBLIC if callable(getattr(fastlars, n))])
def test_public_function_has_an_example(name: str) -> None:
    assert ">>>" in getattr(fastlars, name).__doc__


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


MARKUP = re.compile(r":[a-z:]+:`|\.\. [a-z]+|`_|\\[A-Za-z]")


def owned(each: object) -> bool:
    """Whether it is a class or function of fastlars."""
    each = each.fget if isinstance(each, property) else inspect.unwrap(each)  # type: ignore[arg-type]
    return (getattr(each, "__module__", None) or "").startswith("fastlars") and (
        inspect.isclass(each) or inspect.isroutine(each)
    )


def helped(module: str) -> list[object]:
    """What help() of a module, its public classes and its public functions describes."""
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None) or [n for n in vars(found) if not n.startswith("_")]
    public = [each for each in (getattr(found, name) for name in names) if owned(each)]
    members = [m for c in public if inspect.isclass(c) for _, m in inspect.getmembers(c)]
    return [found, *public, *filter(owned, members)]


@pytest.mark.parametrize("name", ["fastlars", *(f"fastlars.{n}" for n in fastlars._MODULES)])
def test_help_reads_well_in_a_terminal(name: str) -> None:
    """No roles, directives or TeX, and lines within 100 columns."""
    described = helped(name)
    assert len(described) > 1
    for each in described:
        text = pydoc.getdoc(each)
        assert not MARKUP.search(text), f"{each}: {MARKUP.search(text)}"
        assert all(len(line) <= 100 for line in text.splitlines()), each
