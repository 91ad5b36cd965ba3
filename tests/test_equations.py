"""Trust ratios, float64 steps and training: optimizers against their equations."""

from __future__ import annotations

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
