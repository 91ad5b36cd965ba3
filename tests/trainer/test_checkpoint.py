"""Checkpoints: whole or not at all, whatever ends the writing."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlars.trainer import checkpoint
from fastlars.trainer.errors import TrainerError
from trainer.helpers import Outcome, assert_same, files_below, load

Train = Callable[..., Outcome]


def state(value: float, size: int = 1000) -> dict[str, object]:
    return {"step": int(value), "weights": torch.full((size,), value)}


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for value in (1.0, 2.0):
        checkpoint.save(path, state(value))
        loaded = checkpoint.load(path)
        loaded.pop("format")
        assert_same(loaded, state(value))
    assert files_below(tmp_path) == ["checkpoint.pt"]


KILLED_WHILE_SAVING = """
import os, signal, sys, time
from pathlib import Path
import torch
from fastlars.trainer import checkpoint

path = Path(sys.argv[1])
torch.set_num_threads(1)
for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1):
    child = os.fork()
    if child == 0:
        step = checkpoint.load(path)["step"]
        while True:
            step += 1
            checkpoint.save(path, {"step": step, "weights": torch.full((500_000,), float(step))})
    time.sleep(0.05 + delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = checkpoint.load(path)
    assert state["weights"].eq(state["step"]).all()
    left = path.with_name(".checkpoint.pt.partial")
    print(state["step"], left.exists())
"""


def test_kill_while_saving(tmp_path: Path) -> None:
    """SIGKILL at seven moments of writing without a pause: there is always a whole checkpoint."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state(0.0, 500_000))
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    kills = [line.split() for line in done.stdout.splitlines()]
    assert len(kills) == 7
    assert int(kills[-1][0]) > 0  # it did save
    assert any(left == "True" for _, left in kills)  # and was killed in the middle of it
    checkpoint.save(path, state(1.0))
    assert files_below(tmp_path) == ["checkpoint.pt"]  # leftovers go with the next one


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system refuses as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 2000, 300_000])
def test_full_disk(tmp_path: Path, size: int) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state(1.0))
    with disk_full_after(size), pytest.raises(checkpoint.NotSavedError, match=str(path)):
        checkpoint.save(path, state(2.0, 100_000))
    assert files_below(tmp_path) == ["checkpoint.pt"]
    assert checkpoint.load(path)["step"] == 1


@pytest.mark.usefixtures("tiny", "no_picture")
def test_full_disk_during_a_run(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning while there are further chances, an error at the end; the old one stays."""
    settings = ("--epochs", 3, "--batch-size", 512, "--output", tmp_path)
    assert train(*settings, "--max-steps", 1).status == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = train("--output", tmp_path, "--resume", "--max-steps", 0)
    assert outcome.status == 2
    *warnings, last = outcome.err.splitlines()
    assert len(warnings) == 3  # after each epoch
    assert all("No space left on device; training goes on" in line for line in warnings)
    assert all(str(tmp_path) in line for line in (*warnings, last))
    assert "No space left on device; the previous checkpoint is untouched" in last
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert train("--output", tmp_path, "--resume", "--max-steps", 0).status == 0
    assert load(tmp_path)["progress"]["evaluated"] == 3


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04 half an archive", None],
    ids=["empty", "text", "cut", "other"],
)
def test_damaged(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(TrainerError, match="is damaged or not a checkpoint of this trainer"):
        checkpoint.load(path)


def test_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state(1.0))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(TrainerError, match="is damaged"):
        checkpoint.load(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"cannot read .*absent\.pt: No such file"):
        checkpoint.load(tmp_path / "absent.pt")


def test_random_state(tmp_path: Path) -> None:
    """All generators go on where they were, also through a file."""

    def draw() -> tuple[float, float, float, float]:
        normal = random.gauss(0, 1)  # has a second number in store
        return torch.rand(()).item(), float(np.random.normal()), random.random(), normal

    draw()
    checkpoint.save(tmp_path / "state.pt", {"random": checkpoint.random_state()})
    expected = [draw() for _ in range(3)]
    checkpoint.restore_random_state(checkpoint.load(tmp_path / "state.pt")["random"])
    assert [draw() for _ in range(3)] == expected
