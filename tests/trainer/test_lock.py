"""A run directory has one owner at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output.lock import Lock, LockedError, unreliable_file_system
from fastlars.trainer.run import loop
from trainer.helpers import Outcome, files_below

Train = Callable[..., Outcome]
SHORT = ("--epochs", 1, "--batch-size", 512)

# Holds the lock, and so does a child of its own that outlives it: a worker that reads images.
OWNER = """
import os, sys, time
from pathlib import Path
from fastlars.trainer.output.lock import Lock
lock = Lock(Path(sys.argv[1]) / ".lock")
assert lock.acquire() == ""
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(600)
"""
# Takes the lock 150 times; whoever has it makes a file that must not be there.
RIVAL = """
import os, sys
from pathlib import Path
from fastlars.trainer.output.lock import Lock, LockedError
folder, taken = Path(sys.argv[1]), 0
lock = Lock(folder / ".lock")
while taken < 150:
    try:
        lock.acquire()
    except LockedError:
        continue
    os.close(os.open(folder / "mine", os.O_CREAT | os.O_EXCL))
    os.unlink(folder / "mine")
    lock.release()
    taken += 1
"""


def python(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def owned(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process owns the folder."""
    owner = python(OWNER, folder)
    assert owner.stdout is not None
    line = owner.stdout.readline()
    assert line, owner.communicate()
    try:
        yield owner
    finally:
        owner.kill()
        os.kill(int(line), signal.SIGKILL)
        owner.communicate()


def test_kill_9_releases_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with owned(tmp_path) as owner:
        for _ in range(2):
            with pytest.raises(LockedError, match=rf"process {owner.pid} on "):
                lock.acquire()
        owner.kill()
        owner.wait()
        assert lock.acquire() == ""  # though the child lives
        lock.release()
    assert files_below(tmp_path) == []


def test_rivals(tmp_path: Path) -> None:
    """The file is removed while others open it: never do two hold the lock."""
    rivals = [python(RIVAL, tmp_path) for _ in range(3)]
    for rival in rivals:
        _, error = rival.communicate(timeout=600)
        assert rival.returncode == 0, error
    assert files_below(tmp_path) == []


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_second_run_is_refused(tmp_path: Path, train: Train) -> None:
    run = tmp_path / "run"
    assert train(*SHORT, "--output", run, "--max-steps", 1).status == 0
    before = {name: (run / name).read_bytes() for name in files_below(run)}
    with owned(run) as owner:
        for flags in (
            ("--resume",),
            ("--resume", "auto"),
            ("--resume", "--dry-run"),
            ("--find-lr",),
        ):
            outcome = train(*SHORT, "--output", run, *flags)
            assert outcome.status == 2
            assert f"--output: {run} is in use by process {owner.pid} on " in outcome.err
            assert len(outcome.err.splitlines()) == 1
        # It is only read from; the lock is of the directory that is written.
        assert train("--resume", run, "--output", tmp_path / "other").status == 0
        assert {name: (run / name).read_bytes() for name in before} == before
    assert train("--resume", "--output", run).status == 0


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("lost", ["lock", "folder", "renamed", "replaced"])
def test_a_run_that_loses_its_directory_stops(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Another run may write there by now, and its files stay as they are."""
    run, mine = tmp_path / "run", {"checkpoint.pt": "another's", ".lock": "another's"}
    step = loop.step

    def losing(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
        result = step(context, *arguments, **options)
        if context.progress.step == 1:
            if lost == "lock":
                (run / ".lock").unlink()
            elif lost == "renamed":
                run.rename(tmp_path / "elsewhere")
            else:
                shutil.rmtree(run)
            if lost == "replaced":
                run.mkdir()
                for name, text in mine.items():
                    (run / name).write_text(text)
        return result

    monkeypatch.setattr(loop, "step", losing)
    outcome = train("--epochs", 3, "--batch-size", 512, "--output", run)
    assert outcome.status == 2
    assert f"error: {run} was removed or given to another run: this one, at step 2" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    if lost == "replaced":
        assert {name: (run / name).read_text() for name in files_below(run)} == mine


@pytest.mark.usefixtures("tiny", "no_picture")
def test_runs_that_name_no_output_at_the_same_time(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one takes the next name, though the first has written nothing yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-lars-1").mkdir(parents=True)
    with owned(tmp_path / "runs" / "digits-lars-1"):
        assert train(*SHORT, "--max-steps", 1).status == 0
    assert (tmp_path / "runs" / "digits-lars-2" / "checkpoint.pt").exists()


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_file_system_without_locks(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(_file: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    outcome = train(*SHORT, "--output", tmp_path, "--max-steps", 1)
    assert outcome.status == 0
    assert outcome.err == (
        "warning: this file system has no locks (No locks available): "
        f"let no other run write in {tmp_path}\n"
    )


@pytest.mark.parametrize(
    ("system", "found"),
    [
        ("nfs4 server:/ rw,vers=4.2,local_lock=none,addr=10.0.0.1", ""),
        ("nfs server:/ rw,nolock,local_lock=all", "nfs"),
        ("nfs server:/ rw,local_lock=posix", "nfs"),
        ("lustre 10.0.0.1@tcp:/scratch rw,flock", ""),
        ("lustre 10.0.0.1@tcp:/scratch rw,localflock", "lustre"),
        ("fuse.sshfs me@server: rw", "fuse.sshfs"),
        ("beegfs nodev rw", "beegfs"),
        ("ext4 /dev/sda1 rw", ""),
        ("overlay overlay rw,lowerdir=/a", ""),
    ],
)
def test_whether_other_machines_see_it(tmp_path: Path, system: str, found: str) -> None:
    device = os.stat(tmp_path).st_dev
    mine = f"36 35 {os.major(device)}:{os.minor(device)} / /data rw,noatime shared:1 - {system}\n"
    mounts = tmp_path / "mountinfo"
    mounts.write_text("21 1 999:9 / / rw - fuse.other x rw\n" + mine)
    assert unreliable_file_system(tmp_path, str(mounts)) == found
    assert unreliable_file_system(tmp_path, str(tmp_path / "absent")) == ""


def test_the_note_of_a_disk_whose_locks_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastlars.trainer.output.lock.unreliable_file_system", lambda _folder: "beegfs"
    )
    lock = Lock(tmp_path / ".lock")
    assert lock.acquire() == "locks of this file system (beegfs) may not hold on other machines"
    lock.release()
