"""Real processes with a gloo group between them, for tests: ``run(2, function, argument)``."""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import io
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from repository_files import ROOT

# A server imports torch once, and forks every process from there: it starts in a moment, and has
# nothing of this process but the arguments.
_context = get_context("forkserver")
# What DDP imports when the first one is made is half of the time.
_context.set_forkserver_preload(["torch.nn.parallel", "torch._dynamo", "torchvision"])


@dataclass(frozen=True)
class Outcome:
    """What one process returned, or the traceback of what it raised."""

    rank: int
    value: Any = None
    error: str = ""
    seconds: float = 0.0


class WorkerError(RuntimeError):
    """A process raised, died or did not end in time; the message holds its traceback."""


def run(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 300.0,
    group_timeout: float = 120.0,
) -> list[Any]:
    """What ``function(*arguments)`` returns in each of ``size`` new processes, by rank.

    Each has one thread and is in a gloo group (``torch.distributed.get_rank()`` tells them apart).
    ``function`` stands at the top of a file; arguments and return values are pickled.

    Raises:
        WorkerError: for the first process that raises or dies, at once; the others are killed.
    """
    outcomes = _start(size, function, arguments, timeout, group_timeout, stop_early=True)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        first = min(failed, key=lambda outcome: outcome.seconds)
        raise WorkerError(f"rank {first.rank} of {size}:\n{first.error}")
    return [outcome.value for outcome in outcomes]


def outcomes(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 300.0,
    group_timeout: float = 120.0,
) -> list[Outcome]:
    """As :func:`run`, but says how every process ended, for tests of failures."""
    return _start(size, function, arguments, timeout, group_timeout, stop_early=False)


def _start(
    size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    timeout: float,
    group_timeout: float,
    stop_early: bool,
) -> list[Outcome]:
    file = inspect.getsourcefile(function)
    assert file is not None
    call = (str(Path(file).resolve()), function.__module__, function.__qualname__)
    # Plain pickle: multiprocessing's would share memory that dies with its process.
    payload = pickle.dumps(arguments)
    with tempfile.TemporaryDirectory() as folder:
        processes, found = [], {}
        readers: dict[Connection, int] = {}
        try:
            for rank in range(size):
                reader, writer = _context.Pipe(duplex=False)
                where = (rank, size, folder, group_timeout)
                process = _context.Process(
                    target=_work, args=(writer, where, call, payload), daemon=True
                )
                process.start()
                writer.close()
                processes.append(process)
                readers[reader] = rank
            # The first one waits for the server, and that for torch: no time of theirs.
            begun = time.monotonic()
            while readers and not (stop_early and any(o.error for o in found.values())):
                ready = wait(list(readers), timeout=begun + timeout - time.monotonic())
                if not ready:
                    break
                for reader in ready:
                    rank = readers.pop(reader)
                    seconds = time.monotonic() - begun
                    found[rank] = _read(reader, rank, processes[rank], folder, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
    late = f"did not end within {timeout:g} s, and was killed"
    return [found.get(rank) or Outcome(rank, error=late, seconds=timeout) for rank in range(size)]


def _read(reader: Any, rank: int, process: Any, folder: str, seconds: float) -> Outcome:
    try:
        value, error = pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join()
        stack = _stack(folder, rank)
        said = stack.read_text() if stack.exists() else ""
        return Outcome(rank, None, f"died with exit code {process.exitcode}\n{said}", seconds)
    return Outcome(rank, value, error, seconds)


def _stack(folder: str, rank: int) -> Path:
    """Where a process that crashes leaves the stack of every thread."""
    return Path(folder, f"stack-{rank}")


def _work(
    writer: Any,
    where: tuple[int, int, str, float],
    call: tuple[str, str, str],
    payload: bytes,
) -> None:
    """In the new process."""
    rank, size, folder, seconds = where
    faulthandler.enable(_stack(folder, rank).open("w"))
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    value, error = None, ""
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{folder}/store", size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=seconds),
        )
        file, module, name = call
        _load(file, module)
        arguments = _Unpickler(io.BytesIO(payload)).load()
        value = _member(module, name)(*arguments)
        if dist.is_initialized():
            _part()
    except BaseException:
        error = traceback.format_exc()
    try:
        answer = pickle.dumps((value, error))
    except Exception:
        answer = pickle.dumps((None, traceback.format_exc()))
    # Once it has answered, the process may be killed at any time.
    coverage = sys.modules.get("coverage")
    if coverage is not None and (measured := coverage.Coverage.current()) is not None:
        measured.stop()
        measured.save()
    writer.send_bytes(answer)
    writer.close()
    # Threads of a broken group may never end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _part() -> None:
    """Wait for the others: one that leaves early closes its connections to them."""
    try:
        dist.barrier()
    except RuntimeError:
        return  # another one failed, and says so itself
    dist.destroy_process_group()


def _load(file: str, name: str) -> ModuleType:
    """The module of a test file, under the name that pytest gave it."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _member(module: str, name: str) -> Any:
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found


class _Unpickler(pickle.Unpickler):
    """Finds what test files define, whose modules pytest names by their place below the root."""

    def find_class(self, module: str, name: str) -> Any:
        if not module.startswith("tests."):
            return super().find_class(module, name)
        _load(str(ROOT / (module.replace(".", "/") + ".py")), module)
        return _member(module, name)
