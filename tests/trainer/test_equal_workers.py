"""Four workers of 32 images, however they are played, take one step of a batch of 128.

As ghost batches of one forward pass, as micro-batches, and as two gloo processes with two each:
the first momentum buffer is the gradient, and batch norm's statistics are those of 32 images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fastlars.trainer.data.digits import Digits
from fastlars.trainer.data.order import BatchOrder
from trainer.helpers import Outcome, load, tiny_net
from trainer.processes import finish, start

Train = Callable[..., Outcome]
pytestmark = pytest.mark.usefixtures("tiny", "no_picture")
GOYAL = (
    "--recipe", "goyal", "--batch-size", 128, "--classifier-std", 0, "--weight-decay", 0,
    "--lr", 1.0, "--warmup-epochs", 0, "--max-steps", 1, "--bn-statistics", "last",
)  # fmt: skip


def gradients(run: Path) -> list[torch.Tensor]:
    state = load(run)["optimizer"]["state"]
    return [state[number]["momentum_buffer"] for number in sorted(state)]


def statistics(run: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = load(run)["model"]
    return {name: value for name, value in model.items() if "running" in name}


def written_out() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The mean gradient, and the mean statistics, of the plan's first batch in float64."""
    data = Digits(0, torch.device("cpu"))
    plan = BatchOrder(data.train_size, 128, 32, 0, 1, 0)
    net = tiny_net("", 10, "", 0).double()
    means, variances = [], []
    for (images, labels), _ in zip(data.train(plan.from_step(0)), range(4), strict=False):
        inputs = net[0](images.double())
        means.append(inputs.mean((0, 2, 3)))
        variances.append(inputs.var((0, 2, 3)))
        functional.cross_entropy(net[1:](inputs), labels).div(4).backward()
    named: dict[str, Any] = dict(net.named_parameters())
    order = ["0.weight", "5.weight", "5.bias", "1.weight", "1.bias"]  # norms are a group apart
    return [named[name].grad for name in order], {
        "1.running_mean": torch.stack(means).mean(0).detach(),
        "1.running_var": torch.stack(variances).mean(0).detach(),
    }


def assert_equal(run: Path) -> None:
    # Sums of 128 terms of float32, divided at different points.
    expected_gradients, expected_statistics = written_out()
    for found, expected in zip(gradients(run), expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-6)
    for name, found in statistics(run).items():
        torch.testing.assert_close(found.double(), expected_statistics[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("micro", "ghost"), [(128, 32), (64, 32), (32, 32), (32, 0)])
def test_one_process_plays_four_workers(
    tmp_path: Path, train: Train, micro: int, ghost: int
) -> None:
    settings = (*GOYAL, "--micro-batch", micro, "--bn-batch", ghost)
    assert train(*settings, "--output", tmp_path / "run").status == 0
    assert_equal(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_with_two_workers_each(tmp_path: Path) -> None:
    outcome = finish(start(*GOYAL, "--output", tmp_path / "run"))
    assert outcome.status == 0, outcome
    assert_equal(tmp_path / "run")


def test_without_ghost_batches_it_is_another_loss(tmp_path: Path, train: Train) -> None:
    assert train(*GOYAL, "--bn-batch", 0, "--output", tmp_path / "run").status == 0
    with pytest.raises(AssertionError):
        assert_equal(tmp_path / "run")
