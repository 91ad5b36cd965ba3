"""What a run tells: records for programs, a progress bar and lines for people."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output import atomic
from fastlars.trainer.output.checkpoint import NotSavedError

Record = dict[str, Any]


class Listener(Protocol):
    """What else wants a run's records."""

    def record(self, record: Record) -> None:
        """Take one record, as it stands in metrics.jsonl."""

    def sync(self) -> None:
        """Have on the disk what was taken."""

    def close(self) -> None:
        """No more records."""


class Records:
    """The records of a run: lines of metrics.jsonl, and whatever its listeners make of them.

    A record has a kind: start, norms, train, trust, test or end; all but start have step and epoch.
    Records are kept in memory until `open`, so that a run that fails at its start replaces nothing;
    and while the disk is full, until there is room again.

    Args:
        path: the file.
        keep: lines of `source` to keep, those written before the checkpoint; 0 for a new run.
        source: where those lines are; the same file, or that of the run to go on from.
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
        """Write the lines that are kept and the records so far; later ones are written at once."""
        try:
            atomic.write(self._path, lambda file: file.write(self._waiting))
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - see close()
        except OSError as error:
            raise TrainerError(f"cannot write {self._path}: {error.strerror}") from None
        self._waiting = b""

    def write(self, kind: str, **values: Any) -> None:
        """Append one record, and hand it to every listener.

        Floats that are no finite numbers become None: JSON has no inf or nan.
        """
        record = _finite({"kind": kind} | values)
        self._waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        with suppress(OSError):  # `sync` tells of it
            self._flush()
        self.lines += 1
        for listener in self.listeners:
            listener.record(record)

    def _flush(self) -> None:
        while self._waiting and self._file is not None:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """Have all records on the disk, before a checkpoint that counts on them."""
        assert self._file is not None, "no checkpoint comes before `open`"
        try:
            self._flush()
            atomic.sync(self._file.fileno())
            for listener in self.listeners:
                listener.sync()
        except OSError as error:
            raise NotSavedError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """No more records."""
        if self._file is not None:
            with suppress(OSError):
                self._flush()
            self._file.close()
        for listener in self.listeners:
            listener.close()


def read(path: Path) -> list[Record]:
    """All records of a log; a line that a kill cut short is left out."""
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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
