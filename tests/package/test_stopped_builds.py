"""Builds that cannot succeed: the last line of their output names cause and remedy."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from building import SCRIPTS, run

# One worker builds the sdist and the wheel, not each of them.
pytestmark = pytest.mark.xdist_group("package")

NONE = "/nonexistent/c++"
NO_COMPILER = "fastlars cannot be compiled: CMake finds no C++ compiler that works (tried"
NO_CUDA = "fastlars cannot be compiled: FASTLARS_CUDA=1 demands CUDA kernels, but nvcc (/bin/false)"


def last_line(
    source: Path, out: Path, *options: str, python: str | Path = sys.executable, **environment: str
) -> str:
    """What `pip install` shows of the build backend's output as its last line."""
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    command = (*pip, "--no-build-isolation", "--target", out, *options, source)
    done = run(*command, cwd=out, **environment)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    shown, _ = done.stdout.split("[end of output]")
    # The files that setuptools copies would hide what CMake says.
    assert "copying fastlars" not in shown
    return shown.splitlines()[-2].strip()


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({"CXX": "c++", "PATH": "/nonexistent"}, f"{NO_COMPILER} c++): install one, on Debian an"),
        ({"CXX": "/bin/false"}, f"{NO_COMPILER} /bin/false): install one, on Debian and Ubuntu"),
        ({"FASTLARS_CUDA": "1", "CUDACXX": "/bin/false"}, f"{NO_CUDA} cannot compile a test progr"),
        ({"SKBUILD_CMAKE_VERSION": ">=99"}, "(Could not find CMake with version >=99): pip instal"),
        (
            {"CMAKE_ARGS": "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON"},
            "fastlars cannot be compiled: Python's C headers (Python.h) were not found for",
        ),
        (
            {"CMAKE_ARGS": "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON"},
            "fastlars cannot be compiled: pybind11 was not found: pip install pybind11",
        ),
    ],
)
def test_what_is_missing(
    source: Path, tmp_path: Path, environment: dict[str, str], answer: str
) -> None:
    line = last_line(source, tmp_path, **{"FASTLARS_CUDA": "0", **environment})
    assert line.startswith("error: fastlars ")
    assert answer in line


def test_editable(source: Path, tmp_path: Path) -> None:
    line = last_line(source, tmp_path, "-e", CXX=NONE)
    assert line.startswith(f"error: {NO_COMPILER} {NONE}): install one")


def compiler(folder: Path, code: str) -> str:
    """A C++ compiler that does something else first."""
    found = shutil.which("c++") or shutil.which("g++")
    assert found is not None
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n{code}\nexec {found} $more "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_old_compiler(source: Path, tmp_path: Path) -> None:
    old = "more='-U__GNUC__ -D__GNUC__=4 -U__GNUC_MINOR__ -D__GNUC_MINOR__=8'"
    line = last_line(source, tmp_path, CXX=compiler(tmp_path, old), FASTLARS_CUDA="0")
    assert f"the C++ compiler {tmp_path}/compiler (GNU 4.8.0) does not compile C++17: " in line


def test_compiler_that_stops(source: Path, tmp_path: Path) -> None:
    """Nothing that was checked before is blamed for an error in the sources."""
    stops = 'case "$*" in */_C.dir/*) echo "x.cpp:1: error: no such type"; exit 1;; esac'
    line = last_line(source, tmp_path, CXX=compiler(tmp_path, stops), FASTLARS_CUDA="0")
    assert line == (
        "error: fastlars cannot be compiled (CMake build failed): see the first error above"
    )


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_unknown_architecture(source: Path, tmp_path: Path) -> None:
    line = last_line(source, tmp_path, FASTLARS_CUDA_ARCHS="1")
    assert ") does not compile for 1: set FASTLARS_CUDA_ARCHS to architectures that nvcc" in line


def test_no_build_tools(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "empty"
    assert run(sys.executable, "-m", "venv", "--without-pip", home).returncode == 0
    line = last_line(source, tmp_path, python=home / "bin" / "python")
    assert line == (
        "error: fastlars cannot be built without its build tools (No module named "
        "'setuptools'): leave out --no-build-isolation, or pip install -U setuptools "
        "scikit-build-core pybind11"
    )


def test_old_build_tools(source: Path, tmp_path: Path) -> None:
    assert '"setuptools>=77"' in (source / "pyproject.toml").read_text()
    doctored = "import setuptools; setuptools.__version__ = '76.1.0'\n"
    (tmp_path / "sitecustomize.py").write_text(doctored)
    line = last_line(source, tmp_path, PYTHONPATH=str(tmp_path))
    assert line == (
        "error: fastlars needs setuptools 77 or newer, and 76.1.0 is installed: leave out "
        "--no-build-isolation, or pip install -U setuptools scikit-build-core pybind11"
    )


def test_sdist_needs_no_compiler(source: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path)
    done = run(*command, source, CXX=NONE, CC=NONE, PATH=SCRIPTS)
    assert done.returncode == 0, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [
        path.name for path in tmp_path.glob("fastlars-*.tar.gz")
    ]
