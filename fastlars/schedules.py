"""Learning-rate schedules of the large-batch papers, as functions that return torch schedulers.

Call ``scheduler.step()`` once per iteration, after ``optimizer.step()``. The learning rate that a
parameter group has when the schedule is made is its peak. Formulas give lr(i), the learning rate of
iteration i, counted from 0.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["linear_scaling", "polynomial", "slow_start", "step_decay", "time_varying"]


def linear_scaling(base_lr: float, batch_size: int, base_batch_size: int = 256) -> float:
    """Learning rate for a batch, by the linear scaling rule.

    It is, as in Goyal et al. 2017 (arXiv:1706.02677), section 2.1::

        lr = base_lr * batch_size / base_batch_size

    Args:
        base_lr: the learning rate that suits ``base_batch_size``; at least 0. 0.1 is usual for SGD.
        batch_size: images or sequences in one step, over all processes and accumulated
            micro-batches; at least 1.
        base_batch_size: the batch for which ``base_lr`` was found; at least 1, default 256. Change
            it where you tuned ``base_lr`` at another batch.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> linear_scaling(0.1, 8192)
        3.2
    """
    _check_rate("base_lr", base_lr)
    batch_size = _check_count("batch_size", batch_size, minimum=1)
    base_batch_size = _check_count("base_batch_size", base_batch_size, minimum=1)
    return base_lr * batch_size / base_batch_size


def polynomial(
    optimizer: Optimizer,
    *,
    steps: int,
    power: float = 2.0,
    end_lr: float = 0.0,
    warmup_steps: int = 0,
    warmup_from: float = 0.0,
    hold_steps: int = 0,
) -> LambdaLR:
    """Linear warm-up, a constant rate if asked for, then polynomial decay.

    With W = warmup_steps, H = W + hold_steps and T = steps::

        lr(i) = warmup_from + (peak - warmup_from) * i / W                     while i < W
        lr(i) = peak                                                           while i < H
        lr(i) = end_lr + (peak - end_lr) * (1 - (i - H) / (T - H))^power       while i < T
        lr(i) = end_lr                                                         from there on

    ``power=2`` is LARS's schedule (You et al. 2017, arXiv:1708.03888, Algorithm 1), ``power=1``
    LAMB's (You et al. 2019, arXiv:1904.00962), and with ``hold_steps`` that of LANS (Zheng et al.
    2020, arXiv:2006.13484), whose batches are too large for a higher rate. MLPerf's ResNet
    reference divides by one iteration more, so that its last iteration stays above ``end_lr``:
    pass ``steps + 1`` for its numbers.

    Args:
        optimizer: any optimizer of torch; the ``lr`` of each group, a number or a tensor, is the
            group's peak.
        steps: the iteration at which ``end_lr`` is reached, warm-up and hold included; more than
            the two together. Usually all iterations of the run.
        power: exponent of the decay; above 0, default 2. Lower it to keep the rate high for longer.
        end_lr: the rate at the end; from 0 to the smallest peak, default 0. MLPerf has 1e-4.
        warmup_steps: iterations of warm-up; at least 0, default 0 (none). Raise it where early
            steps diverge; 5 epochs are usual for large batches.
        warmup_from: the rate at iteration 0, from 0 to the smallest peak. Default 0, as in MLPerf.
            Goyal et al. 2017, section 2.2, start at the unscaled base rate. Unused without warm-up.
        hold_steps: iterations at the peak between warm-up and decay; at least 0, default 0. Raise
            it where the peak cannot be raised and the run is short of steps.

    Raises:
        ValueError: an argument is out of its range, or exceeds a group's peak.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
        >>> schedule = polynomial(sgd, steps=6, warmup_steps=2)
        >>> rates = []
        >>> for _ in range(7):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     sgd.step()
        ...     schedule.step()
        >>> rates
        [0.0, 4.0, 8.0, 4.5, 2.0, 0.5, 0.0]
    """
    warmup_steps = _check_count("warmup_steps", warmup_steps, minimum=0)
    hold_steps = _check_count("hold_steps", hold_steps, minimum=0)
    steps = _check_count("steps", steps, minimum=1)
    before = warmup_steps + hold_steps
    if steps <= before:
        raise ValueError(f"steps must exceed warmup_steps + hold_steps ({before}), got {steps}")
    if not (math.isfinite(power) and power > 0):
        raise ValueError(f"power must be finite and above 0, got {power}")
    _check_rate("end_lr", end_lr)
    _check_rate("warmup_from", warmup_from)

    def factor(peak: float) -> _Polynomial:
        return _Polynomial(peak, warmup_steps, warmup_from, steps, power, end_lr, hold_steps)

    bounds = {"end_lr": end_lr, "warmup_from": warmup_from if warmup_steps else 0.0}
    return _schedule(optimizer, factor, bounds)


def step_decay(
    optimizer: Optimizer,
    *,
    milestones: Sequence[int],
    gamma: float = 0.1,
    warmup_steps: int = 0,
    warmup_from: float = 0.0,
) -> LambdaLR:
    """Linear warm-up, then a constant rate that is cut at given iterations.

    With W = warmup_steps, and k the number of milestones that are at most i::

        lr(i) = warmup_from + (peak - warmup_from) * i / W    while i < W
        lr(i) = peak * gamma^k                                from there on

    Goyal et al. 2017 (arXiv:1706.02677) have 5 epochs of warm-up from the unscaled base rate, and
    gamma = 0.1 at epochs 30, 60 and 80 of 90.

    Args:
        optimizer: any optimizer of torch; the ``lr`` of each group, a number or a tensor, is the
            group's peak.
        milestones: iterations at which the rate is multiplied by ``gamma``; at least 1, increasing,
            the first not before the end of warm-up. Empty for a constant rate.
        gamma: factor of the rate at each milestone; above 0, at most 1, default 0.1. Raise it where
            there are many milestones.
        warmup_steps: iterations of warm-up; at least 0, default 0 (none). Raise it where early
            steps diverge; 5 epochs are usual for large batches.
        warmup_from: the rate at iteration 0, from 0 to the smallest peak. Default 0, as in MLPerf.
            Goyal et al. start at the unscaled base rate. Unused without warm-up.

    Raises:
        ValueError: an argument is out of its range, or exceeds a group's peak.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = step_decay(sgd, milestones=[3, 5], gamma=0.5, warmup_steps=2,
        ...                       warmup_from=0.5)
        >>> rates = []
        >>> for _ in range(6):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     sgd.step()
        ...     schedule.step()
        >>> rates
        [0.5, 0.75, 1.0, 0.5, 0.5, 0.25]
    """
    warmup_steps = _check_count("warmup_steps", warmup_steps, minimum=0)
    cuts = [_check_count("milestones", at, minimum=1) for at in milestones]
    if any(later <= earlier for earlier, later in pairwise(cuts)):
        raise ValueError(f"milestones must increase, got {cuts}")
    if cuts and cuts[0] < warmup_steps:
        raise ValueError(f"milestone {cuts[0]} lies within the warm-up of {warmup_steps} steps")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    _check_rate("warmup_from", warmup_from)

    factors = [gamma**count for count in range(len(cuts) + 1)]

    def factor(peak: float) -> _Steps:
        return _Steps(peak, warmup_steps, warmup_from, cuts, factors)

    return _schedule(optimizer, factor, {"warmup_from": warmup_from if warmup_steps else 0.0})


def slow_start(
    optimizer: Optimizer,
    *,
    steps_per_epoch: float,
    epochs: Sequence[float] = (40, 70, 85),
    factors: Sequence[float] = (0.5, 0.075, 0.01, 0.001),
) -> LambdaLR:
    """A constant rate that changes at given epochs: half the peak for long, then far less.

    With k the number of entries of ``epochs`` whose iteration, round(epoch * steps_per_epoch), is
    at most i::

        lr(i) = peak * factors[k]

    Akiba et al. 2017 (arXiv:1711.04325) have the defaults, for 90 epochs, and for the peak the
    linear scaling rule, 0.1 * batch / 256. There is no warm-up: the RMSprop phase of
    ``fastlars.RMSpropWarmup`` takes its place.

    Args:
        optimizer: any optimizer of torch; the ``lr`` of each group, a number or a tensor, is the
            group's peak.
        steps_per_epoch: iterations of an epoch; above 0, and need not be a whole number.
        epochs: the epochs at which the next factor begins; above 0 and increasing. Default
            (40, 70, 85). Scale them with the length of a run that does not take 90 epochs.
        factors: what the peak is multiplied with, one for each stretch between ``epochs``, so one
            more than those; each at least 0. Default (0.5, 0.075, 0.01, 0.001).

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
        >>> schedule = slow_start(sgd, steps_per_epoch=2, epochs=[1, 1.5], factors=[0.5, 1, 0.25])
        >>> rates = []
        >>> for _ in range(5):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     sgd.step()
        ...     schedule.step()
        >>> rates
        [4.0, 4.0, 8.0, 2.0, 2.0]
    """
    if not (math.isfinite(steps_per_epoch) and steps_per_epoch > 0):
        raise ValueError(f"steps_per_epoch must be finite and above 0, got {steps_per_epoch}")
    begins = [0.0, *map(float, epochs)]
    if not all(earlier < later < math.inf for earlier, later in pairwise(begins)):
        raise ValueError(f"epochs must be above 0 and increase, got {list(epochs)}")
    if len(factors) != len(begins):
        raise ValueError(f"{len(epochs)} epochs need {len(begins)} factors, got {len(factors)}")
    for factor in factors:
        _check_rate("factors", factor)
    milestones = [round(epoch * steps_per_epoch) for epoch in begins[1:]]
    return _schedule(optimizer, lambda peak: _Steps(peak, 0, 0.0, milestones, [*factors]), {})


def time_varying(
    optimizer: Optimizer,
    *,
    steepness: float,
    delay_steps: float = 0.0,
    alpha: float = 1.0,
    end_factor: float = 0.0,
) -> LambdaLR:
    """TVLARS's schedule: no warm-up, but a high rate that falls along a sigmoid.

    The rate of iteration i is::

        lr(i) = peak * (1 / (alpha + exp(steepness * (i - delay_steps))) + end_factor)

    Do et al. 2023 (arXiv:2309.14053) multiply the ratios of LARS by this factor, phi(t) = 1 /
    (alpha + exp(lambda (t - d_e))) + gamma_min, in place of warm-up. As a factor of the rate it
    does the same with ``fastlars.LARS`` and its default ``buffer="step"``, which keeps the rate
    within the momentum; parameters that are not adapted follow it, too. The authors' code
    (KhoiDOO/tvlars) has alpha = 0.1, d_e = 0 in the exponent, gamma_min = 0, t counted in steps
    from 1, and a factor of 1 in the first 10 epochs.

    Args:
        optimizer: any optimizer of torch; the ``lr`` of each group, a number or a tensor, is the
            peak of the formula. Where ``alpha`` is below 1 the schedule begins above it.
        steepness: lambda, by step: the fall takes about 4 / steepness steps; above 0. The authors'
            scripts try 1e-6 to 1e-2. Raise it for an earlier and steeper fall.
        delay_steps: d_e in steps, about where the fall is steepest; at least 0, default 0. With
            alpha = 1 the first factor of the formula is 1/2 there. Raise it to explore for longer.
        alpha: above 0, default 1. The fraction never exceeds 1 / alpha; with alpha = 1 and a large
            ``delay_steps`` it begins near 1.
        end_factor: gamma_min, the factor that remains at the end; at least 0, default 0, which
            lets the rate go to 0.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
        >>> schedule = time_varying(sgd, steepness=1.0, delay_steps=3, end_factor=0.125)
        >>> rates = []
        >>> for _ in range(7):
        ...     rates.append(round(schedule.get_last_lr()[0], 3))
        ...     sgd.step()
        ...     schedule.step()
        >>> rates
        [8.621, 8.046, 6.848, 5.0, 3.152, 1.954, 1.379]
    """
    for name, value in (("steepness", steepness), ("alpha", alpha)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    for name, value in (("delay_steps", delay_steps), ("end_factor", end_factor)):
        _check_rate(name, value)

    def factor(peak: float) -> _TimeVarying:
        return _TimeVarying(peak, 0, 0.0, steepness, delay_steps, alpha, end_factor)

    return _schedule(optimizer, factor, {})


# The factors are dataclasses and not lambdas because LambdaLR.state_dict() saves their __dict__:
# a resumed run then follows the schedule it was started with.


@dataclass
class _Factor:
    """The factor of one group's peak at an iteration, for LambdaLR."""

    peak: float
    warmup_steps: int
    warmup_from: float

    def __call__(self, step: int) -> float:
        if self.peak == 0:
            return 1.0  # a group frozen by a rate of 0 stays frozen
        if step < self.warmup_steps:
            start = self.warmup_from / self.peak
            return start + (1.0 - start) * step / self.warmup_steps
        return self.after_warmup(step)

    def after_warmup(self, step: int) -> float:
        raise NotImplementedError


@dataclass
class _Polynomial(_Factor):
    steps: int
    power: float
    end_lr: float
    hold_steps: int = 0  # state dicts of schedules without it are loaded, too

    def after_warmup(self, step: int) -> float:
        end, decay = self.end_lr / self.peak, self.steps - self.warmup_steps - self.hold_steps
        left = min(max(self.steps - step, 0) / decay, 1.0)  # 1 as long as the rate is held
        return end + (1.0 - end) * left**self.power


@dataclass
class _Steps(_Factor):
    milestones: list[int]
    factors: list[float]  # one more than milestones

    def after_warmup(self, step: int) -> float:
        return self.factors[bisect_right(self.milestones, step)]


@dataclass
class _TimeVarying(_Factor):
    steepness: float
    delay_steps: float
    alpha: float
    end_factor: float

    def after_warmup(self, step: int) -> float:
        # exp(-x) / (alpha exp(-x) + 1) where x > 0: exp(x) would leave float64 beyond 709.
        x = self.steepness * (step - self.delay_steps)
        if x > 0.0:
            falling = math.exp(-x)
            return falling / (self.alpha * falling + 1.0) + self.end_factor
        return 1.0 / (self.alpha + math.exp(x)) + self.end_factor


def _schedule(
    optimizer: Optimizer, factor: Callable[[float], _Factor], bounds: dict[str, float]
) -> LambdaLR:
    """LambdaLR with one factor for each group; no peak may be below a rate of `bounds`."""
    factors: list[Callable[[int], float]] = []
    for index, group in enumerate(optimizer.param_groups):
        # An optimizer whose state was loaded before holds the decayed rate in "lr"; LambdaLR
        # goes by "initial_lr" then, and so must the factor.
        peak = float(group.get("initial_lr", group["lr"]))
        for name, rate in bounds.items():
            if rate > peak and peak != 0:
                raise ValueError(f"{name} {rate} exceeds the learning rate {peak} of group {index}")
        factors.append(factor(peak))
    return LambdaLR(optimizer, factors)


def _check_rate(name: str, rate: float) -> None:
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {rate}")


def _check_count(name: str, count: int, *, minimum: int) -> int:
    try:
        value = operator.index(count)
    except TypeError:
        raise ValueError(f"{name} must be whole numbers of iterations, got {count!r}") from None
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value
