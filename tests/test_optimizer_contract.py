"""Drop-in means drop-in: what torch.optim.Optimizer promises, for every row of the table."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fastlars
from optimizers import (
    BF16,
    F64,
    ROWS,
    SIMPLE,
    Row,
    Snapshot,
    assert_same,
    parameters,
    set_gradients,
    train,
)

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Barriers of small problems wait long on a busy machine."""
    torch.set_num_threads(1)


# Learning rates and schedulers.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    # It moves the momentum, or beta1, as well.
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),
    "polynomial": lambda o: fastlars.schedules.polynomial(o, steps=6, warmup_steps=2),
}


@each_class
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(row: Row, name: str) -> None:
    params = parameters()
    optimizer = row.make(params)
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for step in range(5):
        group = optimizer.param_groups[0]
        seen.append({key: group[key] for key in ("lr", "momentum", "betas") if key in group})
        train(optimizer, params, [step])
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len({float(values["lr"]) for values in seen}) > 1
    if name == "OneCycleLR":
        assert len({str(values) for values in seen}) == 5

    by_hand = parameters()
    other = row.make(by_hand)
    train(other, by_hand, range(5), lambda step: other.param_groups[0].update(seen[step]))
    assert_same(f"{name}, parameter", params, by_hand)


@every_row
def test_lr_as_a_tensor(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    lr = torch.tensor(row.options["lr"], dtype=F64)
    optimizer, other = row.make(params, lr=lr), row.make(others)
    train(optimizer, params, range(2))
    train(other, others, range(2))
    lr.mul_(0.5)
    other.param_groups[0]["lr"] *= 0.5
    train(optimizer, params, range(2, 4))
    train(other, others, range(2, 4))
    assert_same("parameter", params, others)


@every_row
def test_groups_have_their_own_hyper_parameters(row: Row) -> None:
    params, alone, alone_too = parameters(row.dtype), parameters(row.dtype), parameters(row.dtype)
    changed = {"lr": 0.03, "weight_decay": 0.2, "adapt": not row.options.get("adapt", True)}
    optimizer = row.make([{"params": params[:2]}, {"params": params[2:], **changed}])
    train(optimizer, params, range(3))
    first, second = row.make(alone[:2]), row.make(alone_too[2:], **changed)
    train(first, alone, range(3))
    train(second, alone_too, range(3))
    assert_same("parameter", params, alone[:2] + alone_too[2:])


@each_class
def test_a_changed_option_counts_from_the_next_step(row: Row) -> None:
    params, others = parameters(BF16), parameters(BF16)
    optimizer, other = row.make(params), row.make(others, master_weights=True)
    optimizer.param_groups[0]["master_weights"] = True
    train(optimizer, params, range(3))
    train(other, others, range(3))
    assert_same("parameter", params, others)

    params, others = parameters(BF16), parameters(BF16)
    optimizer, other = row.make(params), row.make(others)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["master_weights"] = True
    train(optimizer, params, range(2, 5))
    train(other, others, range(2))
    assert all("master" in optimizer.state[p] for p in params)
    resumed = row.make(others, master_weights=True)
    resumed.state = other.state
    train(resumed, others, range(2, 5))
    assert_same("parameter", params, others)


# Parameters that come and go.


@every_row
def test_parameter_groups_added_later(row: Row) -> None:
    params, alone = parameters(row.dtype), parameters(row.dtype)
    optimizer = row.make(params[:2])
    train(optimizer, params, range(2))
    optimizer.add_param_group({"params": params[2:], "lr": 0.01})
    train(optimizer, params, range(2, 4))
    early, late = row.make(alone[:2]), row.make(alone[2:], lr=0.01)
    train(early, alone, range(4))
    train(late, alone, range(2, 4))
    assert_same("parameter", params, alone)


@every_row
def test_parameters_without_gradients_are_left_alone(row: Row) -> None:
    """They neither move nor count the step; gradients may come and go."""
    has_gradient = [(0, 1, 3), (0, 2), (), (0, 1, 2, 3, 4), (1,)]
    params, alone = parameters(row.dtype), parameters(row.dtype)
    optimizer, single = row.make(params), [row.make([p]) for p in alone]
    for step, present in enumerate(has_gradient):
        for values in (params, alone):
            set_gradients(values, step)
            for i, p in enumerate(values):
                if i not in present:
                    p.grad = None
        optimizer.step()
        assert set(optimizer.trust_ratios()) == {params[i] for i in present}
        for one in single:
            one.step()
    assert_same("parameter", params, alone)
    for p, one, q in zip(params, single, alone, strict=True):
        assert optimizer.state[p].keys() == one.state[q].keys()
        assert_same("state", optimizer.state[p].values(), one.state[q].values())


@every_row
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(row: Row, set_to_none: bool) -> None:
    params = parameters(row.dtype)
    optimizer = row.make(params)
    train(optimizer, params, range(2))
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad(set_to_none=set_to_none)
    before = Snapshot(optimizer)
    if set_to_none:
        gc.collect()
        assert all(grad() is None for grad in grads), "the optimizer keeps gradients alive"
        optimizer.step()
        before.assert_unchanged()
        return
    assert all(not p.grad.any() for p in params)
    moved = [p.detach().clone() for p in params]
    optimizer.step()  # decay and momentum go on
    assert any(not torch.equal(p, was) for p, was in zip(params, moved, strict=True))


@each_class
def test_types_and_layouts_mixed_in_one_group(row: Row) -> None:
    def mixed() -> list[nn.Parameter]:
        lists = [parameters(dtype) for dtype in (torch.float32, BF16, F64, torch.float16)]
        strided = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))[:, ::2]
        return [p for four in zip(*lists, strict=True) for p in four] + [nn.Parameter(strided)]

    params, alone = mixed(), mixed()
    for p in (params[-1], alone[-1]):
        assert p.stride() == (8, 2)
    optimizer, single = row.make(params, master_weights=True), []
    for i, p in enumerate(alone):
        single.append(row.make([p], master_weights=True))
        assert p.dtype == params[i].dtype
    for step in range(3):
        for values in (params, alone):
            set_gradients(values, step)
        optimizer.step()
        for one in single:
            one.step()
    assert_same("parameter", params, alone)


# Gradients and graphs.


@every_row
def test_gradients_are_never_modified(row: Row) -> None:
    params = parameters(row.dtype)
    optimizer = row.make(params, maximize=True, max_grad_norm=0.01)
    for step in range(2):
        set_gradients(params, step)
        given = [p.grad for p in params]
        kept = [g.clone() for g in given]
        versions = [g._version for g in given]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, given, strict=True))
        assert [g._version for g in given] == versions
        assert_same("gradient", given, kept)


@every_row
def test_gradients_with_other_strides(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params), row.make(others)

    def restride(step: int) -> None:
        params[0].grad = params[0].grad.t().contiguous().t()
        params[3].grad = params[3].grad.contiguous()
        assert params[3].grad.stride() != params[3].stride()

    train(optimizer, params, range(3), restride)
    train(other, others, range(3))
    assert_same("parameter", params, others)
    for p, q in zip(params, others, strict=True):
        assert_same("state", optimizer.state[p].values(), other.state[q].values())


@every_row
def test_a_stale_graph_raises(row: Row) -> None:
    params = parameters(row.dtype)
    optimizer = row.make(params)
    set_gradients(params, 0)
    loss = sum((p * p).sum() for p in params if p.numel() > 0)
    versions = [p._version for p in params]
    optimizer.step()
    assert all(p._version > was for p, was in zip(params, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_row
def test_maximize(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    up, down = row.make(params, maximize=True), row.make(others)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step, scale=-1.0)
        up.step()
        down.step()
    assert_same("parameter", params, others)


@each_class
def test_maximize_is_not_minimize(row: Row) -> None:
    params, others = parameters(), parameters()
    up, down = row.make(params, maximize=True), row.make(others)
    train(up, params, range(2))
    train(down, others, range(2))
    assert not torch.equal(params[0], others[0])


# Closures and hooks.


@every_row
def test_closure(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params), row.make(others)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        set_gradients(params, 0)
        return 3.25

    with torch.no_grad():
        assert optimizer.step(closure) == 3.25
    assert calls == [True]
    train(other, others, [0])
    assert_same("parameter", params, others)
    assert other.step() is None


@each_class
def test_step_hooks(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params)
    weights: list[Tensor] = []

    def record(*_: Any) -> None:
        weights.append(params[0].detach().clone())

    before = optimizer.register_step_pre_hook(record)
    optimizer.register_step_post_hook(record)
    train(optimizer, params, [0])
    assert len(weights) == 2
    assert not torch.equal(weights[0], weights[1])
    before.remove()
    train(optimizer, params, [1])
    assert len(weights) == 3


@each_class
def test_a_pre_hook_may_change_gradients(row: Row) -> None:
    params, others = parameters(), parameters()
    optimizer, other = row.make(params), row.make(others)

    def halve(*_: Any) -> None:
        for p in params:
            p.grad = 0.5 * p.grad

    optimizer.register_step_pre_hook(halve)
    train(optimizer, params, range(2))
    for step in range(2):
        set_gradients(others, step, scale=0.5)
        other.step()
    assert_same("parameter", params, others)


@each_class
def test_state_dict_hooks(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params)
    train(optimizer, params, [0])
    calls: list[str] = []

    def drop_note(_: Any, state_dict: dict[str, Any]) -> None:
        calls.append("pre")
        assert state_dict.pop("note") == "mine"

    def see_types(loaded: Any) -> None:
        calls.append("post")
        states = [value for state in loaded.state.values() for value in state.values()]
        assert states
        assert all(value.dtype == torch.float32 for value in states)

    fresh = row.make(parameters(BF16))
    fresh.register_load_state_dict_pre_hook(drop_note)
    fresh.register_load_state_dict_post_hook(see_types)
    fresh.load_state_dict({**optimizer.state_dict(), "note": "mine"})
    assert calls == ["pre", "post"]


# Copies.


def _through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_row
@pytest.mark.parametrize("through", [_through_pickle, _through_torch_save, copy.deepcopy])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_go_on_by_themselves(row: Row, through: Callable[[Any], Any], steps: int) -> None:
    params = parameters(row.dtype)
    optimizer = row.make([{"params": params[:2], "lr": 0.01}, {"params": params[2:]}])
    train(optimizer, params, range(steps))
    twin = through(optimizer)
    copies = [p for group in twin.param_groups for p in group["params"]]
    assert not {p.data_ptr() for p in copies if p.numel()} & {p.data_ptr() for p in params}
    assert_same("copy", copies, params)
    before = Snapshot(optimizer)
    train(twin, copies, range(steps, steps + 3))
    for p in params:
        p.grad = before.taken.get("no gradient") if p.grad is None else p.grad
    before.assert_unchanged()
    train(optimizer, params, range(steps, steps + 3))
    assert_same("parameter", copies, params)


@each_class
def test_repr_names_the_class_and_its_options(row: Row) -> None:
    text = repr(row.make(parameters()))
    assert text.startswith(type(row.make(parameters())).__name__)
    assert "weight_decay: 0.01" in text


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
@pytest.mark.parametrize("limit", [None, 0.05])
def test_grad_scaler(row: Row, unscale: bool, limit: float | None) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer = row.make(params, max_grad_norm=limit)
    other = row.make(others, max_grad_norm=limit)
    # A power of 2 scales without rounding, so that the results have the same bits.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        _scaled_gradients(params, step, scaler)
        if unscale:
            scaler.unscale_(optimizer)
        grads = [p.grad.clone() for p in params]
        scaler.step(optimizer)
        assert_same("gradient", [p.grad for p in params], grads)
        scaler.update()
    train(other, others, range(3))
    assert_same("parameter", params, others)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("row", GRAD_SCALER_ROWS, ids=repr)
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_grad_scaler_skips_a_bad_step(row: Row, unscale: bool, bad: float) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params), row.make(others)
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


# Names, ratios, precision.


@each_class
def test_named_parameters(row: Row) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = row.make(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    model[0].bias.grad = torch.zeros(4).to_sparse()
    with pytest.raises(TypeError, match=r"group 0, parameter 1 \(0\.bias\) has a sparse gradient"):
        optimizer.step()


def test_trust_ratios_of_lars() -> None:
    w, b, z = (nn.Parameter(torch.tensor(x)) for x in ([3.0, 4.0], [1.0, 0.0], [0.0, 0.0]))
    groups = [{"params": [w, z]}, {"params": [b], "adapt": False}]
    optimizer = fastlars.LARS(groups, lr=0.1, weight_decay=0.2, trust_coefficient=0.5, eps=0.25)
    assert optimizer.trust_ratios() == {}
    for p in (w, b, z):
        p.grad = torch.tensor([0.0, -2.0])
    optimizer.step()
    # 0.5 * 5 / (2 + 0.2 * 5 + 0.25)
    expected = {w: 2.5 / 3.25, b: 1.0, z: 1.0}
    assert optimizer.trust_ratios() == pytest.approx(expected, rel=1e-6)
    w.grad = None
    optimizer.step()
    assert set(optimizer.trust_ratios()) == {b, z}


def test_trust_ratios_of_lamb() -> None:
    w, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0, 0.0]))
    groups = [{"params": [w]}, {"params": [b], "weight_decay": 0.0}]
    optimizer = fastlars.LAMB(groups, lr=0.1, weight_decay=0.5, eps=0.0, always_adapt=False)
    for p in (w, b):
        p.grad = torch.tensor([0.3, -0.7])
    optimizer.step()
    # The first direction is the sign of the gradient: u = (1 + 1.5, -1 + 2).
    expected = {w: 5.0 / (2.5**2 + 1.0) ** 0.5, b: 1.0}
    assert optimizer.trust_ratios() == pytest.approx(expected, rel=1e-6)


def test_lars_in_float64() -> None:
    params = parameters(F64)
    weights = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in weights]
    rates = (0.5, 0.3, 0.8)
    optimizer = fastlars.LARS(params, lr=1.0, weight_decay=0.01, trust_coefficient=0.1)
    set_rate = lambda step: optimizer.param_groups[0].update(lr=rates[step])  # noqa: E731
    train(optimizer, params, range(3), set_rate)
    for step, lr in enumerate(rates):
        set_gradients(weights, step)
        for i, w in enumerate(weights):
            norm, scale = w.norm(), w.grad.norm() + 0.01 * w.norm()
            q = 0.1 * norm / scale if norm > 0 else 1.0
            buffers[i] = 0.9 * buffers[i] + lr * q * (w.grad + 0.01 * w)
            w -= buffers[i]
    for p, w in zip(params, weights, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-13, atol=1e-13)


def test_lamb_in_float64() -> None:
    params = parameters(F64)
    weights = [p.detach().clone() for p in params]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    optimizer = fastlars.LAMB(params, lr=0.05, weight_decay=0.01)
    train(optimizer, params, range(3))
    for step in range(3):
        set_gradients(weights, step)
        for w, m, v in zip(weights, first, second, strict=True):
            m.mul_(0.9).add_(0.1 * w.grad)
            v.mul_(0.999).add_(0.001 * w.grad**2)
            r = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6)
            u = r + 0.01 * w
            w -= 0.05 * (w.norm() / u.norm() if w.numel() else 1.0) * u
    for p, w in zip(params, weights, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-12, atol=1e-12)


@every_row
def test_training_lowers_the_loss(row: Row) -> None:
    x = torch.linspace(-1, 1, 64).unsqueeze(1).to(row.dtype)
    y = torch.sin(3 * x)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)).to(row.dtype)
    groups = fastlars.parameter_groups(model, weight_decay=1e-4, adapt_excluded=True)
    # A buffer of plain gradients outlives them: the ratio of small ones magnifies old large ones.
    careful = row.options.get("adapt") is False or row.options.get("buffer") == "gradient"
    optimizer = row.make(groups, **({"lr": 0.05} if careful else {}))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-10:]) < 0.5 * losses[0], losses
