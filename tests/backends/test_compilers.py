"""The CPU kernels have the same bits whichever compiler makes them, and on 64-bit ARM; they touch
no byte that no tensor has.

A driver, core_steps.cpp, steps the tensors that the extension steps here. Python is not part of it:
no torch is needed for a compiler or a processor that is tried.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backend_cases import (
    BF16,
    DEFAULTS,
    F16,
    F32,
    PLAIN,
    ROWS,
    SOME_TYPE_MIXES,
    TYPE_MIXES,
    Row,
    Run,
    fits,
)
from fastlars import _C
from fastlars.backends.base import Dtypes
from fastlars.backends.cpu import DTYPES
from fastlars.rules import LarsRule
from problems import ORDINARY, PROBLEMS, Entry, Problem
from repository_files import ROOT
from tolerances import assert_same_bits

pytestmark = pytest.mark.slow

CMAKE = (ROOT / "csrc/CMakeLists.txt").read_text()
# Problems for all mixes of types, and those for float32 alone, with thousands of elements.
SMALL = {"huge weights", "NaN gradient", "infinite weight", "ends of float16", "zeros"}
LARGE = {"ordinary", "tiny", "around the cut"}

GUARDED = ["-O1", "-DGUARD_GAPS", "-fsanitize=address,undefined", "-fno-sanitize-recover"]


def _conversions(generator: torch.Generator) -> list[Entry]:
    """Every finite half, and floats of any bits, which are rounded where halves are stored."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    weight = torch.cat([patterns.view(BF16).float(), patterns.view(F16).float(), bits.view(F32)])
    weight = weight[weight.isfinite()]
    return [Entry(weight, (torch.zeros_like(weight),) * 3)]


def _cases(only: type | None) -> Iterator[tuple[Row, Dtypes, Problem, int]]:
    """Rows, types, problems and seeds: all types with the default rows, all rows with float32."""
    floats = Problem("conversions", _conversions, half_range=False, steps=1)
    for row in ROWS:
        if only is not None and type(row.rule) is not only:
            continue
        yield row, PLAIN, ORDINARY, 0
        if row not in DEFAULTS:
            continue
        yield row, Dtypes(BF16, F32, F32), ORDINARY, 5
        for dtypes in TYPE_MIXES:
            names = SMALL | LARGE if dtypes == PLAIN else SMALL
            problems = [p for p in PROBLEMS if p.name in names and fits(p, dtypes, row.rule)]
            if dtypes in SOME_TYPE_MIXES and not row.rule.adapt:
                problems.append(floats)
            for problem in problems:
                yield row, dtypes, problem, 0


class Recording:
    """What the extension does here, and the files with which the driver does it again."""

    def __init__(self, only: type | None) -> None:
        self.jobs: list[str] = []
        self.data = bytearray()
        self.gaps: list[int] = []
        self.expected: list[tuple[str, int, Tensor]] = []
        for row, dtypes, problem, seed in _cases(only):
            self._record(Run("cpu", row, dtypes, problem), seed)

    def _place(self, tensors: list[Tensor] | None) -> list[int]:
        places = []
        for tensor in tensors or []:
            # AddressSanitizer guards from any byte on, but only up to a multiple of 8.
            begin = len(self.data)
            self.data.extend(bytes(8 + -begin % 8))
            self.gaps += [begin, len(self.data)]
            places.append(len(self.data))
            self.data.extend(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return places

    def _record(self, run: Run, seed: int) -> None:
        t, rule = run.tensors, run.row.rule
        dtypes = (t.dtypes.weight, t.dtypes.grad, t.dtypes.state, t.dtypes.copy or F32)
        places = [self._place(column) for column in (t.weights, t.copies, t.counters)]
        states = [self._place(column) for column in t.states]
        for step in range(run.problem.steps):
            run.take_gradients(step)
            words: list[object] = [type(rule).__name__, len(rule.constants)]
            for name, value in rule.constants.items():
                words += [name, float(value)]
            now = run.row.now(step)
            words += [now.lr, now.gradient_scale, seed, *(DTYPES[dtype] for dtype in dtypes)]
            weights, copies, counters = places
            grads = self._place(t.grads)
            for column in ([w.numel() for w in t.weights], weights, grads, copies, counters):
                words += [len(column), *column]
            words.append(len(states))
            for column in states:
                words += [len(column), *column]
            self.jobs.append(" ".join(map(str, words)))
            run.step(step, seed or None)
        written = [place for column in (*places, *states) for place in column]
        for place, (name, tensor) in zip(written, run.written(), strict=True):
            self.expected.append((f"{run.row.name}; {t.dtypes}; {name}", place, tensor))

    def repeat(self, folder: Path, *command: str, **environment: str) -> str:
        """Has the driver step the same tensors, and compares. Returns its instruction set."""
        jobs, data = folder / "jobs", folder / "data"
        gaps = " ".join(map(str, [len(self.gaps), *self.gaps]))
        jobs.write_text("\n".join([gaps, *self.jobs]) + "\n")
        data.write_bytes(self.data)
        said = _output(*command, str(jobs), str(data), **environment)
        after = bytearray(data.read_bytes())
        for name, place, tensor in self.expected:
            if tensor.numel() > 0:
                there = torch.frombuffer(
                    after, dtype=tensor.dtype, count=tensor.numel(), offset=place
                )
                assert_same_bits(name, there.view(tensor.shape), tensor)
        return said.strip()


def _output(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
    return done.stdout


def _accepts(compiler: str, program: str, *options: str) -> bool:
    command = [compiler, *options, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def _build(compiler: str, folder: Path, *options: str, sources: str = "*.cpp") -> str:
    """The driver, compiled with the options of CMakeLists.txt, and OpenMP if it has that."""
    (release,) = re.findall(r'CMAKE_CXX_FLAGS_RELEASE "(.*)"', CMAKE)
    (always,) = re.findall(r"<COMPILE_LANGUAGE:CXX>:(-[^>]*)>", CMAKE)
    flags = [*release.split(), *always.split(";"), "-std=c++17", f"-I{ROOT / 'csrc'}", *options]
    if _accepts(compiler, "#include <omp.h>\nint main() {}", "-fopenmp"):
        flags.append("-fopenmp")
    kernels = map(str, {ROOT / "csrc/cpu/isa.cpp", *(ROOT / "csrc/cpu").glob(sources)})
    driver = str(folder / "core_steps")
    _output(compiler, *flags, str(ROOT / "tests/support/core_steps.cpp"), *kernels, "-o", driver)
    return driver


def _compilers() -> list[str]:
    """g++, g++-11, clang++, ... in PATH; each once, also where it has two names."""
    found: dict[Path, str] = {}
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for path in sorted(folder.glob("*++*")):
            if re.fullmatch(r"(g|clang)\+\+(-\d+)?", path.name):
                found[path.resolve()] = path.name
    return sorted(found.values())


@pytest.mark.parametrize("compiler", _compilers() or [None])
def test_compilers_agree(compiler: str | None, tmp_path: Path) -> None:
    if compiler is None:
        pytest.skip("neither g++ nor clang++ is in PATH")
    # One rule, as LAMB alone takes GCC 20 s: loads, stores and sums are the same code for all.
    options = ["-DONLY=LarsRule"]
    kind, version = _C.build_info()["compiler"].split()
    if compiler.startswith({"GNU": "g++", "Clang": "clang++"}.get(kind, "?")):
        dumped = _output(compiler, "-dumpversion").strip()
        if dumped.split(".")[0] == version.split(".")[0]:
            # The extension itself was built with this one: here it adds checks to what it compiles.
            options += GUARDED
            if not _accepts(compiler, "int main() {}", *GUARDED):
                pytest.skip(f"{compiler} comes without AddressSanitizer")
    recording = Recording(LarsRule)
    driver = _build(compiler, tmp_path, *options, sources="lars.cpp")
    native = _C.instruction_set()
    assert recording.repeat(tmp_path, driver) == native
    if native == "avx2":
        assert recording.repeat(tmp_path, driver, FASTLARS_CPU="baseline") == "baseline"


def test_arm_has_the_same_bits(tmp_path: Path) -> None:
    compiler, qemu = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if platform.machine() == "aarch64":
        pytest.skip("this is an ARM machine: all other tests run on one")
    if compiler is None or qemu is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    driver = _build(compiler, tmp_path, "-static")
    assert Recording(None).repeat(tmp_path, qemu, driver) == "neon"
