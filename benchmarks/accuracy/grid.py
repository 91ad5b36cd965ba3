"""The grid of training runs: its file, its cells, and the rows of finished cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from configparser import ConfigParser, Error
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.results import read_csv, write_csv

# The one thing that the trainer's command line cannot say: whether it would accept the flags of all
# cells, hours before the last of them is run.
from fastlars.trainer.config import command_line
from fastlars.trainer.errors import TrainerError

# What a cell is for. SEARCH measures on the held-out images, FINAL on the test images.
SEARCH, FINAL, FIND_LR = "search", "final", "find-lr"
MOST_BEYOND = 3  # rates tried beyond those of the file, while the best one is at an end


@dataclass(frozen=True)
class Cell:
    """One command of the trainer."""

    kind: str
    optimizer: str
    batch: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """As a folder's name."""
        return f"{self.optimizer}-b{self.batch}-lr{self.lr:g}-s{self.seed}-{self.kind}"


@dataclass(frozen=True)
class Row(Cell):
    """A cell that has ended. Where there is no accuracy or loss, the column is 0."""

    images: str  # of each class, as in the grid file
    status: str  # "done", or "diverged" or "failed" with the reason
    accuracy: float  # after the last epoch
    loss: float  # of training, at the end
    suggested: float  # by FIND_LR, else 0
    seconds: float  # of training, without reading and measuring
    machine: str
    versions: str
    command: str  # the trainer's arguments, without those that name folders

    @property
    def cell(self) -> Cell:
        """What was run."""
        return Cell(**{f.name: getattr(self, f.name) for f in fields(Cell)})

    @property
    def failed(self) -> bool:
        """Whether the run says nothing about the cell, and is to be run again."""
        return self.status.startswith("failed")


class Grid:
    """What a grid file compares.

    Its section [grid] has

        flags     the trainer's flags that all runs share; an optimizer's own come after them
        images    of each class: how many to train on, then how many to hold out for the search
        batches   the smallest first
        search    the seed of the search
        seeds     the seeds of the runs at the best rate

    and every other section is an optimizer, with `flags` of its own. The optimizer's rate is
    searched at each batch among `lr BATCH`, on the held-out images; where the best rate is at an
    end, one more is tried beyond it. All seeds are then run at the best rate and measured on the
    test images. An optimizer with `scales = OTHER` has no search: its rate is OTHER's best one at
    the smallest batch, times batch / smallest batch. In flags, {base} is the rate divided by that
    factor.

    Raises SystemExit where the file is incomplete or the trainer refuses its flags.
    """

    def __init__(self, path: Path) -> None:
        file = ConfigParser(interpolation=None)
        try:
            file.read_string(path.read_text(encoding="utf-8"), str(path))
            self._parse(file)
            for cell in [*self.missing([]), *(Cell(FINAL, *p, 1.0, 0) for p in self.places())]:
                self._check(cell)
        except (OSError, Error, KeyError, ValueError, TrainerError) as error:
            raise SystemExit(f"{path}: {error}") from None

    def _parse(self, file: ConfigParser) -> None:
        common = file["grid"]
        self.batches = [int(batch) for batch in common["batches"].split()]
        self.images = common["images"]
        self.train_images, self.held_out_images = map(int, self.images.split())
        self.seeds = [int(seed) for seed in common["seeds"].split()]
        self.optimizers = [name for name in file.sections() if name != "grid"]
        self._search_seed = int(common["search"])
        self._flags = {name: f"{common['flags']} {file[name]['flags']}" for name in self.optimizers}
        self._scales = {n: file[n]["scales"] for n in self.optimizers if "scales" in file[n]}
        self._rates = {
            (name, batch): sorted(map(float, file[name][f"lr {batch}"].split()))
            for batch in self.batches for name in self.optimizers if name not in self._scales
        }  # fmt: skip
        for (name, batch), rates in self._rates.items():
            if len(rates) < 2:
                raise ValueError(f"{name}: lr {batch} has fewer than 2 rates")

    def _check(self, cell: Cell) -> None:
        """Raise ValueError if the trainer refuses the flags, or if they are not for a grid file."""
        try:
            given = command_line.parse(self.command(cell).split()).given
            command_line.new_config(given)
            if wrong := given.keys() & {"data", "output", "workers", "max_steps"}:
                raise TrainerError(f"--{min(wrong).replace('_', '-')} cannot be set in a grid file")
        except TrainerError as error:
            raise ValueError(f"{cell.optimizer}, batch {cell.batch}: {error}") from None

    def command(self, cell: Cell) -> str:
        """The trainer's arguments, without those that name folders."""
        base = cell.lr * self.batches[0] / cell.batch
        words = self._flags[cell.optimizer].format(base=f"{base:g}").split()
        words += f"--batch-size {cell.batch} --lr {cell.lr:g} --seed {cell.seed}".split()
        return " ".join(words + ["--find-lr"] * (cell.kind == FIND_LR))

    def places(self) -> Iterator[tuple[str, int]]:
        """Every optimizer at every batch; at the smallest, a scaled rate is that of the other."""
        for batch in self.batches:
            for name in self.optimizers:
                if name not in self._scales or batch != self.batches[0]:
                    yield name, batch

    def searched(self, rows: Sequence[Row], optimizer: str, batch: int) -> dict[float, float]:
        """The accuracy on the held-out images at each rate, 0 where training diverged."""
        place = SEARCH, optimizer, batch, self._search_seed
        ended = (row for row in rows if not row.failed)
        found = {r.lr: r.accuracy for r in ended if (r.kind, r.optimizer, r.batch, r.seed) == place}
        return dict(sorted(found.items()))

    def best_rate(self, rows: Sequence[Row], optimizer: str, batch: int) -> float | None:
        """The rate of the final runs; None as long as the search for it goes on."""
        if optimizer in self._scales:
            base = self.best_rate(rows, self._scales[optimizer], self.batches[0])
            return base and float(f"{base * batch / self.batches[0]:g}")
        if self._next_rates(rows, optimizer, batch):
            return None
        found = self.searched(rows, optimizer, batch)
        return max(found, key=found.__getitem__)

    def _next_rates(self, rows: Sequence[Row], optimizer: str, batch: int) -> list[float]:
        """The rates that a search still has to try; none once it has ended."""
        found, asked = self.searched(rows, optimizer, batch), self._rates[optimizer, batch]
        missing = [lr for lr in asked if lr not in found]
        if missing or len(found) >= len(asked) + MOST_BEYOND:
            return missing
        low, *_, high = found
        best = max(found, key=found.__getitem__)
        beyond = {low: low * asked[0] / asked[1], high: high * asked[-1] / asked[-2]}
        return [float(f"{beyond[best]:.3g}")] if best in beyond else []

    def final(self, rows: Sequence[Row], optimizer: str, batch: int) -> list[Row]:
        """The runs at the best rate that have ended."""
        lr = self.best_rate(rows, optimizer, batch)
        cells = {Cell(FINAL, optimizer, batch, lr, seed) for seed in self.seeds if lr is not None}
        return [row for row in rows if row.cell in cells and not row.failed]

    def missing(self, rows: Sequence[Row]) -> list[Cell]:
        """The cells to run next, searches first; more follow from their results."""
        cells = []
        for name, batch in self.places():
            lr = self.best_rate(rows, name, batch)
            if lr is not None:
                cells += [Cell(FINAL, name, batch, lr, seed) for seed in self.seeds]
            if name in self._scales:
                continue
            rates = self._next_rates(rows, name, batch)
            cells += [Cell(SEARCH, name, batch, lr, self._search_seed) for lr in rates]
            # A sweep goes from a thousandth of a rate to 100 times the rate.
            cells.append(Cell(FIND_LR, name, batch, self._rates[name, batch][1], self._search_seed))
        done = {row.cell for row in rows if not row.failed}
        # One seed of every place first: what is cut short still compares everything once.
        order = [SEARCH, FIND_LR, FINAL]
        cells.sort(key=lambda cell: (order.index(cell.kind), cell.seed))
        return [cell for cell in cells if cell not in done]


def read(path: Path, grid: Grid) -> list[Row]:
    """The rows of a CSV, none where there is no file; SystemExit if another grid made them."""
    if not path.exists():
        return []
    kinds = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Row)}
    rows = [Row(**{k: kinds[k](v) for k, v in line.items()}) for line in read_csv(path)]
    for row in rows:
        known = row.optimizer in grid.optimizers and row.images == grid.images
        if not known or row.command != grid.command(row.cell):
            raise SystemExit(
                f"{path}: {row.cell.name} was run with other flags or images than the grid file "
                f"has now ({row.images}: {row.command}): give another --csv"
            )
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """All rows, whole or not at all."""
    write_csv(path, [asdict(row) for row in rows])
