"""Trust ratios, float64 steps and training: optimizers against their equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from backend_cases import F64
from optimizers import ROWS, SIMPLE, Row, parameters, set_gradients, train
from optimizers import one_thread as one_thread

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


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


AHEAD = [
    {"nesterov": True},
    {"nesterov": "both"},
    {"nesterov": True, "bias_correction": False},
    {"nesterov": "both", "bias_correction": False, "grad_averaging": False},
    {"nesterov": True, "decay": "gradient", "grad_averaging": False},
    {"nesterov": "both", "decay": "decoupled"},
]


@pytest.mark.parametrize("options", AHEAD, ids=str)
def test_lamb_looks_ahead_in_float64(options: dict[str, Any]) -> None:
    """Algorithms 3 and 4 in the appendix of the paper, with a constant beta1."""
    params = parameters(F64)
    weights = [p.detach().clone() for p in params]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    optimizer = fastlars.LAMB(params, lr=0.05, weight_decay=0.01, betas=(0.8, 0.9), **options)
    train(optimizer, params, range(3))
    decay, corrects = options.get("decay", "update"), options.get("bias_correction", True)
    enters = 0.2 if options.get("grad_averaging", True) else 1.0
    for t in range(1, 4):
        set_gradients(weights, t - 1)
        now1, next1, now2, next2 = 1 - 0.8**t, 1 - 0.8 ** (t + 1), 1 - 0.9**t, 1 - 0.9 ** (t + 1)
        if not corrects:
            now1 = next1 = now2 = next2 = 1.0
        for w, m, v in zip(weights, first, second, strict=True):
            g = w.grad + 0.01 * w if decay == "gradient" else w.grad
            m.mul_(0.8).add_(enters * g)
            v.mul_(0.9).add_(0.1 * g**2)
            m_hat = 0.8 * m / next1 + enters * g / now1
            v_hat = 0.9 * v / now2
            if options["nesterov"] == "both":
                v_hat = 0.9 * v / next2 + 0.1 * g**2 / now2
            u = m_hat / (v_hat.sqrt() + 1e-6)
            if decay == "update":
                u = u + 0.01 * w
            if decay == "decoupled":
                w *= 1 - 0.05 * 0.01
            w -= 0.05 * (w.norm() / u.norm() if w.numel() else 1.0) * u
    for p, w in zip(params, weights, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-12, atol=1e-12)


def test_looking_ahead_is_a_step_more_with_the_same_gradient() -> None:
    """Without corrections, NN-LAMB's moments are those that LAMB would have a step later."""
    ahead, later = parameters(F64), parameters(F64)
    options: dict[str, Any] = {"bias_correction": False, "weight_decay": 0.1}
    train(fastlars.LAMB(ahead, lr=0.05, nesterov="both", **options), ahead, [0])
    optimizer = fastlars.LAMB(later, lr=0.0, **options)
    set_rate = lambda step: optimizer.param_groups[0].update(lr=0.05)  # noqa: E731
    train(optimizer, later, [0])
    train(optimizer, later, [0], set_rate)
    for p, w in zip(ahead, later, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-13, atol=1e-13)


def test_trust_ratios_within_bounds() -> None:
    """A ratio below, one between, one above; no bounds where there is no ratio."""
    ratios = []
    for kind, options in ((fastlars.LARS, {"trust_coefficient": 1.0}), (fastlars.LAMB, {})):
        params = [nn.Parameter(torch.tensor([x], dtype=F64)) for x in (0.1, 1.0, 30.0, 0.0)]
        optimizer = kind(params, lr=0.1, ratio_bounds=(0.5, 10.0), **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        ratios.append(list(optimizer.trust_ratios().values()))
        # q is |w|, as |g| = |u| = 1; LAMB's eps of 1e-6 shows.
        assert ratios[-1] == pytest.approx([0.5, 1.0, 10.0, 1.0], rel=2e-6)
        steps = [0.1 * q for q in (0.5, 1.0, 10.0, 1.0)]
        expected = [w - step for w, step in zip((0.1, 1.0, 30.0, 0.0), steps, strict=True)]
        assert [p.item() for p in params] == pytest.approx(expected, rel=2e-6)


REFUSED = [
    ({"nesterov": True, "bias_correction": "rate"}, 'nesterov corrects .* bias_correction="rate"'),
    ({"nesterov": "both", "bias_correction": "rate"}, 'nesterov corrects .*="rate"'),
    ({"nesterov": True, "betas": (0.9, 0.0)}, r"nesterov=True takes beta2 v .* betas\[1\]=0"),
    ({"ratio_bounds": (2.0, 1.0)}, r"ratio_bounds must be \(lower, upper\) .* got \(2.0, 1.0\)"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=str)
def test_lamb_refuses_what_makes_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fastlars.LAMB(parameters(), **options)


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
