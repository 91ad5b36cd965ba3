"""torch.compile: the compiled step gives the bits of the eager one, in one graph."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fastlars
from fastlars.backends.choose import instance
from fastlars.optim.compile import operator
from fastlars.rules import LarsRule
from optimizers import SIMPLE, Snapshot, assert_same, parameters, set_gradients

CASES = {
    **{row.kind.__name__: (row.kind, row.options) for row in SIMPLE},
    "lars-correction": (fastlars.LARS, {"lr": 1.0, "momentum_correction": True, "dampening": 0.5}),
    "lars-plain": (fastlars.LARS, {"lr": 1.0, "momentum": 0.0, "maximize": True}),
    "lars-clip": (fastlars.LARS, {"lr": 1.0, "max_grad_norm": 0.1}),
    "lamb-clip": (fastlars.LAMB, {"lr": 0.01, "max_grad_norm": 0.1}),
    "lans-clip": (fastlars.LANS, {"lr": 0.01, "max_grad_norm": 0.1, "norm_eps": 1e-3}),
    "lamb-masters": (fastlars.LAMB, {"lr": 0.01, "master_weights": True}),
}


def pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    return model, copy.deepcopy(model)


def train(model: nn.Module, step, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(5, 8, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        step()
        for group in optimizer.param_groups:
            group["lr"].mul_(0.9)


@pytest.mark.parametrize("name", CASES)
def test_compiled_step_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kind, options = CASES[name]
    models = pair(torch.bfloat16 if options.get("master_weights") else torch.float32)
    optimizers = []
    for model in models:
        groups = fastlars.parameter_groups(model, weight_decay=0.01)
        # A tensor: a float would be a constant of the graph, compiled again at each change.
        lr = torch.tensor(options["lr"])
        optimizers.append(kind(groups, **(options | {"lr": lr})))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled_step() -> None:
        optimizers[1].step()

    train(models[0], optimizers[0].step, optimizers[0], steps=4)
    train(models[1], compiled_step, optimizers[1], steps=4)
    for eager, compiled in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(eager, compiled)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        for key, value in optimizers[0].state[p].items():
            assert torch.equal(value, optimizers[1].state[q][key]), key
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_clip_over_mixed_types_and_layouts() -> None:
    """The order of a sum decides its last bits, and those of a float64 parameter show them."""
    torch._dynamo.reset()
    twins = [[parameters(dtype) for dtype in (torch.float64, torch.float32)] for _ in range(2)]
    optimizers = []
    for doubles, floats in twins:
        groups = [{"params": [*doubles[i : i + 3], *floats[i : i + 3]]} for i in (0, 3)]
        optimizers.append(fastlars.LAMB(groups, lr=torch.tensor(0.1), max_grad_norm=0.01))
    compiled_step = torch.compile(optimizers[1].step, fullgraph=True, backend="aot_eager")
    for step in range(6):
        for lists in twins:
            for params in lists:
                set_gradients(params, step)
                params[3].grad = params[3].grad.contiguous()  # unlike its parameter
        optimizers[0].step()
        compiled_step()
    for eager, compiled in zip(*twins, strict=True):
        assert_same("parameter", eager, compiled)


def test_the_reference_takes_the_norm_of_gradients_as_they_lie() -> None:
    weights = [torch.zeros(60, 50, dtype=torch.float64).t() for _ in range(20)]
    grads = [torch.randn(50, 60, dtype=torch.float64) for _ in weights]
    for w, g in zip(weights, grads, strict=True):
        assert torch.ops.fastlars.square_norm([w], [g], [1]) == g.square().sum()


def test_options_switched_off_and_on_again() -> None:
    torch._dynamo.reset()
    models = pair(torch.bfloat16)
    optimizers = []
    for model in models:
        groups = fastlars.parameter_groups(model, weight_decay=0.01)
        optimizers.append(fastlars.LARS(groups, lr=torch.tensor(1.0)))
    compiled_step = torch.compile(optimizers[1].step, fullgraph=True, backend="aot_eager")
    for on in (True, False, True):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["momentum_correction"] = group["master_weights"] = on
        train(models[0], optimizers[0].step, optimizers[0], steps=2)
        train(models[1], compiled_step, optimizers[1], steps=2)
    for eager, compiled in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(eager, compiled)


def test_operator_passes_opcheck() -> None:
    w = [torch.randn(3, 4), torch.randn(5)]
    g = [torch.randn(3, 4), torch.randn(5)]
    b = [torch.zeros(3, 4), torch.zeros(5)]
    rule = fastlars.LARS.rule_of(fastlars.LARS([torch.nn.Parameter(w[0])], lr=1.0).param_groups[0])
    text = operator.encode(rule)
    arguments = (text, w, g, b, [], [], 1.0, None, 1.0, None, None, False)
    torch.library.opcheck(torch.ops.fastlars.step.default, arguments)
    torch.library.opcheck(torch.ops.fastlars.square_norm.default, (w, g, [1, 1]))


def test_operator_keeps_layouts_and_notices_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setenv("FASTLARS_CHECK", "0")  # it makes a layout too
    backend = type(instance("cpu"))
    layout = backend.layout
    monkeypatch.setattr(
        backend, "layout", lambda self, ws: (made.append(len(ws)), layout(self, ws))[1]
    )
    rule = operator.encode(LarsRule(momentum=0.0, adapt=False))

    def step(w: torch.Tensor) -> None:
        torch.ops.fastlars.step(
            rule, [w], [torch.ones_like(w)], [], [], [], 1.0, None, 1.0, None, None, False
        )

    weight = torch.zeros(3)
    step(weight)
    step(weight)
    assert made == [1]
    assert weight.tolist() == [-2.0, -2.0, -2.0]
    weight.resize_(5).zero_()
    step(weight)
    assert made == [1, 1]
    assert weight.tolist() == [-1.0] * 5


def test_rule_survives_as_text() -> None:
    group = fastlars.LAMB([nn.Parameter(torch.ones(2))], phi=(0.5, float("inf"))).param_groups[0]
    rule = fastlars.LAMB.rule_of(group)
    assert operator.decode(operator.encode(rule)) == rule


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_compiled_step_obeys_a_scaler(found_inf: float) -> None:
    """What a GradScaler leaves on the optimizer is read outside the graph, at every step anew."""
    torch._dynamo.reset()
    models = pair(torch.float32)
    optimizers = [fastlars.LARS(model.parameters(), lr=1.0) for model in models]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend="aot_eager")]
    for infinite in (0.0, found_inf, 0.0):
        for model, optimizer, step in zip(models, optimizers, steps, strict=True):
            optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(infinite)  # type: ignore[attr-defined]
            for p in model.parameters():
                p.grad = 4.0 * p.detach()
            step()
    assert_same("weight", models[1].parameters(), models[0].parameters())
    assert optimizers[1].trust_ratios()


CYCLES: dict[str, list[Any]] = {
    "weight_decay": [0.1, 0.2, 0.3, 0.4, 0.2],
    "eps": [1e-6, 1e-3, 1e-2, 0.1, 1e-3],
    "betas": [(0.9, 0.99), (0.8, 0.99), (0.7, 0.98), [0.6, 0.9], (0.9, 0.99)],
    "phi": [(0.0, 1.0), (0.0, 0.5), (0.1, 0.4), (0.0, 1.0)],
    "ratio_bounds": [(0.0, 10.0), (0.0, 0.5), (3.0, 4.0), (0.0, 10.0)],
    "nesterov": [False, True, "both", False],
    "max_grad_norm": [0.5, 0.2, 0.3, None, 0.4],
    "lr": [0.1, 0.2, 0.3, 0.4],
    "momentum": [0.9, 0.5, 0.3, 0.0, 0.7],
    # Of types that torch.compile does not guard.
    "weight_decay of numpy": [0.1, *map(numpy.float64, (0.2, 0.3)), 0.1, numpy.float32(0.5)],
    "weight_decay tensors": [0.1, *map(torch.tensor, (0.2, 0.3, 0.4))],
    "betas of numpy": [(0.9, 0.99), *map(numpy.array, ([0.8, 0.99], [0.7, 0.98])), (0.9, 0.99)],
    "lr of numpy": [0.1, *map(numpy.float64, (0.2, 0.3)), 0.4],
    "max_grad_norm of numpy": [0.5, *map(numpy.float32, (0.2, 0.3)), None],
    "trust_clip of numpy": [False, numpy.True_, numpy.False_, True],
}


@pytest.mark.parametrize("name", CYCLES)
@pytest.mark.filterwarnings("ignore")  # of torch, which says that it does not trace an extension
def test_hyper_parameters_that_a_schedule_changes(name: str) -> None:
    """torch.compile lets a float vary once it has changed: what was made of it must not stay."""
    torch._dynamo.reset()
    values, name = CYCLES[name], name.split()[0]
    kind = fastlars.LARS if name == "momentum" else fastlars.LAMB
    rows = []
    for compiled in (False, True):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = kind([w], lr=0.5)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        seen = []
        for i, value in enumerate(values):
            optimizer.param_groups[0][name] = value
            w.grad = torch.tensor([1.0, 2.0, 0.5 * i])
            step()
            seen.append(w.detach().clone())
        rows.append(seen)
    assert_same("weights after step", rows[1], rows[0])
    assert len({tuple(weights.tolist()) for weights in rows[0]}) == len(rows[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_grad_norm", -1.0), ("maximize", "yes"), ("lr", -0.2), ("weight_decay", -1.0)],
)
def test_compiled_steps_refuse_what_others_refuse(name: str, value: Any) -> None:
    """Of the last group, before the first is stepped."""
    torch._dynamo.reset()
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fastlars.LAMB([{"params": [p]} for p in params])
    step = torch.compile(optimizer.step, backend="aot_eager")
    for p in params:
        p.grad = torch.ones(3)
    step()
    optimizer.param_groups[1][name] = value
    before = Snapshot(optimizer)
    with pytest.raises(Exception, match=f"group 1: {name} must"):  # wrapped in one of torch's
        step()
    torch.set_grad_enabled(True)  # which torch leaves off behind an error in a compiled region
    before.assert_unchanged()


def test_a_weight_laid_out_anew_between_compiled_steps() -> None:
    """The graph holds the states as they lay; an ordinary step lays them out anew."""
    torch._dynamo.reset()
    w, v = (torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)) for _ in range(2))
    compiled, plain = fastlars.LARS([w], lr=1.0), fastlars.LARS([v], lr=1.0)
    step = torch.compile(compiled.step, backend="aot_eager")

    def both(ours: Any) -> None:
        for p in (w, v):
            p.grad = torch.ones_like(p)
        ours()
        plain.step()

    both(step)
    for p in (w, v):
        p.data = p.data.t().contiguous().t()
    w.grad = torch.ones_like(w)
    with pytest.raises(RuntimeError, match=r"states 0 .*: take one step outside of torch\.compile"):
        step()
    torch.set_grad_enabled(True)  # which torch leaves off behind an error in a compiled region
    both(compiled.step)
    both(step)
    assert_same("weight", [w], [v])
