"""CUDA kernels compiled for the CPU, where cuda_on_cpu runs them: as an extension, as programs."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core_library import compiler
from repository_files import CXX, ROOT, files

# A process whose environment has this takes the extension from there: conftest.py.
VARIABLE = "FASTLARS_TEST_EXTENSION"
DEVICE = "tests/cuda/cuda_on_cpu"
# As CMakeLists.txt compiles the host's code, but that kernels look at floats as at integers.
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    *(f"-I{ROOT / DEVICE}", f"-I{ROOT / 'csrc'}"),
]
BUILD = {
    "VERSION": '"0"',
    "BUILD_CUDA": "1",
    "BUILD_CUDA_SERVES": '"cpu"',
    "BUILD_CUDA_REASON": '""',
    "BUILD_CUDA_VERSION": '"none"',
    "BUILD_CUDA_ARCHS": '"none"',
    "BUILD_COMPILER": '"of the tests"',
    "BUILD_OPENMP": '"of the tests"',
    "BUILD_TYPE": '"Emulated"',
}
# Fibers do what ThreadSanitizer would take for races, and tell it what to think instead.
SANITIZE = ["-fsanitize=thread", "-DON_CPU_TSAN"]
UNWATCHED = f"{DEVICE}/block.cpp"


def load() -> None:
    """Puts the extension that the environment names in the place of the installed one."""
    import torch  # noqa: F401  # its OpenMP first: the extension is to share that

    spec = importlib.util.spec_from_file_location("fastlars._C", os.environ[VARIABLE])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastlars._C"] = module


def extension(folder: Path) -> Path:
    """fastlars._C with the kernels."""
    # Only where it is built, which where there is no compiler it is not.
    import pybind11

    includes = (sysconfig.get_path("include"), pybind11.get_include())
    flags = [*(f"-I{path}" for path in includes)]
    flags += [f"-DFASTLARS_{name}={value}" for name, value in BUILD.items()]
    host = ["csrc/bindings.cpp", *files("csrc/cpu", suffixes=(".cpp",))]
    return _made(folder, "extension", [*host, *_kernels(), *_device()], flags, ["-shared"])


def program(folder: Path, name: str, *, sanitize: bool = False) -> Path:
    """A program of cuda_on_cpu that launches kernels; watched by ThreadSanitizer on demand."""
    sources = [f"{DEVICE}/{name}.cu", *_device()]
    if name == "races":
        sources += _kernels()
    if not sanitize:
        return _made(folder, name, sources, [], [])
    return _made(folder, f"{name}-sanitized", sources, SANITIZE, SANITIZE[:1])


def _kernels() -> list[str]:
    return files("csrc/cuda", suffixes=(".cu",))


def _device() -> list[str]:
    return files(DEVICE, suffixes=(".cpp",))


def _made(folder: Path, name: str, sources: list[str], flags: list[str], link: list[str]) -> Path:
    """What these sources make, from a folder of its own unless that has it already."""
    found = hashlib.sha256(f"{sys.version} {compiler()} {FLAGS} {flags} {link}".encode())
    for source in files("csrc", DEVICE, suffixes=CXX):
        found.update(source.encode() + (ROOT / source).read_bytes())
    target = folder / f"{name}-{found.hexdigest()[:16]}" / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
        if not target.exists():
            for old in folder.glob(f"{name}-????????????????"):
                shutil.rmtree(old)
            target.parent.mkdir()
            made = _objects(target.parent, sources, flags)
            part = target.with_suffix(".part")
            _run([compiler(), "-fopenmp", *link, *made, "-o", str(part)])
            part.rename(target)
    return target


def _objects(folder: Path, sources: list[str], flags: list[str]) -> list[str]:
    def compiled(source: str) -> str:
        out = str(folder / (source.replace("/", "-") + ".o"))
        chosen = [flag for flag in flags if source != UNWATCHED or flag != SANITIZE[0]]
        _run([compiler(), *FLAGS, *chosen, "-x", "c++", "-c", str(ROOT / source), "-o", out])
        return out

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stderr[:4000]
