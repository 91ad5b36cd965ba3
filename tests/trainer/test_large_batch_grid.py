"""The grid of benchmarks/accuracy: its cells, its search for rates, its table."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import figure
from benchmarks.accuracy.grid import (
    FINAL,
    FIND_LR,
    MOST_BEYOND,
    SEARCH,
    Cell,
    Grid,
    Row,
    read,
    write,
)
from fastlars.trainer.config import command_line
from repository_files import ROOT
from trainer.helpers import GRID


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
    grid = Grid(ROOT / "benchmarks" / "accuracy" / "grid.ini")
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
    assert figure.accuracies(grid, rows, "lars", 4) == [pytest.approx(70)]


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


def test_the_table_and_the_bars(grid: Grid, tmp_path: Path) -> None:
    rows = search(grid, "sgd", 4, {0.1: 0.5, 0.2: 0.7, 0.4: 0.6})
    rows += search(grid, "lars", 32, {1.0: 0.5, 2.0: 0.65, 4.0: 0.6})
    rows.append(replace(ended(grid, Cell(FIND_LR, "lars", 32, 2.0, 0)), suggested=2.25))
    assert list(figure.bars(grid, rows)) == []
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
    lines = figure.table(grid, rows).splitlines()
    assert lines[2:] == [
        "| 4 | sgd | 0.1 0.2 0.4 | 0.2 |  | 70.0 | 64.0 | 63.0 65.0 |",
        "| 32 | sgd-linear | none | 1.6 |  |  | 59.5 | 58.0 61.0 |",
        "| 32 | lars | 1 2 4 | 2 | 2.2 | 65.0 | 62.0 | 60.0 64.0 |",
    ]
    assert list(figure.bars(grid, rows)) == [
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
        found = [line.rpartition(" ")[2] for line in figure.bars(grid, changed)]
        assert tuple(found) == verdicts
    one_seed = [row for row in rows if row.seed != 2]
    assert list(figure.bars(grid, one_seed)) == []
    top, first, last = figure.figure(grid, rows).axes
    curves = [list(line.get_ydata()) for line in top.lines if len(line.get_xdata()) == 2]
    assert curves == pytest.approx(np.array([[58.0, 61.0], [63.0, 65.0], [60.0, 64.0]]))
    assert list(first.lines[0].get_ydata()) == pytest.approx([50.0, 70.0, 60.0])
    assert len(first.lines) == 1
    assert [list(line.get_xdata()) for line in last.lines] == [[0.5, 1.0, 2.0]]


def test_the_page_has_what_the_csv_has() -> None:
    grid = Grid(ROOT / "benchmarks" / "accuracy" / "grid.ini")
    rows = read(ROOT / "benchmarks" / "results" / "large_batch.csv", grid)
    page = (ROOT / "docs" / "large-batches.md").read_text()
    assert figure.table(grid, rows) in page
    bars = list(figure.bars(grid, rows))
    assert len(bars) == 2
    assert "\n".join(bars) in page
