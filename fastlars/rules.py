"""Hyper-parameters of the rules, checked. What changes from step to step is not here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def at_least_zero(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number of at least 0."""
    if not 0.0 <= _number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def above_zero(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if not 0.0 < _number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def below_one(name: str, value: Any) -> None:
    """Raise unless ``value`` lies in [0, 1)."""
    if not 0.0 <= _number(name, value) < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class LarsRule:
    r"""LARS (You, Gitman, Ginsburg 2017). Field by field as in :class:`fastlars.LARS`.

    Example:
        >>> LarsRule(momentum=1.5)
        Traceback (most recent call last):
        ValueError: momentum must lie in [0, 1), got 1.5
    """

    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    trust_coefficient: float = 1e-3
    eps: float = 0.0
    ratio: Literal["separate", "combined"] = "separate"
    buffer: Literal["step", "scaled", "gradient"] = "step"
    momentum_correction: bool = False
    trust_clip: bool = False
    adapt: bool = True

    RATIOS: ClassVar[tuple[str, ...]] = ("separate", "combined")
    BUFFERS: ClassVar[tuple[str, ...]] = ("step", "scaled", "gradient")

    def __post_init__(self) -> None:
        below_one("momentum", self.momentum)
        at_least_zero("weight_decay", self.weight_decay)
        at_least_zero("trust_coefficient", self.trust_coefficient)
        at_least_zero("eps", self.eps)
        if not 0.0 <= _number("dampening", self.dampening) <= 1.0:
            raise ValueError(f"dampening must lie in [0, 1], got {self.dampening}")
        one_of("ratio", self.ratio, self.RATIOS)
        one_of("buffer", self.buffer, self.BUFFERS)
        for name in ("nesterov", "momentum_correction", "trust_clip", "adapt"):
            flag(name, getattr(self, name))
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise ValueError("nesterov needs a momentum and no dampening")
        if self.momentum_correction and self.buffer != "step":
            raise ValueError(
                "momentum_correction rescales a buffer that holds the learning rate: it needs "
                f'buffer="step", got {self.buffer!r}'
            )

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states with a tensor per parameter."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def counter(self) -> str | None:
        """Name of the state with one number per parameter, if the rule needs it."""
        return "last_lr" if self.momentum and (self.dampening or self.momentum_correction) else None

    NEVER_STEPPED: ClassVar[float] = -1.0


@dataclass(frozen=True)
class LambRule:
    r"""LAMB (You et al. 2020). Field by field as in :class:`fastlars.LAMB`.

    Example:
        >>> LambRule(beta1=-0.1)
        Traceback (most recent call last):
        ValueError: beta1 must lie in [0, 1), got -0.1
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    decay: Literal["update", "decoupled", "gradient"] = "update"
    bias_correction: Literal["moments", "none", "rate"] = "moments"
    grad_averaging: bool = True
    lower: float = 0.0
    upper: float = math.inf
    ratio_eps: float = 0.0
    trust_clip: bool = False
    adapt: bool = True

    DECAYS: ClassVar[tuple[str, ...]] = ("update", "decoupled", "gradient")
    CORRECTIONS: ClassVar[tuple[str, ...]] = ("moments", "none", "rate")
    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counter: ClassVar[str] = "step"
    NEVER_STEPPED: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        below_one("beta1", self.beta1)
        below_one("beta2", self.beta2)
        for name in ("eps", "weight_decay", "ratio_eps"):
            at_least_zero(name, getattr(self, name))
        at_least_zero("lower end of phi", self.lower)
        if not self.lower <= _number("upper end of phi", self.upper) or self.upper == 0.0:
            raise ValueError(
                f"phi must be (lower, upper) with 0 <= lower <= upper and upper > 0, "
                f"got ({self.lower}, {self.upper})"
            )
        one_of("decay", self.decay, self.DECAYS)
        one_of("bias_correction", self.bias_correction, self.CORRECTIONS)
        for name in ("grad_averaging", "trust_clip", "adapt"):
            flag(name, getattr(self, name))


@dataclass(frozen=True)
class RmspropWarmupRule:
    r"""RMSprop warm-up (Akiba et al. 2017). Field by field as in :class:`fastlars.RMSpropWarmup`.

    Example:
        >>> rule = RmspropWarmupRule(center_steps=100.0, period_steps=50.0)
        >>> [round(rule.sgd_share(step), 4) for step in (0, 80, 100, 110, 125)]
        [0.0092, 0.2247, 0.5, 0.7, 1.0]
    """

    center_steps: float
    period_steps: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_rmsprop: float = 3e-4
    square_decay: float = 0.99
    eps: float = 1e-8
    transition: Literal["smooth", "printed"] = "smooth"

    TRANSITIONS: ClassVar[tuple[str, ...]] = ("smooth", "printed")
    # No norm is measured.
    adapt: ClassVar[bool] = False
    states: ClassVar[tuple[str, ...]] = ("momentum_buffer", "square_avg")
    counter: ClassVar[str] = "step"
    NEVER_STEPPED: ClassVar[float] = 0.0
    # Adding 1 changes no float32 from here on.
    MOST_STEPS: ClassVar[float] = 2.0**24

    def __post_init__(self) -> None:
        below_one("momentum", self.momentum)
        below_one("square_decay", self.square_decay)
        for name in ("weight_decay", "lr_rmsprop", "center_steps"):
            at_least_zero(name, getattr(self, name))
        for name in ("eps", "period_steps"):
            above_zero(name, getattr(self, name))
        one_of("transition", self.transition, self.TRANSITIONS)
        if self.center_steps + self.rise / 2.0 >= self.MOST_STEPS:
            raise ValueError(
                "center_steps and period_steps must end the transition within 2^24 steps, which is "
                f"how far a float32 counts, got {self.center_steps} and {self.period_steps}"
            )

    @property
    def rise(self) -> float:
        """Steps that the linear branch would take from 0 to 1."""
        return self.period_steps / (1.0 if self.transition == "smooth" else 2.0)

    # Compiled back ends take the exponential as below * shrink^n, a power of whole numbers, because
    # the last bits of exp are not the same on every device.

    @property
    def below(self) -> float:
        """The share of SGD at the center, rounded down to a whole step."""
        return self.sgd_share(math.floor(self.center_steps))

    @property
    def shrink(self) -> float:
        """By which that share is smaller one step earlier."""
        return math.exp(-2.0 / self.period_steps)

    def sgd_share(self, step: float) -> float:
        """The share of SGD in the update of a parameter that has taken ``step`` steps."""
        if step < self.center_steps:
            return 0.5 * math.exp(2.0 * (step - self.center_steps) / self.period_steps)
        return min(0.5 + (step - self.center_steps) / self.rise, 1.0)


@dataclass(frozen=True)
class GradientNorm:
    """No rule of its own: measures gradients alone, for a global norm."""

    states: ClassVar[tuple[str, ...]] = ()
    counter: ClassVar[None] = None


Rule = LarsRule | LambRule | RmspropWarmupRule
