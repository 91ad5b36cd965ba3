"""A run whose numbers have become NaN or infinite stops, and keeps its last good checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import checkpoint
from fastlars.trainer.run import journal, loop
from fastlars.trainer.run.loop import StepResult
from fastlars.trainer.run.meter import Figures
from fastlars.trainer.run.replica import Replica
from trainer.helpers import Outcome, load, records
from trainer.processes import finish, start

Train = Callable[..., Outcome]
RUN = ("--epochs", 3, "--batch-size", 256)  # five steps an epoch
pytestmark = pytest.mark.usefixtures("tiny", "no_picture")


def broken(context: TrainingContext, replica: Replica, what: str, value: float) -> None:
    """One number of the model, or of its moving average, is `value`."""
    average = replica.average
    network = context.model if what != "average" or average is None else average.module
    tensors: dict[str, torch.Tensor] = dict(network.state_dict())
    name = "1.running_var" if what == "statistics" else "5.bias"
    with torch.no_grad():
        tensors[name][3] = value


def breaking(monkeypatch: pytest.MonkeyPatch, what: str, value: float, at: int) -> None:
    """Break a number after step `at`, which no loss has shown yet."""
    step = loop.step

    def taken(
        context: TrainingContext, replica: Replica, *arguments: Any, **options: Any
    ) -> StepResult:
        result = step(context, replica, *arguments, **options)
        if context.progress.step == at:
            broken(context, replica, what, value)
        return result

    monkeypatch.setattr(loop, "step", taken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["weight", "statistics", "average"])
def test_the_last_good_checkpoint_stays(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, what: str, value: float
) -> None:
    """Also where a checkpoint is due before the next loss."""
    breaking(monkeypatch, what, value, at=7)
    path = tmp_path / "checkpoint.pt"
    flags = ("--ema", 0.5) if what == "average" else ()
    outcome = train(*RUN, *flags, "--checkpoint-every", 2, "--output", tmp_path, "--keep-last", 9)
    assert outcome.status == 3
    assert " at step 8: try a lower --lr or a longer --warmup-epochs; the last good" in outcome.err
    assert outcome.err.endswith(f"checkpoint is {path}\n")
    assert len(outcome.err.splitlines()) == 1
    assert load(tmp_path)["progress"]["step"] == 6
    for file in tmp_path.glob("*.pt"):
        state = checkpoint.load(file)
        assert all(torch.isfinite(t).all() for t in state["model"].values())
    assert "final test accuracy" not in outcome.out
    monkeypatch.undo()


def test_at_the_very_end(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step's weights are evaluated, and neither saved nor reported."""
    breaking(monkeypatch, "weight", float("nan"), at=14)
    outcome = train(*RUN, "--output", tmp_path)
    assert outcome.status == 3
    assert "the test loss is NaN or infinite at step 15" in outcome.err
    assert load(tmp_path)["progress"]["evaluated"] == 2
    assert [r["epoch"] for r in records(tmp_path) if r["kind"] == "test"] == [1.0, 2.0]
    assert "nan" not in outcome.out


def test_a_test_loss_alone(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are finite still, but too large to compute with."""

    def overflowed(*arguments: Any) -> Figures:
        found = evaluate(*arguments)
        return Figures(float("inf"), found.accuracy, found.images)

    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", overflowed)
    outcome = train(*RUN, "--output", tmp_path)
    assert outcome.status == 3
    assert "the test loss is NaN or infinite at step 5" in outcome.err
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_resumed_run_names_where_it_came_from(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(*RUN, "--output", first, "--max-steps", 3).status == 0
    before = {name: (first / name).read_bytes() for name in os.listdir(first)}
    breaking(monkeypatch, "weight", float("nan"), at=3)
    flags = ("--resume", first, "--output", second, "--max-steps", 0)
    outcome = train(*flags)
    assert outcome.status == 3
    assert outcome.err.endswith(f"the last good checkpoint is {first / 'checkpoint.pt'}\n")
    assert {name: (first / name).read_bytes() for name in before} == before


def test_what_is_looked_at_is_on_one_device(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums on a GPU take no tensor of the CPU, where a moving average counts its updates."""
    checked: list[list[nn.Module]] = []
    count = journal.count_not_finite

    def noted(networks: list[nn.Module]) -> torch.Tensor:
        checked.append(networks)
        return count(networks)

    monkeypatch.setattr(journal, "count_not_finite", noted)
    assert train(*RUN, "--ema", 0.5, "--max-steps", 1, "--output", tmp_path).status == 0
    (model, average), *_ = checked
    assert count([model.to("meta"), average.to("meta")]).device.type == "meta"


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Both end with the exit status, and one speaks."""
    flags = ("--recipe", "goyal", "--lr", 1e30, "--warmup-epochs", 0, "--batch-size", 64)
    outcome = finish(start(*flags, "--output", tmp_path / "run"))
    assert outcome.err.count("is NaN or infinite at step") == 1
    assert outcome.err.count("exitcode  : 3") >= 1
