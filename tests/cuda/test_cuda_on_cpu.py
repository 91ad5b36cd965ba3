"""The CUDA kernels on machines without a GPU: their own source, compiled for the CPU and run there.

Threads of a block take turns in changing order, blocks run beside each other at random speeds; so
what is tested is the arithmetic, the order of sums, the protocol between blocks, and that barriers
are where they must be. How fast any of it is, only a GPU can say.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import cuda_emulation
from subprocess_tests import passing

# Far above what any of them takes: a launch that hangs is found out by the launch itself.
TIMEOUT = 1800


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where builds are kept for the next session, if anything is."""
    cache = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("emulated") if cache is None else cache.mkdir("emulated")


@pytest.mark.parametrize(
    ("path", "quick", "whole"),
    [
        ("backends/test_backends.py", 170, 1690),
        pytest.param("cuda/test_cuda_bits.py", 140, 140, marks=pytest.mark.slow),
        ("cuda/test_cuda_schedule.py", 33, 50),
        ("cuda/test_cuda_errors.py", 11, 11),
        ("cuda/test_cuda_numbers.py", 110, 110),
        ("backends/test_core.py", 4, 4),
        ("optim/test_trust.py", 26, 26),
        ("backends/test_reports.py", 8, 8),
        ("backends/test_random_streams.py", 10, 10),
        ("backends/test_selfcheck.py", 100, 100),
        ("benchmarks/test_gpu_stages.py", 6, 6),
        ("optim/test_rmsprop_warmup.py", 7, 7),
        ("optim/test_lans.py", 36, 36),
        ("optim/test_grad_norm.py", 42, 42),
        ("optim/test_step_in_backward.py", 12, 12),
    ],
)
def test_emulated(path: str, quick: int, whole: int, folder: Path, marks: str) -> None:
    # In one launch, test_backends.py sees both paths: it holds `step` against the reference, and
    # against `measure` and `apply`, which are the other path.
    environment = {
        "FASTLARS_CUDA_PATH": "one-launch",
        cuda_emulation.VARIABLE: str(cuda_emulation.extension(folder)),
    }
    passed = passing(path, "-k", "cuda", "-m", marks, timeout=TIMEOUT, **environment)
    assert passed >= (quick if marks else whole)


def test_emulated_kernels_stay_in_their_own_process() -> None:
    from fastlars import _C

    assert cuda_emulation.VARIABLE not in os.environ
    assert _C.build_info()["build_type"] != cuda_emulation.BUILD["BUILD_TYPE"].strip('"')


# What the emulation is worth: it notices what is wrong.


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("mistake", "code", "words"),
    [
        ("none", 0, "right"),
        ("an ended thread", -signal.SIGABRT, "threads wait for others of their block that never"),
        ("another barrier", -signal.SIGABRT, "threads of a block meet at different barriers"),
        ("another warp sum", -signal.SIGABRT, "threads of a warp meet at different lines"),
        ("no barrier", 1, "wrong"),
        ("no value", 1, "wrong: -?nan"),
        ("no end", -signal.SIGABRT, "blocks wait for each other, and none has advanced for long"),
        ("off its boundary", -signal.SIGABRT, "an access off its boundary"),
        ("beyond shared memory", -signal.SIGSEGV, ""),
    ],
)
def test_mistakes_of_kernels_are_noticed(mistake: str, code: int, words: str, folder: Path) -> None:
    program = cuda_emulation.program(folder, "mistakes")
    done = _run(program, mistake, FASTLARS_EMULATED_PATIENCE="1")
    assert done.returncode == code, done.stderr
    assert re.search(words, done.stdout + done.stderr)


def test_a_rule_with_three_sums_and_states_has_the_same_bits_on_both_paths(folder: Path) -> None:
    done = _run(cuda_emulation.program(folder, "three"), FASTLARS_EMULATED_SEED="0")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stdout + done.stderr


@pytest.fixture(scope="session")
def watched(folder: Path) -> list[str | Path]:
    """How a program is started that ThreadSanitizer watches."""
    try:
        program = cuda_emulation.program(folder, "mistakes", sanitize=True)
    except AssertionError as error:
        if "tsan" in str(error):
            pytest.skip("the compiler has no ThreadSanitizer")
        raise
    # Randomised addresses may lie where it wants its own memory to be.
    for start in ([], ["setarch", platform.machine(), "-R"]):
        if (not start or shutil.which(start[0])) and _run(*start, program).returncode == 0:
            return [*start]
    pytest.skip("ThreadSanitizer does not run on this machine")


@pytest.mark.parametrize("mistake", ["none", "no barrier", "no order between blocks"])
def test_races_of_kernels_are_noticed(
    mistake: str, watched: list[str | Path], folder: Path
) -> None:
    done = _run(*watched, cuda_emulation.program(folder, "mistakes", sanitize=True), mistake)
    found = "WARNING: ThreadSanitizer: data race" in done.stderr
    assert found == (mistake != "none"), done.stderr[:4000]


def test_a_wait_that_never_ends_ends_the_launch(watched: list[str | Path], folder: Path) -> None:
    program = cuda_emulation.program(folder, "races", sanitize=True)
    done = _run(*watched, program, "a lost ticket", FASTLARS_EMULATED_READS="1000")
    assert done.returncode == -signal.SIGABRT
    assert "a wait between blocks did not end" in done.stderr


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_kernels_have_no_races(seed: int, watched: list[str | Path], folder: Path) -> None:
    program = cuda_emulation.program(folder, "races", sanitize=True)
    done = _run(*watched, program, FASTLARS_EMULATED_SEED=str(seed))
    assert "ThreadSanitizer" not in done.stderr, done.stderr[:4000]
    assert done.returncode == 0
    assert "stepped" in done.stdout
