"""GradScaler and the clip of the global norm, for every row of the table of optimizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from backend_cases import BF16, F64
from optimizers import ROWS, SIMPLE, Row, Snapshot, assert_same, parameters, set_gradients, train
from optimizers import one_thread as one_thread

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


# GradScaler.


def _scaled_gradients(params: list[nn.Parameter], step: int, scaler: Any) -> None:
    """Gradients of a scaled loss: the loss of a linear function has exactly these."""
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    set_gradients(plain, step)
    for p in params:
        p.grad = None
    loss = sum((p * q.grad).sum() for p, q in zip(params, plain, strict=True))
    scaler.scale(loss).backward()


GRAD_SCALER_ROWS = [row for row in ROWS if row.dtype != torch.float16]


@pytest.mark.parametrize("row", GRAD_SCALER_ROWS, ids=repr)
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("limit", [None, 0.05])
def test_grad_scaler(row: Row, unscale: bool, fused: bool | None, limit: float | None) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer = row.make(params, max_grad_norm=limit, fused_unscale=fused)
    other = row.make(others, max_grad_norm=limit)
    # A power of 2 scales without rounding, so that the results have the same bits.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        _scaled_gradients(params, step, scaler)
        if unscale:
            scaler.unscale_(optimizer)
        scale = 1.0 if unscale or fused else scaler.get_scale()
        grads = [p.grad / scale for p in params]
        scaler.step(optimizer)
        assert_same("gradient", [p.grad for p in params], grads)
        scaler.update()
    train(other, others, range(3))
    assert_same("parameter", params, others)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("row", GRAD_SCALER_ROWS, ids=repr)
@pytest.mark.parametrize(("fused", "unscale"), [(None, True), (True, False), (True, True)])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_grad_scaler_skips_a_bad_step(
    row: Row, unscale: bool, fused: bool | None, bad: float
) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params, fused_unscale=fused), row.make(others)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        _scaled_gradients(params, step, scaler)
        if step in (0, 2):
            params[1].grad[3] = bad
        if unscale:
            scaler.unscale_(optimizer)
        before = Snapshot(optimizer)
        scaler.step(optimizer)
        if step in (0, 2):
            before.assert_unchanged()
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    train(other, others, (1, 3))
    assert_same("parameter", params, others)
    for p, q in zip(params, others, strict=True):
        assert_same("state", optimizer.state[p].values(), other.state[q].values())


@each_class
def test_who_unscales(row: Row) -> None:
    """Lightning and Accelerate ask this attribute whether they may clip and see skipped steps."""

    def fused(dtype: torch.dtype, *, asked: Any = None, **options: Any) -> bool:
        made = row.make(parameters(dtype), fused_unscale=asked, **options)
        return bool(made._step_supports_amp_scaling)

    assert not fused(torch.float32)
    assert not fused(torch.float16, asked=False)
    assert fused(torch.float32, asked=True)
    assert fused(torch.float32, capturable=True)  # a recorded step is not skipped by the host
    # A GradScaler refuses to unscale gradients of float16.
    assert fused(torch.float16, master_weights=True)
    params = parameters(torch.float32)
    groups = [{"params": params[:1], "fused_unscale": True}, {"params": params[1:]}]
    mixed = row.make(groups)
    assert not mixed._step_supports_amp_scaling
    # Under an overlap that writes during backward, which so sees a GradScaler, and refuses it.
    for writes in (True, False):
        mixed.overlap_hook = SimpleNamespace(may_write=lambda writes=writes: writes)
        assert mixed._step_supports_amp_scaling is writes


def test_a_scaler_steps_float16_weights() -> None:
    w = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = fastlars.LARS([w], lr=1.0, adapt=False, momentum=0.0, master_weights=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(w.sum()).backward()
    scaler.step(optimizer)
    assert w.tolist() == [0.0] * 4


# Clipping.


@pytest.mark.parametrize("row", [row for row in ROWS if row.dtype != torch.float16], ids=repr)
def test_max_grad_norm_is_torchs(row: Row) -> None:
    params = parameters(row.dtype)
    exact = [nn.Parameter(p.detach().double()) for p in params]
    options = {**row.options, "master_weights": False}
    # Large gradients, beside which clip_grad_norm_'s 1e-6 in the denominator is nothing.
    limit = 3.0
    optimizer, other = row.make(params, max_grad_norm=limit), row.kind(exact, **options)
    for step in range(3):
        set_gradients(params, step, scale=100.0)
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.double()
        norm = nn.utils.clip_grad_norm_(exact, limit)
        assert norm > 10 * limit
        optimizer.step()
        other.step()
    tolerance = 2e-2 if BF16 in (row.dtype, row.options.get("state_dtype")) else 3e-6
    if row.dtype == F64:
        tolerance = 1e-7
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance)


@each_class
def test_max_grad_norm_is_of_all_groups_together(row: Row) -> None:
    params, others = parameters(), parameters()
    groups = [{"params": params[:2], "max_grad_norm": 0.1}, {"params": params[2:]}]
    optimizer, other = row.make(groups), row.make(others)
    set_gradients(params, 0)
    set_gradients(others, 0)
    norm = torch.cat([p.grad.double().flatten() for p in params]).norm()
    for p in others[:2]:
        p.grad = (p.grad.double() * (0.1 / norm)).float()
    optimizer.step()
    other.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


@every_row
def test_a_limit_that_is_not_reached_changes_nothing(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params, max_grad_norm=1e6), row.make(others)
    train(optimizer, params, range(2))
    train(other, others, range(2))
    assert_same("parameter", params, others)
