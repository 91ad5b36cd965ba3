"""Timing by interleaved rounds: a, b, a, b, ... in one process, medians, ratios round by round.

Times of a shared machine drift by more than the differences that matter; two neighbours in one
round see the same machine. :func:`interleave` takes the host's clock, :func:`interleave_device` the
device's.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.machine import Machine, Mark

Calls = Mapping[str, Callable[[], object]]
WARM_UP = 2
LEAST = 5
# Longer leads would hide launches by the thousand, which nobody's queue holds.
LONGEST_LEAD_S = 2e-3


@dataclass(frozen=True)
class Sample:
    """Seconds of every round; on the host, of those in which nothing else ran on our core."""

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


def lead(host: Sample) -> float:
    """Seconds of other work that a device needs so as not to wait while the host enqueues."""
    return min(1.3 * host.quantile(0.8), LONGEST_LEAD_S)


def interleave(
    calls: Calls, rounds: int, *, between: Calls | None = None, limit_s: float = math.inf
) -> dict[str, Sample]:
    """Time every call once a round, by the host's clock.

    Args:
        calls: what to time.
        rounds: how often; two more rounds come first and are thrown away.
        between: untimed, after the call of the same name; to undo what it did to its inputs.
        limit_s: no further round begins after so many seconds, once there are five.

    Rounds in which the system took a core away are left out while enough others remain.
    """
    clean: dict[str, list[float]] = {name: [] for name in calls}
    every: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + limit_s
    for number in range(rounds + WARM_UP):
        if number >= LEAST + WARM_UP and time.perf_counter() > end:
            break
        for name, call in calls.items():
            before = _interruptions()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            undisturbed = _interruptions() == before
            if between and name in between:
                between[name]()
            if number < WARM_UP:
                continue
            every[name].append(seconds)
            if undisturbed:
                clean[name].append(seconds)
    least = max(LEAST, rounds // 4)
    return {
        name: Sample(clean[name] if len(clean[name]) >= least else every[name]) for name in calls
    }


def interleave_device(
    calls: Calls,
    rounds: int,
    machine: Machine,
    *,
    leads: Mapping[str, float],
    between: Calls | None = None,
    limit_s: float = math.inf,
) -> dict[str, Sample]:
    """Time every call once a round, by the device's clock and with a cold cache.

    Args:
        calls: what to time; they enqueue work and do not wait for it.
        rounds: how often; two more rounds come first and are thrown away.
        machine: the device.
        leads: seconds of other work that the device is given before the call of that name, so that
            it does not wait for the host while the call enqueues.
        between: untimed, after the call of the same name.
        limit_s: no further round begins after so many seconds, once there are five.
    """
    marks: dict[str, list[tuple[Mark, Mark]]] = {name: [] for name in calls}
    end = time.perf_counter() + limit_s
    for number in range(rounds + WARM_UP):
        if number >= LEAST + WARM_UP and time.perf_counter() > end:
            break
        for name, call in calls.items():
            machine.flush(leads.get(name, 0.0))
            start = machine.mark()
            call()
            marks[name].append((start, machine.mark()))
            if between and name in between:
                between[name]()
        machine.wait()
    return {
        name: Sample([start.elapsed_time(stop) * 1e-3 for start, stop in pairs[WARM_UP:]])
        for name, pairs in marks.items()
    }
