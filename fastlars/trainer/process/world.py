"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fastlars.trainer.errors import TrainerError, one_line
from fastlars.trainer.process import console

_ADVICE = "start the processes with torchrun, or unset WORLD_SIZE"
_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """This process among those of the run, and the few collectives that the trainer needs."""

    rank: int
    size: int
    device: torch.device
    # gloo, even if gradients use NCCL: messages of the CPU must not wait for the GPU
    host_group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def first_given(self, value: _T | None) -> _T | None:
        """The first `value`, in the order of ranks, that is not None; None if all are."""
        return next((given for given in self.gather(value) if given is not None), None)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, as a new tensor on the host."""
        numbers = numbers.detach().to("cpu", copy=True)
        if self.size > 1:
            dist.all_reduce(numbers, group=self.host_group)
        return numbers

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """A TrainerError in one process is raised in all, so that none is left waiting."""
        mine: str | None = None
        try:
            yield
        except TrainerError as error:
            mine = str(error)
        first = self.first_given(mine)
        if first is not None:
            raise TrainerError(first, everywhere=True)


class StopVote:
    """Whether any process wants to stop; all processes learn it at the same step.

    A call starts an all-reduce, which proceeds during the step, and the next call reads its result:
    voting costs no waiting.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[torch.Tensor, Any] | None = None

    def any(self, mine: bool) -> bool:
        """True in all processes at the first call after one in which `mine` was True anywhere."""
        if self._world.size == 1:
            return mine
        if self.close():
            return True
        vote = torch.tensor([int(mine)])
        work = dist.all_reduce(
            vote, op=dist.ReduceOp.MAX, group=self._world.host_group, async_op=True
        )
        self._pending = (vote, work)
        return False

    def close(self) -> bool:
        """Wait for the last vote, so that none is under way when the processes disconnect."""
        if self._pending is None:
            return False
        vote, work = self._pending
        self._pending = None
        work.wait()
        return bool(vote.item())


def restarted(here: World) -> bool:
    """Whether torchrun started these processes again after a failure.

    The answer combines all hosts: each torchrun counts its own restarts, from 0 if torchrun itself
    was started again.
    """
    return any(here.gather(_number("TORCHELASTIC_RESTART_COUNT", "0", range(2**31)) > 0))


def may_restart() -> bool:
    """Whether torchrun has --max-restarts."""
    return _number("TORCHELASTIC_MAX_RESTARTS", "0", range(2**31)) > 0


@contextmanager
def connect(device: str, timeout: float) -> Iterator[World]:
    """The processes of this run, connected while the context lasts.

    A lost connection to another process, or `timeout` seconds without an answer from it, is a
    TrainerError of one line.
    """
    rank, size, local_rank = _numbers()
    place = _device(device, local_rank)
    if size == 1:
        yield World(0, 1, place)
        return
    cuda, patience = place.type == "cuda", timedelta(seconds=timeout)
    try:
        with console.muted():  # torch's C++ prints stack traces in addition to the exception
            dist.init_process_group(
                "nccl" if cuda else "gloo", store=_store(rank, size, patience), rank=rank,
                world_size=size, timeout=patience, device_id=place if cuda else None,
            )  # fmt: skip
            group = dist.new_group(backend="gloo", timeout=patience)
    except (RuntimeError, ValueError) as error:  # also DistError, such as for a port in use
        where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
        text = f"process {rank} does not reach the others at {where}: {one_line(error)}"
        raise TrainerError(text) from error
    try:
        yield World(rank, size, place, group)
    except RuntimeError as error:  # gloo raises RuntimeError itself, so only the text tells
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        # gloo's text begins with a line of its C++ source, and ends with advice.
        why = re.sub(r"^\[[^]]*\] ", "", one_line(error)).split(". ")[0]
        text = f"process {rank} lost its connection to another process: {why}"
        raise TrainerError(text) from error
    finally:
        dist.destroy_process_group()


def _numbers() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; 0, 1, 0 without torchrun."""
    size = _number("WORLD_SIZE", "1", range(1, 2**31))
    if size == 1:
        return 0, 1, _number("LOCAL_RANK", "0", range(2**31))
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise TrainerError(f"WORLD_SIZE is {size}, but {name} is not set: {_ADVICE}")
    _number("MASTER_PORT", "", range(1, 2**16))
    return _number("RANK", "", range(size)), size, _number("LOCAL_RANK", "", range(size))


def _number(name: str, default: str, allowed: range) -> int:
    text = os.environ.get(name) or default
    # int() alone would also accept signs, spaces and underscores.
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) in allowed):
        limits = f"a number from {allowed.start} to {allowed.stop - 1}"
        raise TrainerError(f"{name} must be {limits}, got {text!r}: {_ADVICE}")
    return int(text)


def _store(rank: int, size: int, patience: timedelta) -> Store:
    """The store through which the processes of one attempt connect.

    Each attempt has its own prefix, which torch's env:// lacks. torchrun keeps its store over a
    restart, with the addresses of the dead processes in it, and with env:// a process that connects
    before the others fails at their old addresses (pytorch#135712; seen with torch 2.14.1).
    """
    master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, size, is_master=master, timeout=patience)
    return PrefixStore(f"fastlars/{_attempt(store, rank, size, patience)}", store)


def _attempt(store: Store, rank: int, size: int, patience: timedelta) -> str:
    """A name that all processes of this attempt share, and that no earlier attempt had.

    TORCHELASTIC_RESTART_COUNT is no such name: hosts disagree about it if only one of them saw a
    failure, or if one's torchrun was started again. So every process leaves a new random word in
    the store, and takes the name from an answer of process 0 only if that repeats this word.
    """
    seconds = patience.total_seconds()
    end = time.monotonic() + seconds
    word = uuid.uuid4().hex  # that of process 0 becomes the name
    if rank > 0:
        store.set(f"here-{rank}", word)
    while time.monotonic() < end:
        if rank == 0:
            for other in range(1, size):
                if store.check([f"here-{other}"]):
                    theirs = store.get(f"here-{other}").decode()
                    store.set(f"answer-{other}", f"{theirs} {word}")
            if store.add(f"met-{word}", 0) == size - 1:
                return word
        elif store.check([f"answer-{rank}"]):
            repeated, name = store.get(f"answer-{rank}").decode().split()
            if repeated == word:
                store.add(f"met-{name}", 1)
                return name
        time.sleep(0.02)
    raise TrainerError(f"process {rank} did not meet the others within {seconds:g} s")


def _device(wanted: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise TrainerError("--device cuda: PyTorch sees no GPU on this machine", everywhere=True)
    if local_rank >= count:
        raise TrainerError(f"process {local_rank} has no GPU: this machine has {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
