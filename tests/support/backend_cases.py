"""Rules with their options, types of tensors, and the calls that step a problem with them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cuda_emulation
from fastlars.backends.base import Backend, Dtypes, StepScalars, Tensors
from fastlars.backends.choose import instance
from fastlars.rules import RULES, LambRule, LansRule, LarsRule, RmspropWarmupRule, Rule
from problems import ORDINARY, Problem, place

# The back ends that this process can test on CPU tensors: test_triton.py and test_cuda_on_cpu.py
# run the others' rows in processes of their own, where kernels are interpreted, or compiled for
# the CPU.
NAMES: tuple[str, ...] = ("cpu", "reference")
if "TRITON_INTERPRET" in os.environ:
    NAMES = ("triton",)
elif cuda_emulation.VARIABLE in os.environ:
    NAMES = ("cuda",)
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# The rate changes at every step, so that it matters where it enters.
RATES = (0.5, 0.25, 0.8)


@dataclass(frozen=True)
class Row:
    """A rule under its options."""

    name: str
    rule: Rule
    rates: tuple[float, ...] = RATES
    gradient_scale: float = 1.0

    def now(self, step: int, seed: int | None = None) -> StepScalars:
        return StepScalars(self.rates[step % len(self.rates)], self.gradient_scale, seed)


# Options have values that show: an eps of 1e-6 that is forgotten would hide in the rounding.
def _lars(
    name: str, *, rates: tuple[float, ...] = RATES, scale: float = 1.0, **options: Any
) -> Row:
    rule = LarsRule(**{"momentum": 0.75, "weight_decay": 0.1, "trust_coefficient": 0.3, **options})
    return Row(f"LARS {name}", rule, rates, scale)


def _lamb(name: str, *, scale: float = 1.0, **options: Any) -> Row:
    # Where gradient and decay cancel to 1e-6, a moment holds little but rounding; an eps well above
    # that keeps it out of the direction.
    eps = 1e-2 if options.get("decay") == "gradient" else 1e-6
    usual = {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "eps": eps}
    rule = LambRule(**{**usual, **options})
    return Row(f"LAMB {name}", rule, RATES, scale)


def _lans(name: str, *, scale: float = 1.0, **options: Any) -> Row:
    # The eps as of LAMB.
    eps = 1e-2 if options.get("decay") == "gradient" else 1e-6
    usual = {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "eps": eps}
    return Row(f"LANS {name}", LansRule(**{**usual, **options}), RATES, scale)


def _rmsprop(
    name: str, *, rates: tuple[float, ...] = RATES, scale: float = 1.0, **options: Any
) -> Row:
    # Three steps: before the center, after it, and one that is warmed up. The eps as of LAMB.
    usual = {"center_steps": 0.6, "period_steps": 2.5, "momentum": 0.75, "weight_decay": 0.1}
    usual |= {"lr_rmsprop": 0.2, "square_decay": 0.8, "eps": 1e-2}
    return Row(f"RMSprop warm-up {name}", RmspropWarmupRule(**{**usual, **options}), rates, scale)


DEFAULTS = (
    _lars("of the paper"),
    _lars("without adaptation", adapt=False),
    _lamb("of the paper"),
    _lamb("without adaptation", adapt=False),
    _lans("of the paper"),
    _lans("without adaptation", adapt=False),
    _rmsprop("across the transition", period_steps=0.7),  # warmed up at the second step
)
USUAL = tuple(next(row for row in DEFAULTS if type(row.rule) is rule) for rule in RULES)
ADAPTED = tuple(row for row in USUAL if row.rule.adapt)
OPTIONS = (
    *(
        _lars(
            f"{buffer}, {ratio}{', nesterov' * nesterov}",
            buffer=buffer,
            ratio=ratio,
            nesterov=nesterov,
        )
        for buffer in LarsRule.CHOICES["buffer"]
        for ratio in LarsRule.CHOICES["ratio"]
        for nesterov in (False, True)
    ),
    _lars("without weight decay", weight_decay=0.0),
    _lars("without momentum", momentum=0.0),
    _lars("without momentum, gradient", momentum=0.0, buffer="gradient", ratio="combined"),
    *(
        _lars(f"dampening, {buffer}", dampening=0.4, buffer=buffer)
        for buffer in LarsRule.CHOICES["buffer"]
    ),
    _lars("momentum correction", momentum_correction=True),
    _lars("momentum correction, nesterov", momentum_correction=True, nesterov=True),
    _lars("momentum correction, dampening", momentum_correction=True, dampening=0.4),
    _lars("momentum correction from rate 0", momentum_correction=True, rates=(0.0, 0.5, 0.25)),
    _lars("trust clip", trust_clip=True, trust_coefficient=0.1),
    _lars("trust clip, gradient", trust_clip=True, trust_coefficient=0.1, buffer="gradient"),
    _lars("trust clip at rate 0", trust_clip=True, rates=(0.0,)),
    # Of the problems' ratios some lie below the floor, some between, some above the ceiling.
    _lars("ratio bounds", ratio_floor=0.15, ratio_ceiling=0.95),
    _lars("ratio bounds, trust clip", ratio_floor=0.7, ratio_ceiling=0.75, trust_clip=True),
    _lars("eps", eps=0.5),
    _lars("eps, combined", eps=0.5, ratio="combined"),
    _lars("maximize, unscaled", scale=-0.125),
    _lars("maximize, combined", scale=-1.0, ratio="combined", nesterov=True),
    _lars("without adaptation, nesterov, scaled", adapt=False, nesterov=True, buffer="scaled"),
    _lars("without adaptation or momentum", adapt=False, momentum=0.0),
    *(
        _lamb(f"decay {decay}, correction {correction}", decay=decay, bias_correction=correction)
        for decay in LambRule.CHOICES["decay"]
        for correction in LambRule.CHOICES["bias_correction"]
    ),
    _lamb("without weight decay", weight_decay=0.0),
    _lamb("without averaging", grad_averaging=False),
    _lamb("without averaging, rate", grad_averaging=False, bias_correction="rate"),
    _lamb("without first moment", beta1=0.0),
    _lamb("without second moment", beta2=0.0, eps=0.1),
    _lamb("phi at least 20", lower=20.0),
    _lamb("phi at most 0.5", upper=0.5),
    _lamb("phi between, decoupled", lower=1.0, upper=3.0, decay="decoupled"),
    _lamb("ratio bounds", ratio_floor=0.2, ratio_ceiling=0.8),
    _lamb("ratio bounds, trust clip", ratio_floor=0.2, trust_clip=True),
    *(
        _lamb(f"nesterov {nesterov}, decay {decay}", nesterov=nesterov, decay=decay)
        for nesterov in ("first", "both")
        for decay in LambRule.CHOICES["decay"]
    ),
    *(
        _lamb(
            f"nesterov {nesterov}, neither corrected nor averaged",
            nesterov=nesterov,
            bias_correction="none",
            grad_averaging=False,
        )
        for nesterov in ("first", "both")
    ),
    _lamb("nesterov first, maximize, unscaled", nesterov="first", scale=-0.125),
    _lamb("nesterov both, without adaptation", nesterov="both", adapt=False),
    _lamb("ratio_eps", ratio_eps=0.5),
    _lamb("trust clip", trust_clip=True),
    _lamb("eps", eps=0.5),
    _lamb("maximize, unscaled", scale=-0.125),
    _lamb("without adaptation, decoupled", adapt=False, decay="decoupled"),
    _lamb("without adaptation, rate", adapt=False, bias_correction="rate"),
    *(
        _lans(
            f"decay {decay}{', without correction' * (not corrects)}",
            decay=decay,
            bias_correction=corrects,
        )
        for decay in LansRule.CHOICES["decay"]
        for corrects in (True, False)
    ),
    _lans("without weight decay", weight_decay=0.0),
    _lans("norm_eps", norm_eps=0.5),
    _lans("not normalized", normalize_grad=False),
    _lans("without averaging", grad_averaging=False),
    _lans("without first moment", beta1=0.0),
    _lans("without second moment", beta2=0.0, eps=0.1),
    _lans("phi at least 20", lower=20.0),
    _lans("phi at most 0.5", upper=0.5),
    _lans("eps", eps=0.5),
    _lans("maximize, unscaled", scale=-0.125, norm_eps=0.5),
    _lans("not normalized, without adaptation", normalize_grad=False, adapt=False),
    _rmsprop("before the center", center_steps=7.3, period_steps=4.0),
    _rmsprop("behind the center", center_steps=0.0, period_steps=20.0),
    _rmsprop("printed", transition="printed"),
    _rmsprop("without weight decay", weight_decay=0.0),
    _rmsprop("without momentum", momentum=0.0),
    _rmsprop("without memory of squares", square_decay=0.0),
    _rmsprop("eps", eps=0.5),
    _rmsprop("maximize, unscaled", scale=-0.125),
    _rmsprop("from rate 0", rates=(0.0, 0.5, 0.25)),
    _rmsprop("without RMSprop", lr_rmsprop=0.0),
)
ROWS = DEFAULTS + OPTIONS

PLAIN = Dtypes(F32, F32, F32)
TYPE_MIXES = (
    *(Dtypes(w, g, s) for w in (F32, BF16, F16) for g in (F32, BF16, F16) for s in (F32, BF16)),
    *(
        Dtypes(F32, g, s, copy=c)
        for c in (BF16, F16)
        for g in (F32, BF16, F16)
        for s in (F32, BF16)
    ),
)


# What test_backends.py crosses only in part, and why, stands there.
SOME_TYPE_MIXES = (
    Dtypes(BF16, F16, F32),
    Dtypes(F16, BF16, BF16),
    Dtypes(F32, BF16, F32, copy=BF16),
    Dtypes(F32, F32, BF16, copy=F16),
)
TYPED = {"zeros", "empty", "layouts", "ends of float16", "NaN gradient", "infinite weight"}
INSTANCES = (*DEFAULTS, *(row for row in OPTIONS if "momentum" in row.name and "out" in row.name))


def label(dtypes: Dtypes) -> str:
    short = {F32: "f32", BF16: "bf16", F16: "f16", F64: "f64", None: ""}
    text = f"w {short[dtypes.weight]}, g {short[dtypes.grad]}, s {short[dtypes.state]}"
    return text + (f", copy {short[dtypes.copy]}" if dtypes.copy else "")


def fits(problem: Problem, dtypes: Dtypes, rule: Rule) -> bool:
    """Whether a problem's values can be told apart in these types."""
    if not isinstance(rule, LarsRule) and not problem.squares_fit:
        return False
    return problem.half_range or F16 not in (dtypes.weight, dtypes.grad, dtypes.copy)


def is_tested(backend: str, row: Row, dtypes: Dtypes, problem: Problem) -> bool:
    """Whether a back end that is slow here has a case; each keeps the pairs that concern it."""
    if backend == "reference":  # one code for all types, and loops in Python
        typed = dtypes == PLAIN or (row in DEFAULTS and problem is ORDINARY)
        return typed and problem.name in {"ordinary", "zeros", "tiny", "NaN gradient"}
    if backend == "triton":  # interpreted, at 10 ms and more a chunk
        usual, some = row in USUAL, dtypes in SOME_TYPE_MIXES
        if problem is ORDINARY:
            return dtypes == PLAIN or usual or (some and row in INSTANCES)
        typed = dtypes == PLAIN or (some and problem.name in TYPED)
        return usual and typed and not problem.large
    return True


class Run:
    """A problem's tensors in the given types, stepped by one back end."""

    def __init__(self, backend: str, row: Row, dtypes: Dtypes, problem: Problem) -> None:
        self.backend: Backend = instance(backend)
        self.row, self.problem = row, problem
        self.entries = problem.entries()
        weights, copies = [], None
        for entry in self.entries:
            weights.append(place(entry.weight, dtypes.weight, entry.layout))
        if dtypes.copy is not None:
            copies = [
                place(w, dtypes.copy, entry.layout)
                for w, entry in zip(weights, self.entries, strict=True)
            ]
        states = tuple(
            [place(torch.zeros_like(e.weight), dtypes.state, e.layout) for e in self.entries]
            for _ in row.rule.states
        )
        counters = None
        if row.rule.counter is not None:
            counters = [torch.tensor(row.rule.NEVER_STEPPED) for _ in weights]
        self.tensors = Tensors(weights, [], states, counters, copies, dtypes)

    def take_gradients(self, step: int) -> None:
        dtype = self.tensors.dtypes.grad
        self.tensors.grads = [place(e.grads[step], dtype, e.layout) for e in self.entries]

    def bind(self) -> Any:
        return self.backend.bind(self.tensors, self.backend.layout(self.tensors.weights))

    def step(self, step: int, seed: int | None = None) -> Tensor:
        return self.backend.step(self.row.rule, self.bind(), self.row.now(step, seed))

    def measure_and_apply(self, step: int, seed: int | None = None) -> Tensor:
        rule, bound, now = self.row.rule, self.bind(), self.row.now(step, seed)
        sums = self.backend.measure(rule, bound, now) if rule.adapt else None
        return self.backend.apply(rule, bound, now, sums)

    def written(self) -> list[tuple[str, Tensor]]:
        """Everything that a step may write, by name."""
        t = self.tensors
        named = [("weight", t.weights), ("copy", t.copies or []), ("counter", t.counters or [])]
        named += [(name, s) for name, s in zip(self.row.rule.states, t.states, strict=True)]
        return [
            (f"{self.problem.name}, {name} {i}", x) for name, xs in named for i, x in enumerate(xs)
        ]


def in_float64(tensors: Tensors) -> Tensors:
    """The same values for the reference in float64; bfloat16 states stay, for they round."""
    dtypes = tensors.dtypes
    state = F64 if dtypes.state == F32 else dtypes.state
    return Tensors(
        weights=[w.double() for w in tensors.weights],
        grads=[g.double() for g in tensors.grads],
        states=tuple([x.to(state, copy=True) for x in xs] for xs in tensors.states),
        counters=None if tensors.counters is None else [c.clone() for c in tensors.counters],
        copies=None,
        dtypes=Dtypes(F64, F64, state),
    )
