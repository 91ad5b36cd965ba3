"""docs/migrating.md, What torch accepts: each row of the table, tried on LARS or LAMB."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastlars
from migrate.page import PAGE
from optimizers import one_thread as one_thread

P = nn.Parameter


def weight() -> P:
    return P(torch.ones(2, 3))


def stepped(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def sparse() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    fastlars.LARS(table.parameters(), lr=1.0).step()


def negative() -> None:
    optimizer = fastlars.LARS([weight()], lr=1.0)
    optimizer.param_groups[0]["lr"] = -1e-3
    stepped(optimizer)


def flat() -> None:
    p = weight()
    p._fsdp_flattened = True  # type: ignore[attr-defined]
    stepped(fastlars.LARS([p], lr=1.0))


def overlapping() -> None:
    whole = torch.ones(6)
    fastlars.LARS([P(whole[:4]), P(whole[2:])], lr=1.0)


REFUSED: dict[str, list[Callable[[], Any]]] = {
    "`foreach=`, `fused=`, `differentiable=`": [
        lambda: fastlars.LARS([weight()], lr=1.0, foreach=True),  # type: ignore[call-arg]
        lambda: fastlars.LAMB([weight()], fused=True),  # type: ignore[call-arg]
        lambda: fastlars.LAMB([weight()], differentiable=True),  # type: ignore[call-arg]
    ],
    "`amsgrad=True`": [
        lambda: fastlars.LAMB([weight()], amsgrad=True),  # type: ignore[call-arg]
    ],
    "complex parameters": [
        lambda: stepped(fastlars.LAMB([P(torch.ones(2, dtype=torch.complex64))]))
    ],
    "sparse gradients": [sparse],
    "a negative `lr` in a group, after construction": [negative],
    "`True` and `False` as numbers, as `momentum=True`": [
        lambda: fastlars.LARS([weight()], lr=1.0, momentum=True),
        lambda: fastlars.LARS([weight()], lr=True),
    ],
    "`None`, 1.0 and texts as flags, as `maximize=None`": [
        lambda: fastlars.LAMB([weight()], maximize=None),  # type: ignore[arg-type]
        lambda: fastlars.LARS([weight()], lr=1.0, nesterov="yes"),  # type: ignore[arg-type]
    ],
    "`momentum` of 1 and more": [lambda: fastlars.LARS([weight()], lr=1.0, momentum=1.0)],
    "FSDP1's flat parameters": [flat],
    "one tensor in two parameters, such as overlapping views": [overlapping],
}


def kinds_of_parameters() -> None:
    model = nn.Linear(3, 2)
    params = list(model.parameters())
    for given in (params, [{"params": params}], model.named_parameters(), iter(params)):
        stepped(fastlars.LARS(given, lr=1.0))


def rates() -> None:
    for lr in (1, 0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])):
        stepped(fastlars.LARS([weight()], lr=lr))
    for betas in ((0.9, 0.99), [0.9, 0.99]):
        stepped(fastlars.LAMB([weight()], betas=betas))  # type: ignore[arg-type]


def without_a_rate() -> None:
    stepped(fastlars.LAMB([weight()]))
    optimizer = fastlars.LARS([{"params": [weight()], "lr": 0.5}])
    assert optimizer.param_groups[0]["lr"] == 0.5
    stepped(optimizer)
    with pytest.raises((TypeError, ValueError)):
        fastlars.LARS([weight()])


def keywords() -> None:
    stepped(fastlars.LARS([weight()], lr=1.0, maximize=True, nesterov=True))
    stepped(fastlars.LARS([weight()], lr=1.0, dampening=0.1))
    fastlars.LAMB([weight()], maximize=True, capturable=True)


def surroundings() -> None:
    p = weight()
    optimizer = fastlars.LARS([p], lr=1.0)
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.add_param_group({"params": [weight()]})
    stepped(optimizer)
    optimizer.step(lambda: 1.0)
    copy.deepcopy(optimizer).step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    optimizer.step()
    scheduler.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = fastlars.LARS(model.parameters(), lr=1.0)
    model(torch.ones(4, 5)).sum().backward()
    optimizer.step()


def types() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        stepped(fastlars.LARS([P(torch.ones(2, dtype=dtype))], lr=1.0))


ACCEPTED: dict[str, Callable[[], Any] | str] = {
    "parameters, groups, pairs": kinds_of_parameters,
    "`lr` as a number": rates,
    "no `lr` (AdamW": without_a_rate,
    "`maximize=True`": keywords,
    "closures, hooks": surroundings,
    "parameters of lazy modules": lazy,
    "DTensors": "tests/distributed",
    "float64, float16": types,
}


def test_each_row_of_what_torch_accepts_is_tried() -> None:
    rows = PAGE["What torch accepts"].rows()
    refused = [row[0] for row in rows if row[1].startswith("refused")]
    assert refused == list(REFUSED)
    accepted = [row[0] for row in rows if row[1].startswith("accepted")]
    assert len(refused) + len(accepted) == len(rows)
    assert len(accepted) == len(ACCEPTED)
    for row, begin in zip(accepted, ACCEPTED, strict=True):
        assert row.startswith(begin)


@pytest.mark.parametrize("row", REFUSED)
def test_is_refused(row: str) -> None:
    for attempt in REFUSED[row]:
        with pytest.raises((TypeError, ValueError)):
            attempt()


@pytest.mark.parametrize("row", [row for row in ACCEPTED if callable(ACCEPTED[row])])
def test_is_accepted(row: str) -> None:
    attempt = ACCEPTED[row]
    assert callable(attempt)
    attempt()
