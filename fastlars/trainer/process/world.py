"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import inspect
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from fastlars.trainer.errors import TrainerError, one_line
from fastlars.trainer.process import console

_ADVICE = "start the processes with torchrun, or unset WORLD_SIZE"


@dataclass(frozen=True)
class World:
    """This process among those of the run, and the few exchanges the trainer needs."""

    rank: int
    size: int
    device: torch.device
    host_group: Any = None  # gloo, also beside NCCL: host messages must not wait for the GPU

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum over all processes; a new tensor on the host."""
        numbers = numbers.detach().to("cpu", copy=True)
        if self.size > 1:
            dist.all_reduce(numbers, group=self.host_group)
        return numbers

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """What goes wrong for the user in one process is raised in all: none is left waiting."""
        mine = None
        try:
            yield
        except TrainerError as error:
            mine = str(error)
        first = next((text for text in self.gather(mine) if text is not None), None)
        if first is not None:
            raise TrainerError(first, everywhere=True)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Where another process ended, this one says so in a line, not in a stack trace."""
        try:
            yield
        except RuntimeError as error:  # gloo's has no class of its own
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            # gloo puts a place in its C++ before what happened, and advice after it.
            why = re.sub(r"^\[[^]]*\] ", "", one_line(error)).split(". ")[0]
            text = f"process {self.rank} lost another one: {why}"
            raise TrainerError(text) from error


class StopVote:
    """Whether any process wants to stop, in the same step for all.

    The answer to one call's question arrives during the step and is read by the next call, so
    that asking costs no waiting.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[torch.Tensor, Any] | None = None

    def any(self, mine: bool) -> bool:
        """True in all processes at the first call after one of them said True."""
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
        """Read the last answer, so that none is under way when the processes part."""
        if self._pending is None:
            return False
        vote, work = self._pending
        self._pending = None
        work.wait()
        return bool(vote.item())


def parallel(model: torch.nn.Module, world: World) -> torch.nn.Module:
    """The model, with gradients averaged over all processes.

    Buffers are not sent in every step: `batchnorm.share` gives all processes the same ones before
    an evaluation.
    """
    if world.size == 1:
        return model
    keywords = inspect.signature(DistributedDataParallel.__init__).parameters
    # The name that torch 2.15 deprecates, and the one that earlier releases do not know.
    name = "forward_sync_buffers" if "forward_sync_buffers" in keywords else "broadcast_buffers"
    devices = [world.device.index] if world.device.type == "cuda" else None
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, device_ids=devices, **options)


def restarted(here: World) -> bool:
    """Whether torchrun started these processes again after one had failed.

    Each host's torchrun counts its own failures: one that was itself started again begins at 0.
    """
    return any(here.gather(_number("TORCHELASTIC_RESTART_COUNT", "0", range(2**31)) > 0))


def may_restart() -> bool:
    """Whether torchrun was told to start processes again."""
    return _number("TORCHELASTIC_MAX_RESTARTS", "0", range(2**31)) > 0


@contextmanager
def connect(device: str, timeout: float) -> Iterator[World]:
    """The processes of this run, connected for as long as the context lasts.

    Args:
        device: "cpu", "cuda" or "auto".
        timeout: seconds that a process waits for another one before it gives up.
    """
    rank, size, local_rank = _numbers()
    place = _device(device, local_rank)
    if size == 1:
        yield World(0, 1, place)
        return
    cuda, patience = place.type == "cuda", timedelta(seconds=timeout)
    try:
        with console.muted():  # torch prints stacks of its C++ next to the exception
            dist.init_process_group(
                "nccl" if cuda else "gloo", store=_store(rank, size, patience), rank=rank,
                world_size=size, timeout=patience, device_id=place if cuda else None,
            )  # fmt: skip
            group = dist.new_group(backend="gloo", timeout=patience)
    except (RuntimeError, ValueError) as error:  # also DistError, e.g. of a port that is taken
        where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
        text = f"process {rank} does not reach the others at {where}: {one_line(error)}"
        raise TrainerError(text) from error
    try:
        yield World(rank, size, place, group)
    finally:
        dist.destroy_process_group()


def _numbers() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; 0, 1 and 0 in a process alone."""
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
    # int() would take more: signs, spaces, underscores.
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) in allowed):
        limits = f"a number from {allowed.start} to {allowed.stop - 1}"
        raise TrainerError(f"{name} must be {limits}, got {text!r}: {_ADVICE}")
    return int(text)


def _store(rank: int, size: int, patience: timedelta) -> Store:
    """Where the processes find each other.

    torchrun keeps one store over restarts, with the addresses of the processes that died still
    in it, and gloo would try those (pytorch#135712): hence a prefix for each attempt.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not agents,
        timeout=patience,
    )
    return PrefixStore(f"fastlars/{_attempt(store, rank, size, patience)}", store)


def _attempt(store: Store, rank: int, size: int, patience: timedelta) -> str:
    """A name that this attempt's processes share, and no earlier one's.

    TORCHELASTIC_RESTART_COUNT would not do: hosts disagree about it where only one of them saw a
    failure, or where one's torchrun was started anew. So every process says that it is here, and
    takes a name from the first one only in answer to that very word.
    """
    end = time.monotonic() + patience.total_seconds()
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here-{rank}", mine)
    while time.monotonic() < end:
        for other in range(1, size) if rank == 0 else ():
            if store.check([f"here-{other}"]):
                word = store.get(f"here-{other}").decode()
                store.set(f"answer-{other}", f"{word} {mine}")
        if rank == 0 and store.add(f"met-{mine}", 0) == size - 1:
            return mine
        if rank > 0 and store.check([f"answer-{rank}"]):
            word, name = store.get(f"answer-{rank}").decode().split()
            if word == mine:
                store.add(f"met-{name}", 1)
                return name
        time.sleep(0.02)
    raise TrainerError(
        f"process {rank} did not meet the others within {patience.total_seconds():g} s"
    )


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainerError("--device cuda: PyTorch sees no GPU on this machine", everywhere=True)
    if local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise TrainerError(f"process {local_rank} has no GPU: this machine has {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
