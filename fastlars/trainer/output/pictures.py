"""Pictures and tables of a run, drawn from its log."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastlars.trainer.errors import printable, reason
from fastlars.trainer.output import atomic, layers

Records = list[dict[str, Any]]


@contextmanager
def optional(warn: Callable[[str], None]) -> Iterator[None]:
    """A picture that cannot be drawn, for whatever reason, is a warning: the run is worth more."""
    try:
        with _plainly():
            yield
    except Exception as error:
        warn(f"no picture: {reason(error)}")


def draw(records: Records, path: Path) -> None:
    """Write the picture of a log's records that `path` is named for."""
    save(PICTURES[path.name](records), path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    atomic.write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_all(records: Records, folder: Path) -> None:
    """Write every picture and table of a log."""
    with _plainly():
        draw(records, folder / "curves.png")
        draw_layers(records, folder)


@contextmanager
def _plainly() -> Iterator[None]:
    """Without LaTeX, for which names are formulas, and without a line for each missing glyph."""
    with rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def draw_layers(records: Records, folder: Path) -> None:
    """Write what a log says of layers: trust.csv and .png, norms.csv and .png."""
    tables = {name: tabulate(records) for name, tabulate in TABLES.items()}
    found = [name for name, table in tables.items() if len(table) > 1]
    for name in found:
        atomic.write_table(tables[name], folder / f"{name}.csv")
    for name in found:  # after all tables: a picture may fail
        draw(records, folder / f"{name}.png")


def curves(records: Records) -> Figure:
    """Loss, accuracy, learning rate and trust ratios over the epochs."""
    train = [record for record in records if record["kind"] == "train"]
    test = [record for record in records if record["kind"] == "test"]
    trust = [record for record in records if record["kind"] == "trust"]
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    figure.suptitle(printable(_title(records, test)), parse_math=False)

    _training_and_test(axes[0, 0], train, test, "loss")
    axes[0, 0].set(title="Loss", ylabel="cross-entropy per image")
    axes[0, 0].set_ylim(bottom=0)

    _training_and_test(axes[0, 1], train, test, "accuracy")
    axes[0, 1].set(title="Accuracy", ylabel="images classified correctly")
    axes[0, 1].yaxis.set_major_formatter(PercentFormatter(1.0))

    axes[1, 0].plot(*_series(train, "lr"), color="tab:green")
    axes[1, 0].set(title="Learning rate", ylabel="learning rate")
    axes[1, 0].set_ylim(bottom=0)

    _ratios(figure, axes[1, 1], trust)
    for axis in axes.flat:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    return figure


def _title(records: Records, test: Records) -> str:
    title = next((record["title"] for record in records if record["kind"] == "start"), "")
    return f"{title}: {test[-1]['accuracy']:.2%} test accuracy" if test else title


def _series(records: Records, key: str) -> tuple[list[float], list[float]]:
    points = [(r["epoch"], r[key]) for r in records if r[key] is not None]
    return [x for x, _ in points], [y for _, y in points]


def _training_and_test(axis: Axes, train: Records, test: Records, key: str) -> None:
    axis.plot(*_series(train, key), label="training, augmented", alpha=0.8)
    axis.plot(*_series(test, key), label="test", marker="o", markersize=4)
    axis.legend()


def _ratios(figure: Figure, axis: Axes, trust: Records) -> None:
    axis.set(title="Trust ratio of each layer", ylabel="trust ratio")
    if not trust:
        axis.text(0.5, 0.5, "this optimizer has none", ha="center", transform=axis.transAxes)
        return
    layers = list(trust[0]["ratios"])
    colours, scale = colormaps["viridis"], Normalize(1, max(len(layers), 2))
    for depth, layer in enumerate(layers, start=1):
        points = [(r["epoch"], r["ratios"].get(layer)) for r in trust]
        points = [(x, y) for x, y in points if y is not None and y > 0]
        axis.plot(
            [x for x, _ in points], [y for _, y in points], color=colours(scale(depth)), lw=0.9
        )
    axis.set_yscale("log")
    figure.colorbar(
        ScalarMappable(scale, colours),
        ax=axis,
        label="layer, from the input to the classifier",
        ticks=MaxNLocator(integer=True),
    )


PICTURES: dict[str, Callable[[Records], Figure]] = {
    "curves.png": curves,
    "trust.png": layers.heat_map,
    "norms.png": layers.norms,
}
TABLES = {"trust": layers.trust_table, "norms": layers.norm_table}
