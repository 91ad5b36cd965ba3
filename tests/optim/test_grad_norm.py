"""The global gradient norm: its value, steps that skip_if skips by it, and their count.

Those with a `backend` also run where numbers stay on the device: test_cuda_on_cpu.py and
test_triton.py have the kernels of GPUs step CPU tensors.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastlars
from backend_cases import NAMES
from optimizers import ROWS, SIMPLE, Row, Snapshot, assert_same, parameters, set_gradients, train
from optimizers import one_thread as one_thread
from tolerances import TOLERANCES, assert_same_bits

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)
LARGE = 1000.0  # how much larger the gradients of a spike are
THRESHOLD = 20.0  # between the norms of ordinary gradients and of a spike
IN_RANGE = [row for row in ROWS if row.dtype != torch.float16]
Norm = Callable[[Tensor], Any]


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv("FASTLARS_BACKEND", name)
    return name


def norm_of(optimizer: Any) -> float:
    found = optimizer.grad_norm
    assert found.dtype == torch.float64
    assert found.shape == ()
    return float(found)


def torchs_norm(params: list[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad.double() for p in params]))


def spike(params: list[nn.Parameter], step: int) -> None:
    set_gradients(params, step, scale=LARGE)


def two_groups(row: Row, params: list[nn.Parameter], **options: Any) -> Any:
    return row.make([{"params": params[:2]}, {"params": params[2:]}], **options)


def states(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    return [value for p in params for _, value in sorted(optimizer.state[p].items())]


def assert_same_training(a: Any, mine: Any, b: Any, theirs: Any) -> None:
    assert_same("parameter", mine, theirs)
    assert_same("state", states(a, mine), states(b, theirs))
    for one, other in zip(a.param_groups, b.param_groups, strict=True):
        assert int(one.get("step", 0)) == int(other.get("step", 0))


# The value.


@pytest.mark.parametrize("row", IN_RANGE, ids=repr)
@pytest.mark.parametrize("option", ["max_grad_norm", "skip_if"])
def test_it_is_torchs_norm_of_all_groups(row: Row, option: str) -> None:
    params = parameters(row.dtype)
    optimizer = two_groups(row, params, **{option: math.inf})
    assert optimizer.grad_norm is None
    for step in range(3):
        set_gradients(params, step, scale=1.0 + step)
        expected = torchs_norm(params)
        optimizer.step()
        assert norm_of(optimizer) == pytest.approx(expected, rel=TOLERANCES["sum"].arithmetic)
        clipped = nn.utils.clip_grad_norm_(params, 1e9)
        if row.dtype == torch.float32:
            assert norm_of(optimizer) == pytest.approx(float(clipped), rel=2e-6)


@each_class
def test_it_is_of_unscaled_and_unclipped_gradients(backend: str, row: Row) -> None:
    found = []
    for scale, limit in ((1.0, math.inf), (1.0, 0.05), (65536.0, math.inf), (65536.0, 0.05)):
        params = parameters()
        optimizer: Any = row.make(params, max_grad_norm=limit, fused_unscale=True)
        for step in range(2):
            set_gradients(params, step, scale=scale)
            if scale > 1.0:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor([scale]), torch.zeros(1)
            optimizer.step()
        found.append(optimizer.grad_norm)
    assert found[0] > 0.5
    for other in found[1:]:
        assert_same_bits("norm", other, found[0])


@each_class
def test_an_infinite_limit_clips_nothing(backend: str, row: Row) -> None:
    params, others = parameters(), parameters()
    optimizer, other = row.make(params, max_grad_norm=math.inf), row.make(others)
    train(optimizer, params, range(2))
    train(other, others, range(2))
    assert_same_training(optimizer, params, other, others)
    assert optimizer.grad_norm is not None
    assert other.grad_norm is None


@each_class
def test_a_step_that_does_not_need_it_has_none(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params, max_grad_norm=1.0)
    train(optimizer, params, [0])
    assert norm_of(optimizer) > 0.0
    optimizer.zero_grad()
    optimizer.step()
    assert norm_of(optimizer) == 0.0
    optimizer.param_groups[0]["max_grad_norm"] = None
    train(optimizer, params, [1])
    assert optimizer.grad_norm is None


# Thresholds.


@each_class
def test_a_step_above_the_threshold_is_skipped(backend: str, row: Row) -> None:
    params = parameters()
    optimizer = row.make(params, skip_if=math.inf)
    train(optimizer, params, [0])
    norm = norm_of(optimizer)
    counted = 0
    for threshold in (math.nextafter(norm, 0.0), norm, math.nextafter(norm, math.inf)):
        before = [p.detach().clone() for p in params]
        optimizer.skip_if = threshold
        train(optimizer, params, [0])
        counted += threshold < norm
        assert norm_of(optimizer) == norm
        assert int(optimizer.skipped_steps) == counted == 1
        same = all(torch.equal(p, was) for p, was in zip(params, before, strict=True))
        assert same == (threshold < norm)
        assert (optimizer.trust_ratios() == {}) == (threshold < norm)


@each_class
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("threshold", [THRESHOLD, math.inf])
def test_what_is_not_finite_is_skipped(backend: str, row: Row, bad: float, threshold: Any) -> None:
    params, others = parameters(), parameters()
    optimizer = row.make(params, skip_if=threshold)
    other = row.make(others, max_grad_norm=math.inf)
    for step in range(3):
        set_gradients(params, step)
        if step != 2:  # the very first step, and one with states
            params[1].grad[3] = bad
        optimizer.step()
    assert int(optimizer.skipped_steps) == 2
    train(other, others, [2])
    assert_same_training(optimizer, params, other, others)


@every_row
def test_a_skipped_step_changes_nothing(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer = two_groups(row, params, skip_if=THRESHOLD, max_grad_norm=0.5)
    other = two_groups(row, others, max_grad_norm=0.5)
    for step in range(5):
        if step % 2 == 0:  # the first one too, which makes states
            spike(params, step)
            before = Snapshot(optimizer)
            optimizer.step()
            if step > 0:
                before.assert_unchanged()
            assert norm_of(optimizer) > THRESHOLD
        else:
            train(optimizer, params, [step])
            train(other, others, [step])
    assert_same_training(optimizer, params, other, others)
    assert int(optimizer.skipped_steps) == 3


def assert_spikes_do_not_show(
    optimizer: Any, params: list[Any], other: Any, others: list[Any], steps: int
) -> None:
    """One optimizer gets a spike before each step, which it skips; the other one does not."""
    for step in range(steps):
        spike(params, step)
        optimizer.step()
        train(optimizer, params, [step])
        train(other, others, [step])
    assert_same_training(optimizer, params, other, others)
    assert int(optimizer.skipped_steps) == steps


@each_class
def test_skipped_steps_do_not_show(backend: str, row: Row) -> None:
    params, others = parameters(), parameters()
    optimizer = two_groups(row, params, skip_if=THRESHOLD)
    other = two_groups(row, others)
    assert_spikes_do_not_show(optimizer, params, other, others, steps=4)


# Callables.


def pairs(kinds: Iterable[str]) -> list[Any]:
    """Each kind with one class, each class with one kind: no rule is looked at until it decides."""
    first, *others = kinds
    found = [*((SIMPLE[0], kind) for kind in (first, *others)), *((r, first) for r in SIMPLE[1:])]
    return [pytest.param(row, kind, id=f"{row!r}-{kind}") for row, kind in found]


SKIPS: dict[str, Norm] = {
    "bool": lambda norm: bool(norm > THRESHOLD),
    "numpy": lambda norm: np.float64(norm) > np.float64(THRESHOLD),
    "tensor": lambda norm: norm > THRESHOLD,
    "tensor of one": lambda norm: (norm > THRESHOLD).reshape(1, 1),
    "number in a tensor": lambda norm: torch.where(norm > THRESHOLD, math.nan, 0.0),
}


@pytest.mark.parametrize(("row", "kind"), pairs(SKIPS))
def test_a_callable_decides(backend: str, row: Row, kind: str) -> None:
    params, others = parameters(), parameters()
    optimizer = row.make(params, skip_if=SKIPS[kind], max_grad_norm=0.05)
    other = row.make(others, max_grad_norm=0.05)
    assert_spikes_do_not_show(optimizer, params, other, others, steps=3)


WRONG: dict[str, tuple[Norm, str]] = {
    "None": (lambda norm: None, "got NoneType"),
    "int": (lambda norm: 1, "got int"),
    "float": (float, "got float"),
    "text": (lambda norm: "no", "got str"),
    "two": (lambda norm: torch.zeros(2, dtype=torch.bool), r"got shape \(2,\)"),
    "array": (lambda norm: np.zeros(2, dtype=bool), "got ndarray"),
}


@pytest.mark.parametrize(("row", "kind"), pairs([*WRONG, "raises"]))
def test_a_callable_that_is_wrong_changes_nothing(backend: str, row: Row, kind: str) -> None:
    def fails(norm: Tensor) -> bool:
        raise ArithmeticError("of the callable")

    call, text = WRONG.get(kind, (fails, ""))
    params = parameters()
    optimizer = row.make(params, skip_if=THRESHOLD)
    train(optimizer, params, [0])
    optimizer.skip_if = call
    set_gradients(params, 1)
    before = Snapshot(optimizer, optimizer.skipped_steps)
    if kind == "raises":
        with pytest.raises(ArithmeticError, match="of the callable"):
            optimizer.step()
    else:
        with pytest.raises(TypeError, match=f"skip_if must return .* of one element, {text}"):
            optimizer.step()
    before.assert_unchanged()
    optimizer.skip_if = None
    optimizer.step()


class FarAboveMedian:
    """Skips norms of more than three times the median of the last ones that it let pass."""

    def __init__(self) -> None:
        self.passed: list[float] = []

    def __call__(self, norm: Tensor) -> bool:
        value = float(norm)
        if self.passed and not value <= 3.0 * statistics.median(self.passed[-50:]):
            return True
        self.passed.append(value)
        return False


def test_a_callable_may_remember() -> None:
    params = parameters()
    detector = FarAboveMedian()
    optimizer = fastlars.LAMB(params, lr=0.01, skip_if=detector)
    for step, scale in enumerate((1.0, 1.5, 0.5, 9.0, 1.0, math.nan, 2.0)):
        set_gradients(params, step, scale=scale)
        optimizer.step()
    assert len(detector.passed) == 5
    assert int(optimizer.skipped_steps) == 2
    assert optimizer.param_groups[0]["step"] == 5
    other = copy.deepcopy(optimizer)  # with a memory of its own
    assert other.skip_if.passed == detector.passed  # type: ignore[union-attr]
    assert other.skip_if.passed is not detector.passed  # type: ignore[union-attr]


# GradScaler and the count.


@each_class
def test_a_scalers_skips_are_counted_with_the_others(backend: str, row: Row) -> None:
    params, others = parameters(), parameters()
    optimizer: Any = row.make(params, skip_if=THRESHOLD, fused_unscale=True)
    other = row.make(others)
    kept = None
    for step in range(2):
        for found_inf, larger in ((1.0, 1.0), (2.0, LARGE), (0.0, LARGE), (0.0, 1.0)):
            set_gradients(params, step, scale=larger * 65536.0)
            optimizer.grad_scale = torch.tensor([65536.0])
            optimizer.found_inf = torch.tensor([found_inf])
            optimizer.step()
            kept = optimizer.skipped_steps if kept is None else kept
        train(other, others, [step])
        assert int(optimizer.skipped_steps) == 3 * (step + 1)
    assert_same_training(optimizer, params, other, others)
    assert kept is optimizer.skipped_steps
    assert kept.dtype == torch.int64
    assert kept.shape == ()


def test_what_a_scaler_has_the_host_skip_has_no_finite_norm() -> None:
    params = parameters()
    optimizer: Any = fastlars.LAMB(params, max_grad_norm=1.0)
    for found_inf in (0.0, 1.0, 0.0):
        set_gradients(params, 0)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert math.isnan(norm_of(optimizer)) == bool(found_inf)
        assert bool(optimizer.trust_ratios()) != bool(found_inf)
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.grad_norm is None
    assert int(optimizer.skipped_steps) == 2


class NoWaiting(TorchFunctionMode):
    """Whoever has the host look at a tensor's value fails."""

    LOOKS = ("item", "tolist", "numpy", "cpu", "is_nonzero", "equal", "allclose", "nonzero")
    CASTS = ("__bool__", "__float__", "__int__", "__index__", "__array__", "__format__")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.LOOKS + self.CASTS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@each_class
def test_nothing_waits_for_the_device(backend: str, row: Row) -> None:
    params = parameters()
    optimizer: Any = row.make(params, fused_unscale=True)
    reads_device = backend not in ("cpu", "reference")
    train(optimizer, params, [0])
    for skip_if in (THRESHOLD, lambda norm: norm > THRESHOLD):
        optimizer.skip_if = skip_if
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.zeros(1)
        spike(params, 1)
        if reads_device:
            with NoWaiting():
                optimizer.step()
                assert optimizer.grad_norm is not None
                assert optimizer.skipped_steps is not None
        else:
            with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
                optimizer.step()
            optimizer.step()
    assert int(optimizer.skipped_steps) == 2
