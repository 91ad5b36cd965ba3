"""Sharded steps are unsharded steps to rounding, and one small array for each mesh travels."""

from __future__ import annotations

from typing import Any

import pytest

import fastlars
from distributed.processes import run
from optimizers import SIMPLE

STEPS = 3
USUAL = {"lr": 0.5, "weight_decay": 0.01, "trust_coefficient": 0.1}
# name: the class, and options that a step of shards could get wrong
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{row.name: (row.kind, row.options) for row in SIMPLE},
    "LARS combined": (
        fastlars.LARS,
        {**USUAL, "ratio": "combined", "buffer": "gradient", "nesterov": True, "maximize": True},
    ),
    "LARS dampening": (fastlars.LARS, {**USUAL, "dampening": 0.3}),
    "LAMB clipped": (fastlars.LAMB, {"lr": 0.02, "weight_decay": 0.01, "max_grad_norm": 0.05}),
    "LAMB Nesterov": (
        fastlars.LAMB,
        {"lr": 0.02, "weight_decay": 0.01, "nesterov": "both", "ratio_bounds": (0.5, 5.0)},
    ),
    # The norm that clips, and those that normalize, are of the same sums.
    "LANS clipped": (
        fastlars.LANS,
        {"lr": 0.02, "weight_decay": 0.01, "max_grad_norm": 0.05, "norm_eps": 0.01},
    ),
    # Of the three steps the last one is warmed up.
    "RMSprop warm-up, warmed up": (
        fastlars.RMSpropWarmup,
        {"lr": 0.1, "lr_rmsprop": 1e-2, "center_steps": 0.5, "period_steps": 2.5},
    ),
}
SUM, GATHER = "allreduce_", "_allgather_base_"
# What travels for the parameters that are adapted, and for all of them, of which a clip takes the
# norm: rows of each array. A gather brings those of both ranks.
MOVED: dict[str, tuple[list[tuple[str, int]], list[tuple[str, int]]]] = {
    "fsdp": ([(SUM, 5)], [(SUM, 6)]),
    "fsdp bf16": ([(SUM, 5)], [(SUM, 6)]),
    "fsdp columns": ([(SUM, 5)], [(SUM, 6)]),
    "hsdp": ([(GATHER, 10)], [(GATHER, 12)]),
    # The bias of the second layer is replicated, and the norm is plain or replicated.
    "tensor parallel": ([(SUM, 3)], [(SUM, 3)]),
    "sequence parallel": ([(SUM, 3)], [(SUM, 3)]),
    # The bias of the second layer is replicated over one dimension; the norm has a mesh of its own.
    "two dimensions": (
        [(SUM, 3), (SUM, 1), (GATHER, 2)],
        [(SUM, 3), (SUM, 2), (GATHER, 2)],
    ),
    # The other mesh and the other dimension are of one rank, which has no one to ask.
    "part of the ranks": ([(SUM, 3)], [(SUM, 3)]),
    "side by side": ([(SUM, 2)], [(SUM, 2)]),
}


def step_all() -> dict[str, Any]:
    """By layout and recipe: what was wrong, and what the last step moved."""
    from distributed.sharded_cases import LAYOUTS, Pair, backward, split_replicas

    found = {}
    for layout, shard in LAYOUTS.items():
        for recipe, (kind, options) in RECIPES.items():
            model = shard()
            pair = Pair(model.parameters(), kind, **options)
            wrong = []
            for step in range(STEPS):
                backward(model, step)
                moved = pair.step()
                wrong += pair.differences()
            wrong += split_replicas(model.parameters())
            found[layout, recipe] = wrong, moved
    return found


@pytest.fixture(scope="module")
def stepped() -> list[dict[str, Any]]:
    return run(4, step_all, timeout=600)


@pytest.mark.xdist_group("sharded")
@pytest.mark.parametrize("layout", MOVED)
def test_sharded_is_unsharded_to_rounding(stepped: list[dict[str, Any]], layout: str) -> None:
    for rank, found in enumerate(stepped):
        for recipe in RECIPES:
            wrong, _ = found[layout, recipe]
            assert not wrong, f"rank {rank}, {recipe}:\n" + "\n".join(wrong)


@pytest.mark.xdist_group("sharded")
@pytest.mark.parametrize("layout", MOVED)
def test_a_step_moves_one_small_array_for_each_mesh(
    stepped: list[dict[str, Any]], layout: str
) -> None:
    adapted, everything = MOVED[layout]
    for recipe, (kind, options) in RECIPES.items():
        width = kind.rule.sums
        takes_norms = kind is fastlars.LANS or "max_grad_norm" in options
        norms = everything if takes_norms else []
        expected: list[tuple[str, tuple[int, ...]]] = [(how, (rows, 1)) for how, rows in norms]
        expected += [(how, (rows, width)) for how, rows in adapted if width]
        if layout == "sequence parallel":
            # Both gradients of the norm are sums that torch left pending.
            expected = [("all_reduce", (6,)), ("all_reduce", (6,)), *expected]
        for found in stepped:
            _, moved = found[layout, recipe]
            assert moved == expected, recipe
