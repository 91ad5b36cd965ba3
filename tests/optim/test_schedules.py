"""Schedules at their joints and end points, against values worked out by hand."""

from __future__ import annotations

import doctest
import io
import math
from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import fastlars
from fastlars import conventions, schedules
from fastlars.schedules import linear_scaling, polynomial, slow_start, step_decay, time_varying

# The factor is a quotient of rates and the rate a product again: two roundings.
REL = 4 * torch.finfo(torch.float64).eps


def sgd(*peaks: float | torch.Tensor) -> torch.optim.SGD:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in peaks]
    return torch.optim.SGD(groups, lr=0.0)


def rates(schedule: LambdaLR, count: int) -> list[list[float]]:
    """Learning rates of all groups at the next `count` iterations."""
    seen = []
    for _ in range(count):
        seen.append([float(group["lr"]) for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return seen


def close(value: float) -> object:
    return pytest.approx(value, rel=REL, abs=1e-300)


@pytest.mark.parametrize(
    ("base", "batch", "base_batch", "expected"),
    [(0.1, 256, 256, 0.1), (0.1, 8192, 256, 3.2), (0.1, 32768, 256, 12.8), (0.2, 64, 128, 0.1)],
)
def test_linear_scaling(base: float, batch: int, base_batch: int, expected: float) -> None:
    assert linear_scaling(base, batch, base_batch) == close(expected)


def test_goyal_at_8k() -> None:
    """0.1 to 3.2 in 5 epochs, a constant amount each iteration; a tenth at 30, 60, 80 of 90."""
    epoch = 156  # floor(1,281,167 / 8192)
    schedule = step_decay(
        sgd(3.2),
        milestones=[30 * epoch, 60 * epoch, 80 * epoch],
        warmup_steps=5 * epoch,
        warmup_from=0.1,
    )
    lr = [row[0] for row in rates(schedule, 90 * epoch)]
    assert lr[0] == close(0.1)
    assert lr[390] == close(1.65)  # half way
    assert lr[779] == close(0.1 + 3.1 * 779 / 780)
    assert lr[780] == 3.2
    assert lr[30 * epoch - 1] == 3.2
    assert lr[30 * epoch] == close(0.32)
    assert lr[60 * epoch - 1] == close(0.32)
    assert lr[60 * epoch] == close(0.032)
    assert lr[80 * epoch] == close(0.0032)
    assert lr[-1] == close(0.0032)
    growth = [later - earlier for earlier, later in pairwise(lr[:781])]
    assert max(growth) - min(growth) < 1e-14
    assert growth[0] == pytest.approx(3.1 / 780)


def test_mlperf_at_32k() -> None:
    """lr0 * t / W, then (lr0 - end) * (1 - s / (T - W + 1))^2 + end: hence steps = T + 1."""
    train_steps, warmup = 2267, 625
    schedule = polynomial(
        sgd(21.2), steps=train_steps + 1, power=2.0, end_lr=1e-4, warmup_steps=warmup
    )
    lr = [row[0] for row in rates(schedule, train_steps + 1)]
    decay = train_steps - warmup + 1
    assert lr[0] == 0.0
    assert lr[125] == close(4.24)  # a fifth of the way up
    assert lr[624] == close(21.2 * 624 / 625)
    assert lr[625] == 21.2
    for t in (626, 1000, 2266, 2267):
        expected = (21.2 - 1e-4) * (1 - (t - warmup) / decay) ** 2 + 1e-4
        assert lr[t] == pytest.approx(expected, rel=1e-12)
    assert lr[2267] > 1e-4


def test_akiba_at_32k() -> None:
    """Around 12.8: 6.4 to epoch 39, 0.96 to 69, 0.128 to 84, 0.0128 to the end."""
    epoch = 39  # floor(1,281,167 / 32,768)
    lr = [row[0] for row in rates(slow_start(sgd(12.8), steps_per_epoch=epoch), 90 * epoch)]
    for start, end, rate in ((0, 40, 6.4), (40, 70, 0.96), (70, 85, 0.128), (85, 90, 0.0128)):
        assert lr[start * epoch] == lr[end * epoch - 1] == close(rate)
    assert len(set(lr)) == 4


def test_slow_start_changes_at_the_nearest_iteration() -> None:
    schedule = slow_start(sgd(4.0), steps_per_epoch=2.4, epochs=[1, 2], factors=[0.5, 0.25, 1])
    assert rates(schedule, 7) == [[2.0], [2.0], [1.0], [1.0], [1.0], [4.0], [4.0]]


def test_lars_algorithm_1() -> None:
    """gamma_0 * (1 - t/T)^2, zero at T and never negative after it."""
    lr = [row[0] for row in rates(polynomial(sgd(8.0), steps=4), 7)]
    assert lr == [8.0, 4.5, 2.0, 0.5, 0.0, 0.0, 0.0]


def test_lamb_linear_decay() -> None:
    """Authors' ResNet-50 at 32K: 0.04, 782 warm-up steps of 3519, linear to 0."""
    lr = [
        row[0]
        for row in rates(polynomial(sgd(0.04), steps=3519, power=1.0, warmup_steps=782), 3520)
    ]
    assert lr[391] == close(0.02)
    assert lr[782] == 0.04
    assert lr[783] == pytest.approx(0.04 * 2736 / 2737, rel=1e-14)
    assert lr[3518] == pytest.approx(0.04 / 2737, rel=1e-12)
    assert lr[3519] == 0.0


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_lans_at_96k(power: float) -> None:
    """Its authors' schedule: with x = i / T, x / warm-up; 1; ((1 - x) / (1 - both))^degree.

    Their script for batches of 96K has 3,870 steps, shares of 0.05 and 0.25, a peak of 0.005, and
    degree 1. A share of the steps that is no whole number is rounded here.
    """
    steps, warmup, hold = 4000, 200, 1000
    schedule = polynomial(
        sgd(0.005), steps=steps, power=power, warmup_steps=warmup, hold_steps=hold
    )
    lr = [row[0] for row in rates(schedule, steps + 1)]

    def factor(x: float) -> float:
        if x < 0.05:
            return x / 0.05
        return 1.0 if x < 0.05 + 0.25 else ((1.0 - x) / (1.0 - 0.05 - 0.25)) ** power

    # Near the end 1 - x has lost up to 12 bits, and its power twice as much of what is left.
    for i, rate in enumerate(lr):
        assert rate == pytest.approx(0.005 * factor(i / steps), rel=1e-11, abs=1e-18)
    assert lr[warmup : warmup + hold + 1] == [0.005] * (hold + 1)
    assert lr[warmup - 1] < 0.005 > lr[warmup + hold + 1]
    assert lr[steps] == 0.0


def test_hold_alone_and_to_an_end_rate() -> None:
    schedule = polynomial(sgd(8.0), steps=5, power=1.0, end_lr=2.0, hold_steps=2)
    assert [row[0] for row in rates(schedule, 7)] == [8.0, 8.0, 8.0, 6.0, 4.0, 2.0, 2.0]


def phi(t: float, alpha: float, lam: float, d_e: float, gamma_min: float) -> float:
    """TVLARS's factor as it is printed."""
    return 1.0 / (alpha + math.exp(lam * (t - d_e))) + gamma_min


@pytest.mark.parametrize(
    ("lam", "d_e", "alpha", "gamma_min"),
    [(0.05, 40.0, 1.0, 0.0), (0.01, 0.0, 0.1, 0.0), (0.3, 20.5, 0.5, 0.01), (2.0, 7.0, 1.0, 0.1)],
)
def test_tvlars(lam: float, d_e: float, alpha: float, gamma_min: float) -> None:
    made = time_varying(
        sgd(5.0, 0.0), steepness=lam, delay_steps=d_e, alpha=alpha, end_factor=gamma_min
    )
    seen = rates(made, 120)
    for t, (lr, frozen) in enumerate(seen):
        # An exponential, a sum, a quotient and the peak: four roundings, and those of exponents
        # up to 226, which an exponential magnifies.
        assert lr == pytest.approx(5.0 * phi(t, alpha, lam, d_e, gamma_min), rel=1e-13)
        assert frozen == 0.0
    falling = [lr for lr, _ in seen]
    assert all(a >= b for a, b in pairwise(falling))
    assert falling[0] > falling[-1] >= 5.0 * gamma_min


def test_tvlars_begins_at_the_peak_and_goes_to_its_end_factor() -> None:
    late = time_varying(sgd(8.0), steepness=1.0, delay_steps=50.0, end_factor=0.25)
    lr = [row[0] for row in rates(late, 101)]
    assert lr[0] == pytest.approx(8.0 * 1.25, rel=1e-12)
    assert lr[50] == close(8.0 * 0.75)
    assert lr[100] == pytest.approx(8.0 * 0.25, rel=1e-12)
    # exp(1000) is beyond float64.
    assert rates(time_varying(sgd(8.0), steepness=1e3), 2)[1] == [0.0]


def test_tvlars_is_a_factor_of_the_ratios() -> None:
    """Its authors multiply LARS's ratio by the factor, inside the momentum, at a constant rate."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    p, mu = torch.nn.Parameter(w.clone()), torch.zeros_like(w)
    convention = conventions.barlow_twins_lars(buffer="step", weight_decay=5e-4)
    optimizer = fastlars.LARS([p], lr=2.0, **convention)
    schedule = time_varying(optimizer, steepness=0.2, delay_steps=10.0, alpha=0.1, end_factor=0.01)
    for t in range(20):
        p.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        d = p.grad + 5e-4 * w
        ratio = 0.001 * phi(t, 0.1, 0.2, 10.0, 0.01) * w.norm() / d.norm()
        mu = 0.9 * mu + ratio * d
        w = w - 2.0 * mu
        optimizer.step()
        schedule.step()
    # Operations in another order: roundings of 1e-16 in 20 steps.
    torch.testing.assert_close(p.detach(), w, rtol=1e-13, atol=1e-13)


def test_end_rate_is_exact_enough() -> None:
    lr = rates(polynomial(sgd(10.0), steps=3, end_lr=1e-4), 6)
    assert [row[0] for row in lr[3:]] == [close(1e-4)] * 3


def test_each_group_has_its_own_peak() -> None:
    seen = rates(polynomial(sgd(8.0, 2.0, 0.0), steps=6, warmup_steps=2, warmup_from=0.0), 7)
    eight = [0.0, 4.0, 8.0, 4.5, 2.0, 0.5, 0.0]
    assert [row[0] for row in seen] == eight
    assert [row[1] for row in seen] == [lr / 4 for lr in eight]
    assert [row[2] for row in seen] == [0.0] * 7  # a frozen group stays frozen


def test_step_decay_without_milestones_is_constant() -> None:
    assert rates(step_decay(sgd(0.5), milestones=[]), 3) == [[0.5]] * 3


def test_milestone_may_fall_on_the_end_of_warmup() -> None:
    schedule = step_decay(sgd(1.0), milestones=[2], gamma=0.5, warmup_steps=2)
    assert rates(schedule, 4) == [[0.0], [0.5], [0.5], [0.5]]


def test_tensor_learning_rate_is_changed_in_place() -> None:
    lr = torch.tensor(8.0, dtype=torch.float64)
    optimizer = sgd(lr)
    held = optimizer.param_groups[0]["lr"]
    seen = rates(polynomial(optimizer, steps=6, warmup_steps=2), 7)
    assert [row[0] for row in seen] == [0.0, 4.0, 8.0, 4.5, 2.0, 0.5, 0.0]
    assert optimizer.param_groups[0]["lr"] is held  # captured graphs and kernels keep the address


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("kind", ["polynomial", "step_decay", "slow_start", "time_varying"])
def test_resume_through_state_dict(at: int, optimizer_first: bool, kind: str) -> None:
    """Saved to a file and loaded safely, the schedule goes on exactly, peaks included."""

    def build(optimizer: torch.optim.Optimizer) -> LambdaLR:
        if kind == "polynomial":
            return polynomial(
                optimizer, steps=6, end_lr=0.1, warmup_steps=2, warmup_from=0.3, hold_steps=1
            )
        if kind == "slow_start":
            return slow_start(optimizer, steps_per_epoch=1, epochs=[2, 3, 5])
        if kind == "time_varying":
            return time_varying(optimizer, steepness=0.5, delay_steps=2.0, end_factor=0.01)
        return step_decay(optimizer, milestones=[3, 5], warmup_steps=2, warmup_from=0.3)

    expected = rates(build(sgd(3.0, 0.7)), 8)
    stopped = build(sgd(3.0, 0.7))
    rates(stopped, at)
    file = io.BytesIO()
    torch.save((stopped.optimizer.state_dict(), stopped.state_dict()), file)
    file.seek(0)
    optimizer_state, schedule_state = torch.load(file, weights_only=True)

    optimizer = sgd(3.0, 0.7)
    if optimizer_first:
        optimizer.load_state_dict(optimizer_state)
        schedule = build(optimizer)
    else:
        schedule = build(optimizer)
        optimizer.load_state_dict(optimizer_state)
    schedule.load_state_dict(schedule_state)
    if optimizer_first:  # building a schedule sets the rate of iteration 0
        optimizer.load_state_dict(optimizer_state)
    assert rates(schedule, 8 - at) == expected[at:]


def test_the_saved_schedule_wins_over_the_new_arguments() -> None:
    first = polynomial(sgd(8.0), steps=6, warmup_steps=2)
    other = polynomial(sgd(8.0), steps=100, power=1.0, hold_steps=3)
    other.load_state_dict(first.state_dict())
    assert other.lr_lambdas == first.lr_lambdas


def test_a_schedule_saved_before_rates_were_held_is_loaded() -> None:
    first = polynomial(sgd(8.0), steps=6, warmup_steps=2)
    saved = first.state_dict()
    for factor in saved["lr_lambdas"]:
        del factor["hold_steps"]
    other = polynomial(sgd(8.0), steps=6, warmup_steps=2)
    other.load_state_dict(saved)
    assert rates(other, 7) == rates(first, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 5.0}, "steps must be whole numbers of iterations, got 5.0"),
        (
            {"steps": 5, "warmup_steps": 5},
            r"steps must exceed warmup_steps \+ hold_steps \(5\), got 5",
        ),
        (
            {"steps": 5, "warmup_steps": 2, "hold_steps": 3},
            r"steps must exceed warmup_steps \+ hold_steps \(5\), got 5",
        ),
        ({"steps": 5, "hold_steps": -1}, "hold_steps must be at least 0, got -1"),
        ({"steps": 5, "hold_steps": 0.5}, "hold_steps must be whole numbers of iterations"),
        ({"steps": 5, "warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"steps": 5, "power": 0.0}, "power must be finite and above 0, got 0.0"),
        ({"steps": 5, "power": math.nan}, "power must be finite and above 0, got nan"),
        ({"steps": 5, "end_lr": -1.0}, "end_lr must be finite and at least 0, got -1.0"),
        ({"steps": 5, "end_lr": 0.5}, "end_lr 0.5 exceeds the learning rate 0.1 of group 1"),
        (
            {"steps": 5, "warmup_steps": 2, "warmup_from": 0.2},
            "warmup_from 0.2 exceeds the learning rate 0.1 of group 1",
        ),
        ({"steps": 5, "warmup_from": math.inf}, "warmup_from must be finite and at least 0"),
    ],
)
def test_polynomial_refuses(arguments: dict[str, float], message: str) -> None:
    optimizer = sgd(1.0, 0.1)
    with pytest.raises(ValueError, match=message):
        polynomial(optimizer, **arguments)  # type: ignore[arg-type]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"milestones": [3, 3]}, r"milestones must increase, got \[3, 3\]"),
        ({"milestones": [0]}, "milestones must be at least 1, got 0"),
        ({"milestones": [1.5]}, "milestones must be whole numbers of iterations, got 1.5"),
        ({"milestones": [3], "warmup_steps": 4}, "milestone 3 lies within the warm-up of 4 steps"),
        ({"milestones": [3], "gamma": 0.0}, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"milestones": [3], "gamma": 1.5}, r"gamma must lie in \(0, 1\], got 1.5"),
        ({"milestones": [3], "gamma": math.nan}, r"gamma must lie in \(0, 1\], got nan"),
    ],
)
def test_step_decay_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_decay(sgd(1.0), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch must be finite and above 0, got 0"),
        ({"steps_per_epoch": math.nan}, "steps_per_epoch must be finite and above 0, got nan"),
        ({"epochs": [0, 2, 3]}, r"epochs must be above 0 and increase, got \[0, 2, 3\]"),
        ({"epochs": [1, 2, 2]}, r"epochs must be above 0 and increase, got \[1, 2, 2\]"),
        ({"epochs": [1, 2, math.inf]}, "epochs must be above 0 and increase"),
        ({"epochs": [1, 2]}, "2 epochs need 3 factors, got 4"),
        ({"factors": [1, 0.5, -0.1, 0]}, "factors must be finite and at least 0, got -0.1"),
    ],
)
def test_slow_start_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slow_start(sgd(1.0), **{"steps_per_epoch": 3, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steepness": 0.0}, "steepness must be finite and above 0, got 0.0"),
        ({"steepness": math.nan}, "steepness must be finite and above 0, got nan"),
        ({"alpha": 0.0}, "alpha must be finite and above 0, got 0.0"),
        ({"alpha": math.inf}, "alpha must be finite and above 0, got inf"),
        ({"delay_steps": -1.0}, "delay_steps must be finite and at least 0, got -1.0"),
        ({"end_factor": -0.1}, "end_factor must be finite and at least 0, got -0.1"),
    ],
)
def test_time_varying_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_varying(sgd(1.0), **{"steepness": 0.1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1, 256), "base_lr must be finite and at least 0, got -0.1"),
        ((0.1, 0), "batch_size must be at least 1, got 0"),
        ((0.1, 256, 0), "base_batch_size must be at least 1, got 0"),
        ((0.1, 25.6), "batch_size must be whole numbers"),
    ],
)
def test_linear_scaling_refuses(arguments: tuple[float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_scaling(*arguments)


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(schedules)
    assert result.attempted >= 5
    assert result.failed == 0
