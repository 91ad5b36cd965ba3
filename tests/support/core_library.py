"""csrc/core as a library, for the tests that call it through ctypes."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from repository_files import ROOT

# As CMakeLists.txt compiles the kernels, and vectorised, as the kernels' loops are.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    pytest.skip("no C++ compiler: looked for $CXX, c++, g++, clang++")


@cache
def load(instruction_set: str) -> ctypes.CDLL:
    """csrc/core, compiled as the kernels are, for "baseline" or "avx2"."""
    flags = list(FLAGS)
    if instruction_set == "avx2":
        if platform.machine() not in ("x86_64", "AMD64") or not torch.cpu._is_avx2_supported():
            pytest.skip("this machine has no AVX2")
        flags.append("-mavx2")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "core.so"
        sources = [Path(__file__).with_name("core.cpp"), ROOT / "csrc/cpu/isa.cpp"]
        include = f"-I{ROOT / 'csrc'}"
        command = [compiler(), *flags, include, "-shared", "-fPIC", *map(str, sources)]
        command += ["-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded = ctypes.CDLL(str(library))
    for name in ("lars", "lamb", "share"):
        getattr(loaded, name).restype = ctypes.c_double
    return loaded


@pytest.fixture(params=["baseline", "avx2"])
def core(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """csrc/core, for each instruction set of this machine."""
    return load(request.param)
