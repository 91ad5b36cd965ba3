"""Timing by interleaved rounds: a, b, a, b, ... in one process, medians, ratios round by round.

Times of a shared machine drift by more than the differences that matter; two neighbours in one
round see the same machine.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """Seconds of every round in which nothing else ran on our core."""

    seconds: list[float]

    def quantile(self, q: float) -> float:
        """Seconds below which a share q of the rounds lies."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _interruptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def interleave(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    *,
    between: dict[str, Callable[[], object]] | None = None,
) -> dict[str, Sample]:
    """Time every call once a round.

    Args:
        calls: what to time.
        rounds: how often; two more rounds come first and are thrown away.
        between: untimed, after the call of the same name; to undo what it did to its inputs.

    Rounds in which the system took a core away are left out while enough others remain.
    """
    clean: dict[str, list[float]] = {name: [] for name in calls}
    every: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            before = _interruptions()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            undisturbed = _interruptions() == before
            if between and name in between:
                between[name]()
            if number < 2:
                continue
            every[name].append(seconds)
            if undisturbed:
                clean[name].append(seconds)
    least = max(5, rounds // 4)
    return {
        name: Sample(clean[name] if len(clean[name]) >= least else every[name]) for name in calls
    }
