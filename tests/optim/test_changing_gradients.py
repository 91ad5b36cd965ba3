"""Steps that differ in which parameters have gradients: layers dropped, networks in turns."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from backend_cases import BF16, F64
from fastlars.backends.cpu import Cpu
from fastlars.optim import plan as plans
from fastlars.optim.plan_cache import MAX_PLANS
from optimizers import ROWS, SIMPLE, Row, assert_same, parameters, set_gradients
from optimizers import one_thread as one_thread

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)
STEPS = 12


def drop(params: list[nn.Parameter], step: int) -> None:
    """Gradients of the numbered step, without those of some parameters, at random."""
    set_gradients(params, step)
    for p in random.Random(step).sample(params, 2):
        p.grad = None


def pair(row: Row) -> list[tuple[Any, list[nn.Parameter]]]:
    found = []
    for _ in range(2):
        params = parameters(row.dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
        found.append((row.make(groups), params))
    return found


def run_beside_one_that_forgets(
    row: Row, before: Callable[[list[nn.Parameter], int], None]
) -> list[list[nn.Parameter]]:
    """Two runs, of which one plans every step anew."""
    (optimizer, params), (other, others) = pair(row)
    for step in range(STEPS):
        before(params, step)
        before(others, step)
        optimizer.step()
        other._forget_plans()
        other.step()
        for p, q in zip(params, others, strict=True):
            assert_same(
                f"state after step {step}", optimizer.state[p].values(), other.state[q].values()
            )
    assert_same("parameter", params, others)
    return [params, others]


@every_row
def test_same_bits_as_a_plan_made_anew(row: Row) -> None:
    run_beside_one_that_forgets(row, drop)


@each_class
@pytest.mark.parametrize("change", ["memory", "layout", "gradient type", "frozen"])
def test_what_changes_along_with_the_set(row: Row, change: str) -> None:
    """What was checked is known by how it lay; what lies otherwise is checked again."""

    def before(params: list[nn.Parameter], step: int) -> None:
        drop(params, step)
        if step != 7:
            return
        first, conv = params[0], params[3]
        if change == "memory":
            first.data = first.data.clone()
        elif change == "layout":
            conv.data = conv.data.contiguous(memory_format=torch.contiguous_format)
        elif change == "gradient type":
            for p in params:
                if p.grad is not None:
                    grad, p.grad = p.grad.to(BF16), None
                    if hasattr(p, "grad_dtype"):
                        p.grad_dtype = None  # any
                    p.grad = grad
        elif change == "frozen":
            first.requires_grad_(False)

    run_beside_one_that_forgets(row, before)


@each_class
def test_a_bad_parameter_is_found_though_it_was_known(row: Row) -> None:
    (optimizer, params), _ = pair(row)
    for step in range(6):
        drop(params, step)
        optimizer.step()
    set_gradients(params, 6)
    params[1].grad = None
    params[0].data = torch.zeros(1, 5).expand(6, 5)
    with pytest.raises(ValueError, match=r"group 0, parameter 0.* is expanded"):
        optimizer.step()
    params[0].data = torch.zeros(6, 4)
    with pytest.raises((ValueError, TypeError), match=r"group 0, parameter 0.* has shape"):
        optimizer.step()


class Count:
    """Calls of a method."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        whole = getattr(owner, name)
        self.calls = 0

        def counted(*given: Any, **more: Any) -> Any:
            self.calls += 1
            return whole(*given, **more)

        monkeypatch.setattr(owner, name, counted)


@each_class
def test_what_is_known_is_not_checked_again(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check costs some 40 us for each tensor, which is what such steps took."""
    (optimizer, params), _ = pair(row)
    set_gradients(params, 0)
    optimizer.step()
    checked = Count(monkeypatch, plans, "check_parameter")
    sorted_anew = Count(monkeypatch, plans.GroupPlan, "_from_checked")
    for step in range(1, STEPS):
        drop(params, step)
        optimizer.step()
    assert checked.calls == 0
    for step in range(1, 9):  # in turns: whose plans are kept
        set_gradients(params, step)
        for p in params[step % 2 :: 2]:
            p.grad = None
        if step == 5:
            before = sorted_anew.calls
        optimizer.step()
    assert sorted_anew.calls == before
    assert checked.calls == 0


def test_a_bounded_number_of_plans_is_kept() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(8)]
    optimizer = fastlars.LARS(params, lr=0.1)
    for step in range(40):
        for i, p in enumerate(params):
            p.grad = torch.ones(3) if step == 0 or step >> (i % 6) & 1 else None
        optimizer.step()
    cache = optimizer.planner._plans[0].cache  # type: ignore[union-attr]
    assert cache is not None
    assert len(cache.plans) == MAX_PLANS


@pytest.mark.parametrize("masters", [False, True])
def test_gradients_that_lie_otherwise_are_bound_once(
    masters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channels_last weight has such gradients at every step."""
    monkeypatch.setenv("FASTLARS_CHECK", "0")
    dtype = BF16 if masters else torch.float32
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(4, 3, 2, 2, generator=generator).to(dtype)
    runs = []
    for contiguous in (False, True):
        weight = nn.Parameter(value.clone(memory_format=torch.channels_last))
        other = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = fastlars.LARS([other, weight], lr=0.5, master_weights=masters)
        bound = Count(monkeypatch, Cpu, "bind")
        counts = []
        for step in range(5):
            g = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step)).to(dtype)
            usual = step == 3  # once as the weight lies
            as_weight = usual or not contiguous
            weight.grad = g.contiguous(memory_format=torch.channels_last) if as_weight else g
            other.grad = torch.ones(3, dtype=dtype)
            optimizer.step()
            counts.append(bound.calls)
        assert counts == ([2, 3, 4, 5, 6] if contiguous else [1, 2, 3, 4, 5])
        runs.append([other, weight])
        monkeypatch.undo()
        monkeypatch.setenv("FASTLARS_CHECK", "0")
    assert_same("parameter", *runs)


def test_a_sparse_gradient_after_one_that_was_copied() -> None:
    w = nn.Parameter(torch.ones(3, 4))
    optimizer = fastlars.LARS([w], lr=0.1)
    w.grad = torch.ones(4, 3).t()
    optimizer.step()
    w.grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(TypeError, match="group 0, parameter 0 has a sparse gradient"):
        optimizer.step()


def test_double_weights_have_plans_too() -> None:
    row = next(row for row in ROWS if row.dtype == F64)
    run_beside_one_that_forgets(row, drop)
