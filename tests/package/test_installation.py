"""What ``import fastlars`` and the commands say where something is missing: one line each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from fastlars import _C, installation
from repository_files import ROOT

BUILT = Path(_C.__file__)
REINSTALL = "reinstall it with pip install --force-reinstall --no-deps fastlars"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package as pip installs it, but for the extension."""
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(ROOT / "fastlars", tmp_path / "site" / "fastlars", ignore=skip))


def run(package: Path, *arguments: str, packages: list[str]) -> subprocess.CompletedProcess[str]:
    """A new interpreter that finds the package and some folders of packages, and no others."""
    path = os.pathsep.join([str(package.parent), *packages])
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=package.parents[1],
        env=os.environ | {"PYTHONPATH": path, "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def assert_one_line(package: Path, *parts: str, packages: list[str]) -> None:
    """The import raises one ImportError, whose text the commands print without a traceback."""
    imported = run(package, "-c", "import fastlars", packages=packages)
    assert imported.returncode == 1
    assert len(re.findall(r"^\w*Error: ", imported.stderr, re.M)) == 1, imported.stderr
    last = imported.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    for part in parts:
        assert part in last
    for command in ("fastlars", "fastlars.trainer"):
        done = run(package, "-m", command, packages=packages)
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert last.removeprefix("ImportError: ") in done.stderr


def fake_torch(folder: Path, version: str, code: str = "") -> list[str]:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"from .version import __version__\n{code}")
    (folder / "torch" / "version.py").write_text(f"__all__ = []\n__version__ = '{version}'\n")
    return [str(folder)]


def test_no_extension(package: Path) -> None:
    text = f"the compiled extension of fastlars is missing in {package}: {REINSTALL}"
    assert_one_line(package, text, packages=sys.path)


def test_sources_without_extension(package: Path) -> None:
    (package.parent / "csrc").mkdir()
    text = f"{package} holds the sources of fastlars without the compiled extension: run Python in "
    assert_one_line(package, text, f"pip install -e {package.parent}", packages=sys.path)


def test_extension_of_another_python(package: Path) -> None:
    shutil.copy(BUILT, package / "_C.cpython-38-x86_64-linux-gnu.so")
    mine = f"this one needs _C{EXTENSION_SUFFIXES[0]}"
    text = f"is for another Python (_C.cpython-38-x86_64-linux-gnu.so; {mine}): {REINSTALL}"
    assert_one_line(package, text, packages=sys.path)


@pytest.mark.parametrize("left", [0.02, 0.99])
def test_extension_that_was_cut_off(package: Path, left: float) -> None:
    """The loader does not notice: it ends the process with SIGBUS."""
    whole = BUILT.read_bytes()
    path = package / BUILT.name
    path.write_bytes(whole[: int(left * len(whole))])
    text = rf"{path} lacks its last {len(whole) - path.stat().st_size} bytes: {REINSTALL}"
    assert_one_line(package, text, packages=sys.path)


@pytest.mark.parametrize(
    ("held", "loader"), [(b"", "file too short"), (b"\0" * 9999, "invalid ELF header")]
)
def test_extension_that_does_not_load(
    package: Path, tmp_path: Path, held: bytes, loader: str
) -> None:
    """The loader alone knows what is wrong, and must not be asked before torch is imported."""
    path = package / BUILT.name
    path.write_bytes(held)
    packages = fake_torch(tmp_path, "2.10.0")
    text = f"the compiled extension of fastlars cannot be loaded ({path}: {loader}): {REINSTALL}"
    imported = run(package, "-c", "from fastlars import _C", packages=packages)
    assert imported.returncode == 1
    assert f"\nImportError: {text}" in imported.stderr
    assert imported.stderr.count("Traceback") == 1
    done = run(package, "-m", "fastlars", packages=packages)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith(f"fastlars: error: {text}")


def test_no_torch(package: Path, tmp_path: Path) -> None:
    shutil.copy(BUILT, package)
    text = "fastlars needs torch 2.10 or newer, and torch is not installed: pip install torch"
    assert_one_line(package, text, packages=[])
    (tmp_path / "rest" / "torch" / "lib").mkdir(parents=True)  # what an uninstallation may leave
    assert_one_line(package, text, packages=[str(tmp_path / "rest")])


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0"])
def test_old_torch(package: Path, tmp_path: Path, version: str) -> None:
    shutil.copy(BUILT, package)
    packages = fake_torch(tmp_path, version)
    text = f"fastlars needs torch 2.10 or newer, and {version} is installed: pip install --upgrade"
    assert_one_line(package, text, packages=packages)
    code = "import torch, fastlars"
    assert text in run(package, "-c", code, packages=packages).stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git12", "3.0.0.dev2027"])
def test_torches_that_are_new_enough(package: Path, tmp_path: Path, version: str) -> None:
    shutil.copy(BUILT, package)
    done = run(package, "-c", "import fastlars", packages=fake_torch(tmp_path, version))
    assert (done.returncode, done.stderr) == (0, "")


def test_torch_that_does_not_load(package: Path, tmp_path: Path) -> None:
    shutil.copy(BUILT, package)
    packages = fake_torch(tmp_path, "2.11.0", "raise OSError('libx.so: no\\n such file')")
    done = run(package, "-m", "fastlars", packages=packages)
    text = "torch 2.11.0 cannot be imported (libx.so: no such file): reinstall it"
    assert (done.returncode, done.stderr) == (1, f"fastlars: error: {text}\n")


def test_old_python(package: Path, tmp_path: Path) -> None:
    # What Python says of itself is doctored: an older one is not everywhere.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 9, 18)\n")
    done = subprocess.run(
        [sys.executable, "-m", "fastlars"],
        env=os.environ | {"PYTHONPATH": f"{package.parent}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "fastlars needs Python 3.10 or newer, and this is 3.9: run it with another" in line


def test_oldest_versions_are_those_of_the_metadata() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (python,) = re.findall(r'^requires-python = ">=(.*)"', text, re.M)
    (oldest,) = re.findall(r'^    "torch>=(.*)"', text, re.M)
    assert python == ".".join(map(str, installation.OLDEST_PYTHON))
    assert oldest == ".".join(map(str, installation.OLDEST_TORCH))


def test_a_torch_without_the_table_is_told_too_old() -> None:
    """A build between two releases may call itself 2.10 and not have it."""
    oldest = ".".join(map(str, installation.OLDEST_TORCH))
    with pytest.raises(RuntimeError, match=rf"^this torch is too old: .* from {oldest} on$"):
        _C.Viewer(torch.Size, [torch.Size])
