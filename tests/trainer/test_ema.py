"""--ema: the average is what is evaluated, and it is there after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fastlars.trainer.data.digits import Digits
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.run import loop
from fastlars.trainer.run.loop import StepResult
from trainer.helpers import Outcome, assert_same, load, records, tiny_net

Train = Callable[..., Outcome]
SETTINGS = ("--epochs", 2, "--batch-size", 256, "--ema", 0.75)  # 5 steps an epoch
pytestmark = pytest.mark.usefixtures("tiny", "no_picture")


def test_average_and_its_evaluation(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step's weights, then 3/4 old and 1/4 new, in float64; buffers too."""
    expected: dict[str, torch.Tensor] = {}
    step = loop.step

    def followed(context: TrainingContext, *arguments: Any, **options: Any) -> StepResult:
        found = step(context, *arguments, **options)
        for name, value in context.model.state_dict().items():
            if value.is_floating_point():
                old = expected.get(name, value.double())
                expected[name] = 0.75 * old + 0.25 * value.double()
        return found

    monkeypatch.setattr(loop, "step", followed)
    outcome = train(*SETTINGS, "--output", tmp_path)
    assert outcome.status == 0
    state = load(tmp_path)
    average = {
        name.removeprefix("module."): value
        for name, value in state["average"].items()
        if name != "n_averaged"
    }
    for name, value in expected.items():
        torch.testing.assert_close(average[name].double(), value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(average[name], state["model"][name])

    net = tiny_net("", 10, "", 1)
    net.load_state_dict(average)
    images, labels = next(Digits(0, torch.device("cpu")).test([torch.arange(360)]))
    with torch.no_grad():
        loss = functional.cross_entropy(net.eval()(images), labels).item()
    test = [record for record in records(tmp_path) if record["kind"] == "test"][-1]
    assert test["loss"] == pytest.approx(loss, rel=1e-5)


def test_resumed(tmp_path: Path, train: Train) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*SETTINGS, "--output", whole).status == 0
    assert train(*SETTINGS, "--output", parts, "--max-steps", 3).status == 0
    assert train("--resume", "--output", parts, "--max-steps", 0).status == 0
    assert load(whole)["average"]["n_averaged"] == 10
    assert_same(load(whole), load(parts))
    assert records(whole) == records(parts)


def test_none_by_default(tmp_path: Path, train: Train) -> None:
    assert train("--epochs", 1, "--batch-size", 1024, "--output", tmp_path).status == 0
    assert load(tmp_path)["average"] is None
