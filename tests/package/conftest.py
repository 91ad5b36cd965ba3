"""What is shipped, built once for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from building import ADDED, build
from repository_files import ROOT


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without anything built."""
    copy = tmp_path_factory.mktemp("source") / "fastlars"
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "fastlars"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, copy / path.name)
    for name in ADDED:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("// added by tests/package\n")
    return copy


@pytest.fixture(scope="session")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that FASTLARS_WHEEL names, for one about to be published; else one built here."""
    if named := os.environ.get("FASTLARS_WHEEL"):
        return Path(named).resolve(strict=True)
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(request.getfixturevalue("sdist")) as archive:
        archive.extractall(unpacked)
    (folder,) = unpacked.iterdir()
    return build("wheel", folder, tmp_path_factory.mktemp("wheel"))
