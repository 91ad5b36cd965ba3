"""Accuracy against batch: SGD with Goyal's recipe, LARS and LAMB at equal epochs.

``python benchmarks/large_batch.py --data DIR [--epochs 200] [--minutes 60] [--csv OUT.csv]``

Every cell (model, optimizer, batch, learning rate, seed) is one run of ``fastlars.trainer``. All
optimizers have the same epochs, warm-up, ghost batches, augmentation and exclusions (biases and
norms have neither decay nor ratio), and learning rates on the same grid: factors around a rate
that suits batch 128, which grows with the square root of the batch. The accuracy of a run is that
after its last epoch; of an optimizer at a batch, the mean over seeds at its best rate.

A finished cell is a row of the CSV and is not run again. Ctrl-C, SIGTERM or the end of --minutes
leave a checkpoint, from which the next sitting goes on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
import torchvision

import fastlars
import large_batch_figure
from host import describe
from large_batch_grid import CONTENDERS, Cell, Row, grid, read, subset, write

ROOT = Path(__file__).resolve().parent.parent
DIVERGED = 3  # the trainer's exit status
READERS = min(os.cpu_count() or 1, 8)  # every cell reads all images, once, before it trains


class Sitting:
    """Runs cells until the time is up or a signal asks to stop.

    Args:
        minutes: until no further cell begins, and the one under way is stopped.
        lock: an open file that the trainer is to hold open too.
    """

    def __init__(self, minutes: float, lock: IO[str]) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.stopped = False
        self._lock = lock
        self._running: subprocess.Popen[str] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        if self._running is not None:
            self._running.terminate()  # the trainer answers with a checkpoint

    @property
    def over(self) -> bool:
        """Whether no further cell is to begin."""
        return self.stopped or time.monotonic() >= self.end

    def train(self, arguments: Sequence[str], run: Path) -> tuple[int, str]:
        """The trainer's exit status and its errors; it goes on from a checkpoint in `run`."""
        command = [sys.executable, "-m", "fastlars.trainer", *arguments]
        command += ["--output", str(run), "--resume", "auto", "--workers", str(READERS)]
        # A session of its own: Ctrl-C reaches the trainer through us, once. Where we are killed it
        # goes on alone, and the lock with it.
        self._running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True, pass_fds=(self._lock.fileno(),),
        )  # fmt: skip
        if self.stopped:  # by a signal that came before there was a process to pass it on to
            self._running.terminate()
        try:
            left = max(self.end - time.monotonic(), 1.0)
            _, errors = self._running.communicate(timeout=None if math.isinf(left) else left)
        except subprocess.TimeoutExpired:
            self.stopped = True
            self._running.terminate()
            _, errors = self._running.communicate()
        status = self._running.returncode
        self._running = None
        return status, errors


def finish(cell: Cell, run: Path, status: int, errors: str, seconds: float) -> Row | None:
    """The row of a run that has ended; None for one that was stopped."""
    if status > 128 or status < 0:
        return None
    diverged = status == DIVERGED
    if status and not diverged:
        raise SystemExit(f"{cell.name}: the trainer failed:\n{errors.strip()}")
    facts: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "device": device(),
        "versions": versions(),
    }
    if diverged:
        return Row(**asdict(cell), **facts)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [record["accuracy"] for record in records if record["kind"] == "test"]
    return Row(
        **asdict(cell),
        accuracy=round(accuracies[-1], 6),
        best_accuracy=round(max(accuracies), 6),
        loss=next(round(r["loss"], 6) for r in reversed(records) if r["kind"] == "train"),
        diverged=False,
        **facts,
    )


def device() -> str:
    """What the runs are made on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else describe()["machine"]


def versions() -> str:
    """What the runs are made with."""
    return (
        f"fastlars {fastlars.__version__}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )


@contextmanager
def alone(path: Path) -> Iterator[IO[str]]:
    """One sitting at a time for each CSV: as long as any process has the file open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another sitting is writing {path}") from None
        yield lock


def run_all(cells: Sequence[Cell], options: argparse.Namespace, lock: IO[str]) -> list[Row]:
    """Every cell that the CSV lacks, until the sitting is over; all rows there are."""
    rows = read(options.csv)
    done = {row.cell for row in rows}
    left = [cell for cell in cells if cell not in done]
    print(f"{len(cells) - len(left)} of {len(cells)} cells are done", flush=True)
    sitting = Sitting(options.minutes, lock)
    for number, cell in enumerate(left, start=1):
        if sitting.over:
            break
        run, begin = options.runs / cell.name, time.perf_counter()
        if (run / "metrics.jsonl").exists() and not (run / "checkpoint.pt").exists():
            shutil.rmtree(run)  # it was killed before its first checkpoint
        data = options.data
        if cell.per_class:
            data = subset(data, cell.per_class, options.runs)
        arguments = cell.arguments(str(data), options.bn_batch, options.micro_batch)
        row = finish(cell, run, *sitting.train(arguments, run), time.perf_counter() - begin)
        if row is None:
            print(f"{cell.name}: stopped; the next sitting goes on with it", flush=True)
            break
        rows.append(row)
        write(options.csv, rows)
        for checkpoint in run.glob("*.pt"):
            checkpoint.unlink()  # 200 MB each for ResNet-50
        what = "diverged" if row.diverged else f"{row.accuracy:.2%}"
        print(f"[{number}/{len(left)}] {cell.name}: {what}, {row.seconds:.0f} s", flush=True)
    return rows


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Contenders between commas."""
    chosen = text.split(",")
    for name in chosen:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CONTENDERS)}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left of the grid, then draw and compare all that the CSV holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--per-class", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["resnet20"])
    parser.add_argument("--optimizers", type=names, default=["sgd", "lars", "lamb"])
    parser.add_argument("--batches", type=numbers, default=[128, 1024, 4096, 8192])
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--bn-batch", type=int, default=128, help="images of a ghost batch")
    parser.add_argument("--micro-batch", type=int, default=1024, help="images of a forward pass")
    parser.add_argument("--minutes", type=float, default=math.inf, help="length of this sitting")
    parser.add_argument("--csv", type=Path, default=results / "large_batch.csv")
    parser.add_argument("--picture", type=Path, default=results / "large_batch.png")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "large_batch")
    options = parser.parse_args(arguments)
    cells = list(
        grid(
            options.models, options.batches, options.optimizers, options.seeds, options.epochs,
            options.per_class,
        )
    )  # fmt: skip
    with alone(options.csv) as lock:
        rows = run_all(cells, options, lock)
    if rows:
        large_batch_figure.draw(rows, options.picture)
        print(large_batch_figure.table(rows), *large_batch_figure.bars(rows), sep="\n")


if __name__ == "__main__":
    main()
