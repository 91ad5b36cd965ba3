"""The recipe `mlperf` against the reference optimizer's published formula, in float64.

mlcommons/training, ResNet in TensorFlow 2: lars_optimizer.py and its polynomial decay with warm-up,
written out here from their equations. The two are stepped with the same gradients.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastlars.trainer.config import command_line
from fastlars.trainer.config.settings import Config
from fastlars.trainer.model.optimizer import build_optimizer, build_schedule

STEPS_PER_EPOCH = 3
EPS = torch.finfo(torch.float64).eps


class Net(nn.Module):
    """Names as the reference tells them apart by: "bn" and "bias" are skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.zero = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.zero.weight)  # a norm of 0: its ratio is 1


class Published:
    """trust = eeta |w| / (|g| + wd |w| + eps); mom = mu mom - lr trust (g + wd w); w = w + mom."""

    def __init__(self, model: nn.Module, made: Config) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.momentum = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.mu, self.decay = made.momentum, made.weight_decay
        self.eeta, self.eps = 0.001, 1e-7
        self.peak, self.end = made.lr, 1e-4
        self.warmup = round(made.warmup_epochs * STEPS_PER_EPOCH)
        self.decay_steps = made.epochs * STEPS_PER_EPOCH - self.warmup + 1

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * step / self.warmup
        left = 1 - (step - self.warmup) / self.decay_steps
        return (self.peak - self.end) * left**2 + self.end

    def step(self, number: int, gradients: dict[str, Tensor]) -> None:
        lr = self.rate(number)
        for name, w in self.weights.items():
            g, trust = gradients[name], 1.0
            if not any(word in name for word in ("batch_normalization", "bn", "bias")):
                w_norm, g_norm = w.norm().item(), g.norm().item()
                if w_norm > 0 and g_norm > 0:
                    trust = self.eeta * w_norm / (g_norm + self.decay * w_norm + self.eps)
                g = g + self.decay * w
            self.momentum[name] = self.mu * self.momentum[name] - lr * trust * g
            w += self.momentum[name]


@pytest.mark.parametrize("batch", [4096, 32768, 49152])
def test_step_by_step_to_rounding(batch: int) -> None:
    """The whole schedule, over 100 steps of warm-up and decay.

    The errors allowed are those of float64 at the largest weight there has been, 100 times:
    momentum multiplies them by up to 1 / (1 - mu) = 21, and over the steps they add up.
    """
    made = command_line.new_config({"recipe": "mlperf", "data": "a/folder", "batch_size": batch})
    torch.manual_seed(batch)
    model = Net().double()
    published = Published(model, made)
    optimizer = build_optimizer(made, model, STEPS_PER_EPOCH)
    schedule = build_schedule(made, optimizer, STEPS_PER_EPOCH)
    steps = made.epochs * STEPS_PER_EPOCH
    assert steps > 100
    largest = dict.fromkeys(published.weights, 1.0)
    for number in range(steps):
        scale = 10.0 ** torch.randint(-4, 3, ()).item()
        gradients = {
            name: scale * torch.randn_like(p) / math.sqrt(p.numel())
            for name, p in model.named_parameters()
        }
        if number % 7 == 3:
            gradients["conv.weight"].zero_()  # the other norm of 0
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        rate = schedule.get_last_lr()[0]
        assert rate == pytest.approx(published.rate(number), rel=1e-14, abs=0)
        optimizer.step()
        schedule.step()
        published.step(number, gradients)
        for name, parameter in model.named_parameters():
            expected = published.weights[name]
            largest[name] = max(largest[name], expected.abs().max().item())
            error = (parameter.detach() - expected).abs().max().item()
            assert error <= 100 * EPS * largest[name], (number, name, error, largest[name])


def test_the_ends_of_the_schedule() -> None:
    """At 32,768: 0, then 21.2 after 16 epochs, and at the last step still above 1e-4."""
    made = command_line.new_config({"recipe": "mlperf", "data": "a/folder", "batch_size": 32768})
    optimizer = build_optimizer(made, Net(), 39)
    schedule = build_schedule(made, optimizer, 39)
    seen = []
    for _ in range(58 * 39):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert seen[0] == 0
    assert seen[312] == pytest.approx(10.6)
    assert (seen[624], max(seen)) == (21.2, 21.2)
    assert seen[-1] == pytest.approx(21.1999 * (2 / 1639) ** 2 + 1e-4, rel=1e-9)
