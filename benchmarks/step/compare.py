"""A run of the benchmarks against results that are committed, by ratio.

Times of two machines, or of one machine on two days, do not compare; how fastlars stands to the
same peer in the same rounds does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Rows = Iterable[Mapping[str, Any]]
# On the VM of cpu.csv the same build's ratios differ by up to a tenth from run to run.
TOLERANCE = 1.15


def _ratios(rows: Rows) -> dict[tuple[str, str], float]:
    return {
        (row["group"], row["contender"]): float(row["fastlars_over_this"])
        for row in rows
        if row["fastlars_over_this"] and row["contender"] != "fastlars"
    }


def regressions(old: Rows, new: Rows, tolerance: float = TOLERANCE) -> list[str]:
    """A line for every case in which fastlars lost more than `tolerance` against a contender."""
    before, now = _ratios(old), _ratios(new)
    return [
        f"{group}: fastlars / {contender} is {now[group, contender]:.3g}, "
        f"was {before[group, contender]:.3g}"
        for group, contender in now
        if (group, contender) in before
        and now[group, contender] > tolerance * before[group, contender]
    ]


def shared(old: Rows, new: Rows) -> int:
    """How many ratios both have."""
    return len(_ratios(old).keys() & _ratios(new).keys())
