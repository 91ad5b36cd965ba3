"""requirements.lock pins everything that pyproject.toml asks for, and README names its date."""

from __future__ import annotations

import re
import sys

import pytest
from packaging.requirements import Requirement

from repository_files import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads no TOML by itself")

LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WANTED = [
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *(text for extra in PROJECT["project"]["optional-dependencies"].values() for text in extra),
]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Package: its version, for the Python that runs the test."""
    lines = re.findall(r"^([\w.-]+==[^\\]*)\\$", LOCK, re.MULTILINE)
    found = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate()]
    assert len({pin.name for pin in found}) == len(found), "a package is pinned twice"
    return {plain(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


@pytest.mark.parametrize("text", [text for text in WANTED if not text.startswith("fastlars[")])
def test_what_the_project_asks_for_is_locked(text: str) -> None:
    wanted = Requirement(text)
    version = pins().get(plain(wanted.name))
    assert version is not None, f"{wanted.name} is not in requirements.lock: run make lock"
    assert wanted.specifier.contains(version), f"{text} against {version}: run make lock"


def test_every_package_has_a_hash() -> None:
    assert len(pins()) > 100
    assert not re.findall(r"^[\w.-]+==.*[^\\\n]$", LOCK, re.MULTILINE)


def test_readme_says_how_old_the_set_is() -> None:
    (made,) = re.findall(r"^# Made by make lock on (\d{4}-\d\d-\d\d):", LOCK)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert re.findall(r"`requirements.lock`, tested together, of (\S+)\.", readme) == [made]
