"""Stochastic rounding draws the same bits however a step is cut into calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backend_cases import BF16, DEFAULTS, F32, NAMES, Dtypes, Row
from fastlars.backends.base import StepScalars, Tensors
from fastlars.backends.choose import instance
from fastlars.rules import LarsRule, Rule
from tolerances import assert_same_bits

NOW = StepScalars(lr=0.25, seed=2**40 + 7)
SIZES = (4099, 7, 0, 300, 12)
I32 = torch.int32


def _tensors(rule: Rule, sizes: tuple[int, ...] = SIZES) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def drawn(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    states = tuple([torch.zeros(size) for size in sizes] for _ in rule.states)
    counters = [torch.tensor(rule.NEVER_STEPPED) for _ in sizes] if rule.counter else None
    return Tensors(drawn(BF16), drawn(F32), states, counters, None, Dtypes(BF16, F32, F32))


def _part(tensors: Tensors, indices: list[int]) -> Tensors:
    def chosen(values: list[Tensor]) -> list[Tensor]:
        return [values[i] for i in indices]

    return Tensors(
        chosen(tensors.weights),
        chosen(tensors.grads),
        tuple(map(chosen, tensors.states)),
        None if tensors.counters is None else chosen(tensors.counters),
        None,
        tensors.dtypes,
    )


def _step(backend: str, rule: Rule, tensors: Tensors, now: StepScalars = NOW) -> list[Tensor]:
    """The new weights."""
    chosen = instance(backend)
    chosen.step(rule, chosen.bind(tensors, chosen.layout(tensors.weights)), now)
    return tensors.weights


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row.name)
def test_several_calls_draw_the_bits_of_one(backend: str, row: Row) -> None:
    expected = _step(backend, row.rule, _tensors(row.rule))
    by_number, by_index = _tensors(row.rule), _tensors(row.rule)
    for indices in ([3, 0], [4], [2, 1]):
        now = replace(NOW, streams=torch.tensor(indices, dtype=I32))
        _step(backend, row.rule, _part(by_number, indices), now)
        _step(backend, row.rule, _part(by_index, indices))
    assert_same_bits("weights", torch.cat(by_number.weights), torch.cat(expected))
    # The test can tell: without their numbers, tensors get other bits.
    same = [torch.equal(a, b) for a, b in zip(by_index.weights, expected, strict=True)]
    assert same[0] is same[3] is False


@pytest.mark.parametrize("backend", NAMES)
def test_numbers_may_be_any_and_lie_anywhere(backend: str) -> None:
    rule = LarsRule()
    # Every second one of a longer list.
    numbers = torch.tensor([2**31 - 1, 9, 0, 9, -5, 9, 3, 9, 0, 9], dtype=I32)[::2]
    weights = _step(backend, rule, _tensors(rule), replace(NOW, streams=numbers))
    for i, number in enumerate(numbers.tolist()):
        now = replace(NOW, streams=torch.tensor([number], dtype=I32))
        alone = _step(backend, rule, _part(_tensors(rule), [i]), now)
        assert_same_bits(f"weight {i}", alone[0], weights[i])


# Triton has one launch for any list, and its interpreter takes a minute for this one.
@pytest.mark.parametrize("backend", [name for name in NAMES if name != "triton"])
def test_each_tensor_of_a_long_list_has_its_number(backend: str) -> None:
    # CUDA's kernels take 464 tensors in a launch.
    rule, sizes = LarsRule(), (9,) * 470
    expected = _step(backend, rule, _tensors(rule, sizes))
    backwards = list(range(len(sizes)))[::-1]
    tensors = _tensors(rule, sizes)
    now = replace(NOW, streams=torch.tensor(backwards, dtype=I32))
    _step(backend, rule, _part(tensors, backwards), now)
    assert_same_bits("weights", torch.cat(tensors.weights), torch.cat(expected))


@pytest.mark.parametrize("backend", NAMES)
def test_other_numbers_are_refused(backend: str) -> None:
    rule, tensors = LarsRule(), _tensors(LarsRule())
    right = torch.arange(len(SIZES), dtype=I32)
    for wrong in (right.long(), right[1:], right.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"rounding needs int32 streams of shape \[5\]"):
            _step(backend, rule, tensors, replace(NOW, streams=wrong))
    with pytest.raises(ValueError, match="rounding needs streams on cpu, got some on meta"):
        _step(backend, rule, tensors, replace(NOW, streams=right.to("meta")))
    assert_same_bits("weight", tensors.weights[0], _tensors(rule).weights[0])
    # To nearest, none are read.
    to_nearest = replace(NOW, seed=None, streams=right.to("meta"))
    expected = _step(backend, rule, _tensors(rule), replace(NOW, seed=None))
    found = _step(backend, rule, tensors, to_nearest)
    assert_same_bits("weights", torch.cat(found), torch.cat(expected))
