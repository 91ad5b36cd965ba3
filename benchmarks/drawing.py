"""Pictures for the documentation: SVG, as wide as a phone, in pairs for light and dark pages.

matplotlib is imported only when one is drawn: machines with GPUs may lack it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import write_text

WIDTH = 4.2  # inches, or 403 px: 8 points stay 10 px on a phone that is 390 px wide
_TOP, _BOTTOM, _GAP = 0.28, 0.48, 0.62  # inches above, below and between panels
_LINE = 0.155  # inches between two names
# Blue, orange, green, purple, yellow, red and grey, also told apart by people who are colour-blind;
# dark or light enough for text on the page.
_THEMES = {
    "": ("#1f2328", ["#0060a8", "#b34700", "#00704f", "#a03f7c", "#7a6200", "#b3261e", "#6e7781"]),
    "-dark": (
        "#e6e6e6",
        ["#6db8f2", "#f5a15d", "#4fd0a5", "#e59bc8", "#e3cf5b", "#ff8f87", "#8b949e"],
    ),
}
GREY = "C6"


def save(make: Callable[[], Any], path: Path) -> list[Path]:
    """Draw a figure for light pages at `path`, and for dark pages next to it."""
    written = []
    for suffix, (text, colours) in _THEMES.items():
        written.append(path.with_name(f"{path.stem}{suffix}.svg"))
        write_text(written[-1], _svg(make, text, colours))
    return written


def _svg(make: Callable[[], Any], text: str, colours: list[str]) -> str:
    import matplotlib as mpl

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(names, text) | {
        "axes.prop_cycle": mpl.cycler(color=colours),
        "axes.grid": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 9,
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8,
        "grid.alpha": 0.25,
        "grid.color": colours[-1],
        "lines.linewidth": 1.3,
        "lines.markersize": 4,
        "svg.fonttype": "none",  # text, which is small and can be searched
        "svg.hashsalt": "fastlars",  # the same names in the file each time
    }
    file = io.StringIO()
    with mpl.rc_context(style):
        about = {"Date": None, "Creator": None}
        make().savefig(file, format="svg", transparent=True, metadata=about)
    # The reader's own font; matplotlib's, by which places were computed, is wider than most.
    drawn = file.getvalue().replace("'DejaVu Sans'", "sans-serif")
    return re.sub(r" +$", "", drawn, flags=re.MULTILINE)


def panels(
    heights: Sequence[float], *, left: float = 0.48, right: float = 1.15, gap: float = _GAP
) -> tuple[Any, list[Any]]:
    """A figure with panels one below the other; all lengths are inches.

    Places are fixed, so that the size of a letter in some font moves nothing.
    """
    from matplotlib.figure import Figure

    height = _TOP + sum(heights) + gap * (len(heights) - 1) + _BOTTOM
    figure, top, axes = Figure(figsize=(WIDTH, height)), height - _TOP, []
    for each in heights:
        box = (left / WIDTH, (top - each) / height, 1 - (left + right) / WIDTH, each / height)
        axes.append(figure.add_axes(box))
        top -= each + gap
    return figure, axes


def name_ends(axis: Any, ends: Sequence[tuple[str, float, float, str]], *, lines: int = 1) -> None:
    """Write names to the right of a panel, each near the point (x, y) of its curve's end.

    Args:
        axis: the panel; its limits are final.
        ends: name, x, y and colour.
        lines: of the longest name.
    """
    axis.autoscale_view()  # which matplotlib else leaves for later
    place = axis.transData + axis.transAxes.inverted()
    low_to_high = sorted(ends, key=lambda end: end[2])
    heights = [float(place.transform(end[1:3])[1]) for end in low_to_high]
    least = lines * _LINE / (axis.get_position().height * axis.figure.get_figheight())
    for (name, x, y, colour), height in zip(low_to_high, _apart(heights, least), strict=True):
        axis.annotate(
            name, (x, y), (1.04, height), textcoords="axes fraction", color=colour, va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": GREY, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 1,
                "shrinkB": 2,
            },
        )  # fmt: skip


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Rising heights, moved as little as makes each differ by `least` from the next."""
    found = list(heights)
    for _ in range(200):
        for i in range(len(found) - 1):
            short = least - (found[i + 1] - found[i])
            if short > 0:
                found[i] -= short / 2
                found[i + 1] += short / 2
    return found


def short(value: float) -> str:
    """A number for an axis: 0.1, 100, 10k, 1M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (size if unit != 'k' else 1e3):g}{unit}"
    return f"{value:g}"


def log_axes(axis: Any, *, xs: Sequence[float] = (), ys: Sequence[float] = ()) -> None:
    """Make axes logarithmic, with ticks at these values and no others."""
    from matplotlib.ticker import NullLocator

    for values, scale, ticks, lines in (
        (xs, axis.set_xscale, axis.set_xticks, axis.xaxis),
        (ys, axis.set_yscale, axis.set_yticks, axis.yaxis),
    ):
        if values:
            scale("log")
            ticks(values, [short(value) for value in values])
            lines.set_minor_locator(NullLocator())
