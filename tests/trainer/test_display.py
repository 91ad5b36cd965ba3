"""What a run shows: facts by label, a row for each epoch, the files at the end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fastlars.trainer.output import report
from fastlars.trainer.output.display import Display
from trainer.helpers import Outcome, facts, records

Train = Callable[..., Outcome]


@pytest.mark.parametrize("columns", [60, 80, 100, 120])
def test_facts_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Whole flags and paths; not wider than 100 characters, which are hard to read."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = " ".join(f"--warmup-epochs {n} (recipe: 5)," for n in range(20)) + f" /data/{70 * 'x'}"
    lines = list(report.fact("changed", text))
    *short, path = lines
    assert path.strip() == f"/data/{70 * 'x'}"
    assert max(map(len, short)) <= min(columns, 100)
    assert max(map(len, short)) > min(columns, 100) - 20
    assert facts("\n".join(lines)) == {"changed": text}
    assert not any(line.rstrip().endswith("-") for line in lines)


def test_a_row_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(1, 0, shown=True)
    for number in ("epoch 1/90", "epoch 1000/1000"):
        display.row(number, "1.23e-05", "12.3456", "100.00%", "12.3456", "100.00%", "100.00%", "-")
    space, heading, *rows = capsys.readouterr().out.splitlines()
    assert space == ""
    assert " ".join(heading.split()) == "lr train loss acc test loss acc best images/s"
    assert [row.split()[1] for row in rows] == ["1/90", "1000/1000"]
    assert len(heading) == len(rows[0]) < 80
    assert len(rows[1]) < 80


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_row_for_each_epoch(tmp_path: Path, train: Train) -> None:
    """Means over the epoch; of a resumed one, over the part that was trained since."""
    flags = ("--epochs", 3, "--batch-size", 256, "--log-every", 2, "--output", tmp_path)
    first = train(*flags, "--max-steps", 7)
    second = train("--resume", "--output", tmp_path, "--max-steps", 0)
    rows = [
        [line.split()[1:] for line in outcome.out.splitlines() if re.match(r"epoch \d/3 ", line)]
        for outcome in (first, second)
    ]
    assert [[row[0] for row in part] for part in rows] == [["1/3"], ["2/3", "3/3"]]
    found = records(tmp_path)
    tests = [r for r in found if r["kind"] == "test"]
    for row, test in zip([*rows[0], *rows[1]], tests, strict=True):
        assert row[4:7] == [
            f"{test['loss']:.4f}", f"{test['accuracy']:.2%}", f"{test['best_accuracy']:.2%}"
        ]  # fmt: skip
        assert float(row[7]) > 0
    trained = [r for r in found if r["kind"] == "train" and r["epoch"] <= 1]
    images = sum(r["images"] for r in trained)
    assert images == 5 * 256
    for column, key, kind in ((2, "loss", "{:.4f}"), (3, "accuracy", "{:.2%}")):
        mean = sum(r[key] * r["images"] for r in trained) / images
        assert rows[0][0][column] == kind.format(mean)
    assert rows[0][0][1] == f"{trained[-1]['lr']:.3g}"


@pytest.mark.usefixtures("tiny", "no_picture")
def test_the_first_screen(tmp_path: Path, train: Train) -> None:
    flags = ("--max-steps", 1, "--lr", 0.5, "--micro-batch", 32, "--output", tmp_path)
    said = facts(train(*flags).out)
    assert said["images"] == "digits: 1,437 to train, 360 to test, 10 classes, 32 x 32 pixels"
    assert said["steps"] == (
        "14 epochs of 11 steps of 128 images; 1 process on cpu, 4 x 32 images each, fp32"
    )
    assert said["rate"] == (
        "2 epochs of warm-up from 0, then lr 0.5, schedule poly; weight decay 0.0001"
    )
    assert said["output"] == str(tmp_path)
