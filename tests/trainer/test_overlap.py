"""--overlap, --compression and --bn-statistics last in two processes, over gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.process.world import World
from fastlars.trainer.run.replica import _overlap
from trainer.helpers import Outcome, assert_same, load, records
from trainer.processes import finish, start

Train = Callable[..., Outcome]
# Two micro-batches of 16 a process: the first one's gradients must not travel.
SETTINGS = ("--recipe", "goyal", "--bn-batch", 16, "--epochs", 1, "--batch-size", 64)
RUNS: dict[str, tuple[object, ...]] = {
    "plain": ("--no-overlap",),
    "overlap": ("--overlap",),
    "fp16": ("--overlap", "--compression", "fp16"),
    "scaled": ("--no-overlap", "--precision", "fp16", "--ema", 0.5),
    "last": ("--bn-statistics", "last", "--max-steps", 6),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of RUNS, trained by the same two processes."""
    folder = tmp_path_factory.mktemp("runs")
    line: list[object] = []
    for name, flags in RUNS.items():
        line += ["then"] if line else []
        line += [*SETTINGS, "--micro-batch", 16, *flags, "--output", folder / name]
    outcome = finish(start(*line))
    assert outcome.status == 0, outcome
    return folder


def trained(run: Path) -> dict[str, Any]:
    state = load(run)
    return {what: state[what] for what in ("model", "optimizer", "schedule", "progress")}


@pytest.mark.xdist_group("overlapped runs")
@pytest.mark.slow
def test_overlap_keeps_the_bits(runs: Path) -> None:
    assert_same(trained(runs / "plain"), trained(runs / "overlap"))
    plain, overlapped = records(runs / "plain"), records(runs / "overlap")
    assert [r["step"] for r in plain if r["kind"] == "norms"] == [0, 10]  # of weights not moved yet
    assert plain[1:] == overlapped[1:]


@pytest.mark.xdist_group("overlapped runs")
@pytest.mark.slow
def test_gradients_travel_in_half_precision(runs: Path) -> None:
    """Other bits, the same training."""
    plain, half = (trained(runs / name)["model"] for name in ("plain", "fp16"))
    assert not torch.equal(plain["0.weight"], half["0.weight"])
    torch.testing.assert_close(plain["5.weight"], half["5.weight"], rtol=0.05, atol=5e-3)


@pytest.mark.xdist_group("overlapped runs")
def test_a_scaler_over_processes(runs: Path) -> None:
    """One scale for all, and weights as in float32."""
    state = load(runs / "scaled")
    assert state["scaler"]["_growth_tracker"] == 22
    plain, scaled = (load(runs / name)["model"]["5.weight"] for name in ("plain", "scaled"))
    assert not torch.equal(plain, scaled)
    torch.testing.assert_close(plain, scaled, rtol=0.05, atol=5e-3)
    assert state["average"]["n_averaged"] == 22


@pytest.mark.xdist_group("overlapped runs")
@pytest.mark.usefixtures("tiny", "no_picture")
def test_statistics_of_the_last_step_over_processes(
    runs: Path, tmp_path: Path, train: Train
) -> None:
    """As those of one process, which sees the same ghost batches."""
    flags = ("--micro-batch", 16, *RUNS["last"])
    assert train(*SETTINGS, *flags, "--output", tmp_path).status == 0
    one, two = load(tmp_path)["model"], load(runs / "last")["model"]
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_one_process_has_nothing_to_overlap(tmp_path: Path, train: Train) -> None:
    states = []
    for name in ("plain", "fp16"):
        run = tmp_path / name
        assert train(*SETTINGS, *RUNS[name], "--max-steps", 2, "--output", run).status == 0
        states.append(trained(run))
    assert_same(*states)


def test_what_overlap_refuses_is_a_line() -> None:
    layer = nn.Linear(4, 2)
    context: Any = SimpleNamespace(
        config=SimpleNamespace(compression="none"),
        optimizer=fastlars.LARS(layer.parameters(), lr=0.1),
        world=World(0, 1, torch.device("cpu")),
    )
    with pytest.raises(TrainerError, match=r"^--overlap: overlap needs a DistributedDataParallel"):
        _overlap(layer, context)  # type: ignore[arg-type]
