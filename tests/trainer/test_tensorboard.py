"""TensorBoard's event files, read by TensorBoard's own reader."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output.tensorboard import TensorBoard
from fastlars.trainer.run import loop
from trainer.helpers import Outcome, files_below, records

Train = Callable[..., Outcome]
pytestmark = pytest.mark.usefixtures("tiny", "no_picture")
RUN = ("--epochs", 2, "--batch-size", 256, "--log-every", 1)  # five steps an epoch
TAGS = {"loss/training": "loss", "accuracy/training": "accuracy", "learning_rate": "lr"}


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve that TensorBoard shows."""
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def close(curve: list[tuple[int, float]], points: list[tuple[int, float]]) -> None:
    np.testing.assert_allclose(curve, points, rtol=1e-6)  # TensorBoard keeps float32


def assert_shows(run: Path) -> None:
    """TensorBoard shows what metrics.jsonl has, each step once."""
    curves, found = scalars(run), records(run)
    for tag, key in TAGS.items():
        points = [(r["step"], r[key]) for r in found if r["kind"] == "train"]
        close(curves[tag], points)
    points = [(r["step"], r["accuracy"]) for r in found if r["kind"] == "test"]
    close(curves["accuracy/test"], points)
    trust = [record for record in found if record["kind"] == "trust"]
    assert trust[0]["ratios"]
    for name in trust[0]["ratios"]:
        points = [(r["step"], r["ratios"][name]) for r in trust]
        close(curves[f"trust_ratio/{name}"], points)


def wait_for_the_next_second() -> None:
    """TensorBoard reads files in the order of their names, which begin with the second in which
    they were made. Within one second that order is arbitrary: "10" comes before "9". Real runs take
    longer to start."""
    time.sleep(1.01 - time.time() % 1.0)


def test_a_resumed_run_shows_each_step_once(tmp_path: Path, train: Train) -> None:
    """The first part goes on after the checkpoint that the second starts from."""
    run = tmp_path / "run"
    flags = (*RUN, "--tensorboard", "--output", run)
    assert train(*flags, "--max-steps", 3).status == 0
    early = (run / "checkpoint.pt").read_bytes()
    wait_for_the_next_second()
    assert train("--resume", "--tensorboard", "--output", run, "--max-steps", 6).status == 0
    assert max(step for step, _ in scalars(run)["loss/training"]) == 6
    (run / "checkpoint.pt").write_bytes(early)
    again = ("--resume", "--tensorboard", "--output", run)
    wait_for_the_next_second()
    assert train(*again, "--max-steps", 5).status == 0
    assert_shows(run)
    assert max(step for step, _ in scalars(run)["loss/training"]) == 5
    wait_for_the_next_second()
    assert train(*again, "--max-steps", 0).status == 0
    assert_shows(run)


def test_what_was_before_the_first_event_file(tmp_path: Path, train: Train) -> None:
    """A run that is resumed elsewhere, and had no TensorBoard before, shows its first part too."""
    before, after = tmp_path / "before", tmp_path / "after"
    assert train(*RUN, "--output", before, "--max-steps", 3).status == 0
    assert not (before / "tensorboard").exists()
    flags = ("--resume", before, "--output", after, "--tensorboard")
    assert train(*flags, "--max-steps", 0).status == 0
    assert_shows(after)
    assert len(scalars(after)["loss/training"]) == 10


def test_a_run_that_fails_before_its_first_step_leaves_no_event_files(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise TrainerError("no step")

    monkeypatch.setattr(loop, "step", fail)
    assert train(*RUN, "--tensorboard", "--output", tmp_path / "run").status == 2
    assert files_below(tmp_path) == []


def test_events_are_on_the_disk_when_a_checkpoint_counts_on_them(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard", 0, pytest.fail)
    board.record({"kind": "test", "step": 1, "loss": 0.5, "accuracy": None})
    board.sync()
    assert scalars(tmp_path) == {"loss/test": [(1, 0.5)]}
    board.close()


def test_a_writer_that_cannot_be_made(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is worth more."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fail)
    outcome = train(*RUN, "--tensorboard", "--output", tmp_path, "--max-steps", 2)
    assert outcome.status == 0
    folder = tmp_path / "tensorboard"
    assert outcome.err == f"warning: no more TensorBoard in {folder}: can't start new thread\n"


def test_a_writer_that_failed_gets_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error would keep the frames of every call that raises it again."""
    calls, warnings = [], []

    class Failing:
        def __init__(self, *_arguments: object, **_options: object) -> None: ...

        def add_scalar(self, *arguments: object) -> None:
            calls.append(arguments)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Failing)
    board = TensorBoard(tmp_path, 0, warnings.append)
    for step in range(3):
        board.record({"kind": "test", "step": step, "loss": 0.5, "accuracy": None})
    board.sync()
    board.close()
    assert len(calls) == 1
    assert warnings == [f"no more TensorBoard in {tmp_path}: No space left on device"]


def test_without_tensorboard_installed(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    outcome = train(*RUN, "--tensorboard", "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "--tensorboard: tensorboard is not installed: pip install" in outcome.err
    assert files_below(tmp_path) == []


def test_where_nothing_can_be_written(tmp_path: Path, train: Train) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    outcome = train(*RUN, "--tensorboard", "--output", tmp_path)
    assert outcome.status == 2
    assert f"--tensorboard: {tmp_path / 'tensorboard'} is not a folder" in outcome.err
    assert files_below(tmp_path) == ["tensorboard"]
