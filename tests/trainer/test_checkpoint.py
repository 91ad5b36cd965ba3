"""Checkpoints: whole or not at all, whatever ends the writing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import checkpoint
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.retention import Retention
from fastlars.trainer.run import loop
from trainer.helpers import Outcome, assert_same, disk_full_after, files_below, load

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
from fastlars.trainer.output import checkpoint
from fastlars.trainer.output.retention import Retention
from fastlars.trainer.output.directory import RunDirectory

if sys.argv[2] == "copies":
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")
    os.link = link
run = RunDirectory(Path(sys.argv[1]))
torch.set_num_threads(1)
for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1):
    saved, saves = os.pipe()
    child = os.fork()
    if child == 0:
        step, kept = checkpoint.load(run.checkpoint)["step"], Retention(run, 2)
        kept.add_names(step, best=step % 3 == 0)  # as a resumed run does
        while True:
            step += 1
            state = {"step": step, "weights": torch.full((300_000,), float(step))}
            kept.save(state, step, best=step % 3 == 0)
            os.write(saves, b".")
    os.close(saves)
    os.read(saved, 1)  # on a busy machine, the first save may be long in coming
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(saved)
    latest = checkpoint.load(run.checkpoint)["step"]
    numbered = sorted(run.path.glob("checkpoint-*.pt"))
    for path in (run.checkpoint, run.best, *numbered):
        state = checkpoint.load(path)
        assert state["weights"].eq(state["step"]).all()
        assert path not in numbered or path.name == f"checkpoint-{state['step']:06}.pt"
    best = checkpoint.load(run.best)["step"]
    assert best % 3 == 0 and latest - 3 <= best <= latest, (best, latest)
    assert 2 <= len(numbered) <= 3 and int(numbered[-1].stem[-6:]) in (latest - 1, latest)
    left = any(path.name.endswith(".partial") for path in run.path.iterdir())
    print(latest, left)
"""


@pytest.mark.parametrize("how", ["links", "copies"])
def test_kill_while_saving(tmp_path: Path, how: str) -> None:
    """SIGKILL at seven moments of saving without a pause: each name is a whole checkpoint's."""
    run = RunDirectory(tmp_path)
    for step in range(4):
        Retention(run, 2).save(state(step, 300_000), step, best=step % 3 == 0)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    kills = [line.split() for line in done.stdout.splitlines()]
    assert len(kills) == 7
    assert int(kills[-1][0]) > 3  # it did save
    assert any(left == "True" for _, left in kills)  # and was killed in the middle of it
    last = int(kills[-1][0]) + 3
    Retention(run, 2).save(state(last), last, best=True)
    names = sorted(name for name in files_below(tmp_path) if name.startswith("checkpoint-"))
    assert names[-1] == f"checkpoint-{last:06}.pt"
    assert files_below(tmp_path) == ["best.pt", *names, "checkpoint.pt"]  # no leftovers


@pytest.mark.parametrize("size", [0, 100, 2000, 300_000])
def test_full_disk(tmp_path: Path, size: int) -> None:
    """Nothing is lost: the latest ones and the best one are as they were."""
    run = RunDirectory(tmp_path)
    kept = Retention(run, 2)
    for step in (1, 2, 3):
        kept.save(state(step), step, best=step == 2)
    message = f"cannot write {run.checkpoint}: File too large"
    with disk_full_after(size), pytest.raises(checkpoint.NotSavedError, match=message):
        kept.save(state(4, 100_000), 4, best=True)
    names = ["best.pt", "checkpoint-000002.pt", "checkpoint-000003.pt", "checkpoint.pt"]
    assert files_below(tmp_path) == names
    assert [checkpoint.load(tmp_path / name)["step"] for name in names] == [2, 2, 3, 3]


@pytest.mark.parametrize(("copied", "name"), [(0, "checkpoint-000004.pt"), (1, "best.pt")])
def test_no_room_for_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: int, name: str
) -> None:
    """On a disk without links names are copies, and any of them may find it full."""
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        Retention(run, 2).save(state(step), step, best=step == 2)

    def link(_source: Path, _target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    room = iter([True] * copied + [False])

    def copy(source: Any, target: Any) -> None:
        target.write(source.read(100))
        if not next(room):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        target.write(source.read())

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(shutil, "copyfileobj", copy)
    with pytest.raises(checkpoint.NotSavedError, match=rf"{name}: No space left on device"):
        Retention(run, 2).save(state(4), 4, best=True)
    left = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    numbers = {f"checkpoint-00000{step}.pt": step for step in (2, 3)}
    if name == "best.pt":
        numbers |= {"checkpoint-000004.pt": 4}
    assert left == numbers | {"checkpoint.pt": 4, "best.pt": 2}
    monkeypatch.undo()
    Retention(run, 2).add_names(4, best=True)  # as a resumed run does
    left = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    names = {"checkpoint-000003.pt": 3, "checkpoint-000004.pt": 4}
    assert left == names | {"checkpoint.pt": 4, "best.pt": 4}


def test_one_file_has_many_names(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    Retention(run, 3).save(state(1), 1, best=True)
    Retention(run, 3).add_names(1, best=True)  # as a resumed run does
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 1
    assert files_below(tmp_path) == ["best.pt", "checkpoint-000001.pt", "checkpoint.pt"]


def test_no_more_are_kept_than_asked_for(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "checkpoint-mine.pt").write_text("not one of the run's")
    for step in (5, 999_999, 1_000_000, 2_000_000):
        Retention(run, 3).save(state(step), step, best=step == 5)
    kept = ["checkpoint-1000000.pt", "checkpoint-2000000.pt", "checkpoint-999999.pt"]
    others = ["checkpoint-mine.pt", "checkpoint.pt"]
    assert files_below(tmp_path) == ["best.pt", *kept, *others]
    Retention(run, 1).save(state(3_000_000), 3_000_000, best=False)
    assert files_below(tmp_path) == ["best.pt", *kept, *others]  # resumed without --keep-last
    assert checkpoint.load(run.best)["step"] == 5


@pytest.mark.usefixtures("tiny", "no_picture")
def test_full_disk_during_a_run(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning while there are further chances, an error at the end; the old one stays."""
    settings = ("--epochs", 3, "--batch-size", 256, "--output", tmp_path)
    assert train(*settings, "--max-steps", 1).status == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    step = loop.step
    with monkeypatch.context() as patch:

        def fills(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
            if context.progress.step > 1:  # when the run has its files
                patch.setattr(os, "fsync", full)
            return step(context, *arguments, **options)

        patch.setattr(loop, "step", fills)
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


def test_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for version in (1, 2, 5):
        torch.save({"format": f"fastlars.trainer checkpoint {version}"}, path)
        message = (
            rf"checkpoint\.pt needs another version of fastlars: it is a .* checkpoint {version}$"
        )
        with pytest.raises(TrainerError, match=message):
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
