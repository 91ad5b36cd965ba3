"""Accuracy against batch: a grid of training runs, each of them one command of the trainer.

``python -m benchmarks.accuracy.run --data FOLDER [--grid GRID.ini] [--jobs 2]``

The grid file says what is compared; `Grid` in grid.py explains it. A finished run is a
row of the CSV and is not run again. A run that diverges, or that the trainer refuses, is a row with
the reason; what failed is tried again the next time. Ctrl-C and SIGTERM stop the runs under way
with a checkpoint, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import FrameType
from typing import IO

import torch
from torchvision.datasets import ImageFolder

import fastlars
from benchmarks import RESULTS, ROOT, drawing
from benchmarks.accuracy.figure import bars, figure, table
from benchmarks.accuracy.grid import FINAL, FIND_LR, SEARCH, Cell, Grid, Row, read, write
from benchmarks.machine import describe

GRID = Path(__file__).with_name("grid.ini")
# The trainer's exit statuses.
DIVERGED, STOPPED = 3, (128 + signal.SIGTERM, -signal.SIGTERM)
POLL = 0.2  # seconds between looks at the runs


class Sitting:
    """Runs the cells of a grid, `jobs` at a time, until none is left or a signal asks to stop."""

    def __init__(self, grid: Grid, options: argparse.Namespace, lock: IO[str]) -> None:
        self.grid, self.options, self.lock = grid, options, lock
        self.rows = read(options.csv, grid)
        self.folders = image_folders(grid, options.data, options.runs)
        self.running: dict[Cell, subprocess.Popen[bytes]] = {}
        self.stopped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        for process in self.running.values():
            process.terminate()  # the trainer answers with a checkpoint

    def run(self) -> None:
        """Run all cells that the rows lack; each is a row as soon as it has ended."""
        tried: set[Cell] = set()
        try:
            while not self.stopped or self.running:
                waiting = [cell for cell in self.grid.missing(self.rows) if cell not in tried]
                for cell in waiting[: self.options.jobs - len(self.running)]:
                    tried.add(cell)
                    self._start(cell)
                if not self.running:
                    return
                time.sleep(POLL)
                for cell in [cell for cell, run in self.running.items() if run.poll() is not None]:
                    self._end(cell, self.running.pop(cell).returncode)
        finally:  # after an error: no run goes on alone
            for process in self.running.values():
                process.terminate()
                process.wait()

    def _start(self, cell: Cell) -> None:
        if self.stopped:
            return
        threads = str(max((os.cpu_count() or 1) // self.options.jobs, 1))
        command = [sys.executable, "-m", "fastlars.trainer", *self.grid.command(cell).split()]
        command += ["--data", str(self.folders[cell.kind]), "--workers", threads]
        command += ["--output", str(self.options.runs / cell.name)]
        command += ["--resume", "auto"] * (cell.kind != FIND_LR)
        with open(self.options.runs / f"{cell.name}.log", "wb") as log:
            # A session of its own: Ctrl-C reaches the trainer through `_stop`, once. Where this
            # process is killed, the trainer goes on alone and keeps the lock.
            self.running[cell] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                pass_fds=(self.lock.fileno(),), env=os.environ | {"OMP_NUM_THREADS": threads},
            )  # fmt: skip
        if self.stopped:  # by a signal that came before the process was in `running`
            self.running[cell].terminate()

    def _end(self, cell: Cell, status: int) -> None:
        if self.stopped and status in STOPPED:
            print(f"{cell.name}: stopped; the same command goes on with it", flush=True)
            return
        row = result(self.grid, cell, self.options.runs, status)
        self.rows = [old for old in self.rows if old.cell != cell] + [row]
        write(self.options.csv, self.rows)
        if not row.failed:  # a failed run goes on from its checkpoint the next time
            for checkpoint in (self.options.runs / cell.name).glob("*.pt"):
                checkpoint.unlink()  # 200 MB each for ResNet-50
        what = row.status if row.status != "done" else f"{row.accuracy:.2%}"
        if cell.kind == FIND_LR and row.status == "done":
            what = f"suggests {row.suggested:g}" if row.suggested else "suggests nothing"
        left = len(self.grid.missing(self.rows))
        print(f"{cell.name}: {what}; {left} runs left, searches may add more", flush=True)


def result(grid: Grid, cell: Cell, runs: Path, status: int) -> Row:
    """The row of a cell whose run has ended with this exit status."""
    accuracy = loss = suggested = seconds = 0.0
    log = (runs / f"{cell.name}.log").read_text(errors="replace")
    last = [line for line in log.split("\n") if line][-1:] or ["it wrote nothing"]
    reason = "diverged" if status == DIVERGED else f"failed with exit status {status}"
    reason += f": {last[0].removeprefix('fastlars.trainer: error: ')}"
    if cell.kind == FIND_LR and not status:
        found = re.search(r"^ *suggest +--lr ([^, ]+)", log, re.MULTILINE)
        suggested = float(found[1]) if found else 0.0  # where no rate lowers the loss
    elif not status:
        metrics = (runs / cell.name / "metrics.jsonl").read_text()
        records = [json.loads(line) for line in metrics.splitlines()]
        trained = [record for record in records if record["kind"] == "train"]
        seconds = sum(record["images"] / record["images_per_second"] for record in trained)
        accuracy = [record["accuracy"] for record in records if record["kind"] == "test"][-1]
        loss = trained[-1]["loss"]
    return Row(
        **asdict(cell),
        images=grid.images,
        status=reason if status else "done",
        accuracy=round(accuracy, 6),
        loss=round(loss, 6),
        suggested=suggested,
        seconds=round(seconds, 1),
        machine=machine(),
        versions=f"fastlars {fastlars.__version__}, torch {torch.__version__}",
        command=grid.command(cell),
    )


@cache
def machine() -> str:
    """What the runs are made on."""
    on_gpu = torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else describe()["machine"]


def image_folders(grid: Grid, data: Path, runs: Path) -> dict[str, Path]:
    """A folder of links for each kind of cell: the images to train on, and those to measure on."""
    if not (data / "test").is_dir():
        raise SystemExit(f"--data: {data} has no folder test/")
    try:
        found = ImageFolder(data / "train")  # lists the images, and reads none
    except OSError as error:
        raise SystemExit(f"--data: {error}") from None
    searches, finals = runs / f"images-{grid.images.replace(' ', '-')}", runs / "images"
    if finals.exists() and (finals / "test").resolve() != (data / "test").resolve():
        raise SystemExit(f"{runs} was begun with other images than {data}: give another --runs")
    if not searches.exists():
        partial = runs / ".images.partial"
        shutil.rmtree(partial, ignore_errors=True)
        first, last = grid.train_images, grid.train_images + grid.held_out_images
        for label, name in enumerate(found.classes):
            files = [Path(file) for file, of in found.samples if of == label]
            if len(files) < last:
                raise SystemExit(f"--data: class {name} has {len(files)} images, not {last}")
            for part, chosen in (("train", files[:first]), ("val", files[first:last])):
                (partial / part / name).mkdir(parents=True)
                for number, file in enumerate(chosen):
                    link = partial / part / name / f"{number:07}{file.suffix}"
                    link.symlink_to(file.resolve())
        partial.rename(searches)
    finals.mkdir(exist_ok=True)
    for name, target in (("train", searches / "train"), ("test", data / "test")):
        if not (finals / name).exists():
            (finals / name).symlink_to(target.resolve())
    return {SEARCH: searches, FIND_LR: searches, FINAL: finals}


@contextmanager
def alone(path: Path) -> Iterator[IO[str]]:
    """One sitting at a time for each CSV: as long as any process has the lock file open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another sitting is writing {path}") from None
        yield lock


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left of the grid, then draw and compare all that the CSV holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--grid", type=Path, default=GRID, help="grid file")
    parser.add_argument("--csv", type=Path, help="default: results/large_batch.csv, or GRID.csv")
    parser.add_argument("--picture", type=Path, help="default: an SVG next to the CSV")
    parser.add_argument("--runs", type=Path, help="logs and checkpoints; default: runs/CSV")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    name = "large_batch" if options.grid == GRID else options.grid.stem
    options.csv = options.csv or RESULTS / f"{name}.csv"
    options.picture = options.picture or options.csv.with_suffix(".svg")
    options.runs = options.runs or ROOT / "runs" / options.csv.stem
    options.runs.mkdir(parents=True, exist_ok=True)
    grid = Grid(options.grid)
    with alone(options.csv) as lock:
        sitting = Sitting(grid, options, lock)
        sitting.run()
    drawing.save(lambda: figure(grid, sitting.rows), options.picture)
    print(table(grid, sitting.rows), *bars(grid, sitting.rows), sep="\n")


if __name__ == "__main__":
    main()
