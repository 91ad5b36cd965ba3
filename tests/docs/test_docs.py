"""Documentation that is executed: every public name has some, and every example runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
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
