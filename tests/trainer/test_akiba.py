"""The recipe `akiba` as a whole, against a loop written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import fastlars
from fastlars.trainer.data.digits import Digits
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.model import batchnorm, resnet
from trainer.helpers import Outcome, load, tiny_net

STEPS, PER_EPOCH = 19, 1437 // 128


@pytest.mark.usefixtures("tiny", "no_picture")
def test_steps_and_statistics(tmp_path: Path, train: Callable[..., Outcome]) -> None:
    """Steps in which the transition ends and the rate changes twice.

    Everything stems from the same operations, so the weights are equal to rounding for as long as
    no sign of a gradient flips, which RMSprop's first steps would make a step of full length.
    """
    settings = (
        "--recipe", "akiba", "--epochs", 2, "--batch-size", 128, "--micro-batch", 64,
        "--lr", 0.4, "--rmsprop-center", 0.6, "--rmsprop-period", 0.4, "--lr-rmsprop", 1e-3,
        "--max-steps", STEPS, "--output", tmp_path,
    )  # fmt: skip
    assert train(*settings).status == 0

    net = tiny_net("", 10, "", 0).train()
    resnet.draw_classifier(net, 0.01, 0)
    batchnorm.replace_norms(net, 32, "last")
    optimizer = fastlars.RMSpropWarmup(
        fastlars.parameter_groups(net, 1e-4, no_decay="norms", no_ratio="none"),
        lr=0.4,
        momentum=0.9,
        center_steps=0.6 * PER_EPOCH,
        period_steps=0.4 * PER_EPOCH,
        lr_rmsprop=1e-3,
    )
    data = Digits(0, torch.device("cpu"))
    batches = data.train(BatchOrder(data.train_size, 128, 64, 0, 1, 0).from_step(0))
    for step in range(STEPS):
        # 40, 70 and 85 of 90 epochs, in a run of 22 steps: 9.78, 17.11 and 20.78
        factor = 0.5 if step < 10 else 0.075 if step < 17 else 0.01
        for group in optimizer.param_groups:
            group["lr"] = 0.4 * factor
        optimizer.zero_grad()
        inputs = []
        for _ in range(2):
            images, labels = next(batches)
            inputs += images.split(32)
            functional.cross_entropy(net(images), labels, reduction="sum").div(128).backward()
        with torch.no_grad():  # the four workers' own
            seen = [net[0](part).double() for part in inputs]
        optimizer.step()
    saved = load(tmp_path)["model"]
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    means = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    variances = torch.stack([part.var((0, 2, 3)) for part in seen]).mean(0)
    torch.testing.assert_close(saved["1.running_mean"].double(), means, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(saved["1.running_var"].double(), variances, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_resume_within_the_transition(tmp_path: Path, train: Callable[..., Outcome]) -> None:
    settings = ("--recipe", "akiba", "--epochs", 1, "--batch-size", 128)
    spread = ("--rmsprop-center", 0.6, "--rmsprop-period", 0.4)  # it ends after 8.8 of 11 steps
    assert train(*settings, *spread, "--output", tmp_path / "whole").status == 0
    for stop in (3, 7, 10, 0):
        resume = ("--resume",) if (tmp_path / "parts").exists() else ()
        parts = (*settings, *spread, "--max-steps", stop, *resume)
        assert train(*parts, "--output", tmp_path / "parts").status == 0
    whole, parts_state = load(tmp_path / "whole"), load(tmp_path / "parts")
    for name, value in whole["model"].items():
        assert torch.equal(parts_state["model"][name], value), name
