"""The log file: which lines it keeps, and what it does without room."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output.checkpoint import NotSavedError
from fastlars.trainer.output.records import Records, read
from trainer.helpers import disk_full_after, files_below


def test_log_keeps_the_lines_before_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("of an earlier run")
    log = Records(path)
    for step in range(5):
        if step == 3:
            assert path.read_text() == "of an earlier run"
            log.open()
        log.write("train", step=step, loss=float("nan") if step == 1 else 0.5)
    assert log.lines == 5
    log.close()
    with open(path, "a") as file:
        file.write('{"kind": "tra')
    assert [record["step"] for record in read(path)] == [0, 1, 2, 3, 4]
    assert read(path)[1]["loss"] is None  # JSON has no NaN

    again = Records(path, keep=2, source=path)
    again.open()
    again.write("test", step=2)
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert files_below(tmp_path) == ["metrics.jsonl"]


def test_no_room_for_the_log(tmp_path: Path) -> None:
    """Records wait for room; a checkpoint is not made without them."""
    path = tmp_path / "metrics.jsonl"
    log = Records(path)
    log.open()
    with disk_full_after(100):
        log.write("start", title="x" * 100)
        log.write("train", step=1)
        with pytest.raises(NotSavedError, match=rf"cannot write {path}: File too large"):
            log.sync()
        assert len(path.read_bytes()) == 100  # as much as there was room for
    log.write("train", step=2)
    log.sync()
    log.close()
    assert [record.get("step") for record in read(path)] == [None, 1, 2]
    path.write_text("line\n" * 9)
    before = path.read_bytes()
    with disk_full_after(10), pytest.raises(TrainerError, match=rf"cannot write {path}: File too"):
        Records(path, 8, path).open()
    assert path.read_bytes() == before
    assert files_below(tmp_path) == ["metrics.jsonl"]
