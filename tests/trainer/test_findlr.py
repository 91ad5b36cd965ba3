"""The sweep over learning rates."""

from __future__ import annotations

import csv
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastlars.trainer.data.digits import Digits
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.model import resnet
from fastlars.trainer.run import find_lr, loop
from fastlars.trainer.run.loop import StepResult
from trainer.helpers import Outcome, facts, files_below, tiny_net
from trainer.processes import finish, start

Train = Callable[..., Outcome]
SHORT = ("--find-lr", "--batch-size", 32)


def test_the_rate_suggested_is_where_the_loss_falls_fastest() -> None:
    """A loss that falls from 2 to 1 around a rate of 0.1 and grows again from 10 on."""
    rates = np.logspace(-4, 2, 121)
    at = np.log10(rates)
    losses = 2 - 1 / (1 + np.exp(-4 * (at + 1))) + np.maximum(at - 1, 0)
    found = find_lr.suggest(rates.tolist(), losses.tolist())
    assert found is not None
    assert found == pytest.approx((0.1, 10.0), rel=0.15)
    wild = losses + 9 * (np.abs(at - 1.5) < 0.3)  # what comes after the lowest loss says nothing
    assert find_lr.suggest(rates.tolist(), wild.tolist()) == found
    assert find_lr.suggest([0.1, 1.0, 10.0], [1.0, 1.5, 2.0]) is None


def test_smoothing_shifts_nothing() -> None:
    falling = [10.0 - step for step in range(20)]
    assert find_lr.smoothed(falling)[3:-3] == falling[3:-3]
    spike = find_lr.smoothed([0.0] * 10 + [7.0] + [0.0] * 10)
    assert [step for step, loss in enumerate(spike) if loss] == list(range(7, 14))
    assert find_lr.smoothed([4.0, 2.0]) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("losses", "lost"),
    [
        ([2.0, 1.0, 1.0, 1.0], False),
        ([2.0, 1.0, 1.0, 1.0, 9.0], False),  # one step of its own is no trend
        ([2.0, 1.0, 1.0, 1.0, 9.0, 9.0], True),
        ([2.0, 1.0, 1.0, 1.0, 1.0, 6.0, 6.0], True),
        ([2.0, 1.0, float("nan")], True),
        ([2.0, float("inf")], True),
        ([2.0], False),
    ],
)
def test_the_sweep_ends_where_the_loss_is_lost(losses: list[float], lost: bool) -> None:
    assert find_lr.has_diverged(losses) is lost


NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ([4.0, 3.0, 1.0, 1.5, 2.0], "it is lowest at 1; 100 is the highest rate tried"),
        ([4.0, 3.0, 2.5, 2.0, 1.5], "it still falls at 1e+02; 100 is the highest rate tried"),
        ([4.0, 3.0, 2.5, NAN], "it still falls at 1, and NaN or infinite at 10"),
        ([4.0, 1.0, 2.5, NAN], "it is lowest at 0.1, and NaN or infinite at 10"),
        ([2.0, 1.0, 1.0, 1.0, 9.0, 9.0], "at 0.1, and over 4 times as high at 1e+03"),
        ([4.0, 1.0, 1.0, 1.0], "it is lowest at 0.1; 10 is the highest rate tried"),
        ([4.0, 1.0, 0.9], "--lr 0.01, the lowest rate tried, where the loss falls fastest; it s"),
        ([4.0, 4.0, 5.0], "nothing: no rate up to 1 brings the loss below where it begins"),
        ([4.0, NAN], "nothing: no rate up to 0.1 brings the loss below where it begins"),
    ],
)
def test_what_is_said_of_a_sweep_is_true(losses: list[float], text: str) -> None:
    """Of losses that need no smoothing."""
    rates = [10.0 ** (step - 2) for step in range(len(losses))]
    finite = [loss for loss in losses if loss == loss]
    found = find_lr.suggest(rates, finite) if len(finite) > 1 else None
    assert text in find_lr.summary(dict(zip(rates, losses, strict=True)), found)


@pytest.mark.usefixtures("tiny")
def test_a_sweep_says_what_it_does_and_not_what_a_run_would(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_lr, "STEPS", 5)
    flags = ("--lr", 0.5, "--max-steps", 2, "--mllog", "--momentum", 0.8, "--output", tmp_path)
    outcome = train(*SHORT, *flags)
    assert outcome.status == 0, outcome.err
    assert facts(outcome.out)["sweep"].startswith("lr 0.0005 to 50, weight decay 0.0001; up to 5 ")
    with open(tmp_path / "lr_find.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert (rates[0], rates[-1]) == (pytest.approx(0.0005), pytest.approx(50))
    assert "epochs of" not in outcome.out
    assert facts(outcome.out)["unused"] == "--find-lr has no use for --mllog, --max-steps"
    assert "no use" not in train(*SHORT, "--output", tmp_path).out


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("flags", [("--warmup-epochs", 1), ("--schedule", "slow-start")])
def test_what_a_sweep_has_no_use_for_does_not_stop_it(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...]
) -> None:
    monkeypatch.setattr(find_lr, "STEPS", 5)
    outcome = train(*SHORT, *flags, "--epochs", 1, "--output", tmp_path)
    assert outcome.status == 0, outcome.err


@pytest.mark.usefixtures("tiny")
def test_a_dry_run_of_a_sweep(tmp_path: Path, train: Train) -> None:
    """It finds what a sweep finds, and says what that does and takes."""
    (tmp_path / "checkpoint.pt").write_text("of a run, which a sweep leaves alone")
    outcome = train(*SHORT, "--dry-run", "--output", tmp_path)
    assert outcome.status == 0, outcome.err
    said = facts(outcome.out)
    assert "; up to 100 steps of " in said["sweep"]
    assert " for 100 steps, " in said["time"]
    assert outcome.out.endswith(f"nothing was written; a sweep would write in {tmp_path}\n")
    assert "epochs of" not in outcome.out
    assert files_below(tmp_path) == ["checkpoint.pt"]
    assert "akiba's first steps" in train("--find-lr", "--dry-run", "--recipe", "akiba").err


@pytest.mark.usefixtures("tiny")
def test_a_sweep_leaves_a_picture_and_a_table(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_lr, "STEPS", 40)
    flags = ("--recipe", "goyal", "--bn-batch", 0, "--lr", 0.1, "--output", tmp_path / "a" / "b")
    outcome = train(*SHORT, *flags, "--tensorboard", "--mllog")
    assert outcome.status == 0, outcome.err
    assert files_below(tmp_path) == ["a", "a/b", "a/b/lr_find.csv", "a/b/lr_find.png"]
    assert facts(outcome.out)["suggest"].startswith("--lr ")
    with open(tmp_path / "a/b/lr_find.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rates, losses = ([float(row[key]) for row in rows] for key in ("lr", "loss"))
    steps = np.arange(len(rates))
    np.testing.assert_allclose(rates, 1e-4 * 10 ** (5 * steps / 39), rtol=1e-6)
    np.testing.assert_allclose(losses[:20], written_out(rates[:20]), rtol=1e-4)
    assert [int(row["step"]) for row in rows] == (steps + 1).tolist()
    assert float(rows[20]["smoothed_loss"]) == pytest.approx(np.mean(losses[17:24]))


def written_out(rates: list[float]) -> list[float]:
    """Losses of torch's SGD with Nesterov momentum at these rates; no decay of norms."""
    net = tiny_net("", 10, "", 0).train()
    resnet.draw_classifier(net, 0.01, 0)
    norms = [p for n, p in net.named_parameters() if n.startswith("1.")]
    others = [p for n, p in net.named_parameters() if not n.startswith("1.")]
    groups = [{"params": others, "weight_decay": 1e-4}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    data = Digits(0, torch.device("cpu"))
    batches = data.train(BatchOrder(data.train_size, 32, 0, 0, 1, 0).from_step(0))
    losses = []
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = next(batches)
        loss = functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("tiny")
def test_a_run_in_the_same_directory_stays_as_it_is(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_lr, "STEPS", 5)
    assert train("--max-steps", 1, "--output", tmp_path).status == 0
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    assert train(*SHORT, "--output", tmp_path).status == 0
    after = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    assert {name: after.pop(name) for name in before} == before
    assert sorted(after) == ["lr_find.csv", "lr_find.png"]


@pytest.mark.usefixtures("tiny")
def test_without_output_the_directory_is_new(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find_lr, "STEPS", 5)
    assert train(*SHORT).status == 0
    assert [name for name in files_below(tmp_path) if name.endswith(".csv")] == [
        "runs/digits-lars-lr-1/lr_find.csv"
    ]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "akiba"), "--find-lr: akiba's first steps are RMSprop's"),
        (("--resume",), "--find-lr starts from new weights: leave out --resume"),
        (("--batch-size", 9999), "--batch-size 9999 exceeds"),
    ],
)
def test_mistakes_leave_nothing_behind(
    tmp_path: Path, train: Train, arguments: tuple[object, ...], message: str
) -> None:
    outcome = train(*SHORT, "--output", tmp_path / "a" / "b", *arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert files_below(tmp_path) == []


@pytest.mark.usefixtures("tiny")
def test_no_room_for_the_picture(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(find_lr, "STEPS", 5)
    monkeypatch.setattr(os, "fsync", full)
    outcome = train(*SHORT, "--output", tmp_path / "a")
    assert outcome.status == 2
    assert f"cannot write in {tmp_path / 'a'}: No space left on device" in outcome.err
    assert files_below(tmp_path) == []


@pytest.mark.usefixtures("tiny")
def test_a_signal_leaves_nothing_behind(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = loop.step, iter(range(100))

    def interrupted(*arguments: Any) -> StepResult:
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(loop, "step", interrupted)
    outcome = train(*SHORT, "--output", tmp_path / "a" / "b")
    assert outcome.status == 143
    assert next(count) == 4
    assert files_below(tmp_path) == []


@pytest.mark.slow
def test_two_processes_end_at_the_same_step(tmp_path: Path) -> None:
    outcome = finish(start(*SHORT, "--recipe", "goyal", "--lr", 100, "--output", tmp_path / "run"))
    assert outcome.status == 0, outcome
    assert files_below(tmp_path) == ["run", "run/lr_find.csv", "run/lr_find.png"]
    assert outcome.out.count("table     ") == 1
