"""Every back end, rule, option and type against the reference in float64.

Each step starts from the tested tensors themselves, so that the tolerance is that of one step,
whatever the types; errors cannot hide in those of earlier steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from backend_cases import (
    BF16,
    DEFAULTS,
    F16,
    F32,
    F64,
    INSTANCES,
    NAMES,
    OPTIONS,
    PLAIN,
    ROWS,
    SOME_TYPE_MIXES,
    TYPE_MIXES,
    TYPED,
    USUAL,
    Row,
    Run,
    fits,
    in_float64,
    is_tested,
    label,
)
from fastlars import _C
from fastlars.backends.base import Dtypes, Mismatch, StepScalars, Tensors
from fastlars.backends.choose import instance
from fastlars.backends.reference import equations
from fastlars.rules import RULES, GradientNorm, LambRule, LarsRule, Rule
from problems import LARGE, ORDINARY, SMALL, Problem, place
from tolerances import assert_close, assert_same_bits

# The full grid has 2 x 58 x 30 x 17 cases. An option changes coefficients, a type changes loads and
# stores, a problem changes sizes and sums: pairs of them interplay, triples do not. So every two
# axes are crossed with the third at its usual value; and where options meet types, every template
# instance (the four default rows and those without momentum) meets all types, every other option
# four mixes of them that hold each type in each place.
CASES = [
    *((row, PLAIN, problem) for row in ROWS for problem in SMALL),
    *((row, dtypes, ORDINARY) for row in INSTANCES for dtypes in TYPE_MIXES[1:]),
    *(
        (row, dtypes, ORDINARY)
        for row in OPTIONS
        if row not in INSTANCES
        for dtypes in SOME_TYPE_MIXES
    ),
    *((row, k, p) for row in USUAL for k in TYPE_MIXES[1:] for p in SMALL if p.name in TYPED),
    *((row, dtypes, problem) for row in USUAL for dtypes in TYPE_MIXES[::20] for problem in LARGE),
]

CASES = [
    (backend, row, dtypes, problem)
    for row, dtypes, problem in CASES
    for backend in NAMES
    if fits(problem, dtypes, row.rule) and is_tested(backend, row, dtypes, problem)
]


def is_slow(backend: str, row: Row, dtypes: Dtypes, problem: Problem) -> bool:
    """Whether a case is left to `make test-all`; the others hold each option and problem once."""
    if dtypes == PLAIN:
        long = backend == "triton" and problem.name == "around the cut"  # 10 s and more
        return long or (problem is not ORDINARY and row not in USUAL)
    return row not in DEFAULTS or dtypes not in SOME_TYPE_MIXES or problem is not ORDINARY


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Barriers of small problems wait long on a busy machine; test_determinism.py has threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _largest(*values: torch.Tensor) -> float:
    """The largest finite magnitude among these tensors; 0 where there is none."""
    finite = [x.double()[x.double().isfinite()].abs() for x in values]
    return max((float(x.max()) for x in finite if x.numel()), default=0.0)


def _condition(rule: Rule, tensors: Tensors, now: StepScalars) -> list[float]:
    """How much larger a relative error is in a sum with the decay than in its two terms.

    Where gradient and decay nearly cancel, as they may in a tensor of one element, all that is left
    is the rounding of the two.
    """
    if not rule.measure_writes:  # its update is the decayed gradient
        rule = LarsRule(weight_decay=rule.weight_decay, ratio="combined")
    reference, copy = instance("reference"), in_float64(tensors)
    sums = reference.measure(rule, reference.bind(copy, reference.layout(copy.weights)), now)
    w, *directions = sums.sqrt().nan_to_num(0.0, 0.0).unbind(1)
    u = torch.stack(directions).amin(0)
    return (1.0 + 2.0 * rule.weight_decay * w / u.where(u > 0.0, 1.0)).tolist()


def _from_stored_moments(
    rule: Rule, stored: Tensors, before: Tensors, now: StepScalars
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Report and weights in float64, from the moments that a step stored.

    Where float32 and float64 arithmetic lie on different sides of a rounding boundary, stored
    bfloat16 moments differ by a whole step; a direction from other moments than these is a fault.
    """
    exact = in_float64(stored)
    sums = []
    for i, (weight, old) in enumerate(zip(exact.weights, before.weights, strict=True)):
        weight.copy_(old)
        assert exact.counters is not None
        moments = [states[i] for states in exact.states]
        gradient = now.gradient_scale * exact.grads[i]
        if rule.normalize_grad:
            gradient = equations(rule.name).normalized(rule, gradient, float(gradient.norm()))
        each = weight, gradient, moments, exact.counters[i]
        measured = equations(rule.name).measured(rule, *each)
        sums.append([float(x.square().sum()) for x in measured])
    squares = torch.tensor(sums, dtype=F64).reshape(-1, rule.sums)
    return instance("reference").apply(rule, exact, now, squares), exact.weights


def _compare(
    run: Run,
    before: Tensors,
    expected: Tensors,
    report: torch.Tensor,
    expected_report: torch.Tensor,
    now: StepScalars,
) -> None:
    tested, rule = run.tensors, run.row.rule
    condition = _condition(rule, before, now)
    scale = expected_report.abs() * torch.tensor(condition, dtype=F64).unsqueeze(1)
    assert_close(f"{run.problem.name}, report", "ratio", report, expected_report, scale)
    for i, (new, old, target) in enumerate(
        zip(tested.weights, before.weights, expected.weights, strict=True)
    ):
        where = f"{run.problem.name}, weight {i}"
        largest = condition[i] * _largest(old, target, target - old)
        assert_close(where, "weight", new, target, largest)
        if tested.copies is not None:
            assert_same_bits(f"copy of {where}", tested.copies[i], new.to(tested.copies[i].dtype))
    for name, news, olds, targets in zip(
        rule.states, tested.states, before.states, expected.states, strict=True
    ):
        for i, (new, old, target) in enumerate(zip(news, olds, targets, strict=True)):
            scale = condition[i] * _largest(old, target)
            if new.dtype == BF16:  # both are rounded: a whole step where they fell apart
                scale += 2.0**-7 / 1e-6 * target.double().abs().nan_to_num(0.0, 0.0, 0.0)
            assert_close(f"{run.problem.name}, {name} {i}", "state", new, target, scale)
    for i, (new, target) in enumerate(
        zip(tested.counters or [], expected.counters or [], strict=True)
    ):
        assert_same_bits(f"{run.problem.name}, counter {i}", new, target)


@pytest.mark.parametrize(
    ("backend", "row", "dtypes", "problem"),
    [
        pytest.param(
            *case,
            id="; ".join((case[0], case[1].name, label(case[2]), case[3].name)),
            marks=[pytest.mark.slow] * is_slow(*case),
        )
        for case in CASES
    ],
)
def test_equals_reference_in_float64(
    backend: str, row: Row, dtypes: Dtypes, problem: Problem
) -> None:
    reference = instance("reference")
    run = Run(backend, row, dtypes, problem)
    twin = Run(backend, row, dtypes, problem)
    # Triton's step is these two calls, and interpreted, slow.
    separately = backend != "triton" or (row in DEFAULTS and dtypes == PLAIN)
    for step in range(problem.steps):
        run.take_gradients(step)
        twin.take_gradients(step)
        before, expected = in_float64(run.tensors), in_float64(run.tensors)
        bound = reference.bind(expected, reference.layout(expected.weights))
        right = reference.step(row.rule, bound, row.now(step))
        report = run.step(step)
        assert report.dtype == F32
        if row.rule.measure_writes and dtypes.state == BF16:
            right, expected.weights[:] = _from_stored_moments(
                row.rule, run.tensors, before, row.now(step)
            )
        _compare(run, before, expected, report, right.double(), row.now(step))

        if separately:
            assert_same_bits("report of measure and apply", twin.measure_and_apply(step), report)
            for (name, a), (_, b) in zip(twin.written(), run.written(), strict=True):
                assert_same_bits(f"measure and apply against step: {name}", a, b)
        for grad, entry in zip(run.tensors.grads, run.entries, strict=True):
            given = place(entry.grads[step], dtypes.grad, entry.layout)
            assert_same_bits("gradient, which is never written", grad, given)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("dtype", "problem"),
    [(d, p) for d in (F32, BF16, F16) for p in SMALL if fits(p, Dtypes(F32, d, F32), LarsRule())],
)
def test_gradient_norm(backend: str, dtype: torch.dtype, problem: Problem) -> None:
    run = Run(backend, DEFAULTS[0], Dtypes(F32, dtype, F32), problem)
    run.take_gradients(0)
    sums = run.backend.measure(
        GradientNorm(), run.bind(), StepScalars(lr=0.0, gradient_scale=-0.25)
    )
    expected = torch.tensor(
        [float((0.25 * g.double()).square().sum()) for g in run.tensors.grads], dtype=F64
    )
    assert sums.dtype == F64
    assert_close(f"{problem.name}, sums", "sum", sums, expected.unsqueeze(1))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("rule", [LarsRule(), LarsRule(ratio="combined", weight_decay=0.5)])
@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_sums_of_squares(backend: str, rule: LarsRule, problem: Problem) -> None:
    run = Run(backend, Row("", rule), PLAIN, problem)
    run.take_gradients(0)
    sums = run.backend.measure(rule, run.bind(), StepScalars(lr=1.0))
    for i, (w, g) in enumerate(zip(run.tensors.weights, run.tensors.grads, strict=True)):
        w, g = w.double(), g.double()
        update = g + rule.weight_decay * w if rule.ratio == "combined" else g
        expected = torch.stack([w.square().sum(), update.square().sum()])
        assert_close(f"{problem.name}, sums {i}", "sum", sums[i], expected)


@pytest.mark.parametrize("backend", [*NAMES])
def test_lars_by_hand(backend: str) -> None:
    # |w| = 5, |g| = 1, wd |w| = 2.5: q = 0.7 * 5 / (1 + 2.5) = 1, so that d = g + w / 2 steps.
    w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
    expected = {
        "step": ([0.21, 0.28], [2.79, 3.72]),
        "scaled": ([2.1, 2.8], [2.79, 3.72]),
        "gradient": ([2.1, 2.8], [2.79, 3.72]),
    }
    for buffer, (state, weight) in expected.items():
        rule = LarsRule(weight_decay=0.5, trust_coefficient=0.7, buffer=buffer)  # type: ignore[arg-type]
        tensors = Tensors([w.clone()], [g], ([torch.zeros(2)],), None, None, PLAIN)
        chosen = instance(backend)
        bound = chosen.bind(tensors, chosen.layout(tensors.weights))
        (row,) = chosen.step(rule, bound, StepScalars(lr=0.1)).tolist()
        assert row == pytest.approx([1.0, 5.0, 1.0])
        assert tensors.weights[0].tolist() == pytest.approx(weight, rel=1e-6)
        assert tensors.states[0][0].tolist() == pytest.approx(state, rel=1e-6)


@pytest.mark.parametrize("backend", NAMES)
def test_lamb_by_hand(backend: str) -> None:
    w, g = torch.tensor([0.6, -0.8]), torch.tensor([0.01, 3.0])
    # At the first step m^ = g and v^ = g^2, so that r = (1, 1) and u = r + w / 2 = (1.3, 0.6);
    # |w| = 1, |u| = sqrt(2.05).
    tensors = Tensors(
        [w.clone()], [g], ([torch.zeros(2)], [torch.zeros(2)]), [torch.tensor(0.0)], None, PLAIN
    )
    rule = LambRule(eps=0.0, weight_decay=0.5)
    chosen = instance(backend)
    report = chosen.step(
        rule, chosen.bind(tensors, chosen.layout(tensors.weights)), StepScalars(lr=0.1)
    )
    q = 1.0 / math.sqrt(2.05)
    assert report[0].tolist() == pytest.approx([q, 1.0, math.sqrt(2.05)], rel=1e-5)
    step = [0.6 - 0.1 * q * 1.3, -0.8 - 0.1 * q * 0.6]
    assert tensors.weights[0].tolist() == pytest.approx(step, rel=1e-5)
    assert tensors.states[0][0].tolist() == pytest.approx([0.001, 0.3], rel=1e-5)
    assert tensors.states[1][0].tolist() == pytest.approx([1e-7, 9e-3], rel=1e-5)
    assert tensors.counters is not None
    assert tensors.counters[0].item() == 1.0


def _pair() -> Run:
    run = Run("cpu", DEFAULTS[2], Dtypes(F32, BF16, F32, copy=BF16), ORDINARY)
    run.take_gradients(0)
    return run


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", ["weights", "grads", "states", "copies"])
@pytest.mark.parametrize("what", ["dtype", "shape", "device"])
def test_bind_refuses_what_does_not_pair_up(backend: str, name: str, what: str) -> None:
    run = _pair()
    run.backend = instance(backend)
    layout = run.backend.layout(list(run.tensors.weights))
    wrong = {
        "dtype": lambda x: x.to(F64),
        "shape": lambda x: x.flatten()[:-1].clone(),
        "device": lambda x: x.to("meta"),
    }[what]
    values = run.tensors.states[1] if name == "states" else getattr(run.tensors, name)
    values[1] = wrong(values[1])
    with pytest.raises(Mismatch) as caught:
        run.backend.bind(run.tensors, layout)
    assert caught.value.args == (name, 1, what)


@pytest.mark.parametrize("name", ["weights", "grads", "states", "copies"])
def test_cpu_refuses_other_strides(name: str) -> None:
    run = _pair()
    layout = run.backend.layout(list(run.tensors.weights))
    values = run.tensors.states[0] if name == "states" else getattr(run.tensors, name)
    values[0] = values[0].contiguous(memory_format=torch.channels_last)
    with pytest.raises(Mismatch) as caught:
        run.backend.bind(run.tensors, layout)
    assert caught.value.args == (name, 0, "strides")


def test_cpu_refuses_lists_of_other_lengths_and_foreign_objects() -> None:
    run = _pair()
    layout = run.backend.layout(list(run.tensors.weights))
    last = run.tensors.grads.pop()
    with pytest.raises(Mismatch, match="grads"):
        run.backend.bind(run.tensors, layout)
    run.tensors.grads.append(3.0)  # type: ignore[arg-type]
    with pytest.raises(Mismatch) as caught:
        run.backend.bind(run.tensors, layout)
    assert caught.value.args == ("grads", 3, "type")
    run.tensors.grads[-1] = last
    assert run.tensors.counters is not None
    run.tensors.counters[2] = torch.zeros((), dtype=F64)
    with pytest.raises(Mismatch) as caught:
        run.backend.bind(run.tensors, layout)
    assert caught.value.args == ("counters", 2, "dtype")


def test_apply_refuses_sums_of_another_list() -> None:
    run = _pair()
    bound = run.bind()
    for sums in (None, torch.zeros(3, 2, dtype=F64), torch.zeros(4, 2)):
        with pytest.raises(ValueError, match=r"float64 sums of shape \[4, 2\]"):
            run.backend.apply(run.row.rule, bound, StepScalars(lr=0.1), sums)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_an_extension_of_other_sources_is_refused(rule: type[Rule]) -> None:
    numbers = rule.usual().constants
    for given in ({**numbers, "other": 1.0}, {k: v for k, v in numbers.items() if k != "eps"}):
        with pytest.raises(TypeError, match=f"{rule.__name__} has other fields in fastlars.rules"):
            getattr(_C, rule.__name__)(**given)
