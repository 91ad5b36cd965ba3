"""The check of a back end at first use: right ones pass for every rule and type, planted errors do
not, and what serves then is the next back end, with one warning."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlars
from backend_cases import (
    BF16,
    DEFAULTS,
    F32,
    NAMES,
    PLAIN,
    ROWS,
    SOME_TYPE_MIXES,
    TYPE_MIXES,
    USUAL,
    Dtypes,
    Row,
    label,
)
from fastlars.backends import choose, selfcheck
from fastlars.rules import GradientNorm, LambRule, LarsRule, RmspropWarmupRule
from subprocess_tests import python
from tolerances import assert_same_bits

CPU = torch.device("cpu")
COMPILED = [name for name in NAMES if name != "reference"]
INTERPRETED = NAMES == ("triton",)  # 10 ms a chunk
each_backend = pytest.mark.parametrize("name", COMPILED)
Method = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test is a process that has used no device yet."""
    for variable in ("FASTLARS_BACKEND", "FASTLARS_CHECK"):
        monkeypatch.delenv(variable, raising=False)
    choose._warn_once.cache_clear()
    saved = dict(selfcheck._passed), dict(selfcheck._failure)
    for known in (selfcheck._passed, selfcheck._failure):
        known.clear()
    yield
    for known, old in zip((selfcheck._passed, selfcheck._failure), saved, strict=True):
        known.clear()
        known.update(old)  # type: ignore[arg-type]


def _differs(name: str, row: Row, dtypes: Dtypes, rounds: bool = False) -> str:
    tested = selfcheck.combination(row.rule, dtypes, rounds)
    return selfcheck.difference(choose.instance(name), tested, CPU)


@each_backend
@pytest.mark.parametrize("row", DEFAULTS if INTERPRETED else ROWS, ids=lambda row: row.name)
def test_every_rule_agrees(name: str, row: Row) -> None:
    assert _differs(name, row, PLAIN) == ""


@each_backend
@pytest.mark.parametrize("dtypes", SOME_TYPE_MIXES if INTERPRETED else TYPE_MIXES, ids=label)
@pytest.mark.parametrize("row", USUAL, ids=lambda row: row.name)
def test_every_type_agrees(name: str, row: Row, dtypes: Dtypes) -> None:
    assert _differs(name, row, dtypes) == ""
    if dtypes.weight == BF16:
        assert _differs(name, row, dtypes, rounds=True) == ""


@each_backend
def test_the_gradient_norm_agrees(name: str) -> None:
    tested = selfcheck.combination(GradientNorm(), PLAIN)
    assert selfcheck.difference(choose.instance(name), tested, CPU) == ""


def test_combinations_keep_options_and_drop_numbers() -> None:
    def same(*rules: Any) -> bool:
        return len({selfcheck.combination(rule, PLAIN) for rule in rules}) == 1

    assert same(LarsRule(momentum=0.9, eps=1e-8), LarsRule(momentum=0.5, weight_decay=0.3))
    assert same(LambRule(), LambRule(beta1=0.0, upper=3.0))
    assert same(RmspropWarmupRule(3.0, 4.0), RmspropWarmupRule(30.0, 5.0))
    assert not same(LarsRule(), LarsRule(momentum=0.0))
    assert not same(LarsRule(), LarsRule(nesterov=True))
    assert not same(LarsRule(dampening=0.5), LarsRule())
    assert not same(LambRule(), LambRule(adapt=False))
    # Rounding is of bfloat16 weights alone.
    assert selfcheck.combination(LarsRule(), PLAIN, True) == selfcheck.combination(
        LarsRule(), PLAIN
    )


# Errors planted in a back end: what is wrong, where, and what the check says of it.


def _after(wrong: Callable[[Any, Any, Tensor], None]) -> Callable[[Method], Method]:
    def plant(method: Method) -> Method:
        def planted(rule: Any, bound: Any, *rest: Any) -> Tensor:
            result = method(rule, bound, *rest)
            if not isinstance(rule, GradientNorm):
                wrong(rule, bound.tensors, result)
            return result

        return planted

    return plant


@_after
def _one_weight(rule: Any, tensors: Any, result: Tensor) -> None:
    tensors.weights[0].view(-1)[16_400].mul_(1.001)


@_after
def _last_state(rule: Any, tensors: Any, result: Tensor) -> None:
    tensors.states[-1][2].view(-1)[-1].mul_(1.01)


@_after
def _ratio(rule: Any, tensors: Any, result: Tensor) -> None:
    result[3, 0].mul_(1.001)


@_after
def _norm(rule: Any, tensors: Any, result: Tensor) -> None:
    result[3, -1].mul_(1.001)


@_after
def _not_a_number(rule: Any, tensors: Any, result: Tensor) -> None:
    tensors.weights[1][7] = float("nan")


def _raises(method: Method) -> Method:
    def planted(*_: Any) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered\nand more lines")

    return planted


def _swapped(method: Method) -> Method:
    return lambda *arguments: method(*arguments).flip(0)


def _sleeps(method: Method) -> Method:
    return lambda rule, bound, *_: torch.ones(len(bound.tensors.weights), 1 + rule.sums)


PLANTED = {
    "one weight": ("step", _one_weight, r"weight 0 \[16400\] is \S+ instead of \S+ \(1 of 16401"),
    "one weight, second step": ("apply", _one_weight, r"weight 0 \[16400\] is"),
    "a state": ("apply", _last_state, r"2 \[256\] is|ratio of step 2 \[2\] is 0\.\d+ instead"),
    "a ratio": ("step", _ratio, r"trust ratio of step 1 \[3\] is"),
    "a norm": ("step", _norm, r"(gradient|update) norm of step 1 \[3\] is"),
    "NaN": ("apply", _not_a_number, r"weight 1 \[7\] is nan|ratio of step 2 \[1\] is 1 instead"),
    "sums of other tensors": ("measure", _swapped, r"square norm \[0\] is"),
    "an error": ("apply", _raises, "RuntimeError: an illegal memory access was encountered$"),
    "no step at all": ("step", _sleeps, r"trust ratio of step 1 \[0\] is 1 instead of"),
}


def _plant(monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    method, plant, _ = PLANTED[what]
    backend = choose.instance(name)
    # Not with setattr, which would leave the method itself in the process's one instance.
    monkeypatch.setitem(vars(backend), method, plant(getattr(backend, method)))


@each_backend
@pytest.mark.parametrize("what", PLANTED)
def test_planted_errors_are_seen(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(monkeypatch, name, what)
    for row in DEFAULTS[: 1 if INTERPRETED else 3 : 2]:
        assert _matches(PLANTED[what][2], _differs(name, row, PLAIN))


def _matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None and "\n" not in text


# What an optimizer makes of it.


def _optimizer(**options: Any) -> tuple[torch.nn.Parameter, fastlars.LARS]:
    w = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 50).to(options.pop("dtype", F32)))
    w.grad = torch.full_like(w, 0.25)
    return w, fastlars.LARS([w], lr=0.1, weight_decay=0.1, **options)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every check that is made, in words."""
    made: list[str] = []
    whole = selfcheck.difference

    def counting(backend: Any, tested: Any, device: torch.device) -> str:
        made.append(f"{backend.name} {tested}")
        return whole(backend, tested, device)

    monkeypatch.setattr(selfcheck, "difference", counting)
    return made


@each_backend
def test_the_next_back_end_serves_with_one_warning(
    name: str, monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", "reference")
    expected, optimizer = _optimizer()
    optimizer.step()
    monkeypatch.delenv("FASTLARS_BACKEND")
    monkeypatch.setitem(choose.COMPILED, "cpu", (name,))
    _plant(monkeypatch, name, "one weight")
    w, optimizer = _optimizer()
    said = rf"fastlars steps cpu parameters with plain torch operations: the {name} back end fails "
    said += (
        r"its check on cpu \(LARS, float32 weights, float32 gradients, float32 states: weight 0 "
    )
    with pytest.warns(UserWarning, match=said) as caught:
        optimizer.step()
    assert len(caught) == 1
    assert_same_bits("weights", w.detach(), expected.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        # Not trusted with anything else on this device either.
        for options in ({"nesterov": True}, {"dtype": BF16}, {"master_weights": True}):
            _optimizer(**options)[1].step()
    assert len(checks) == 1


def test_a_back_end_between_the_wrong_one_and_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = choose.Reference()
    monkeypatch.setattr(wrong, "step", _raises(wrong.step))
    wrong.name = "cuda"
    whole = choose.instance
    monkeypatch.setattr(choose, "instance", lambda name: wrong if name == "cuda" else whole(name))
    monkeypatch.setattr(choose.cuda, "why_not", lambda device: "")
    monkeypatch.setattr(choose._C, "build_info", lambda: {"cuda": True})
    monkeypatch.setitem(choose.COMPILED, "cpu", ("cuda", COMPILED[0]))
    said = (
        r"cpu parameters with Triton: its CUDA kernels do not serve here \(the cuda back end fails"
    )
    weight = torch.ones(3)
    with pytest.warns(UserWarning, match=said):
        chosen = choose.choose(weight, PLAIN, LarsRule())
    assert chosen.name == COMPILED[0]


@each_backend
def test_a_demanded_back_end_that_is_wrong_is_an_error_that_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", name)
    _plant(monkeypatch, name, "an error")
    w, optimizer = _optimizer()
    before = w.detach().clone()
    said = f"group 0, parameter 0: FASTLARS_BACKEND={name}, but the {name} back end fails its check"
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    assert_same_bits("weights", w.detach(), before)
    assert not optimizer.state


@each_backend
def test_each_combination_is_checked_once(
    name: str, monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", name)
    for _ in range(2):
        _, optimizer = _optimizer(max_grad_norm=1.0)
        for _ in range(2):
            optimizer.step()
        _, optimizer = _optimizer(dtype=BF16, stochastic_rounding=True)
        optimizer.step()
    assert checks == [
        f"{name} LARS, float32 weights, float32 gradients, float32 states",
        f"{name} LARS, bfloat16 weights, bfloat16 gradients, float32 states, stochastic rounding",
    ]


def test_random_numbers_of_the_training_stay(checks: list[str]) -> None:
    state = torch.get_rng_state()
    _optimizer()[1].step()
    assert checks
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_steps_are_checked_too(checks: list[str]) -> None:
    _, optimizer = _optimizer(max_grad_norm=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        step()
    assert {text.split(",")[0] for text in checks} == {"cpu gradient norm", "cpu LARS"}
    assert len(checks) == 2


def test_the_check_can_be_left_out(monkeypatch: pytest.MonkeyPatch, checks: list[str]) -> None:
    monkeypatch.setenv("FASTLARS_CHECK", "0")
    _plant(monkeypatch, COMPILED[0], "an error")
    _optimizer()[1].step()
    assert not checks
    monkeypatch.setenv("FASTLARS_CHECK", "no")
    with pytest.raises(ValueError, match="FASTLARS_CHECK must be 0 or 1, got 'no'"):
        _optimizer()[1].step()


def test_memory_that_is_short_is_no_fault_of_a_back_end(
    monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "_on", full)
        _optimizer()[1].step()
    assert not selfcheck._failure
    _optimizer()[1].step()
    assert len(checks) == 2
    _optimizer()[1].step()
    assert len(checks) == 2


FORKED = """
import os, signal, torch, fastlars

torch.ones(4_000_000).mul_(2)  # starts threads, which a fork leaves behind
if (child := os.fork()) == 0:
    signal.alarm(60)
    w = torch.nn.Parameter(torch.ones(50))
    w.grad = torch.ones(50)
    fastlars.LARS([w], lr=0.1).step()
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1] != 0)
"""


def test_a_forked_process_steps_a_small_model() -> None:
    done = python("-c", FORKED, FASTLARS_BACKEND="")
    assert done.returncode == 0, done.stdout


def test_a_recording_is_not_disturbed(monkeypatch: pytest.MonkeyPatch, checks: list[str]) -> None:
    monkeypatch.setattr(selfcheck, "is_capturing", lambda device: True)
    _optimizer()[1].step()
    assert not checks
    monkeypatch.setattr(selfcheck, "is_capturing", lambda device: False)
    _optimizer()[1].step()
    assert len(checks) == 1
