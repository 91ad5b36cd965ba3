"""Worker processes that read image files, some batches ahead of the training."""

from __future__ import annotations

import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ENOSPC
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from fastlars.trainer.data import decode, sharing
from fastlars.trainer.data.device_dataset import Part
from fastlars.trainer.data.listing import Files
from fastlars.trainer.errors import (
    FILE_LIMIT_HINT,
    TrainerError,
    hits_file_limit,
    one_line,
    printable,
    reason,
)

_AHEAD = 2  # batches that each worker may have finished
# A worker that cannot open a file to send it closes the connection, without saying why.
_MAYBE_FILES = "too few open files (ulimit -n)"
_LOST = f"--workers: a worker process died; is memory or /dev/shm full, or {_MAYBE_FILES}?"
_NAMED = 5  # bad images that the error names

Prepare = Callable[[torch.Tensor, int, int], torch.Tensor]  # image, epoch, index
Asked = tuple[int, list[int]]  # epoch, indices


class Skipped:
    """The images that a process could not read: each is told of once, up to a limit.

    Args:
        limit: how many there may be.
        shown: print a warning for each.
    """

    def __init__(self, limit: int, *, shown: bool = True) -> None:
        self._limit, self.shown = limit, shown
        self._found: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, path: str, reason: str) -> None:
        """Count the image at `path`; TrainerError where there are too many."""
        if path in self._found:
            return
        self._found[path] = reason
        if len(self) > self._limit:
            raise TrainerError(self._error())
        if self.shown:
            text = f"warning: skipped image {path}: {reason} ({len(self)} of {self._limit})"
            tqdm.write(printable(text), file=sys.stderr)

    def _error(self) -> str:
        first = [f"{path}: {why}" for path, why in list(self._found.items())[:_NAMED]]
        if self._limit == 0:
            return f"cannot read image {first[0]} (--max-bad-images would skip some)"
        more = f"; and {len(self) - _NAMED} more" if len(self) > _NAMED else ""
        return (
            f"more than --max-bad-images {self._limit} cannot be read: " + "; ".join(first) + more
        )


class Reader:
    """Reads images of one kind. Made by `readers`; its workers may read another kind meanwhile."""

    def __init__(self, pool: _Pool, kind: int, files: Files, skipped: Skipped) -> None:
        self._pool, self._kind, self.files, self._skipped = pool, kind, files, skipped

    def read(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Part]:
        """The images at each (epoch, indices), in that order, without those that are bad."""
        device = self._pool.device
        for batch in self._pool.read(self._kind, batches):
            for index, why in zip(batch.bad, batch.reasons, strict=True):
                self._skipped.add(self.files[index][0], why)
            pixels = batch.pixels.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            indices = batch.indices.to(device, non_blocking=True)
            yield Part(pixels, labels, batch.epoch, indices)


def readers(
    kinds: Sequence[tuple[Files, Prepare]], workers: int, device: torch.device, skipped: Skipped
) -> list[Reader]:
    """A reader for each kind of images, all with the same worker processes.

    Args:
        kinds: the images, and what is done to each; the results must be of one shape.
        workers: processes that read; 0: the calling one.
        device: where the batches are put.
        skipped: where images that cannot be read are counted.
    """
    pool = _Pool([_Images(*kind) for kind in kinds], workers, device)
    return [Reader(pool, number, files, skipped) for number, (files, _) in enumerate(kinds)]


@dataclass(eq=False)
class _Reading:
    """Batches of one kind that somebody goes through."""

    kind: int
    batches: Iterator[tuple[int, torch.Tensor]]
    arrived: deque[_Batch] = field(default_factory=deque)
    on_their_way: int = 0
    asked_all: bool = False


class _Requests:
    """What the loader is to fetch: for the reading that began last, then for those before it.

    When nothing is left to fetch, it stays ended until everything has arrived; then the loader
    starts again. Without that the loader, which asks only when a batch arrives, would keep one
    worker busy and leave the others idle.

    Args:
        ahead: how many batches may be on their way; as many may wait for a reading.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead, self._ended = ahead, False
        self.readings: list[_Reading] = []
        self.sent: deque[_Reading] = deque()  # whose the batches on their way are, in order

    def __iter__(self) -> Iterator[tuple[int, Asked]]:
        self._ended = False
        return self

    def __next__(self) -> tuple[int, Asked]:
        for reading in [] if self._ended else reversed(self.readings):
            if reading is not self.readings[-1] and not len(reading.arrived) <= self._ahead > 0:
                break
            for epoch, indices in reading.batches:
                self.sent.append(reading)
                reading.on_their_way += 1
                # Lists: a tensor would travel to the worker through a file of its own.
                return reading.kind, (epoch, indices.tolist())
            reading.asked_all = True
        self._ended = True
        raise StopIteration


class _Pool:
    """One set of workers for training and test images.

    What the training has asked for by then arrives first, and waits for it.
    """

    def __init__(self, kinds: Sequence[_Images], workers: int, device: torch.device) -> None:
        self.device = device
        self._requests = _Requests(workers * _AHEAD)
        with _unwarned():
            self._loader: DataLoader[Any] = DataLoader(
                _Kinds(kinds),
                batch_size=None,  # a request is a whole batch
                sampler=self._requests,
                num_workers=workers,
                prefetch_factor=_AHEAD if workers else None,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
                worker_init_fn=_start_worker,
                # Without one of its own the loader draws from the global generator, and a resumed
                # run would no longer be where the undisturbed one is.
                generator=torch.Generator(),
            )
        self._found: Iterator[_Sent] = iter(())

    def read(self, kind: int, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[_Batch]:
        """The batches of one kind, in order."""
        requests = self._requests
        reading = _Reading(kind, iter(batches))
        requests.readings.append(reading)
        try:
            while reading.arrived or reading.on_their_way or not reading.asked_all:
                if reading.arrived:
                    yield reading.arrived.popleft()
                else:
                    self._receive()
        finally:
            requests.readings.remove(reading)

    def _receive(self) -> None:
        """Hand the next batch, where there is one, to whoever asked for it."""
        # A test takes place in inference mode, and a batch of the training may arrive meanwhile.
        with torch.inference_mode(False), _worker_errors_in_a_line():
            if not self._requests.sent:
                with _child_signals_as_they_are(), _unwarned():
                    self._found = iter(self._loader)
            batch = next(self._found, None)
            if isinstance(batch, sharing.Packed):
                batch = batch.open()
        if batch is not None:
            reading = self._requests.sent.popleft()
            reading.on_their_way -= 1
            reading.arrived.append(batch)


@contextmanager
def _worker_errors_in_a_line() -> Iterator[None]:
    """What goes wrong between the trainer and its workers is a TrainerError."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:  # torch's has no class of its own
        text = str(error)
        if hits_file_limit(text):
            said = f"--workers: Too many open files: {FILE_LIMIT_HINT}"
        elif isinstance(error, ConnectionError) or "DataLoader worker (pid" in text:
            said = f"{_LOST} {one_line(error)}"
        elif isinstance(error, RuntimeError):
            raise
        else:
            why = (
                reason(error)
                if isinstance(error, OSError)
                else f"a pipe is closed: {_MAYBE_FILES}?"
            )
            full = " in /dev/shm" if isinstance(error, OSError) and error.errno == ENOSPC else ""
            said = f"--workers: {why}{full}; with --workers 0 the trainer reads alone"
        raise TrainerError(said) from error


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without torch's advice on the number of workers, which the user has chosen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


class _Batch(NamedTuple):
    """What a worker sends."""

    pixels: torch.Tensor  # [n, side, side, 3]
    labels: torch.Tensor
    epoch: int
    indices: torch.Tensor
    bad: list[int]
    reasons: list[str]


_Sent = _Batch | sharing.Packed[_Batch]


class _Images(Dataset[_Sent]):
    """Reads a batch; picklable, for workers that are not forked."""

    def __init__(self, files: Sequence[tuple[str, int]], prepare: Prepare) -> None:
        self._files, self._prepare = files, prepare

    def __getitem__(self, request: tuple[int, list[int]]) -> _Sent:
        epoch, indices = request
        pixels, labels, good, bad, reasons = [], [], [], [], []
        for index in indices:
            path, label = self._files[index]
            try:
                image = self._prepare(decode.decode(path), epoch, index)
            except decode.BAD as error:
                bad.append(index)
                reasons.append(decode.reason(error))
            else:
                pixels.append(image.permute(1, 2, 0))
                labels.append(label)
                good.append(index)
        working = get_worker_info() is not None
        stack = sharing.stack if working else torch.stack
        together = stack(pixels) if pixels else torch.empty(0, 1, 1, 3, dtype=torch.uint8)
        label_tensor, index_tensor = (torch.tensor(n, dtype=torch.int64) for n in (labels, good))
        batch = _Batch(together, label_tensor, epoch, index_tensor, bad, reasons)
        return sharing.Packed(batch) if working else batch


class _Kinds(Dataset[_Sent]):
    """The batches of several kinds."""

    def __init__(self, kinds: Sequence[_Images]) -> None:
        self._kinds = kinds

    def __getitem__(self, request: tuple[int, Asked]) -> _Sent:
        kind, asked = request
        return self._kinds[kind][asked]


@contextmanager
def _child_signals_as_they_are() -> Iterator[None]:
    """Keeps torch from handling SIGCHLD.

    When a worker dies its handler raises wherever the trainer happens to be, even half-way through
    a checkpoint. Without it the next batch finds out, within 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) != before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _start_worker(_worker: int) -> None:
    # Its threads would print stack traces; what ends a batch is sent to the trainer.
    sys.excepthook = lambda _kind, _error, _trace: None
    # Ctrl-C and a terminal's end reach workers too, but the training process decides; it ends them
    # with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
