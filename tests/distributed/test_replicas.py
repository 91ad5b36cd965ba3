"""Shards with replicas: sums travel among the shards alone, and replicas keep the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastlars
from distributed.processes import run

STEPS = 3
LARS: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.01, "trust_coefficient": 0.1}
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LARS": (fastlars.LARS, LARS),
    "LARS clipped": (fastlars.LARS, {**LARS, "max_grad_norm": 0.5}),
    "LAMB clipped": (fastlars.LAMB, {"lr": 0.02, "weight_decay": 0.01, "max_grad_norm": 0.05}),
    "LANS": (fastlars.LANS, {"lr": 0.02, "weight_decay": 0.01}),
    "LANS clipped": (
        fastlars.LANS,
        {"lr": 0.02, "weight_decay": 0.01, "max_grad_norm": 0.05, "norm_eps": 0.01},
    ),
}
# name: the mesh, and the placements of its parameters: R is replicated, a digit the dimension that
# is sharded.
MESHES: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "hybrid": ([[0, 1], [2, 3]], ("R0", "R1", "RR", "R0")),
    "mixed": ([[0, 1], [2, 3]], ("R0", "00", "RR", "0R", "10", "R0")),
    "three shards": ([[0, 1, 2], [3, 4, 5]], ("R0", "RR", "R1")),
    "three dimensions": ([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], ("R01", "R00", "RRR", "R0R", "000")),
}
# name: the sizes of the groups of a step's collectives, where ratios and where a clip need them
GROUPS: dict[str, list[tuple[str, int]]] = {
    "hybrid": [("gather", 2)],
    # The all-reduce of what is sharded over the whole mesh begins first.
    "mixed": [("sum", 4), ("gather", 2), ("gather", 2)],
    "three shards": [("gather", 3)],
    "three dimensions": [("sum", 8), ("gather", 2), ("gather", 2), ("gather", 2)],
}


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Every collective of torch.distributed that a step may call, and the size of its group."""
    seen: list[tuple[str, int]] = []
    names = {"all_reduce": "sum", "all_gather_into_tensor": "gather", "all_gather_single": "gather"}
    found = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def watched(name: str) -> Any:
        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            seen.append((names[name], dist.get_world_size(group)))
            return found[name](*args, group=group, **kwargs)

        return call

    for name in found:
        setattr(dist, name, watched(name))
    try:
        yield seen
    finally:
        for name, real in found.items():
            setattr(dist, name, real)


def parameters(ranks: list[Any], placements: tuple[str, ...]) -> list[nn.Parameter]:
    """Odd sizes, so that shards are uneven; the last one is in the group that is not adapted."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", ranks)
    torch.manual_seed(3)
    params = []
    vector = placements[0].replace("1", "0")
    for i, places in enumerate((*placements, vector)):
        value = torch.randn(7 + i, 5) if i < len(placements) else torch.randn(9)
        spread = [Replicate() if c == "R" else Shard(int(c)) for c in places]
        params.append(nn.Parameter(distribute_tensor(value, mesh, spread)))
    return params


def step_all(names: list[str]) -> dict[tuple[str, str], tuple[list[str], list[tuple[str, int]]]]:
    """By mesh and recipe: what was wrong, and the collectives of the last step."""
    from distributed.sharded_cases import Pair, set_gradients, split_replicas

    found = {}
    for name in names:
        for recipe, (kind, options) in RECIPES.items():
            pair = Pair(parameters(*MESHES[name]), kind, **options)
            wrong = []
            for step in range(STEPS):
                set_gradients(pair.params, step)
                with collectives() as seen:
                    pair.step()
                wrong += pair.differences()
            found[name, recipe] = wrong + split_replicas(pair.params), seen
    return found


def check(size: int, *names: str) -> None:
    for rank, found in enumerate(run(size, step_all, list(names))):
        for (name, recipe), (wrong, seen) in found.items():
            assert not wrong, f"rank {rank}, {name}, {recipe}:\n" + "\n".join(wrong)
            times = 2 if "clipped" in recipe or "LANS" in recipe else 1
            assert seen == GROUPS[name] * times, (name, recipe)


def test_sums_travel_among_the_shards_of_a_replica() -> None:
    check(4, "hybrid", "mixed")


def test_an_odd_number_of_shards() -> None:
    check(6, "three shards")


@pytest.mark.slow
def test_two_dimensions_of_shards_with_replicas() -> None:
    check(8, "three dimensions")


def replicated() -> list[str]:
    """Parameters that are whole on every rank, and a mesh of one rank: nothing travels."""
    from distributed.sharded_cases import Pair, set_gradients, split_replicas

    wrong = []
    for kind, options in RECIPES.values():
        alone = parameters([[dist.get_rank()]], ("00", "R0"))
        pair = Pair([*parameters([[0], [1]], ("R0", "RR")), *alone], kind, **options)
        for step in range(STEPS):
            set_gradients(pair.params, step)
            moved = pair.step()
            wrong += [f"moved {moved}"] if moved else []
            wrong += pair.differences()
        wrong += split_replicas(pair.params)
    return wrong


def test_nothing_travels_for_replicated_parameters() -> None:
    for wrong in run(2, replicated):
        assert not wrong, "\n".join(wrong)


def cut_differently() -> list[str]:
    """On one rank the third parameter has gaps, and so a list of its own there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from distributed.sharded_cases import Pair, set_gradients

    mesh = init_device_mesh("cpu", (2, 2))
    both, rows = [Shard(0), Shard(0)], [Replicate(), Shard(0)]
    params = []
    for size, places in ((3, both), (5, rows), (4, both), (2, rows), (6, both)):
        torch.manual_seed(size + mesh.get_local_rank(1))
        local = torch.randn(size, 2)
        if size == 4 and dist.get_rank() == 1:
            local = torch.stack((local, local), dim=2)[..., 0]
        params.append(nn.Parameter(DTensor.from_local(local, mesh, places)))
    pair = Pair(params, fastlars.LARS, **LARS)
    set_gradients(params, 0)
    with collectives() as seen:
        pair.step()
    assert seen == [("sum", 4), ("gather", 2)], seen
    return pair.differences()


def test_ranks_that_cut_their_lists_differently_meet_in_the_same_collectives() -> None:
    for wrong in run(4, cut_differently):
        assert not wrong, "\n".join(wrong)
