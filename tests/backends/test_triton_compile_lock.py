"""Processes that compile at once: one compiles, the others find the kernel in Triton's cache."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from repository_files import ROOT, python_path

pytest.importorskip("triton")

from fastlars.backends.triton import compile_lock
from fastlars.backends.triton.compile_lock import FOLDER, alone

KERNELS = ("LAMB prepare before measure", "total")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Triton's, and a process that has not given up."""
    monkeypatch.setattr(compile_lock, "_gave_up", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that compiles KERNELS; kills what is left of them."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    started = []

    def one(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "tests/backends/compiles_alone.py", how, str(tmp_path), *KERNELS]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
        )
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.communicate()


def _wait_for(what: Callable[[], bool], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def _compiled(process: subprocess.Popen[str]) -> int:
    """How many kernels a process has compiled."""
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return int(printed.split()[0])


def _go(folder: Path, count: int) -> None:
    _wait_for(lambda: len(list(folder.glob("ready-*"))) == count)
    Path(folder, "go").touch()


def _lock(cache: Path) -> Path:
    """The one file of a lock."""
    (path,) = Path(cache, FOLDER).iterdir()
    return path


@contextmanager
def _held(cache: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """The lock, taken by a process that does not let it go."""
    with alone("kernel"):
        pass
    with _lock(cache).open("w") as file:
        fcntl.flock(file, how)
        yield


def test_processes_compile_each_kernel_once(
    tmp_path: Path, cache: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    processes = [start("alone") for _ in range(3)]
    _go(tmp_path, 3)
    assert sum(map(_compiled, processes)) == len(KERNELS)
    assert not [path for path in cache.rglob("*") if "tmp" in path.name]
    locks = list(Path(cache, FOLDER).iterdir())
    assert [path.stat().st_size for path in locks] == [0] * len(KERNELS)


def test_a_killed_process_blocks_nobody(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    first = start("1000")
    _go(tmp_path, 1)
    _wait_for(Path(tmp_path, "held").exists)
    second = start("alone")
    _wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    time.sleep(0.3)
    assert not Path(tmp_path, "entered-alone").exists()  # it does wait
    first.send_signal(signal.SIGKILL)
    assert _compiled(second) == len(KERNELS) - 1  # the first one has left its first kernel


def test_whoever_waits_too_long_goes_on_and_does_not_wait_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    with _held(cache):
        begin = time.monotonic()
        with alone("kernel", 0.2):
            entered.append(time.monotonic() - begin)
        monkeypatch.setattr(compile_lock, "_try", lambda *given: pytest.fail("it waits again"))
        with alone("kernel"):
            entered.append(0.0)
    assert entered[0] >= 0.2
    assert len(entered) == 2


def test_processes_load_what_is_compiled_at_the_same_time(cache: Path) -> None:
    with _held(cache, fcntl.LOCK_SH), alone("kernel", 30.0):
        assert not compile_lock._gave_up


def test_other_kernels_do_not_wait(cache: Path) -> None:
    with _held(cache), alone("another", 0.0):
        assert not compile_lock._gave_up


def test_the_lock_is_let_go_after_an_error(cache: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone("kernel"):
        1 / 0  # noqa: B018
    with _lock(cache).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_forked_child_does_not_keep_it(cache: Path) -> None:
    with alone("kernel"):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
    with _lock(cache).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(writer)
    os.waitpid(child, 0)


def test_waiting_holds_up_neither_other_threads_nor_ctrl_c(cache: Path) -> None:
    turns, entered = [], threading.Event()

    def interrupt() -> None:
        for _ in range(5):
            turns.append(time.sleep(0.01))
        if not entered.is_set():  # else the signal would end all tests
            signal.raise_signal(signal.SIGINT)

    with _held(cache):
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt), alone("kernel", 1000.0):
            entered.set()
        thread.join()
    assert len(turns) == 5
    assert not compile_lock._gave_up


@pytest.mark.parametrize("fails", ["makedirs", "open", "flock"])
def test_without_a_place_for_the_lock_it_goes_on(
    fails: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refuse(*arguments: object, **named: object) -> None:
        calls.append(arguments)
        code = {"makedirs": errno.EROFS, "open": errno.EACCES, "flock": errno.ENOLCK}[fails]
        raise OSError(code, os.strerror(code))

    module = compile_lock.fcntl if fails == "flock" else compile_lock.os
    opened = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(module, fails, refuse)
        with alone("kernel"):
            assert calls
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(tmp_path, "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with alone("kernel"):
        pass
