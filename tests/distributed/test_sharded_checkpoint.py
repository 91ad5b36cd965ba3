"""Sharded states through torch.distributed.checkpoint, onto another number of ranks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlars
from distributed.processes import run
from optimizers import OPTIONS, SIMPLE
from tolerances import assert_close, assert_same_bits

# name: the class, its options, the type of the weights
RECIPES: dict[str, tuple[Any, dict[str, Any], torch.dtype]] = {
    **{row.kind.__name__: (row.kind, row.options, row.dtype) for row in SIMPLE},
    "dampening": (fastlars.LARS, {**OPTIONS["LARS"], "dampening": 0.2}, torch.float32),
    "masters": (fastlars.LAMB, {"lr": 0.02, "master_weights": True}, torch.bfloat16),
}


def build(recipe: str, layout: str) -> tuple[nn.Module, Any]:
    """A model over all ranks there are, and its optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from distributed.sharded_cases import NARROW, make_model

    kind, options, dtype = RECIPES[recipe]
    model = make_model(NARROW).to(dtype)
    size = dist.get_world_size()
    mesh = (
        init_device_mesh("cpu", (size,))
        if layout == "fsdp"
        else init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("rep", "shard"))
    )
    fully_shard(model, mesh=mesh)
    groups = fastlars.parameter_groups(model, weight_decay=0.01)
    return model, kind(groups, **options)


def weights_of(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Weights before they are rounded: a hair's difference may round two ways."""
    from distributed.sharded_cases import whole

    return [whole(optimizer.state[p].get("master", p)) for p in model.parameters()]


def save(folder: str) -> dict[str, list[Tensor]]:
    """Two steps of every recipe, a checkpoint, and the weights of one more step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    from distributed.sharded_cases import set_gradients

    after = {}
    for recipe in RECIPES:
        model, optimizer = build(recipe, "fsdp")
        for step in range(2):
            set_gradients(model.parameters(), step)
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
        states = get_state_dict(model, optimizer)
        dcp.save(
            dict(zip(("model", "optimizer"), states, strict=True)),
            checkpoint_id=f"{folder}/{recipe}",
        )
        set_gradients(model.parameters(), 2)
        optimizer.step()
        after[recipe] = weights_of(model, optimizer)
    return after


def load(folder: str) -> dict[tuple[str, str], list[Tensor]]:
    """What the next step gives, here."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.tensor import DTensor

    from distributed.sharded_cases import set_gradients

    after = {}
    for recipe, layout in product(RECIPES, ("fsdp", "hsdp")):
        model, optimizer = build(recipe, layout)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=f"{folder}/{recipe}")
        set_state_dict(
            model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        for p in model.parameters():
            for name, value in optimizer.state[p].items():
                if value.dim() > 0:
                    assert isinstance(value, DTensor), name
                    assert value.placements == p.placements, name
        set_gradients(model.parameters(), 2)
        optimizer.step()
        after[recipe, layout] = weights_of(model, optimizer)
    return after


def test_a_checkpoint_of_four_ranks_continues_on_two(tmp_path: Path) -> None:
    expected = run(4, save, str(tmp_path))[0]
    for after in run(2, load, str(tmp_path)):
        for (recipe, layout), weights in after.items():
            for i, (a, e) in enumerate(zip(weights, expected[recipe], strict=True)):
                name = f"{recipe} on {layout}, weight {i}"
                assert_close(name, "weight", a, e, float(e.abs().max()))


def continue_whole_states() -> dict[str, list[Tensor]]:
    """The next step of an optimizer, as it is and with its states gathered and loaded again."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    from distributed.sharded_cases import set_gradients, whole

    options = StateDictOptions(full_state_dict=True)
    after = {}
    for way in ("kept", "loaded", "loaded by torch", "flat"):
        model, optimizer = build("LAMB", "fsdp")
        for step in range(2):
            set_gradients(model.parameters(), step)
            optimizer.step()
        if way == "loaded":
            states = optimizer.state_dict()
            for state in states["state"].values():
                state.update({name: whole(value) for name, value in state.items()})
            optimizer.state.clear()
            optimizer.zero_grad()
            optimizer.load_state_dict(states)
        elif way == "loaded by torch":
            states = get_optimizer_state_dict(model, optimizer, options=options)
            optimizer.state.clear()
            optimizer.zero_grad()
            set_optimizer_state_dict(model, optimizer, states, options=options)
        elif way == "flat":
            o = StateDictOptions(flatten_optimizer_state_dict=True)
            states = get_optimizer_state_dict(model, optimizer, options=o)
            states = {k: (v.clone() if isinstance(v, Tensor) else v) for k, v in states.items()}
            optimizer.state.clear()
            optimizer.zero_grad()
            set_optimizer_state_dict(model, optimizer, states, options=o)
        set_gradients(model.parameters(), 2)
        optimizer.step()
        after[way] = [whole(p) for p in model.parameters()]
    return after


def test_whole_states_are_cut_into_shards() -> None:
    for found in run(2, continue_whole_states):
        kept = found.pop("kept")
        for way, weights in found.items():
            for i, (a, e) in enumerate(zip(weights, kept, strict=True)):
                assert_same_bits(f"{way}, weight {i}", a, e)


def refuse_inside_compile() -> str:
    """What a compiled step says of DTensors."""
    from distributed.sharded_cases import set_gradients, whole

    model, optimizer = build("LARS", "fsdp")
    set_gradients(model.parameters(), 0)
    before = [whole(p).clone() for p in model.parameters()]
    try:
        torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    except Exception as error:
        for p, b in zip(model.parameters(), before, strict=True):
            assert_same_bits("weight", whole(p), b)
        return str(error)
    return "stepped"


def test_a_compiled_step_refuses_shards() -> None:
    for said in run(2, refuse_inside_compile):
        assert "DTensors are not stepped inside torch.compile" in said
