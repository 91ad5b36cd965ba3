"""The rules' hyper-parameters: only this module has their words, ranges and defaults.

What changes from step to step is not here. Everything else derives from the fields: the structs of
the compiled kernels and Triton's constants (``_Rule.constants``), the rule of a parameter group
(``rule_of`` of the optimizers), the values of the check at first use (``_Rule.probe``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fastlars.ranges import (
    above_zero,
    at_least_zero,
    below_one,
    check_bounds,
    flag,
    one_of,
    real,
    up_to_one,
)


def adapts(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group has trust ratios; without ``always_adapt``, not if wd is 0."""
    always = flag("always_adapt", group["always_adapt"])
    decays = real("weight_decay", group["weight_decay"]) != 0.0
    return flag("adapt", group["adapt"]) and (always or decays)


def number(
    check: Callable[[str, Any], float], *, probe: float, default: Any = MISSING, off: bool = False
) -> Any:
    """A field that holds a real number.

    Args:
        check: a function of ``fastlars.ranges`` that converts it, or refuses it.
        probe: a value whose effect shows in two steps, for the check at first use.
        default: the field's default; without one the field must be given.
        off: whether 0 switches a state off, so that a probe must leave it at 0.
    """
    return field(default=default, metadata={"check": check, "probe": probe, "off": off})


@dataclass(frozen=True)
class _Rule:
    """A rule whose fields are checked when it is made, and kept as Python's own numbers."""

    name: ClassVar[str]
    """The name of the files that hold its kernels, in every back end."""
    title: ClassVar[str]
    """The name in messages."""
    norms: ClassVar[tuple[str, ...]]
    """What a trust ratio takes the norms of, in the order of ``measure``; empty where the rule
    never adapts."""
    sums: ClassVar[int]
    """How many norms there are: ``measure`` takes the sum of squares of each."""
    measure_writes: ClassVar[bool] = False
    """Whether ``measure`` advances the states, and the counter with them."""
    STATES: ClassVar[frozenset[str]] = frozenset()
    """Names of all states with a tensor per parameter that some choice of options needs."""
    COUNTER: ClassVar[str | None] = None
    """Name of the state with one number per parameter that some choice of options needs."""
    counts_steps: ClassVar[bool] = False
    """Whether the counter is the number of steps taken; else it is the last learning rate."""
    NEVER_STEPPED: ClassVar[float] = 0.0
    """The counter of a parameter that was never stepped."""
    CHOICES: ClassVar[dict[str, tuple[str, ...]]]
    """The options that are words, and their words. Compiled kernels know a word by its place."""

    def __init_subclass__(cls) -> None:
        cls.sums = len(cls.norms)
        hints = get_type_hints(cls).items()
        cls.CHOICES = {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in self.CHOICES:
                value = one_of(each.name, value, self.CHOICES[each.name])
            else:
                value = each.metadata.get("check", flag)(each.name, value)
            object.__setattr__(self, each.name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Raise where values do not go together."""

    @cached_property
    def constants(self) -> dict[str, float | int | bool]:
        """The rule's constants as compiled kernels take them, by name."""
        return self._constants()

    def _constants(self) -> dict[str, float | int | bool]:
        """The fields; in place of a word, its number."""
        words = self.CHOICES
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {k: words[k].index(v) if k in words else v for k, v in values.items()}

    @classmethod
    def usual(cls) -> Any:
        """The rule with its defaults, and the probes of those fields that have none."""
        needed = [each for each in fields(cls) if each.default is MISSING]
        return cls(**{each.name: each.metadata["probe"] for each in needed})

    def probe(self) -> Any:
        """The rule with the same options, but numbers whose effect shows in two steps."""
        probes = {
            each.name: each.metadata["probe"]
            for each in fields(self)
            if each.metadata and not (each.metadata["off"] and getattr(self, each.name) == 0.0)
        }
        return replace(self, **probes)


@dataclass(frozen=True)
class LarsRule(_Rule):
    r"""LARS (You, Gitman, Ginsburg 2017). The fields are arguments of ``fastlars.LARS``, with
    ``ratio_bounds`` as two fields.

    Example:
        >>> LarsRule(momentum=1.5)
        Traceback (most recent call last):
        ValueError: momentum must lie in [0, 1), got 1.5
    """

    momentum: float = number(below_one, default=0.9, probe=0.75, off=True)
    dampening: float = number(up_to_one, default=0.0, probe=0.4, off=True)
    weight_decay: float = number(at_least_zero, default=0.0, probe=0.1)
    nesterov: bool = False
    trust_coefficient: float = number(at_least_zero, default=1e-3, probe=0.3)
    eps: float = number(at_least_zero, default=0.0, probe=0.01)
    ratio: Literal["separate", "combined"] = "separate"
    buffer: Literal["step", "scaled", "gradient"] = "step"
    momentum_correction: bool = False
    ratio_floor: float = number(real, default=0.0, probe=0.75)
    ratio_ceiling: float = number(real, default=math.inf, probe=1.4)
    trust_clip: bool = False
    adapt: bool = True

    name: ClassVar[str] = "lars"
    title: ClassVar[str] = "LARS"
    norms: ClassVar[tuple[str, ...]] = ("weight", "gradient")  # of w, and of g or g + wd w
    normalize_grad: ClassVar[bool] = False
    STATES: ClassVar[frozenset[str]] = frozenset({"momentum_buffer"})
    COUNTER: ClassVar[str] = "last_lr"
    NEVER_STEPPED: ClassVar[float] = -1.0

    def _check_together(self) -> None:
        check_bounds("ratio_bounds", self.ratio_floor, self.ratio_ceiling)
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise ValueError("nesterov needs a momentum and no dampening")
        if self.momentum_correction and self.buffer != "step":
            raise ValueError(
                "momentum_correction rescales a buffer that holds the learning rate: it needs "
                f'buffer="step", got {self.buffer!r}'
            )

    @property
    def states(self) -> tuple[str, ...]:
        """The names in STATES that these options use."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def counter(self) -> str | None:
        """COUNTER, where these options need it."""
        noted = self.momentum and (self.dampening or self.momentum_correction)
        return self.COUNTER if noted else None


@dataclass(frozen=True)
class LambRule(_Rule):
    r"""LAMB (You et al. 2020). The fields are arguments of ``fastlars.LAMB``, with ``betas``,
    ``phi`` and ``ratio_bounds`` as two fields each.

    Example:
        >>> LambRule(beta1=-0.1)
        Traceback (most recent call last):
        ValueError: beta1 must lie in [0, 1), got -0.1
    """

    beta1: float = number(below_one, default=0.9, probe=0.8)
    beta2: float = number(below_one, default=0.999, probe=0.95)
    eps: float = number(at_least_zero, default=1e-6, probe=0.01)
    weight_decay: float = number(at_least_zero, default=0.0, probe=0.1)
    decay: Literal["update", "decoupled", "gradient"] = "update"
    bias_correction: Literal["moments", "none", "rate"] = "moments"
    grad_averaging: bool = True
    nesterov: Literal["none", "first", "both"] = "none"
    lower: float = number(real, default=0.0, probe=0.0)
    upper: float = number(real, default=math.inf, probe=10.0)
    ratio_eps: float = number(at_least_zero, default=0.0, probe=0.01)
    ratio_floor: float = number(real, default=0.0, probe=0.1)
    ratio_ceiling: float = number(real, default=math.inf, probe=0.5)
    trust_clip: bool = False
    adapt: bool = True

    name: ClassVar[str] = "lamb"
    title: ClassVar[str] = "LAMB"
    norms: ClassVar[tuple[str, ...]] = ("weight", "update")  # of w and u
    normalize_grad: ClassVar[bool] = False
    measure_writes: ClassVar[bool] = True
    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    STATES: ClassVar[frozenset[str]] = frozenset(states)
    counter: ClassVar[str] = "step"
    COUNTER: ClassVar[str] = counter
    counts_steps: ClassVar[bool] = True

    def _check_together(self) -> None:
        check_bounds("phi", self.lower, self.upper)
        check_bounds("ratio_bounds", self.ratio_floor, self.ratio_ceiling)
        if self.nesterov != "none" and self.bias_correction == "rate":
            raise ValueError(
                'nesterov corrects m and g by different factors: bias_correction="rate" has one '
                "for both"
            )
        if self.nesterov == "first" and self.beta2 == 0.0:
            raise ValueError(
                "nesterov=True takes beta2 v for the second moment, which is 0 with betas[1]=0"
            )


@dataclass(frozen=True)
class LansRule(_Rule):
    r"""LANS (Zheng et al. 2020). The fields are arguments of ``fastlars.LANS``, with ``betas``
    and ``phi`` as two fields each.

    Example:
        >>> LansRule(norm_eps=-1.0)
        Traceback (most recent call last):
        ValueError: norm_eps must be finite and at least 0, got -1.0
    """

    beta1: float = number(below_one, default=0.9, probe=0.8)
    beta2: float = number(below_one, default=0.999, probe=0.95)
    eps: float = number(at_least_zero, default=1e-6, probe=0.02)
    weight_decay: float = number(at_least_zero, default=0.0, probe=0.1)
    normalize_grad: bool = True
    norm_eps: float = number(at_least_zero, default=0.0, probe=0.3)
    decay: Literal["update", "gradient"] = "update"
    bias_correction: bool = True
    grad_averaging: bool = True
    lower: float = number(real, default=0.0, probe=0.0)
    upper: float = number(real, default=math.inf, probe=10.0)
    adapt: bool = True

    name: ClassVar[str] = "lans"
    title: ClassVar[str] = "LANS"
    norms: ClassVar[tuple[str, ...]] = ("weight", "momentum", "gradient")  # of w, r and c
    measure_writes: ClassVar[bool] = True
    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    STATES: ClassVar[frozenset[str]] = frozenset(states)
    counter: ClassVar[str] = "step"
    COUNTER: ClassVar[str] = counter
    counts_steps: ClassVar[bool] = True

    def _check_together(self) -> None:
        check_bounds("phi", self.lower, self.upper)


@dataclass(frozen=True)
class RmspropWarmupRule(_Rule):
    r"""RMSprop warm-up (Akiba et al. 2017). The fields are arguments of
    ``fastlars.RMSpropWarmup``.

    Example:
        >>> rule = RmspropWarmupRule(center_steps=100.0, period_steps=50.0)
        >>> [round(rule.sgd_share(step), 4) for step in (0, 80, 100, 110, 125)]
        [0.0092, 0.2247, 0.5, 0.7, 1.0]
    """

    center_steps: float = number(at_least_zero, probe=0.6)
    period_steps: float = number(above_zero, probe=2.5)
    momentum: float = number(below_one, default=0.9, probe=0.75)
    weight_decay: float = number(at_least_zero, default=0.0, probe=0.1)
    lr_rmsprop: float = number(at_least_zero, default=3e-4, probe=0.2)
    square_decay: float = number(below_one, default=0.99, probe=0.8)
    eps: float = number(above_zero, default=1e-8, probe=0.01)
    transition: Literal["smooth", "printed"] = "smooth"

    name: ClassVar[str] = "rmsprop_warmup"
    title: ClassVar[str] = "RMSprop warm-up"
    norms: ClassVar[tuple[str, ...]] = ()
    adapt: ClassVar[bool] = False
    normalize_grad: ClassVar[bool] = False
    states: ClassVar[tuple[str, ...]] = ("momentum_buffer", "square_avg")
    STATES: ClassVar[frozenset[str]] = frozenset(states)
    counter: ClassVar[str] = "step"
    COUNTER: ClassVar[str] = counter
    counts_steps: ClassVar[bool] = True
    # Adding 1 changes no float32 from here on.
    MOST_STEPS: ClassVar[float] = 2.0**24

    def _check_together(self) -> None:
        if self.center_steps + self.rise / 2.0 >= self.MOST_STEPS:
            raise ValueError(
                "center_steps and period_steps must end the transition within 2^24 steps, which is "
                f"how far a float32 counts, got {self.center_steps} and {self.period_steps}"
            )

    def _constants(self) -> dict[str, float | int | bool]:
        """The fields, with those of the transition as kernels take them.

        Kernels take the share a before c as ``below * shrink^n``, n whole steps before floor(c),
        because the last bits of exp are not the same on every device: ``below`` is a at floor(c),
        and ``shrink`` the factor from one step to the step before.
        """
        derived = {
            "rise": self.rise,
            "below": self.sgd_share(math.floor(self.center_steps)),
            "shrink": math.exp(-2.0 / self.period_steps),
        }
        replaced = ("period_steps", "transition")
        return {k: v for k, v in super()._constants().items() if k not in replaced} | derived

    @property
    def rise(self) -> float:
        """Steps that the linear branch of a would take from 0 to 1, p or (printed) p / 2."""
        return self.period_steps / (1.0 if self.transition == "smooth" else 2.0)

    def sgd_share(self, step: float) -> float:
        """The share a of SGD in the update of a parameter that has taken ``step`` steps, t - 1."""
        if step < self.center_steps:
            return 0.5 * math.exp(2.0 * (step - self.center_steps) / self.period_steps)
        return min(0.5 + (step - self.center_steps) / self.rise, 1.0)


@dataclass(frozen=True)
class GradientNorm(_Rule):
    """No rule of its own: measures gradients alone, for a global norm."""

    name: ClassVar[str] = "gradient_norm"
    title: ClassVar[str] = "gradient norm"
    norms: ClassVar[tuple[str, ...]] = ("gradient",)
    normalize_grad: ClassVar[bool] = False
    states: ClassVar[tuple[str, ...]] = ()
    counter: ClassVar[None] = None


Rule = LarsRule | LambRule | LansRule | RmspropWarmupRule
RULES: tuple[type[Rule], ...] = get_args(Rule)
