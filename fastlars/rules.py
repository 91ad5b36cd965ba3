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
class GradientNorm:
    """No rule of its own: measures gradients alone, for a global norm."""

    states: ClassVar[tuple[str, ...]] = ()
    counter: ClassVar[None] = None


Rule = LarsRule | LambRule
