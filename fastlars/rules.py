"""Hyper-parameters of the rules, checked. What changes from step to step is not here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, ClassVar, Literal

# Rates that torch's schedulers bring down to 0 end, by their roundings, a little above or below.
ROUNDING = 1e-9


def unboxed(value: Any) -> Any:
    """The element of an array or tensor of one, of numpy or torch; anything else as it is."""
    boxed = hasattr(value, "item") and math.prod(value.shape) == 1
    return value.item() if boxed else value


def real(name: str, value: Any) -> float:
    """``value`` as a float: a real number of Python, numpy or torch, or an array of one element.

    What is below 0 by no more than a rounding is 0. True and False are no numbers.
    """
    value = unboxed(value)
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    found = float(value)
    return 0.0 if -ROUNDING < found < 0.0 else found


def pair(name: str, value: Any) -> tuple[float, float]:
    """``value`` as two floats; any sequence of two numbers."""
    try:
        if isinstance(value, (str, Mapping, Set)):
            raise TypeError
        first, second = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a pair of numbers, got {value!r}") from None
    return real(name, first), real(name, second)


def at_least_zero(name: str, value: Any) -> float:
    """``value`` as a finite float of at least 0."""
    found = real(name, value)
    if not 0.0 <= found < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return found


def above_zero(name: str, value: Any) -> float:
    """``value`` as a finite float above 0."""
    found = real(name, value)
    if not 0.0 < found < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return found


def below_one(name: str, value: Any) -> float:
    """``value`` as a float in [0, 1)."""
    found = real(name, value)
    if not 0.0 <= found < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return found


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool: True, False, numpy's, or 1 and 0."""
    if isinstance(value, bool):
        return value
    value = unboxed(value)
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def adapts(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group has trust ratios: ``always_adapt`` asks for a weight decay."""
    always = flag("always_adapt", group["always_adapt"])
    decays = real("weight_decay", group["weight_decay"]) != 0.0
    return flag("adapt", group["adapt"]) and (always or decays)


class _Checked:
    """A rule whose fields are checked when it is made, and kept as Python's own numbers."""

    # Whether to measure the update for the trust ratio advances states.
    measure_writes: ClassVar[bool] = False

    def _check(self, check: Callable[[str, Any], Any], *names: str) -> None:
        for name in names:
            object.__setattr__(self, name, check(name, getattr(self, name)))


@dataclass(frozen=True)
class LarsRule(_Checked):
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
        self._check(below_one, "momentum")
        self._check(at_least_zero, "dampening", "weight_decay", "trust_coefficient", "eps")
        if self.dampening > 1.0:
            raise ValueError(f"dampening must lie in [0, 1], got {self.dampening}")
        one_of("ratio", self.ratio, self.RATIOS)
        one_of("buffer", self.buffer, self.BUFFERS)
        self._check(flag, "nesterov", "momentum_correction", "trust_clip", "adapt")
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise ValueError("nesterov needs a momentum and no dampening")
        if self.momentum_correction and self.buffer != "step":
            raise ValueError(
                "momentum_correction rescales a buffer that holds the learning rate: it needs "
                f'buffer="step", got {self.buffer!r}'
            )

    STATES: ClassVar[frozenset[str]] = frozenset({"momentum_buffer"})
    COUNTER: ClassVar[str] = "last_lr"

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states with a tensor per parameter; of STATES, those in use."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def counter(self) -> str | None:
        """Name of the state with one number per parameter, if the rule needs it."""
        noted = self.momentum and (self.dampening or self.momentum_correction)
        return self.COUNTER if noted else None

    NEVER_STEPPED: ClassVar[float] = -1.0


@dataclass(frozen=True)
class LambRule(_Checked):
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
    STATES: ClassVar[frozenset[str]] = frozenset(states)
    counter: ClassVar[str] = "step"
    COUNTER: ClassVar[str] = counter
    NEVER_STEPPED: ClassVar[float] = 0.0
    measure_writes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check(below_one, "beta1", "beta2")
        self._check(at_least_zero, "eps", "weight_decay", "ratio_eps")
        self._check(real, "lower", "upper")
        if not 0.0 <= self.lower <= self.upper or self.upper == 0.0:
            raise ValueError(
                f"phi must be (lower, upper) with 0 <= lower <= upper and upper > 0, "
                f"got ({self.lower}, {self.upper})"
            )
        one_of("decay", self.decay, self.DECAYS)
        one_of("bias_correction", self.bias_correction, self.CORRECTIONS)
        self._check(flag, "grad_averaging", "trust_clip", "adapt")


@dataclass(frozen=True)
class RmspropWarmupRule(_Checked):
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
    STATES: ClassVar[frozenset[str]] = frozenset(states)
    counter: ClassVar[str] = "step"
    COUNTER: ClassVar[str] = counter
    NEVER_STEPPED: ClassVar[float] = 0.0
    # Adding 1 changes no float32 from here on.
    MOST_STEPS: ClassVar[float] = 2.0**24

    def __post_init__(self) -> None:
        self._check(below_one, "momentum", "square_decay")
        self._check(at_least_zero, "weight_decay", "lr_rmsprop", "center_steps")
        self._check(above_zero, "eps", "period_steps")
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
