"""What is shipped: the sdist, the wheel built from it, the extension's symbols."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastlars
from fastlars import _C
from sources import CXX, ROOT, files

# One worker builds the sdist and the wheel, not each of them.
pytestmark = pytest.mark.xdist_group("package")

# A copy of the project in which csrc/cuda holds something, whatever it holds today.
ADDED = ("csrc/cuda/added.cu", "csrc/cuda/added.cuh", "csrc/cuda/added.h")
# cmake and ninja are found beside the interpreter, also where .venv is not active.
SCRIPTS = sysconfig.get_path("scripts")


def run(
    *command: str | Path, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([SCRIPTS, os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build(kind: str, source: Path, out: Path) -> Path:
    """Builds an sdist or a wheel with what is installed here, so without the network."""
    done = run(
        sys.executable,
        "-m",
        "build",
        f"--{kind}",
        "--no-isolation",
        "--outdir",
        out,
        source,
        FASTLARS_CUDA="0",
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (built,) = out.iterdir()
    return built


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
        (copy / name).write_text("// added by tests/test_package.py\n")
    return copy


@pytest.fixture(scope="session")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked)
    (folder,) = unpacked.iterdir()
    return build("wheel", folder, tmp_path_factory.mktemp("wheel"))


def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {*files("csrc", suffixes=(*CXX, ".txt", ".cmake")), *ADDED, "LICENSE", "README.md"}
    wanted |= {*files("fastlars", suffixes=(".py", ".pyi", ".typed"))}
    assert wanted <= held, sorted(wanted - held)


def test_wheel_from_the_sdist_holds_the_package_and_one_extension(wheel: Path) -> None:
    held = zipfile.ZipFile(wheel).namelist()
    wanted = {*files("fastlars", suffixes=(".py", ".pyi", ".typed"))}
    assert wanted <= set(held), sorted(wanted - set(held))
    assert len([name for name in held if re.fullmatch(r"fastlars/_C\..*\.so", name)]) == 1
    strange = [
        n for n in held if not n.startswith((f"fastlars-{fastlars.__version__}", "fastlars/"))
    ]
    assert not strange


def test_wheel_from_the_sdist_runs(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import fastlars._C as c; print(c.__file__); print(c.build_info()['cuda_reason'])"
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stdout
    path, reason = done.stdout.splitlines()
    assert Path(path).parent == site / "fastlars"
    assert reason == "FASTLARS_CUDA=0 was set"


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
    done = run("nm", "-D", "-C", option, _C.__file__)
    assert done.returncode == 0, done.stdout
    return [re.sub(r"^\s*[0-9a-f]*\s+\w\s+", "", line) for line in done.stdout.splitlines()]


def test_extension_needs_neither_torch_nor_a_shared_cuda() -> None:
    needed = symbols("--undefined-only")
    assert any(name.startswith("PyModule") for name in needed)
    foreign = r"torch|\bc10\b|\bat::|cuda|cublas|^cu[A-Z]"
    assert not [name for name in needed if re.search(foreign, name)]


def test_extension_exports_its_init_function_alone() -> None:
    assert symbols("--defined-only") == ["PyInit__C"]


def test_build_needs_no_torch() -> None:
    (requires,) = re.findall(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    assert "scikit-build-core" in requires
    assert "torch" not in requires


def test_version_is_written_once() -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert fastlars.__version__ == version
    assert _C.build_info()["version"] == version
    sources = ["setup.py", *files("fastlars", "csrc", suffixes=(".py", ".pyi", ".txt", *CXX))]
    assert not [path for path in sources if version in (ROOT / path).read_text()]
