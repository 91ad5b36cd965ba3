"""benchmarks/large_batch.py: its grid, its table, and sittings that go on after a stop."""

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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import large_batch
import large_batch_figure
from fastlars.trainer.config import command_line
from large_batch_grid import FINAL, FIND_LR, MOST_BEYOND, SEARCH, Cell, Grid, Row, read, write
from sources import ROOT
from trainer.helpers import Outcome, write_images

# Two optimizers and the linear rule, which has no search of its own.
GRID = """
[grid]
images = 6 3
batches = 4 32
search = 0
seeds = 1 2
flags = --model resnet8 --stem small --micro-batch 4 --bn-batch 4 --epochs 1 --warmup-epochs 0
[sgd-linear]
scales = sgd
flags = --recipe goyal --warmup-from {base}
[sgd]
flags = --recipe goyal --warmup-from 0
lr 4 = 0.1 0.2 0.4
lr 32 = 0.1 0.2 0.4
[lars]
flags = --recipe lars
lr 4 = 1 2 4
lr 32 = 1 2 4
"""


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    path = tmp_path / "grid.ini"
    path.write_text(GRID)
    return Grid(path)


def ended(grid: Grid, cell: Cell, accuracy: float = 0.5, status: str = "done") -> Row:
    return Row(
        **asdict(cell), images=grid.images, status=status, accuracy=accuracy, loss=1.5,
        suggested=0.0, seconds=2.0, machine="a, b", versions="1", command=grid.command(cell),
    )  # fmt: skip


def search(grid: Grid, name: str, batch: int, accuracies: dict[float, float]) -> list[Row]:
    cells = {lr: Cell(SEARCH, name, batch, lr, 0) for lr in accuracies}
    return [ended(grid, cells[lr], accuracy) for lr, accuracy in accuracies.items()]


def rates(cells: list[Cell], name: str, batch: int, kind: str = SEARCH) -> list[float]:
    return [c.lr for c in cells if (c.optimizer, c.batch, c.kind) == (name, batch, kind)]


def test_all_optimizers_of_the_published_grid_share_their_flags_and_number_of_rates() -> None:
    grid = Grid(ROOT / "benchmarks" / "large_batch.ini")
    cells = grid.missing([])
    counts = {
        place: len(rates(cells, *place)) for place in grid.places() if place[0] != "sgd-linear"
    }
    assert set(counts.values()) == {4}
    assert len(counts) == 9
    given = {
        c: command_line.parse(grid.command(c).split()).given for c in cells if c.kind == SEARCH
    }
    shared = {"model", "epochs", "bn_batch", "no_decay", "no_ratio", "power", "seed", "schedule"}
    shared |= {"warmup_epochs", "warmup_from", "end_lr", "micro_batch", "label_smoothing"}
    for name in shared:
        assert len({settings[name] for settings in given.values()}) == 1
    for cell, settings in given.items():
        assert (settings["lr"], settings["batch_size"]) == (cell.lr, cell.batch)
    others = {name for settings in given.values() for name in settings if name not in shared}
    assert others == {
        "recipe", "lr", "batch_size", "stem", "image_size", "bn_statistics", "classifier_std",
        "weight_decay", "trust_coefficient", "bias_correction", "max_grad_norm",
    }  # fmt: skip


def test_a_search_ends_with_a_best_rate_between_two_others(grid: Grid) -> None:
    assert rates(grid.missing([]), "lars", 4) == [1.0, 2.0, 4.0]
    rows = search(grid, "lars", 4, {1.0: 0.5, 4.0: 0.6})
    assert rates(grid.missing(rows), "lars", 4) == [2.0]
    assert grid.best_rate(rows, "lars", 4) is None
    inside = rows + search(grid, "lars", 4, {2.0: 0.7})
    assert grid.best_rate(inside, "lars", 4) == 2.0
    assert rates(grid.missing(inside), "lars", 4, FINAL) == [2.0, 2.0]
    above = rows + search(grid, "lars", 4, {2.0: 0.55})
    assert grid.best_rate(above, "lars", 4) is None
    assert rates(grid.missing(above), "lars", 4) == [8.0]
    below = search(grid, "lars", 4, {1.0: 0.7, 2.0: 0.6, 4.0: 0.0})
    assert rates(grid.missing(below), "lars", 4) == [0.5]


def test_a_search_does_not_go_on_for_ever(grid: Grid) -> None:
    rows = search(grid, "lars", 4, {1.0: 0.1, 2.0: 0.2, 4.0: 0.3})
    for number in range(MOST_BEYOND):
        (lr,) = rates(grid.missing(rows), "lars", 4)
        rows += search(grid, "lars", 4, {lr: 0.4 + number / 10})
    assert grid.best_rate(rows, "lars", 4) == 4.0 * 2**MOST_BEYOND


def test_the_linear_rule_scales_the_best_rate_of_the_smallest_batch(grid: Grid) -> None:
    assert grid.best_rate([], "sgd-linear", 32) is None
    rows = search(grid, "sgd", 4, {0.1: 0.5, 0.2: 0.7, 0.4: 0.6})
    assert rates(grid.missing(rows), "sgd-linear", 32, FINAL) == [1.6, 1.6]
    command = command_line.parse(grid.command(Cell(FINAL, "sgd-linear", 32, 1.6, 1)).split())
    assert command.given["warmup_from"] == 0.2
    assert ("sgd-linear", 4) not in grid.places()  # there it is sgd


def test_what_failed_is_run_again_and_what_diverged_is_not(grid: Grid) -> None:
    cell = Cell(SEARCH, "lars", 4, 2.0, 0)
    rows = search(grid, "lars", 4, {1.0: 0.5, 4.0: 0.4})
    failed = [*rows, ended(grid, cell, 0.0, "failed with exit status 1: x")]
    assert cell in grid.missing(failed)
    assert grid.best_rate(failed, "lars", 4) is None
    diverged = [*rows, ended(grid, cell, 0.0, "diverged: at step 3")]
    assert rates(grid.missing(diverged), "lars", 4) == [0.5]
    rows += search(grid, "lars", 4, {2.0: 0.6})
    final = [Cell(FINAL, "lars", 4, 2.0, seed) for seed in (1, 2)]
    rows += [ended(grid, final[0], 0.7), ended(grid, final[1], 0.0, "failed with exit status 1: x")]
    assert [c for c in grid.missing(rows) if c.kind == FINAL] == [final[1]]
    assert large_batch_figure.accuracies(grid, rows, "lars", 4) == [pytest.approx(70)]


def test_rows_of_other_seeds_count_for_nothing(grid: Grid) -> None:
    rows = search(grid, "lars", 4, {1.0: 0.5, 2.0: 0.6, 4.0: 0.4})
    rows += [ended(grid, Cell(FINAL, "lars", 4, 2.0, seed)) for seed in (1, 7)]
    assert len(grid.final(rows, "lars", 4)) == 1
    other = [replace(row, seed=3) for row in rows if row.kind == SEARCH]
    assert grid.searched(other, "lars", 4) == {}


def test_what_is_cut_short_has_compared_all_with_one_seed(grid: Grid) -> None:
    accuracies = {0.1: 0.1, 0.2: 0.3, 0.4: 0.2, 1.0: 0.1, 2.0: 0.3, 4.0: 0.2}
    searches = [cell for cell in grid.missing([]) if cell.kind == SEARCH]
    cells = grid.missing([ended(grid, cell, accuracies[cell.lr]) for cell in searches])
    assert [c.kind for c in cells] == [FIND_LR] * 4 + [FINAL] * 10
    assert [c.seed for c in cells[4:]] == [1] * 5 + [2] * 5


def test_rows_come_back_as_they_were_written(tmp_path: Path, grid: Grid) -> None:
    rows = search(grid, "lars", 4, {1.0: 0.5, 2.0: 0.6})
    write(tmp_path / "out.csv", rows)
    assert read(tmp_path / "out.csv", grid) == rows
    write(tmp_path / "out.csv", [*rows, replace(rows[0], lr=0.5)])
    with pytest.raises(SystemExit, match=r"lars-b4-lr0.5-s0-search was run with other flags"):
        read(tmp_path / "out.csv", grid)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("--recipe lars", "--recipe lbrs", r"lars, batch 4: argument --recipe: invalid choice"),
        ("lr 32 = 1 2 4", "lr 32 = -1 2 4", r"lars, batch 32: --lr must be above 0"),
        (
            "from {base}",
            "from x",
            r"sgd-linear, batch 32: argument --warmup-from: must be a number",
        ),
        ("lr 32 = 1 2 4", "lr 32 = 1", r"lars: lr 32 has fewer than 2 rates"),
        ("lr 32 = 1 2 4", "", r"lr 32"),
        ("--epochs 1", "--max-steps 1", r"--max-steps cannot be set in a grid file"),
    ],
)
def test_a_grid_whose_flags_the_trainer_refuses(
    tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    (tmp_path / "bad.ini").write_text(GRID.replace(right, wrong))
    with pytest.raises(SystemExit, match=message):
        Grid(tmp_path / "bad.ini")


@pytest.mark.usefixtures("tiny", "no_picture")
def test_how_a_run_ended_is_in_its_row(
    tmp_path: Path, grid: Grid, train: Callable[..., Outcome]
) -> None:
    def row(cell: Cell, *flags: object) -> Row:
        outcome = train(*grid.command(cell).split(), *flags, "--output", tmp_path / cell.name)
        (tmp_path / f"{cell.name}.log").write_text(outcome.out + outcome.err)
        return large_batch.result(grid, cell, tmp_path, outcome.status)

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


def test_the_table_and_the_bars(grid: Grid, tmp_path: Path) -> None:
    rows = search(grid, "sgd", 4, {0.1: 0.5, 0.2: 0.7, 0.4: 0.6})
    rows += search(grid, "lars", 32, {1.0: 0.5, 2.0: 0.65, 4.0: 0.6})
    rows.append(replace(ended(grid, Cell(FIND_LR, "lars", 32, 2.0, 0)), suggested=2.25))
    assert list(large_batch_figure.bars(grid, rows)) == []
    rows += [
        ended(grid, Cell(FINAL, name, batch, lr, seed), accuracy)
        for name, batch, lr, accuracies in (
            ("lars", 32, 2.0, (0.6, 0.64)),
            ("sgd-linear", 32, 1.6, (0.58, 0.61)),
            ("sgd", 4, 0.2, (0.63, 0.65)),
        )
        for seed, accuracy in enumerate(accuracies, start=1)
    ]
    rows.append(ended(grid, Cell(FINAL, "lars", 32, 4.0, 1), 0.99))  # not the rate of the search
    lines = large_batch_figure.table(grid, rows).splitlines()
    assert lines[2:] == [
        "| 4 | sgd | 0.1 0.2 0.4 | 0.2 |  | 70.0 | 64.0 | 63.0 65.0 |",
        "| 32 | sgd-linear | none | 1.6 |  |  | 59.5 | 58.0 61.0 |",
        "| 32 | lars | 1 2 4 | 2 | 2.2 | 65.0 | 62.0 | 60.0 64.0 |",
    ]
    assert list(large_batch_figure.bars(grid, rows)) == [
        "lars at 32: +2.50 points from sgd-linear at 32, to be at least +1: met",
        "lars at 32: -2.00 points from sgd at 4, to be at least -0.5: missed",
    ]
    for change, verdicts in ((-0.02, ("missed", "missed")), (0.02, ("met", "met"))):
        changed = [
            replace(row, accuracy=row.accuracy + change)
            if (row.kind, row.optimizer) == (FINAL, "lars")
            else row
            for row in rows
        ]
        found = [line.rpartition(" ")[2] for line in large_batch_figure.bars(grid, changed)]
        assert tuple(found) == verdicts
    one_seed = [row for row in rows if row.seed != 2]
    assert list(large_batch_figure.bars(grid, one_seed)) == []
    large_batch_figure.draw(grid, rows, tmp_path / "o.png")
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_what_the_csv_has() -> None:
    grid = Grid(ROOT / "benchmarks" / "large_batch.ini")
    rows = read(ROOT / "benchmarks" / "results" / "large_batch.csv", grid)
    page = (ROOT / "docs" / "large-batches.md").read_text()
    assert large_batch_figure.table(grid, rows) in page
    bars = list(large_batch_figure.bars(grid, rows))
    assert len(bars) == 2
    assert "\n".join(bars) in page


def test_the_images_to_train_on_are_never_measured_on(tmp_path: Path, grid: Grid) -> None:
    for name in ("ant", "bee"):
        write_images(tmp_path / "all" / "train" / name, 10, 0)
        write_images(tmp_path / "all" / "test" / name, 2, 1)
    folders = large_batch.image_folders(grid, tmp_path / "all", tmp_path)
    assert folders == large_batch.image_folders(grid, tmp_path / "all", tmp_path)
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
        large_batch.image_folders(grid, tmp_path / "other", tmp_path)
    for path in sorted((tmp_path / "other" / "train" / "bee").iterdir())[:2]:
        path.unlink()
    (tmp_path / "else").mkdir()
    with pytest.raises(SystemExit, match="class bee has 8 images, not 9"):
        large_batch.image_folders(grid, tmp_path / "other", tmp_path / "else")
    with pytest.raises(SystemExit, match="has no folder test/"):
        large_batch.image_folders(grid, tmp_path / "else", tmp_path / "else")
    assert not list((tmp_path / "else").glob("images*"))


def test_two_sittings_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with large_batch.alone(path):
        second = large_batch.alone(path)
        with pytest.raises(SystemExit, match="another sitting is writing"):
            second.__enter__()
    with large_batch.alone(path):
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
            sys.executable, "benchmarks/large_batch.py", "--data", images, "--grid",
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
        sitting = large_batch.Sitting(grid, options, lock)
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
        sitting = large_batch.Sitting(grid, options, lock)
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
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("runs/*/*.pt"))

    out, errors = sit().communicate(timeout=600)
    assert "lr" not in out.split("| batch")[0], errors  # nothing was run
    assert read(tmp_path / "o.csv", grid) == rows
