"""The picture of timeline.py's rows: one iteration of each contender, on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import drawing

# The rows of a panel from top to bottom, the name of each, and its colour.
_ROWS = {
    "forward": ("forward", drawing.GREY),
    "backward": ("backward", "C0"),
    "all-reduce": ("all-reduce", "C1"),
    "step of a bucket": ("bucket's step", "C2"),
    "optimizer.step()": ("step()", "C3"),
}


def figure(rows: Sequence[Mapping[str, str]]) -> Any:
    """A panel for each contender."""
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    made, panels = drawing.panels([0.95] * len(contenders), left=0.95, right=0.15, gap=0.35)
    ends = {name: max(_span(row)[1] for row in rows if row["contender"] == name)
            for name in contenders}  # fmt: skip
    narrowest = max(ends.values()) / 250
    for panel, name in zip(panels, contenders, strict=True):
        for row in rows:
            if row["contender"] == name:
                begin, end = _span(row)
                place = list(_ROWS).index(row["what"])
                # Two bars that touch stay two; the shortest one can be seen.
                width = max(end - begin - narrowest / 2, narrowest)
                panel.barh(place, width, 0.75, begin, color=_ROWS[row["what"]][1])
        panel.axvline(ends[name], color=drawing.GREY, linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(_ROWS)), [label for label, _ in _ROWS.values()])
        panel.set(ylim=(len(_ROWS) - 0.4, -0.6), xlim=(0, 1.03 * max(ends.values())))
        panel.set_title(f"{name}: {ends[name]:.0f} ms")
        panel.grid(visible=False, axis="y")
        if panel is not panels[-1]:
            panel.set_xticklabels([])
    panels[-1].set_xlabel("ms")
    return made


def _span(row: Mapping[str, str]) -> tuple[float, float]:
    return float(row["from_ms"]), float(row["until_ms"])
