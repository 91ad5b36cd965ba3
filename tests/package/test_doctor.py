""".ci/doctor.py, which `make setup` runs first: one line for each thing that a machine lacks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from repository_files import ROOT

DOCTOR = ROOT / ".ci" / "doctor.py"


def line(tmp_path: Path, change: str = "", **environment: str) -> str:
    """What it says where `change` was made to Python; the only variables are those given."""
    code = f"import sys, sysconfig\n{change}\nexec(open({str(DOCTOR)!r}).read())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode == 0) == (not done.stderr)
    assert not done.stdout
    return done.stderr


def compiler(folder: Path, status: int) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def headers(tmp_path: Path) -> str:
    """Makes Python believe that it has its C headers."""
    (tmp_path / "Python.h").touch()
    return f"sysconfig.get_path = lambda name: {str(tmp_path)!r}"


def test_a_machine_that_has_everything(tmp_path: Path, headers: str) -> None:
    assert line(tmp_path, headers, CXX=compiler(tmp_path, 0)) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sys.version_info = (3, 9, 7)", "Python 3.10 or newer is needed, {python} is 3.9; "
         "choose another with make PYTHON=/path/to/python3"),
        ("sys.modules['ensurepip'] = None", "{python} cannot make virtual environments (import of "
         "ensurepip halted; None in sys.modules); on Debian and Ubuntu: apt install python3-venv"),
        ("sysconfig.get_path = lambda name: '/nowhere'", "{python} has no C headers (Python.h); "
         "on Debian and Ubuntu: apt install python3-dev"),
    ],
    ids=["old Python", "no venv", "no headers"],
)  # fmt: skip
def test_a_python_that_lacks_something(
    tmp_path: Path, headers: str, change: str, message: str
) -> None:
    said = line(tmp_path, f"{headers}\n{change}", CXX=compiler(tmp_path, 0))
    assert said == f"fastlars: {message.format(python=sys.executable)}\n"


def test_a_compiler_that_is_missing_or_old(tmp_path: Path, headers: str) -> None:
    assert line(tmp_path, headers, PATH=str(tmp_path)) == (
        "fastlars: no C++ compiler was found (looked for c++, g++, clang++); "
        "on Debian and Ubuntu: apt install g++\n"
    )
    assert "no C++ compiler was found (looked for absent)" in line(tmp_path, headers, CXX="absent")
    old = compiler(tmp_path, 1)
    assert line(tmp_path, headers, CXX=f"{old} -O2") == (
        f"fastlars: the C++ compiler {old} does not compile C++17; "
        "choose another with CXX=/path/to/c++\n"
    )


def test_old_pythons_can_read_it() -> None:
    """Up to the line that refuses them; Python 2 has neither f-strings nor annotations."""
    nodes = list(ast.walk(ast.parse(DOCTOR.read_text(), feature_version=(3, 4))))
    assert not [node for node in nodes if isinstance(node, (ast.JoinedStr, ast.AnnAssign))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    arguments = [node.annotation for node in nodes if isinstance(node, ast.arg)]
    assert not any([*arguments, *(function.returns for function in functions)])
    assert DOCTOR.read_text().isascii()


def test_make_runs_it_before_anything_else() -> None:
    rules = (ROOT / "Makefile").read_text().split("$(TESTED)/.packages:")[1].split("\n\n")[0]
    assert rules.index(".ci/doctor.py") < rules.index("-m venv")
