"""A run directory: the latest checkpoints, the best one, and what is needed to repeat the run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlars
from fastlars.trainer.output import checkpoint
from fastlars.trainer.run import loop
from fastlars.trainer.run.meter import Figures
from trainer.helpers import Outcome, assert_same, files_below, load, records

Train = Callable[..., Outcome]
RUN = ("--epochs", 4, "--batch-size", 512, "--keep-last", 2)  # 2 steps an epoch
pytestmark = pytest.mark.usefixtures("tiny", "no_picture")


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs reach 20%, 50%, 30% and 40%."""
    reached = {2: 0.2, 4: 0.5, 6: 0.3, 8: 0.4}
    monkeypatch.setattr(
        loop,
        "evaluate",
        lambda context, _replica: Figures(1.0, reached[context.progress.step], 360),
    )


def at(path: Path) -> tuple[int, int]:
    progress = checkpoint.load(path)["progress"]
    return progress["step"], progress["evaluated"]


def checkpoints(run: Path) -> dict[str, tuple[int, int]]:
    """Step and epoch of every checkpoint in a run directory."""
    return {path.name: at(path) for path in sorted(run.glob("*.pt"))}


@pytest.mark.usefixtures("accuracies")
def test_the_latest_and_the_best(tmp_path: Path, train: Train) -> None:
    assert train(*RUN, "--checkpoint-every", 3, "--output", tmp_path).status == 0
    assert checkpoints(tmp_path) == {
        "best.pt": (4, 2),
        "checkpoint-000006.pt": (6, 3),
        "checkpoint-000008.pt": (8, 4),
        "checkpoint.pt": (8, 4),
    }


@pytest.mark.usefixtures("accuracies")
def test_one_is_kept_by_default(tmp_path: Path, train: Train) -> None:
    assert train(*RUN[:4], "--output", tmp_path).status == 0
    assert checkpoints(tmp_path) == {"best.pt": (4, 2), "checkpoint.pt": (8, 4)}


@pytest.mark.usefixtures("accuracies")
def test_names_that_a_kill_prevented(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """checkpoint.pt is there, its other names are not: the resumed run makes them."""
    with monkeypatch.context() as patch:

        def killed(*_arguments: object, **_keywords: object) -> None:
            raise SystemExit(1)

        assert train(*RUN, "--output", tmp_path, "--max-steps", 3).status == 0
        patch.setattr("fastlars.trainer.output.atomic.duplicate", killed)
        with pytest.raises(SystemExit):
            train("--resume", "--output", tmp_path, "--max-steps", 0)
    assert checkpoints(tmp_path)["checkpoint.pt"] == (4, 2)
    assert checkpoints(tmp_path)["best.pt"] == (2, 1)
    again = train("--resume", "--output", tmp_path, "--max-steps", 5, "--keep-last", 2)
    assert again.status == 0
    assert checkpoints(tmp_path) == {
        "best.pt": (4, 2),
        "checkpoint-000004.pt": (4, 2),
        "checkpoint-000005.pt": (5, 2),
        "checkpoint.pt": (5, 2),
    }


@pytest.mark.usefixtures("accuracies")
def test_an_older_one_goes_on_elsewhere(tmp_path: Path, train: Train) -> None:
    """From step 6 with the best one of step 4; from step 2 without it, for it came later."""
    whole = tmp_path / "whole"
    assert train(*RUN, "--keep-last", 9, "--output", whole).status == 0
    before = {name: (whole / name).read_bytes() for name in files_below(whole)}
    for step, best in ((6, (4, 2)), (2, (2, 1))):
        source, other = whole / f"checkpoint-00000{step}.pt", tmp_path / str(step)
        refused = train("--resume", source)
        assert refused.status == 2
        assert f"{whole} holds a different run than {source}" in refused.err
        outcome = train("--resume", source, "--output", other, "--max-steps", step + 1)
        assert outcome.status == 0
        found = checkpoints(other)
        assert found["checkpoint.pt"] == (step + 1, step // 2)
        assert found.get("best.pt") == (best if step == 6 else None)
        assert train("--resume", "--output", other, "--max-steps", 0).status == 0
        assert_same(load(whole)["model"], load(other)["model"])
        assert checkpoints(other)["best.pt"] == (4, 2)
    assert {name: (whole / name).read_bytes() for name in before} == before


@pytest.mark.usefixtures("accuracies")
def test_the_latest_by_its_number(tmp_path: Path, train: Train) -> None:
    """Another name of checkpoint.pt: no other run."""
    assert train(*RUN, "--output", tmp_path, "--max-steps", 3).status == 0
    assert train("--resume", tmp_path / "checkpoint-000003.pt", "--max-steps", 0).status == 0
    assert checkpoints(tmp_path)["checkpoint.pt"] == (8, 4)


def test_resume_auto(tmp_path: Path, train: Train) -> None:
    """The same command line starts the run and goes on with it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*RUN, "--output", whole).status == 0
    for steps in (3, 5, 0):
        line = (*RUN, "--output", parts, "--resume", "auto", "--max-steps", steps)
        outcome = train(*line)
        assert outcome.status == 0
        assert ("resumed at step" in outcome.out) is (steps != 3)
    assert_same(load(whole), load(parts))
    assert records(whole)[:-1] == [r for r in records(parts) if r["kind"] != "end"]
    refused = train(*RUN, "--resume", "auto")
    assert refused.status == 2
    assert "--resume auto needs --output" in refused.err


def test_a_best_one_is_not_overwritten(tmp_path: Path, train: Train) -> None:
    (tmp_path / "best.pt").write_text("of another run")
    outcome = train(*RUN, "--output", tmp_path)
    assert outcome.status == 2
    assert "holds a run already" in outcome.err
    assert files_below(tmp_path) == ["best.pt"]


def starts(run: Path) -> list[dict[str, Any]]:
    parsed = json.loads((run / "run.json").read_text())
    found: list[dict[str, Any]] = parsed["starts"]
    return found


def test_what_is_needed_to_repeat_a_run(tmp_path: Path, train: Train, images: Path) -> None:
    run, line = tmp_path / "run", ("--data", images, "--batch-size", 12, "--workers", 0, "--lr", 1)
    assert train(*line, "--output", run, "--max-steps", 2).status == 0
    (start,) = starts(run)
    assert start["command"][3:] == [*map(str, line), "--output", str(run), "--max-steps", "2"]
    assert (start["step"], start["processes"]) == (0, 1)
    assert start["config"]["seed"] == 0
    assert start["config"]["data"] == str(images)
    assert start["config"]["weight_decay"] > 0  # the recipe's, which no flag names
    assert start["versions"]["torch"] == torch.__version__
    assert start["versions"]["fastlars"] == fastlars.__version__
    assert start["machines"][0]["threads"] == torch.get_num_threads()
    assert start["machines"][0]["device"]
    assert "You et al. 2017" in json.loads((run / "run.json").read_text())["recipe"]


def test_every_start_is_noted(tmp_path: Path, train: Train) -> None:
    """Also of a run that goes on elsewhere, and after the file was damaged."""
    run, other = tmp_path / "run", tmp_path / "other"
    assert train(*RUN, "--output", run, "--max-steps", 1).status == 0
    assert train("--output", run, "--resume", "--max-steps", 3).status == 0
    assert train("--output", other, "--resume", run, "--max-steps", 4).status == 0
    assert [start["step"] for start in starts(other)] == [0, 1, 3]
    assert [start["step"] for start in starts(run)] == [0, 1]
    (run / "run.json").write_text("{")
    assert train("--output", run, "--resume", "--max-steps", 4).status == 0
    assert [start["step"] for start in starts(run)] == [3]


def test_no_room_for_it(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    outcome = train(*RUN, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "run.json: No space left on device" in outcome.err
    assert files_below(tmp_path) == []


def test_a_run_that_fails_at_once_leaves_nothing(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def fail(*_arguments: object, **_options: object) -> None:
        seen.extend(files_below(tmp_path / "run"))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "step", fail)
    assert train(*RUN, "--output", tmp_path / "run").status == 130
    assert seen == [".lock"]  # no file of the run's before its first step
    assert files_below(tmp_path) == []
