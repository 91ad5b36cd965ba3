"""The runs of benchmarks/large_batch.py: what they are called with, and what came out."""

from __future__ import annotations

import csv
import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastlars.trainer.output import atomic

BASE_BATCH = 128
FACTORS = (0.5, 1.0, 2.0)
WARMUP = 5.0  # epochs, but at most a quarter of the run


@dataclass(frozen=True)
class Contender:
    """How the trainer is told to use an optimizer.

    Attributes:
        base_lr: the middle of the grid at BASE_BATCH.
        arguments: beside what all contenders share.
    """

    base_lr: float
    arguments: tuple[str, ...]


_POLY = ("--schedule", "poly", "--power", "2", "--end-lr", "0", "--warmup-from", "0")
# Not the recipe's decay of 1.5 and missing correction, which belong to long runs on ImageNet.
_LAMB = ("--weight-decay", "0.01", "--bias-correction", "--max-grad-norm", "0")
# The middle rates: for SGD and LARS the best of the grid at 128 and 1,024 in a public table of
# ResNet-20 on CIFAR-10 (hysts, pytorch_image_classification); for LAMB table 5 of its paper.
CONTENDERS = {
    # Goyal et al.: Nesterov, steps at 1/3, 2/3 and 8/9, warm-up from a rate of 0.1.
    "sgd": Contender(0.4, ("--recipe", "goyal", "--weight-decay", "1e-4")),
    # The fairer baseline of Nado et al. 2021: the schedule of LARS.
    "sgd-poly": Contender(0.4, ("--recipe", "goyal", *_POLY, "--weight-decay", "1e-4")),
    "lars": Contender(5.0, ("--recipe", "lars", *_POLY, "--weight-decay", "1e-4")),
    "lamb": Contender(0.0025, ("--recipe", "lamb", *_POLY, "--power", "1", *_LAMB)),
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: str
    optimizer: str
    batch: int
    lr: float
    seed: int
    epochs: int
    per_class: int = 0  # training images; 0: all

    @property
    def name(self) -> str:
        """As a folder's name."""
        return (
            f"{self.model}-{self.optimizer}-b{self.batch}-lr{self.lr:g}-s{self.seed}"
            f"-e{self.epochs}-i{self.per_class or 'all'}"
        )

    def arguments(self, data: str, bn_batch: int, micro_batch: int) -> list[str]:
        """The trainer's command line, but for where it writes."""
        forward = min(self.batch, micro_batch)
        values = {
            "--data": data,
            "--model": self.model,
            "--stem": "small",
            "--batch-size": self.batch,
            "--micro-batch": forward,
            "--bn-batch": min(bn_batch, forward),
            "--lr": self.lr,
            "--seed": self.seed,
            "--epochs": self.epochs,
            "--warmup-epochs": min(WARMUP, self.epochs / 4),
            "--no-decay": "norms+biases",
            "--no-ratio": "norms+biases",
            "--bn-statistics": "running",
            "--classifier-std": 0,
            "--label-smoothing": 0,
        }
        shared = [str(part) for pair in values.items() for part in pair]
        return [*CONTENDERS[self.optimizer].arguments, *shared]


@dataclass(frozen=True)
class Row(Cell):
    """A finished run."""

    accuracy: float = 0.0  # after the last epoch; 0 where the loss was no number any more
    best_accuracy: float = 0.0
    loss: float = math.nan  # of training, at the end
    diverged: bool = True
    seconds: float = 0.0  # in the last sitting
    device: str = ""
    versions: str = ""

    @property
    def cell(self) -> Cell:
        """What was run."""
        return Cell(**{f.name: getattr(self, f.name) for f in fields(Cell)})


def rates(optimizer: str, batch: int) -> list[float]:
    """The grid at this batch, to three digits."""
    middle = CONTENDERS[optimizer].base_lr * (batch / BASE_BATCH) ** 0.5
    return [float(f"{middle * factor:.3g}") for factor in FACTORS]


def grid(
    models: Sequence[str],
    batches: Sequence[int],
    optimizers: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    per_class: int = 0,
) -> Iterator[Cell]:
    """All cells, first seeds first: what is cut short still compares everything once."""
    for seed, model, batch, optimizer in itertools.product(seeds, models, batches, optimizers):
        for lr in rates(optimizer, batch):
            yield Cell(model, optimizer, batch, lr, seed, epochs, per_class)


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    text = {"model": str, "optimizer": str, "device": str, "versions": str}
    kinds = {"batch": int, "seed": int, "epochs": int, "per_class": int, "diverged": "True".__eq__}
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Row(**{k: {**text, **kinds}.get(k, float)(v) for k, v in line.items()})
            for line in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[Row]) -> None:
    """All rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(Row)]
    atomic.write_table([names, *(asdict(row).values() for row in rows)], path)


def subset(data: Path, per_class: int, into: Path) -> Path:
    """A folder of links to the first images of each class, and to all test images."""
    root = into / f"images-{per_class}"
    if root.exists():
        return root
    partial = into / f".images-{per_class}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for folder in sorted((data / "train").iterdir()):
        files = sorted(folder.iterdir())
        if len(files) < per_class:
            raise SystemExit(f"{folder} has {len(files)} images, not {per_class}")
        (partial / "train" / folder.name).mkdir(parents=True)
        for file in files[:per_class]:
            (partial / "train" / folder.name / file.name).symlink_to(file.resolve())
    (partial / "test").symlink_to((data / "test").resolve())
    partial.rename(root)
    return root
