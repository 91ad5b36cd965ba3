"""The driver of benchmarks/accuracy: runs, their images, and sittings that are stopped."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import run
from benchmarks.accuracy.grid import FINAL, FIND_LR, SEARCH, Cell, Grid, Row, read
from repository_files import ROOT
from trainer.helpers import GRID, Outcome, write_images


@pytest.mark.usefixtures("tiny", "no_picture")
def test_how_a_run_ended_is_in_its_row(
    tmp_path: Path, grid: Grid, train: Callable[..., Outcome]
) -> None:
    def row(cell: Cell, *flags: object) -> Row:
        outcome = train(*grid.command(cell).split(), *flags, "--output", tmp_path / cell.name)
        (tmp_path / f"{cell.name}.log").write_text(outcome.out + outcome.err)
        return run.result(grid, cell, tmp_path, outcome.status)

    cell = Cell(SEARCH, "sgd", 4, 0.2, 0)
    found = row(cell, "--max-steps", 0)
    assert (found.cell, found.status, found.command) == (cell, "done", grid.command(cell))
    log = (tmp_path / cell.name / "metrics.jsonl").read_text()
    assert 0 < found.accuracy < 1
    assert f'"accuracy": {found.accuracy:.4f}'[:-1] in log
    assert min(found.loss, found.seconds) > 0

    found = row(replace(cell, lr=1e30))
    assert found.status.startswith("diverged: the loss is NaN or infinite at step")
    assert found.accuracy == 0

    found = row(replace(cell, seed=7), "--data", tmp_path / "absent")
    assert found.status.startswith("failed with exit status 2: --data: ")

    cell = replace(cell, kind=FIND_LR)
    found = row(cell)
    (said,) = re.findall(r"suggest +--lr ([\d.]+)", (tmp_path / f"{cell.name}.log").read_text())
    assert found.suggested == pytest.approx(float(said), rel=0.05)


def test_the_images_to_train_on_are_never_measured_on(tmp_path: Path, grid: Grid) -> None:
    for name in ("ant", "bee"):
        write_images(tmp_path / "all" / "train" / name, 10, 0)
        write_images(tmp_path / "all" / "test" / name, 2, 1)
    folders = run.image_folders(grid, tmp_path / "all", tmp_path)
    assert folders == run.image_folders(grid, tmp_path / "all", tmp_path)
    found = {
        kind: sorted(str(path.relative_to(root)) for path in root.glob("*/ant/*.png"))
        for kind, root in folders.items()
    }
    train = [f"train/ant/{number:07}.png" for number in range(6)]
    assert found[SEARCH] == train + [f"val/ant/{number:07}.png" for number in range(3)]
    assert found[FINAL] == [f"test/ant/{number:03}.png" for number in (0, 1)] + train
    targets = {path.resolve() for path in folders[SEARCH].glob("*/ant/*.png")}
    assert targets == set(sorted((tmp_path / "all" / "train" / "ant").iterdir())[:9])

    shutil.copytree(tmp_path / "all", tmp_path / "other")
    with pytest.raises(SystemExit, match="was begun with other images"):
        run.image_folders(grid, tmp_path / "other", tmp_path)
    for path in sorted((tmp_path / "other" / "train" / "bee").iterdir())[:2]:
        path.unlink()
    (tmp_path / "else").mkdir()
    with pytest.raises(SystemExit, match="class bee has 8 images, not 9"):
        run.image_folders(grid, tmp_path / "other", tmp_path / "else")
    with pytest.raises(SystemExit, match="has no folder test/"):
        run.image_folders(grid, tmp_path / "else", tmp_path / "else")
    assert not list((tmp_path / "else").glob("images*"))


def test_two_sittings_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with run.alone(path):
        second = run.alone(path)
        with pytest.raises(SystemExit, match="another sitting is writing"):
            second.__enter__()
    with run.alone(path):
        pass


@pytest.fixture
def sit(images: Path, tmp_path: Path) -> Callable[[], subprocess.Popen[str]]:
    """Starts a sitting of one optimizer at one batch, with one final run."""
    (images / "val").rename(images / "test")
    text = (
        GRID.split("[sgd-linear]")[0]
        .replace("= 4 32", "= 4")
        .replace("= 1 2", "= 1")
        .replace("--epochs 1", "--epochs 12")
    )
    (tmp_path / "sit.ini").write_text(text + "[lars]\nflags = --recipe lars\nlr 4 = 1 2 4\n")

    def start() -> subprocess.Popen[str]:
        command = [
            sys.executable, "-m", "benchmarks.accuracy.run", "--data", images, "--grid",
            tmp_path / "sit.ini", "--csv", tmp_path / "o.csv", "--runs", tmp_path / "runs",
        ]  # fmt: skip
        return subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


def test_a_signal_that_comes_while_a_run_is_started(
    grid: Grid, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler does not know the process yet."""
    (images / "val").rename(images / "test")
    monkeypatch.setattr(signal, "signal", lambda _number, _handler: None)
    options = argparse.Namespace(data=images, csv=tmp_path / "o.csv", runs=tmp_path, jobs=1)
    with open(tmp_path / "lock", "w") as lock:
        sitting = run.Sitting(grid, options, lock)
        start = subprocess.Popen

        def interrupted(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
            sitting.stopped = True
            return start(*arguments, **settings)

        monkeypatch.setattr(subprocess, "Popen", interrupted)
        (tmp_path / "grid.ini").unlink()
        sitting.run()
    assert sitting.rows == []
    assert not (tmp_path / "o.csv").exists()


def test_an_error_leaves_no_run_alone(
    grid: Grid, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "val").rename(images / "test")
    monkeypatch.setattr(signal, "signal", lambda _number, _handler: None)
    monkeypatch.setattr(Grid, "command", lambda _grid, _cell: "--epochs 100000")
    options = argparse.Namespace(data=images, csv=tmp_path / "o.csv", runs=tmp_path, jobs=2)
    with open(tmp_path / "lock", "w") as lock:
        sitting = run.Sitting(grid, options, lock)
        monkeypatch.setattr(time, "sleep", lambda _seconds: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sitting.run()
    assert len(sitting.running) == 2
    assert all(process.returncode is not None for process in sitting.running.values())


def trainer_of(sitting: int) -> int | None:
    """The process that trains for a sitting, both by number."""
    for child in Path(f"/proc/{sitting}/task/{sitting}/children").read_text().split():
        with suppress(OSError):
            if b"fastlars.trainer" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


@pytest.mark.slow
def test_the_trainer_of_a_sitting_that_was_killed(sit: Callable[[], subprocess.Popen[str]]) -> None:
    """It trains on, and no second one writes in its directory."""
    first = sit()
    while (trainer := trainer_of(first.pid)) is None and first.poll() is None:
        time.sleep(0.02)
    assert trainer is not None
    os.kill(trainer, signal.SIGSTOP)  # takes its time
    first.kill()
    first.communicate(timeout=600)
    try:
        _, errors = sit().communicate(timeout=600)
        assert "another sitting is writing" in errors
    finally:
        os.kill(trainer, signal.SIGKILL)


@pytest.mark.slow
def test_a_sitting_that_is_stopped_goes_on(
    sit: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    grid = Grid(tmp_path / "sit.ini")
    first = sit()
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    out, errors = first.communicate(timeout=600)
    assert first.returncode == 0, errors
    assert "stopped; the same command goes on with it" in out
    (log,) = tmp_path.glob("runs/*/metrics.jsonl")
    before = log.read_text()
    assert not read(tmp_path / "o.csv", grid)

    out, errors = sit().communicate(timeout=600)
    rows = read(tmp_path / "o.csv", grid)
    assert not grid.missing(rows), errors
    assert {row.status for row in rows} == {"done"}
    # A resumed log has no longer that it was stopped.
    assert log.read_text().startswith(before[: before.index('{"kind": "end"')])
    assert (tmp_path / "o.svg").exists()
    assert (tmp_path / "o-dark.svg").exists()
    assert not list(tmp_path.glob("runs/*/*.pt"))

    out, errors = sit().communicate(timeout=600)
    assert "lr" not in out.split("| batch")[0], errors  # nothing was run
    assert read(tmp_path / "o.csv", grid) == rows
