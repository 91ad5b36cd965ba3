"""Norms of weights and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastlars.trainer.model import norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_of_every_parameter_with_a_gradient(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).to(dtype)
    net[2].requires_grad_(False)
    net(torch.randn(8, 3, dtype=dtype)).sum().backward()
    found = norms.measure(net, norms.weights(net))
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for name, (weight, gradient) in found.items():
        parameter = net.get_parameter(name)
        assert parameter.grad is not None
        for norm, tensor in ((weight, parameter), (gradient, parameter.grad)):
            squares = (value**2 for value in tensor.detach().double().flatten().tolist())
            assert norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-12)


def test_squares_outside_of_float32() -> None:
    net = nn.Linear(2, 2, bias=False)
    net.weight.grad = torch.full((2, 2), 1e-30)
    nn.init.constant_(net.weight, 1e30)
    weight, gradient = norms.measure(net, norms.weights(net))["weight"]
    assert weight == pytest.approx(2e30, rel=1e-6)
    assert gradient == pytest.approx(2e-30, rel=1e-6)


def test_without_gradients_there_are_none() -> None:
    net = nn.Linear(2, 2)
    assert norms.measure(net, norms.weights(net)) == {}
