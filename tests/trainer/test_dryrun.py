"""What a run would do, need and take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from fastlars.trainer.config import command_line
from fastlars.trainer.data.digits import Digits
from fastlars.trainer.model import memory, resnet
from fastlars.trainer.model.context import Progress, TrainingContext, build
from fastlars.trainer.process.world import World
from fastlars.trainer.run import dry_run
from trainer.helpers import Outcome, facts, files_below, tiny_net
from trainer.processes import finish, start

Train = Callable[..., Outcome]
CPU = torch.device("cpu")
# tiny_net: 3*3*3*16 weights of the convolution, 2*16 of the norm, 144*10+10 of the classifier.
PARAMETERS = 432 + 32 + 1450
BUFFERS = 2 * 16 * 4 + 8  # running mean and variance, and the counter
KEPT = 1797 * 32 * 32 * 4  # the digits


def context(**settings: object) -> TrainingContext:
    found = command_line.new_config({"data": "digits", **settings}, 1)
    return build(found, Digits(0, CPU), Progress(), World(0, 1, CPU))


def megabytes(text: str) -> dict[str, float]:
    """MB by what they are for."""
    told = re.search("of which (.*?);", text)
    assert told is not None
    pattern = r"([A-Za-z ]+) ([\d.]+) MB(?:, |$)"
    return {what: float(count) for what, count in re.findall(pattern, told[1])}


@pytest.mark.usefixtures("tiny")
def test_nothing_is_written(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = train("--dry-run", "--lr", 0.5, "--tensorboard", "--mllog")
    assert outcome.status == 0, outcome.err
    assert files_below(tmp_path) == []
    said = facts(outcome.out)
    assert said["recipe"].startswith("lars: ")
    assert said["changed"] == "--lr 0.5 (recipe: 1)"
    assert said["rate"].startswith("2 epochs of warm-up from 0, then lr 0.5, schedule poly; ")
    assert " for 154 steps, " in said["time"]
    assert outcome.out.endswith("nothing was written; a run would write in runs/digits-lars-1\n")
    assert train("--dry-run", "--output", "a/b").out.endswith("a run would write in a/b\n")
    assert files_below(tmp_path) == []


@pytest.mark.usefixtures("tiny", "no_picture")
def test_of_a_run_to_go_on_with(tmp_path: Path, train: Train) -> None:
    assert train("--max-steps", 4, "--output", tmp_path).status == 0
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    outcome = train("--dry-run", "--resume", "--output", tmp_path)
    assert outcome.status == 0, outcome.err
    assert " for 150 steps, " in facts(outcome.out)["time"]
    refused = train("--dry-run", "--output", tmp_path)
    assert refused.status == 2
    assert "holds a run already" in refused.err
    assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == before


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("settings", "states"),
    [({"recipe": "lars"}, 4 * PARAMETERS), ({"recipe": "lamb"}, 8 * PARAMETERS + 4 * 5)],
)
def test_weights_gradients_and_states_are_exact(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], states: int
) -> None:
    """lamb: two moments, and a counter for each of the 5 parameters."""
    monkeypatch.setattr(memory, "size", lambda count: f"{count} MB")
    monkeypatch.setattr(memory, "_resident", lambda: 10**8 + 4 * PARAMETERS + BUFFERS + KEPT)
    told = facts("\n".join(dry_run.describe(context(ema=0.5, **settings), 0)))["needs"]
    found = megabytes(told)
    workspaces = found.pop("workspaces")
    assert workspaces == pytest.approx(sum(found.values()) / 10, rel=0.001)
    assert found.pop("activations") > 0
    assert found == {
        "Python and its packages": 1e8,
        "images of a batch": 128 * 3 * 32 * 32,
        "kept images": KEPT,
        "weights": 4 * PARAMETERS + BUFFERS,
        "gradients": 4 * PARAMETERS,
        "optimizer states": states,
        "moving average": 4 * PARAMETERS + BUFFERS,
    }
    whole = re.search(r"memory of a process: ([\d.]+) MB", told)
    assert whole is not None
    assert float(whole[1]) == pytest.approx(sum(megabytes(told).values()))


@pytest.mark.usefixtures("tiny")
def test_the_time_is_that_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 epochs of 5 steps, of which 10 are done; a step is 2 forward passes of 128 images."""
    monkeypatch.setattr(dry_run, "_timed_images", lambda *_: 32)
    monkeypatch.setattr(dry_run, "_step_seconds", lambda *_: 0.5)
    lines = dry_run.describe(context(batch_size=256, micro_batch=128), 60)
    told = facts("\n".join(lines))["time"]
    assert told.startswith("4.0 min for 60 steps, 4 s a step, from 3 steps of 32 images a process")


@pytest.mark.usefixtures("tiny")
def test_steps_are_timed_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 100.0, 103.0, 110.0, 111.0, 120.0, 122.0])
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: next(clock))
    job = context(batch_size=64)
    assert isinstance(job.schedule, LambdaLR)
    assert dry_run._step_seconds(job, 8) == 2.0
    assert job.schedule.last_epoch == 4


@pytest.mark.parametrize(("bn_batch", "images"), [(0, 25), (32, 32), (2, 25)])
def test_a_timed_step_is_as_large_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch, bn_batch: int, images: int
) -> None:
    monkeypatch.setattr(resnet, "build", tiny_net)
    job = context(batch_size=64, bn_batch=bn_batch)
    assert dry_run._timed_images(job, 0.0, 1e7) == images
    assert dry_run._timed_images(job, 0.0, 1.0) == 64


@pytest.mark.slow
def test_two_processes_tell_one_story() -> None:
    outcome = finish(start("--dry-run", "--batch-size", 64, "--recipe", "goyal"))
    assert outcome.status == 0, outcome
    assert outcome.out.count("of a process: ") == 1
    said = facts(outcome.out)
    assert "buckets of gradients" in said["needs"]
    assert "2 processes on cpu, 32 images each, fp32" in said["steps"]
