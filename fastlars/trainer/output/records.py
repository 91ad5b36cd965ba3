"""The records of a run: metrics.jsonl, and listeners that show the same records elsewhere."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output import atomic
from fastlars.trainer.output.checkpoint import not_saved


class Listener(Protocol):
    """A further output for records, such as TensorBoard."""

    def record(self, record: dict[str, Any]) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class Records:
    """Writes the records of a run to metrics.jsonl and passes them to listeners.

    A record has a kind: start, norms, train, trust, test or end; all but start have step and epoch.
    Records stay in memory until `open` is called, so that a run that fails at its start replaces no
    earlier log, and while the disk is full.

    A resumed run begins with the first `keep` lines of `source`, the log in the directory of its
    checkpoint: those that were written before the checkpoint.
    """

    def __init__(self, path: Path, keep: int = 0, source: Path | None = None) -> None:
        self._path = path
        kept: list[bytes] = []
        if keep and source is not None and source.exists():
            try:
                with open(source, "rb") as old:
                    kept = list(islice(old, keep))
            except OSError as error:
                raise TrainerError(f"cannot read {source}: {error.strerror}") from None
        self.lines = len(kept)
        self.listeners: list[Listener] = []
        self._waiting = b"".join(kept)
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Write the kept lines and all records so far; from now on, records are written at once."""
        try:
            atomic.write(self._path, lambda file: file.write(self._waiting))
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - see close()
        except OSError as error:
            raise TrainerError(f"cannot write {self._path}: {error.strerror}") from None
        self._waiting = b""

    def write(self, kind: str, **values: Any) -> None:
        """Append one record and pass it to every listener.

        Infinite and NaN floats become None, because JSON has neither.
        """
        record = json.loads(json.dumps({"kind": kind} | values), parse_constant=lambda _: None)
        self._waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        with suppress(OSError):  # the next `sync` reports the error if it persists
            self._flush()
        self.lines += 1
        for listener in self.listeners:
            listener.record(record)

    def _flush(self) -> None:
        while self._waiting and self._file is not None:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """Flush all records to disk: a checkpoint saved next stores how many there are."""
        assert self._file is not None, "no checkpoint is saved before `open`"
        with not_saved(self._path):
            self._flush()
            atomic.sync(self._file.fileno())
            for listener in self.listeners:
                listener.sync()

    def close(self) -> None:
        """Write what is still in memory, if possible, and close the file and the listeners."""
        if self._file is not None:
            with suppress(OSError):
                self._flush()
            self._file.close()
        for listener in self.listeners:
            listener.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Return all records of a metrics.jsonl, up to a line that a kill cut short."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if isinstance(record, dict) and "kind" in record:
                records.append(record)
    return records
