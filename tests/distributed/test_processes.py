"""The helper that starts processes: values come back by rank, failures as they were."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

from distributed.processes import WorkerError, outcomes, run


def total(start: torch.Tensor) -> torch.Tensor:
    start = start + dist.get_rank()
    dist.all_reduce(start)
    return start


def fail_on(rank: int, how: str) -> int:
    if dist.get_rank() != rank:
        return dist.get_rank()
    if how == "raise":
        raise ValueError("as asked")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)
    return -1


def test_values_come_back_by_rank() -> None:
    assert [int(value) for value in run(2, total, torch.tensor(4))] == [9, 9]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ValueError: as asked"),
        ("die", "exit code -9"),
        ("crash", r"exit code -11\nFatal Python error: Segmentation fault(?s:.*) in fail_on"),
        pytest.param("hang", "did not end within 30 s", marks=pytest.mark.slow),
    ],
)
def test_a_failure_says_what_it_was(how: str, message: str) -> None:
    # The other process waits for the group's timeout before it ends; on a busy machine, longer.
    zero, one = outcomes(2, fail_on, 1, how, timeout=30, group_timeout=5)
    assert zero.value == 0
    assert re.search(message, one.error)


def test_the_first_error_is_raised_at_once() -> None:
    with pytest.raises(WorkerError, match=r"rank 1 of 2:(?s:.*)as asked"):
        run(2, fail_on, 1, "raise")
