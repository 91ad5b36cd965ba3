"""Worker processes that read image files a few batches ahead of the training.

One DataLoader serves both training and tests, so that --workers N starts N processes. A loader for
each would be simpler, but would double the processes. Where workers are not forked (the default of
Python 3.14), each takes 600 MB with the list of ImageNet's files, and seconds to start.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ENOSPC
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from fastlars.trainer.data import decode, sharing
from fastlars.trainer.data.dataset import PixelBatch
from fastlars.trainer.data.listing import Files
from fastlars.trainer.errors import (
    FILE_LIMIT_HINT,
    TrainerError,
    hits_file_limit,
    one_line,
    printable,
    reason_of,
)

_PREFETCH = 2  # batches that each worker reads ahead
_NAMED = 5  # bad images that the error names

# The user chose the number of workers: torch's advice on it is not wanted.
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)

Transform = Callable[[torch.Tensor, int, int], torch.Tensor]  # of image, epoch and index
Request = tuple[int, int, list[int]]  # split, epoch, indices
# What a worker sends: the batch, and index and reason of each image that cannot be read.
Result = tuple[PixelBatch, list[tuple[int, str]]]


class BadImages:
    """The images that a process could not read: each is reported once, up to a limit.

    A warning for each is printed where `shown`.
    """

    def __init__(self, limit: int, *, shown: bool) -> None:
        self._limit, self.shown = limit, shown
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, path: str, reason: str) -> None:
        """Count the image at `path`; TrainerError if there are too many."""
        if path in self._reasons:
            return
        self._reasons[path] = reason
        if len(self) > self._limit:
            raise TrainerError(self._error())
        if self.shown:
            text = f"warning: skipped image {path}: {reason} ({len(self)} of {self._limit})"
            tqdm.write(printable(text), file=sys.stderr)

    def _error(self) -> str:
        named = [f"{path}: {reason}" for path, reason in list(self._reasons.items())[:_NAMED]]
        if self._limit == 0:
            return f"cannot read image {named[0]} (--max-bad-images would skip some)"
        if len(self) > _NAMED:
            named.append(f"and {len(self) - _NAMED} more")
        return f"more than --max-bad-images {self._limit} cannot be read: " + "; ".join(named)


@dataclass(eq=False)
class _Reading:
    """One pass over batches of a split: the training, or one test."""

    split: int
    batches: Iterator[tuple[int, torch.Tensor]]
    arrived: deque[Result] = field(default_factory=deque)
    exhausted: bool = False


class _Requests:
    """The loader's sampler: requests of the current reading, to its end.

    The loader takes one request whenever a batch arrives, and the batches arrive in the order of
    the requests. So a test first receives the training batches in flight, which then wait in
    `arrived` of their reading.
    """

    def __init__(self) -> None:
        self.current = _Reading(0, iter(()))  # the one that waits for a batch
        # The reading that each requested batch belongs to, in order.
        self.in_flight: deque[_Reading] = deque()

    def __iter__(self) -> Iterator[Request]:
        while (batch := next(self.current.batches, None)) is not None:
            self.in_flight.append(self.current)
            # A list: a tensor would travel to the worker through a file of its own.
            yield self.current.split, batch[0], batch[1].tolist()
        self.current.exhausted = True


class Reader:
    """Reads the images of several splits, all with the same worker processes.

    `splits` holds the files of each split (training, test), and what transforms its images to one
    shape. Without `workers` the calling process reads.
    """

    def __init__(
        self,
        splits: Sequence[tuple[Files, Transform]],
        workers: int,
        device: torch.device,
        bad_images: BadImages,
    ) -> None:
        self._splits, self._device, self._bad_images = splits, device, bad_images
        self._ahead = workers * _PREFETCH
        self._requests = _Requests()
        self._loader: DataLoader[Any] = DataLoader(
            _ImageFiles(splits),
            batch_size=None,  # a request is a whole batch
            sampler=self._requests,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
            # By default the loader draws from the global generator, on which no run may depend.
            generator=torch.Generator(),
        )
        self._results: Iterator[Result | sharing.Packed] = iter(())

    def read(self, split: int, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[PixelBatch]:
        """The images of a split at each (epoch, indices), in order, without the bad ones."""
        reading, requests = _Reading(split, iter(batches)), self._requests
        while reading.arrived or reading in requests.in_flight or not reading.exhausted:
            requests.current = reading
            # Nothing is in flight at first and after a test. The workers get new requests before
            # the waiting batches are used up, or they would idle meanwhile; but not while so many
            # batches wait that more would take too much memory.
            if not (requests.in_flight or reading.exhausted or len(reading.arrived) > self._ahead):
                self._start()
            if reading.arrived:
                yield self._on_device(split, reading.arrived.popleft())
            else:
                self._receive()

    def _start(self) -> None:
        """Start the loader on the requests of the current reading."""
        # When a worker dies, torch's handler of SIGCHLD raises wherever the trainer is, even while
        # it writes a checkpoint. Without it the next batch reports the death, within 5 s.
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            # Workers must not be forked in the inference mode of a test.
            with torch.inference_mode(False), _worker_errors_in_one_line():
                self._results = iter(self._loader)
        finally:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def _receive(self) -> None:
        """Hand the next batch, if there is one, to the reading that requested it."""
        # A test runs in inference mode, and a training batch may arrive meanwhile.
        with torch.inference_mode(False), _worker_errors_in_one_line():
            result = next(self._results, None)
            if isinstance(result, sharing.Packed):
                result = result.open()
        if result is not None:
            self._requests.in_flight.popleft().arrived.append(result)

    def _on_device(self, split: int, result: Result) -> PixelBatch:
        """Count the bad images, and move the batch of the others to the device."""
        (pixels, labels, epoch, indices), bad = result
        files, _ = self._splits[split]
        for index, reason in bad:
            self._bad_images.add(files[index][0], reason)
        return PixelBatch(
            pixels.to(self._device, non_blocking=True),
            labels.to(self._device, non_blocking=True),
            epoch,
            indices.to(self._device, non_blocking=True),
        )


@contextmanager
def _worker_errors_in_one_line() -> Iterator[None]:
    """Turn what goes wrong between the trainer and its workers into a TrainerError."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:  # RuntimeError: torch has no class for these
        text = str(error)
        if hits_file_limit(text):
            line = f"Too many open files: {FILE_LIMIT_HINT}"
        elif isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in text:
            # A worker that cannot open a file to send it closes the connection without a reason.
            line = (
                "a worker process died; is memory or /dev/shm full, or are too few open files "
                f"allowed (ulimit -n)? {one_line(error)}"
            )
        elif isinstance(error, OSError):
            place = " in /dev/shm" if error.errno == ENOSPC else ""
            line = f"{reason_of(error)}{place}; with --workers 0 the trainer reads alone"
        else:
            raise
        raise TrainerError(f"--workers: {line}") from error


class _ImageFiles(Dataset[Any]):
    """Reads whole batches; picklable, for workers that are not forked."""

    def __init__(self, splits: Sequence[tuple[Files, Transform]]) -> None:
        self._splits = splits

    def __getitem__(self, request: Request) -> Result | sharing.Packed:
        split, epoch, requested = request
        files, transform = self._splits[split]
        pixels, indices, bad = [], [], []
        for index in requested:
            try:
                image = transform(decode.decode(files[index][0]), epoch, index)
            except decode.BadImageError as error:
                bad.append((index, str(error)))
            else:
                pixels.append(image.permute(1, 2, 0))
                indices.append(index)
        in_worker = get_worker_info() is not None
        stack = sharing.stack if in_worker else torch.stack
        batch = PixelBatch(
            stack(pixels) if pixels else torch.empty(0, 1, 1, 3, dtype=torch.uint8),
            torch.tensor([files[index][1] for index in indices], dtype=torch.int64),
            epoch,
            torch.tensor(indices, dtype=torch.int64),
        )
        return sharing.Packed((batch, bad)) if in_worker else (batch, bad)


def _start_worker(_worker: int) -> None:
    # Threads of the worker would print stack traces; the trainer gets the error with the batch.
    sys.excepthook = lambda _kind, _error, _trace: None
    # A terminal sends Ctrl-C and its hang-up to workers too, but the trainer decides when they end;
    # it ends them with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
