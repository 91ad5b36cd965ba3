"""Overlap with FSDP2: the bits, and the collectives, of steps without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastlars
from distributed.fsdp_cases import EVERY, Run, compare, net
from distributed.processes import run
from distributed.sharded_cases import LAYOUTS, backward, cpu_mesh, make_model
from optimizers import BF16, ROWS, SIMPLE, Row

MODES = ("step", "norms")
MASTERS = tuple(row for row in ROWS if row.options.get("master_weights"))
CLIP = {"max_grad_norm": 0.05}


def pending() -> nn.Module:
    """FSDP2 leaves the norm to tensor parallelism, whose gradients are sums that are pending."""
    model = make_model()
    mesh = cpu_mesh(2, 2, names=("dp", "tp"))
    plan = {
        "0": ColwiseParallel(),
        "1": RowwiseParallel(output_layouts=Shard(1)),
        "2": SequenceParallel(),
    }
    parallelize_module(model, mesh["tp"], plan)
    return fully_shard(model, mesh=mesh["dp"], ignored_params=set(model[2].parameters()))


def in_layout(shard: Callable[[], Any], kind: str, options: Any, overlapped: bool) -> Run:
    """Four steps of a model of sharded_cases, of which FSDP2 may know a part alone."""
    model = shard()
    sharded = model if isinstance(model, FSDPModule) else model[0]
    one = Run(overlapped, kind, model=model, sharded=sharded, **options)
    for number in range(4):
        backward(model, number)
        one.step()
    return one


# By layout: parameters that are measured early, and those of which a clip takes the norm early.
MEASURED = {
    "fsdp": (5, 6),
    "fsdp bf16": (5, 6),
    "fsdp columns": (5, 6),
    "hsdp": (5, 6),
    "two dimensions": (5, 6),
    "part of the ranks": (3, 6),
    "side by side": (2, 2),
    "pending": (4, 4),
}


def every_layout() -> dict[str, list[int]]:
    shards = {**LAYOUTS, "pending": pending}
    recipes = {"LARS": {}, "LAMB": {}, "LANS": CLIP}
    return compare(
        {
            f"{layout}, {kind}": partial(in_layout, shards[layout], kind, options)
            for layout in MEASURED
            for kind, options in recipes.items()
        }
    )


@pytest.mark.xdist_group("sharded")
def test_every_layout() -> None:
    """On 4 processes, some of which have no rows of a parameter; also HSDP and over tensor
    parallelism."""
    for early in run(4, every_layout):
        for layout, (measured, clipped) in MEASURED.items():
            assert early[f"{layout}, LARS"] == [0, 0, measured, measured], layout
            assert early[f"{layout}, LAMB"] == [0, 0, measured, measured], layout
            assert early[f"{layout}, LANS"] == [0, 0, clipped, clipped], layout


def of_row(row: Row, mode: str, options: dict[str, Any], overlapped: bool) -> Run:
    model = net(dtype=row.dtype)
    options = {**row.options, **options}
    return Run(overlapped, row.kind.__name__, mode, model, **options).go(range(4))


def every_option() -> dict[str, list[int]]:
    clips = {"max_grad_norm": 0.05, "skip_if": 0.5}
    rounds = {"stochastic_rounding": True}
    bf16 = [replace(row, dtype=BF16) for row in SIMPLE]
    return compare(
        {
            **{f"{row}, step": partial(of_row, row, "step", {}) for row in ROWS},
            **{f"{row}, norms": partial(of_row, row, "norms", {}) for row in (*SIMPLE, *MASTERS)},
            **{f"{row}, clip": partial(of_row, row, "step", clips) for row in (*SIMPLE, *MASTERS)},
            **{f"{row}, rounded": partial(of_row, row, "step", rounds) for row in bf16},
        }
    )


def measured(row: Row, how: str) -> int:
    """How many parameters are measured early: the last one is not adapted."""
    every, normalizes = EVERY, row.options.get("normalize_grad", row.kind is fastlars.LANS)
    if how == "clip" or normalizes:
        return every  # of the gradients alone
    writes = row.kind.rule.measure_writes and how == "norms"
    return every - 1 if row.options.get("adapt", row.adapts) and not writes else 0


def test_every_option() -> None:
    """All rules and their options, in both modes; with a clip and skipped steps; with masters, and
    with stochastic rounding."""
    (early, _) = run(2, every_option)
    rows = {row.name: row for row in ROWS}
    for name, seen in early.items():
        row, how = name.rsplit(", ", 1)
        count = measured(rows[row], how)
        assert seen == [0, 0, count, count], name
