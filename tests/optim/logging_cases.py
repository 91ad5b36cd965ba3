"""Run by test_logging.py in a process of its own: what layer_statistics copies from a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlars
from backends.no_float64_device import DEVICE, calls
from fastlars.logging import layer_statistics
from fastlars.optim.execute import StepResult

COPY = "aten::_copy_from"


@pytest.mark.parametrize("verdict", [None, False, True])
def test_one_copy_whatever_the_number_of_batches(verdict: bool | None) -> None:
    """The verdict of the device travels with the reports."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(5)))
    optimizer = fastlars.LARS(model.parameters(), lr=1.0)
    rule = optimizer.rule_of(optimizer.param_groups[0])
    params = list(model.parameters())
    rows = torch.arange(15.0).reshape(5, 3)
    optimizer.stepper.results = [
        StepResult(params[i:j], rule, rows[i:j].to(DEVICE)) for i, j in ((0, 2), (2, 3), (3, 5))
    ]
    optimizer.stepper.verdict = None if verdict is None else torch.tensor(verdict).to(DEVICE)
    calls.clear()
    found = layer_statistics(model, optimizer)
    assert calls.count(COPY) == 1
    assert "aten::_local_scalar_dense" not in calls
    assert [[each.trust_ratio, *each.norms.values()] for each in found.values()] == (
        [] if verdict else rows.tolist()
    )


def test_reports_of_several_devices() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    optimizer = fastlars.LAMB(model.parameters())
    rule = optimizer.rule_of(optimizer.param_groups[0])
    rows = torch.arange(9.0).reshape(3, 3)
    optimizer.stepper.results = [
        StepResult([p], rule, rows[i : i + 1].to("cpu" if i == 1 else DEVICE))
        for i, p in enumerate(model.parameters())
    ]
    calls.clear()
    found = layer_statistics(model, optimizer)
    assert calls.count(COPY) == 1
    assert [each.norms["update"] for each in found.values()] == [2.0, 5.0, 8.0]
