"""The wheel, installed into an empty environment outside the checkout and run there.

torch is not downloaded: the environment borrows the packages of this interpreter, or those in the
folder that FASTLARS_OLD_TORCH names: the oldest torch that pyproject.toml allows, numpy and pytest.
Where that variable is not set, the oldest torch is not tried.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import numpy
import pytest
import torch

from building import output, run
from repository_files import ROOT, files

# One worker builds the sdist and the wheel, not each of them.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("package")]

PYPROJECT = (ROOT / "pyproject.toml").read_text()
(VERSION,) = re.findall(r'^version = "(.*)"', PYPROJECT, re.M)
(OLDEST,) = re.findall(r'^    "torch>=(.*)"', PYPROJECT, re.M)
LICENCES = ("LICENSE", "THIRD_PARTY_NOTICES.txt")
# What any optimizer promises, and the equations: with the back ends that a user's torch is given.
CONTRACT = ("test_optimizer_contract.py", "test_checkpoints.py", "test_equations.py")
# No variable of ours, no working directory, no packages of the user's: what is installed, alone.
ALONE = ("-I", "-B")


def folders(torch_is: str) -> set[Path]:
    """Where the packages are that an environment borrows."""
    if torch_is == "present":
        return {Path(str(module.__file__)).parents[1] for module in (torch, numpy, pytest)}
    named = os.environ.get("FASTLARS_OLD_TORCH")
    if not named:
        pytest.skip(f"FASTLARS_OLD_TORCH names no site-packages with torch {OLDEST} and pytest")
    return {Path(named).resolve(strict=True)}


@pytest.fixture(scope="session", params=["present", "oldest"])
def python(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The interpreter of a new environment in which the wheel is installed."""
    borrowed = folders(request.param)
    home = tmp_path_factory.mktemp(request.param)
    output(sys.executable, "-m", "venv", "--without-pip", home)
    interpreter = home / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", interpreter, "install")
    output(*install, "--no-index", "--no-deps", "--no-cache-dir", wheel, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("".join(f"{folder}\n" for folder in sorted(borrowed)))
    found = output(interpreter, *ALONE, "-c", "import torch; print(torch.__version__)", cwd=home)
    if request.param == "oldest":
        assert re.match(rf"{re.escape(OLDEST)}\b", found), f"FASTLARS_OLD_TORCH holds torch {found}"
    return interpreter


def test_wheel_holds_the_package_and_one_extension(wheel: Path) -> None:
    held = zipfile.ZipFile(wheel).namelist()
    wanted = {*files("fastlars", suffixes=(".py", ".pyi", ".typed"))}
    assert wanted <= set(held), sorted(wanted - set(held))
    assert len([name for name in held if re.fullmatch(r"fastlars/_C\..*\.so", name)]) == 1
    licences = {f"fastlars-{VERSION}.dist-info/licenses/{name}" for name in LICENCES}
    assert licences <= set(held)
    # Libraries that a repair has added would be fastlars.libs/*.
    parts = (f"fastlars-{VERSION}.dist-info/", "fastlars/")
    assert not [name for name in held if not name.startswith(parts)]


def test_metadata_asks_for_torch_from_the_oldest_on(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read(f"fastlars-{VERSION}.dist-info/METADATA")
    metadata = message_from_bytes(text)
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0]: line for line in always}
    assert names.keys() == {"torch"}, "another Triton would overwrite the files of torch's"
    assert names["torch"] == f"torch>={OLDEST}", "a cap would refuse torches that work"
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_installed_package_is_the_wheels(python: Path) -> None:
    code = (
        "import fastlars, fastlars._C as c;"
        "print(fastlars.__file__, c.__file__, fastlars.__version__, c.build_info()['version'])"
    )
    path, extension, version, built = output(python, *ALONE, "-c", code, cwd=python.parent).split()
    home = str(python.parents[1])
    assert path.startswith(home)
    assert extension.startswith(home)
    assert version == built == VERSION


def test_report(python: Path) -> None:
    lines = output(python, *ALONE, "-m", "fastlars", cwd=python.parent).splitlines()
    assert lines[0].split() == ["fastlars", VERSION]
    assert any(re.match(r"cpu +cpu: ", line) for line in lines), lines


def test_threads_are_those_of_torch(python: Path) -> None:
    """Two copies of OpenMP would be two pools of threads, one of which torch does not govern."""
    code = (
        "import torch, fastlars; w = torch.nn.Parameter(torch.ones(1 << 20));"
        "w.grad = torch.ones_like(w); fastlars.LARS([w], lr=0.1).step();"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line})"
    )
    libraries = output(python, *ALONE, "-c", code, cwd=python.parent).split()
    copies = [path for path in libraries if re.match(r"lib[gi]?omp", Path(path).name)]
    assert len(copies) == 1, copies


def test_contract(python: Path, tmp_path: Path) -> None:
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    command = (python, *ALONE, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c")
    tests = [f"tests/optim/{name}" for name in CONTRACT]
    # Threads that spin while they wait would slow down the others.
    done = run(
        *command, "pyproject.toml", *tests, cwd=tmp_path, timeout=900, OMP_WAIT_POLICY="PASSIVE"
    )
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 300, done.stdout[-2000:]
