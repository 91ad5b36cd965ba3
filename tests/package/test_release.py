"""What a release is made with: one list of Pythons, one version, actions that cannot be moved."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from package.building import run
from sources import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOW = (ROOT / ".github/workflows/release.yml").read_text()
(VERSION,) = re.findall(r'^version = "(.*)"', PYPROJECT, re.M)


def one(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text, re.M)
    return str(found)


def test_the_pythons_are_the_same_everywhere() -> None:
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert one(r'^requires-python = ">=(.*)"', PYPROJECT) == supported[0]
    short = ["cp" + python.replace(".", "") for python in supported]
    assert re.findall(r'"(cp\d+)-\*"', one(r"^build = \[(.*)\]", PYPROJECT)) == short
    wheels, tries = re.findall(r"^ +python: \[(.*)\]", WORKFLOW, re.M)
    assert wheels.split(", ") == short
    assert re.findall(r'"(.*?)"', tries) == supported


def test_the_oldest_torch_is_tried() -> None:
    oldest = one(r'^    "torch>=(.*)"', PYPROJECT)
    assert f'torch: ["=={oldest}.*", ">={oldest}"]' in WORKFLOW


def test_wheels_have_cuda_of_the_release_that_is_installed() -> None:
    release = one(r"install-nvcc (\S+)\"", PYPROJECT)
    assert one(r'^CUDACXX = "(.*)"', PYPROJECT) == f"/usr/local/cuda-{release}/bin/nvcc"
    assert one(r'^FASTLARS_CUDA = "(.*)"', PYPROJECT) == "1", "a wheel without kernels is no error"


def test_every_repair_leaves_libgomp_to_torch() -> None:
    repairs = re.findall(r"auditwheel repair (.*)", PYPROJECT + (ROOT / "Makefile").read_text())
    assert len(repairs) == 2
    assert all("--exclude libgomp.so.1" in repair for repair in repairs)


def test_actions_are_named_by_commit() -> None:
    used = re.findall(r"uses: (\S+)(.*)", WORKFLOW)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v[\d.]+", comment), f"{action}: which release is that?"


def test_documents_speak_of_this_version() -> None:
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"State of (\d+\.\d+\.\d+)", readme)) <= {VERSION}


@pytest.mark.parametrize(
    ("tag", "section", "answer"),
    [
        (f"v{VERSION}", f"## {VERSION} (2026-11-21)", ""),
        (VERSION, f"## {VERSION} (2026-11-21)", f"the tag {VERSION} does not name the version"),
        (
            "v99.0.0",
            "## 99.0.0 (2026-11-21)",
            f"does not name the version of pyproject.toml, {VERSION}",
        ),
        (
            f"v{VERSION}",
            "## Unreleased",
            f"CHANGELOG.md has no section '## {VERSION} (YYYY-MM-DD)'",
        ),
    ],
)
def test_a_tag_that_is_not_the_version_stops_the_release(
    tmp_path: Path, tag: str, section: str, answer: str
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/version.py", tmp_path / ".ci")
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{section}\n")
    done = run(sys.executable, tmp_path / ".ci/version.py", tag)
    assert (done.returncode == 0) == (not answer)
    assert answer in done.stdout
