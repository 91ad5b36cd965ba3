"""benchmarks/large_batch.py: its grid, its figure, and sittings that go on after a stop."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import large_batch
import large_batch_figure
import large_batch_grid
from large_batch_grid import Cell, Row, grid, read, subset, write
from sources import ROOT
from trainer.helpers import Outcome, write_images

EPOCHS = 12


def row(optimizer: str, batch: int, accuracy: float, lr: float = 1.0, seed: int = 0) -> Row:
    return Row("resnet20", optimizer, batch, lr, seed, 30, 0, accuracy, accuracy, 0.5, False)


def test_all_optimizers_get_the_same_grid_and_the_same_rules() -> None:
    cells = list(grid(["resnet20"], [128, 4096], ["sgd", "lars", "lamb"], [0, 1], 200))
    assert len(set(cells)) == len(cells) == 2 * 3 * 2 * 3
    factors, shared = defaultdict(set), defaultdict(set)
    for cell in cells:
        middle = large_batch_grid.CONTENDERS[cell.optimizer].base_lr * math.sqrt(cell.batch / 128)
        factors[cell.optimizer, cell.batch, cell.seed].add(round(cell.lr / middle, 2))
        own = large_batch_grid.CONTENDERS[cell.optimizer].arguments
        rest = cell.arguments("images", 128, 1024)[len(own) :]
        at = rest.index("--lr")
        shared[cell.batch, cell.seed].add(tuple(rest[:at] + rest[at + 2 :]))
    assert set(map(frozenset, factors.values())) == {frozenset({0.5, 1.0, 2.0})}
    assert all(len(arguments) == 1 for arguments in shared.values())
    # What is cut short has compared all optimizers at every batch with one seed.
    assert [cell.seed for cell in cells] == [0] * 18 + [1] * 18


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [row("lars", 128, 0.91), replace(row("sgd", 128, 0.0), diverged=True, loss=1.25)]
    write(tmp_path / "a" / "out.csv", rows)
    assert read(tmp_path / "a" / "out.csv") == rows
    assert rows[0].cell == Cell("resnet20", "lars", 128, 1.0, 0, 30)


@pytest.mark.usefixtures("tiny")
def test_a_run_that_diverges_is_a_row(tmp_path: Path, train: Callable[..., Outcome]) -> None:
    """And what else goes wrong ends the grid."""
    run = tmp_path / "run"
    flags = ("--recipe", "goyal", "--lr", 1e30, "--warmup-epochs", 0, "--output", run)
    outcome = train(*flags)
    cell = row("sgd", 128, 0.0).cell
    found = large_batch.finish(cell, run, outcome.status, outcome.err, 1.0)
    assert found is not None
    assert (found.cell, found.diverged) == (cell, True)
    outcome = train("--data", tmp_path / "absent")
    with pytest.raises(SystemExit, match="the trainer failed"):
        large_batch.finish(cell, run, outcome.status, outcome.err, 1.0)


def test_the_best_rate_is_that_of_the_mean_over_all_seeds() -> None:
    rows = [
        *(row("lars", 1024, a, lr=1.0, seed=s) for s, a in enumerate((0.90, 0.90))),
        *(row("lars", 1024, a, lr=2.0, seed=s) for s, a in enumerate((0.80, 0.98))),
        row("lars", 1024, 0.99, lr=4.0),  # one seed alone: luck
    ]
    (curves,) = large_batch_figure.best(rows).values()
    assert curves["lars"][1024].lr == 1.0
    assert curves["lars"][1024].mean == pytest.approx(0.90)
    assert "| resnet20, all images, 30 epochs | 1,024 | lars | 90.00% | 1 | 2 | 2 |" in (
        large_batch_figure.table(rows)
    )


@pytest.mark.parametrize(
    ("sgd", "lars", "verdict"), [(0.90, 0.92, "+2.00"), (0.90, 0.905, "+0.50")]
)
def test_the_bars_say_what_was_met(sgd: float, lars: float, verdict: str) -> None:
    rows = [row("sgd", 4096, sgd), row("lars", 4096, lars), row("sgd", 128, 0.93)]
    (line,) = large_batch_figure.bars(rows)
    assert verdict in line
    assert line.endswith("met" if lars - sgd > 0.01 else "missed")
    *_, line = large_batch_figure.bars([*rows, row("lars", 1024, 0.924)])
    assert "-0.60 points from SGD at 128" in line
    assert line.endswith("missed")


def test_a_subset_links_the_first_images_of_each_class(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write_images(tmp_path / "all" / "train" / name, 4, 0)
        write_images(tmp_path / "all" / "test" / name, 3, 1)
    root = subset(tmp_path / "all", 2, tmp_path)
    found = sorted(str(path.relative_to(root)) for path in root.glob("*/*/*.png"))
    assert [path for path in found if path.startswith("train")] == [
        f"train/{name}/{number:03}.png" for name in ("ant", "bee") for number in (0, 1)
    ]
    assert len([path for path in found if path.startswith("test")]) == 6
    with pytest.raises(SystemExit, match="ant has 4 images, not 5"):
        subset(tmp_path / "all", 5, tmp_path)


def sit(images: Path, into: Path) -> subprocess.Popen[str]:
    """A sitting of three short cells."""
    command = [
        sys.executable, "benchmarks/large_batch.py", "--data", images, "--csv", into / "o.csv",
        "--picture", into / "o.png", "--runs", into / "runs", "--optimizers", "lars",
        "--batches", "12", "--seeds", "0", "--epochs", EPOCHS,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_two_sittings_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with large_batch.alone(path):
        second = large_batch.alone(path)
        with pytest.raises(SystemExit, match="another sitting is writing"):
            second.__enter__()
    with large_batch.alone(path):
        pass


def trainer_of(sitting: int) -> int | None:
    """The process that trains for a sitting, both by number."""
    for child in Path(f"/proc/{sitting}/task/{sitting}/children").read_text().split():
        with suppress(OSError):
            if b"fastlars.trainer" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


@pytest.mark.slow
def test_the_trainer_of_a_sitting_that_was_killed(images: Path, tmp_path: Path) -> None:
    """It trains on, and no second one writes in its directory."""
    (images / "val").rename(images / "test")
    first = sit(images, tmp_path)
    while (trainer := trainer_of(first.pid)) is None and first.poll() is None:
        time.sleep(0.02)
    assert trainer is not None
    os.kill(trainer, signal.SIGSTOP)  # takes its time
    first.kill()
    first.communicate(timeout=600)
    try:
        _, errors = sit(images, tmp_path).communicate(timeout=600)
        assert "another sitting is writing" in errors
    finally:
        os.kill(trainer, signal.SIGKILL)


def test_a_signal_before_there_is_a_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda _number, _handler: None)
    with open(tmp_path / "lock", "w") as lock:
        sitting = large_batch.Sitting(math.inf, lock)
        sitting.stopped = True
        status, _ = sitting.train(["--epochs", "100000"], tmp_path / "run")
    assert status in (-signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_a_sitting_that_is_stopped_goes_on(images: Path, tmp_path: Path) -> None:
    (images / "val").rename(images / "test")
    first = sit(images, tmp_path)
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    out, errors = first.communicate(timeout=600)
    assert first.returncode == 0, errors
    assert "stopped; the next sitting goes on with it" in out
    (stopped,) = tmp_path.glob("runs/*")
    before = (stopped / "metrics.jsonl").read_text()
    assert not read(tmp_path / "o.csv")

    out, errors = sit(images, tmp_path).communicate(timeout=600)
    rows = read(tmp_path / "o.csv")
    assert len(rows) == 3, errors
    assert all(0.0 <= r.accuracy <= r.best_accuracy <= 1.0 and not r.diverged for r in rows)
    after = (stopped / "metrics.jsonl").read_text()
    assert before.count('"test"') < after.count('"test"') == EPOCHS
    # A resumed log has no longer that it was stopped.
    assert after.startswith(before[: before.index('{"kind": "end"')])
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("runs/*/*.pt"))

    out, errors = sit(images, tmp_path).communicate(timeout=600)
    assert "3 of 3 cells are done" in out, errors
    assert read(tmp_path / "o.csv") == rows
