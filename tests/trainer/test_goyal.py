"""Goyal et al. 2017, remark 2: momentum when the learning rate changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastlars
from fastlars import schedules
from fastlars.trainer.config import command_line
from fastlars.trainer.model.optimizer import build_optimizer

STEPS = 45


def trained(make: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype) -> Tensor:
    """The weight after a warm-up to 32 times the rate and three cuts, with given gradients."""
    draw = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(5, 8, generator=draw, dtype=torch.float64).to(dtype))
    optimizer = make([weight])
    schedule = schedules.step_decay(
        optimizer, milestones=[15, 30, 40], warmup_steps=5, warmup_from=0.1
    )
    for _ in range(STEPS):
        # Of a quadratic, so that weights of two runs stay together; and noise.
        noise = torch.randn(5, 8, generator=draw, dtype=torch.float64).to(dtype)
        weight.grad = weight.detach() * 0.05 + noise
        optimizer.step()
        schedule.step()
    return weight.detach()


def sgd(buffer: str, **options: bool) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda weights: fastlars.LARS(
        weights, lr=3.2, adapt=False, buffer=buffer, weight_decay=1e-4, **options
    )


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_momentum_correction_makes_both_forms_equal(
    dtype: torch.dtype, error: float, nesterov: bool
) -> None:
    """(9), the rate outside the momentum, is (10), the rate inside it, with the correction."""
    outside = trained(sgd("scaled", nesterov=nesterov), dtype)
    inside = trained(sgd("step", nesterov=nesterov), dtype)
    corrected = trained(sgd("step", nesterov=nesterov, momentum_correction=True), dtype)
    torch.testing.assert_close(corrected, outside, rtol=error, atol=error)
    # Without it the rise of the warm-up is missing from the momentum.
    assert (inside - outside).abs().max() > 0.1


def test_the_recipe_is_torchs_sgd() -> None:
    """Form (9), with Nesterov's momentum, which needs no correction."""
    made = command_line.new_config({"recipe": "goyal", "data": "a/folder", "batch_size": 8192})

    def ours(weights: list[nn.Parameter]) -> Optimizer:
        model = nn.Module()
        model.weight = weights[0]
        return build_optimizer(made, model, 1)

    def torchs(weights: list[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(weights, lr=made.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)

    torch.testing.assert_close(
        trained(ours, torch.float64), trained(torchs, torch.float64), rtol=1e-13, atol=1e-13
    )
