"""What is shipped: the sdist, how it configures, the extension's symbols, the version."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import fastlars
from building import ADDED, output, run
from fastlars import _C
from repository_files import CXX, ROOT, files

# One worker builds the sdist and the wheel, not each of them.
pytestmark = pytest.mark.xdist_group("package")


def held(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


def test_sdist_holds_every_source(sdist: Path) -> None:
    wanted = {*files("csrc", suffixes=(*CXX, ".txt", ".cmake")), *ADDED, "LICENSE", "README.md"}
    wanted |= {*files("fastlars", suffixes=(".py", ".pyi", ".typed"))}
    assert wanted <= held(sdist), sorted(wanted - held(sdist))


def test_sdist_leaves_out_nothing_that_git_tracks(sdist: Path) -> None:
    listed = run("git", "ls-files", cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("this is no checkout of git")
    tracked = [path.split("/") for path in listed.stdout.splitlines()]
    top = {path[0] for path in tracked if len(path) == 1 and (ROOT / path[0]).exists()}
    assert top <= held(sdist), sorted(top - held(sdist))
    # Other folders are missing in the copy that these tests ship: see that they are named.
    grafted = {*re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), re.M), "fastlars"}
    assert {path[0] for path in tracked if len(path) > 1} <= grafted


@pytest.mark.parametrize(
    ("setting", "nvcc", "answer"),
    [
        ("1", "/bin/false", "FASTLARS_CUDA=1 demands CUDA kernels, but nvcc (/bin/false) cannot"),
        ("", "/bin/false", "CUDA kernels: not built, because nvcc (/bin/false) cannot compile"),
        ("0", "/bin/false", "CUDA kernels: not built, because FASTLARS_CUDA=0 was set"),
        ("yes", "/bin/false", 'FASTLARS_CUDA must be 0, 1 or unset, got "yes"'),
    ],
)
def test_configuring_says_why_cuda_is_left_out(
    source: Path, tmp_path: Path, setting: str, nvcc: str, answer: str
) -> None:
    done = run(
        "cmake",
        "-G",
        "Ninja",
        "-S",
        source / "csrc",
        "-B",
        tmp_path,
        FASTLARS_CUDA=setting,
        CUDACXX=nvcc,
    )
    assert answer in re.sub(r"\s+", " ", done.stdout)


def symbols(option: str) -> list[str]:
    lines = output("nm", "-D", "-C", option, _C.__file__).splitlines()
    return [re.sub(r"^\s*[0-9a-f]*\s+\w\s+", "", line) for line in lines]


def test_extension_needs_neither_torch_nor_a_shared_cuda() -> None:
    needed = symbols("--undefined-only")
    assert any(name.startswith("PyModule") for name in needed)
    foreign = r"torch|\bc10\b|\bat::|cuda|cublas|^cu[A-Z]"
    assert not [name for name in needed if re.search(foreign, name)]


def test_extension_exports_its_init_function_alone() -> None:
    assert symbols("--defined-only") == ["PyInit__C"]


def test_notices_have_the_licence_of_pybind11() -> None:
    (path,) = [path for path in distribution("pybind11").files or [] if path.name == "LICENSE"]
    licence = " ".join(path.read_text().split())
    assert licence in " ".join((ROOT / "THIRD_PARTY_NOTICES.txt").read_text().split())


def test_build_needs_no_torch() -> None:
    (requires,) = re.findall(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    assert "scikit-build-core" in requires
    assert "torch" not in requires


def test_editable_install_is_a_path_that_mypy_follows(source: Path, tmp_path: Path) -> None:
    """setuptools writes an import hook for some layouts, which only a running Python follows."""
    copy = shutil.copytree(source, tmp_path / "copy")
    # Nothing is compiled: the extension is not what this looks at.
    text = "cmake_minimum_required(VERSION 3.22)\nproject(nothing LANGUAGES NONE)\n"
    (copy / "csrc/CMakeLists.txt").write_text(text)
    code = "from scikit_build_core.setuptools.build_meta import build_editable as f; f('..')"
    output(sys.executable, "-c", code, cwd=copy)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        (pth,) = [name for name in archive.namelist() if "dist-info/" not in name]
        assert pth.endswith(".pth")
        assert archive.read(pth).decode().strip() == str(copy)


def test_version_is_written_once() -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert fastlars.__version__ == version
    assert _C.build_info()["version"] == version
    sources = ["setup.py", *files("fastlars", "csrc", suffixes=(".py", ".pyi", ".txt", *CXX))]
    assert not [path for path in sources if version in (ROOT / path).read_text()]
