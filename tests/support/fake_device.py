"""A processor in the place of the GPU that benchmarks time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Moment:
    """A time on a clock that only the test moves."""

    seconds: float

    def elapsed_time(self, end: Moment) -> float:
        return (end.seconds - self.seconds) * 1e3


@dataclass
class FakeDevice:
    """The processor in the place of a GPU; its clock stands still unless a call moves it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    now: float = 0.0
    leads: list[float] = field(default_factory=list)
    waits: int = 0
    free: int = 2**40
    recordings: int = 0

    def mark(self) -> Moment:
        self.now += 1e-6
        return Moment(self.now)

    def wait(self) -> None:
        self.waits += 1

    def flush(self, seconds: float) -> None:
        self.leads.append(seconds)
        self.now += 1.0

    def free_bytes(self) -> int:
        return self.free

    def extra_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 100

    def recorded(self, call: Callable[[], object]) -> Callable[[], object]:
        self.recordings += 1
        return call

    def facts(self) -> dict[str, str]:
        return {"gpu": "none", "driver": "1.2", "cuda": "13.0"}
