"""Processes killed in the middle of a step under torchrun: the run ends as if nothing had been."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.torchrun import (
    SETTINGS,
    TRAINER,
    TWO,
    assert_same_runs,
    finish,
    resumed_at,
    start,
)
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.process import world
from fastlars.trainer.process.world import World

pytestmark = pytest.mark.xdist_group("elastic")  # with one undisturbed run for both files


@pytest.mark.slow
def test_killed_in_backward_in_the_optimizer_and_while_saving(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Among them the one that writes checkpoints."""
    run, log = tmp_path / "run", tmp_path / "log"
    status = finish(
        start(
            TRAINER, *SETTINGS, "--output", run, launch=(*TWO, "--max-restarts=3"), log=log,
            DEATHS="0:backward:8 1:optimizer:23 0:checkpoint:29",
        )
    )  # fmt: skip
    text = log.read_text()
    assert status == 0, text
    assert resumed_at(text) == [5, 22, 25]
    assert_same_runs(undisturbed, run)


def attempt(store: Any, size: int, seconds: float = 20) -> list[str]:
    """What the processes of one attempt agree upon."""
    patience = timedelta(seconds=seconds)
    with ThreadPoolExecutor(size) as threads:
        ranks = range(size - 1, -1, -1)  # the first one comes last
        parts = [threads.submit(world._attempt, store, r, size, patience) for r in ranks]
        return [part.result() for part in parts]


def test_attempts_with_one_store_do_not_meet() -> None:
    """Whatever earlier ones left in it, and with more or fewer processes than they had."""
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    names = [attempt(store, size) for size in (3, 3, 4, 2)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == len(names)


def test_an_attempt_without_the_others_ends() -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    attempt(store, 2)  # which leaves its words in the store
    for rank in range(2):
        with pytest.raises(
            TrainerError, match=f"process {rank} did not meet the others within 0.1"
        ):
            world._attempt(store, rank, 2, timedelta(seconds=0.1))


@dataclass(frozen=True)
class Host(World):
    """A process among others that were started again."""

    again: bool = False

    def gather(self, value: Any) -> list[Any]:
        return [value, self.again]


@pytest.mark.parametrize(
    ("mine", "other", "expected"), [(0, False, False), (0, True, True), (2, False, True)]
)
def test_a_restart_is_one_for_all(
    monkeypatch: pytest.MonkeyPatch, mine: int, other: bool, expected: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(mine))
    assert world.restarted(Host(0, 2, torch.device("cpu"), again=other)) is expected
