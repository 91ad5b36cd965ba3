"""What shards meet beside ordinary steps: gaps, mixed types, scalers, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlars
from distributed.processes import run

Stepped = list[tuple[list[str], list[str], list[str], list[Tensor]]]
USUAL: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.01, "trust_coefficient": 0.1}
BF16 = torch.bfloat16


def _mesh(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


def _parameters(shape: tuple[int, ...], *dtypes: torch.dtype) -> list[nn.Parameter]:
    """A matrix and a vector of each type: rows over the last dimension of a mesh, whole over the
    others, and another vector whole on every rank."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = _mesh(*shape)
    rows = [*[Replicate()] * (len(shape) - 1), Shard(0)]
    whole = [Replicate()] * len(shape)
    torch.manual_seed(3)
    params = []
    for size, placements in (((5, 3), rows), ((6,), rows), ((7,), whole)):
        for dtype in dtypes:
            value = torch.randn(size).to(dtype)
            params.append(nn.Parameter(distribute_tensor(value, mesh, placements)))
    return params


def mixed(kind: Any, widths: list[int], **options: Any) -> list[str]:
    """Two types in one group, and so two lists, whose sums travel together: one array of each
    width, of 4 parameters."""
    from distributed.sharded_cases import Pair, set_gradients, split_replicas

    pair = Pair(_parameters((2, 2), torch.float32, BF16), kind, **options)
    wrong = []
    for step in range(3):
        set_gradients(pair.params, step)
        # Unused layers, another one each time, and none in the last step.
        for i in range(step, len(pair.params) - 1, 3) if step < 2 else ():
            pair.params[i].grad = None
        moved = pair.step()
        wrong += pair.differences()
    # Of two ranks each, and not of parameters that are whole on every rank.
    assert moved == [("_allgather_base_", (2 * 4, width)) for width in widths], moved
    return wrong + split_replicas(pair.params)


def infinite() -> list[str]:
    """A gradient's infinity gives the ratio that it gives without shards, on every replica."""
    from distributed.sharded_cases import Pair, set_gradients

    pair = Pair(_parameters((2, 2), torch.float32), fastlars.LARS, **USUAL)
    set_gradients(pair.params, 0)
    for p in pair.params:
        p.grad.to_local()[:1] = float("inf")
    pair.step()
    ratios = list(pair.optimizer.trust_ratios().values())
    assert ratios[:2] == [0.0, 0.0], ratios
    return pair.differences()


def cut_differently() -> list[str]:
    """One rank's shard of the second parameter has gaps, and so a list of its own there."""
    from torch.distributed.tensor import DTensor, Shard

    from distributed.sharded_cases import Pair, here, set_gradients

    params = []
    for size in (3, 5, 4):
        local = torch.randn(size, 2)
        if size == 5 and dist.get_rank() == 1:
            local = torch.stack((local, local), dim=2)[..., 0]
        params.append(nn.Parameter(DTensor.from_local(local, _mesh(4), [Shard(0)])))
    pair = Pair(params, fastlars.LARS, **USUAL)
    set_gradients(params, 0)
    before = [(p._version, here(p)._version) for p in params]
    moved = pair.step()
    assert moved == [("allreduce_", (3, 2))]
    # Autograd has to notice that a parameter has changed, and that its shard has.
    for p, (outer, inner) in zip(params, before, strict=True):
        assert p._version > outer
        assert here(p)._version > inner
    return pair.differences()


def scaled() -> list[Tensor]:
    """Weights after a GradScaler's steps; one rank's gradient overflows in the second."""
    from distributed.sharded_cases import set_gradients, whole

    params = _parameters((4,), torch.float32)
    optimizer = fastlars.LAMB(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    weights = []
    for step in range(2):
        set_gradients(params, step)
        for p in params:
            p.grad.mul_(4.0)
        if step == 1 and dist.get_rank() == 2:
            params[0].grad.to_local()[:1] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        weights.append(torch.cat([whole(p).flatten() for p in params]))
    bare = _parameters((4,), torch.float32)
    optimizer = fastlars.LAMB(bare, lr=0.1)
    set_gradients(bare, 0)
    optimizer.step()
    return [
        torch.cat([whole(p).flatten() for p in bare]),
        *weights,
        torch.tensor(scaler.get_scale()),
    ]


def mixed_of_both() -> list[str]:
    lars = mixed(fastlars.LARS, [1, 2], **USUAL, master_weights=True, max_grad_norm=0.5)
    return lars + mixed(fastlars.LAMB, [2], lr=0.05, master_weights=True)


def all_steps() -> tuple[list[str], list[str], list[str], list[Tensor]]:
    return mixed_of_both(), infinite(), cut_differently(), scaled()


@pytest.fixture(scope="module")
def stepped() -> Stepped:
    return run(4, all_steps)


def test_mixed_types_masters_and_unused_layers(stepped: Stepped) -> None:
    for wrong, *_ in stepped:
        assert not wrong


def test_replicas_of_an_infinity_count_once(stepped: Stepped) -> None:
    for _, wrong, *_ in stepped:
        assert not wrong


def test_ranks_may_cut_their_lists_differently(stepped: Stepped) -> None:
    for _, _, wrong, _ in stepped:
        assert not wrong


def test_an_overflow_on_one_rank_skips_the_step_on_all(stepped: Stepped) -> None:
    for *_, (bare, first, second, scale) in stepped:
        assert torch.equal(first, bare)
        assert torch.equal(second, first)
        assert float(scale) == 2.0


class Refused:
    """Steps that must raise, by name; each returns the optimizer."""

    @staticmethod
    def fsdp1() -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
        return fastlars.LARS(_with_gradients(model.parameters()), **USUAL)

    @staticmethod
    def fsdp1_with_original_parameters() -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(
            nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True
        )
        params = [p for p in model.parameters() if p.numel() > 0]
        return fastlars.LARS(_with_gradients(params), **USUAL)

    @staticmethod
    def pending_parameter() -> Any:
        from torch.distributed.tensor import DTensor, Partial

        p = nn.Parameter(DTensor.from_local(torch.ones(3), _mesh(2), [Partial()]))
        p.grad = DTensor.from_local(torch.ones(3), _mesh(2), [Partial()])
        return fastlars.LARS([p], **USUAL)

    @staticmethod
    def rounding_of_replicas() -> Any:
        params = _with_gradients(_parameters((2, 1), BF16))
        return fastlars.LAMB(params, stochastic_rounding=True)

    @staticmethod
    def rounding_that_begins_later() -> Any:
        optimizer = fastlars.LAMB(_with_gradients(_parameters((2, 1), BF16)))
        optimizer.step()
        optimizer.param_groups[0]["stochastic_rounding"] = True
        return optimizer

    @staticmethod
    def plain_state() -> Any:
        params = _with_gradients(_parameters((2,), torch.float32))
        optimizer = fastlars.LAMB(params)
        optimizer.step()
        optimizer.state[params[1]]["exp_avg"] = torch.zeros(6)
        return optimizer

    @staticmethod
    def state_placed_otherwise() -> Any:
        from torch.distributed.tensor import Replicate

        params = _with_gradients(_parameters((2,), torch.float32))
        optimizer = fastlars.LAMB(params)
        optimizer.step()
        state = optimizer.state[params[1]]
        state["exp_avg"] = state["exp_avg"].redistribute(placements=[Replicate()])
        return optimizer

    @staticmethod
    def another_mesh() -> Any:
        params = _with_gradients(_parameters((2,), torch.float32))
        others = _parameters((2, 1), torch.float32)
        optimizer = fastlars.LAMB(params)
        optimizer.step()
        optimizer.state[params[0]]["exp_avg"] = torch.zeros_like(others[0])
        return optimizer


def _with_gradients(params: Any) -> list[Any]:
    params = list(params)
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def refuse(name: str) -> tuple[str, str]:
    """The error of a step that must leave everything as it was."""
    optimizer = getattr(Refused, name)()
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def taken() -> list[Tensor]:
        from distributed.sharded_cases import here

        states = [v for p in params for v in optimizer.state.get(p, {}).values()]
        return [here(t).clone() for t in (*params, *states)]

    before = taken()
    with pytest.raises((TypeError, ValueError)) as caught:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(taken(), before, strict=True))
    return type(caught.value).__name__, str(caught.value)


def refuse_all(names: list[str]) -> dict[str, tuple[str, str]]:
    return {name: refuse(name) for name in names}


FSDP1 = "TypeError: group 0, parameter 0 is a flat parameter of FSDP1.*fully_shard"
REFUSED = {
    "fsdp1": FSDP1,
    "fsdp1_with_original_parameters": FSDP1,
    "pending_parameter": "TypeError: group 0, parameter 0 is a DTensor whose sum is pending",
    "rounding_of_replicas": "ValueError: group 0, parameter 0 is replicated .*master_weights",
    "rounding_that_begins_later": "ValueError: group 0, parameter 0 is replicated",
    "plain_state": "TypeError: group 0, parameter 1 is a DTensor, its exp_avg a plain tensor",
    "state_placed_otherwise": r"ValueError: group 0, parameter 1 is placed \(Shard",
    "another_mesh": "ValueError: group 0, parameter 0 is on DeviceMesh.* its exp_avg on",
}


@pytest.fixture(scope="module")
def refusals() -> list[dict[str, tuple[str, str]]]:
    return run(2, refuse_all, list(REFUSED))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_changes(
    refusals: list[dict[str, tuple[str, str]]], name: str
) -> None:
    for found in refusals:
        assert re.match(REFUSED[name], ": ".join(found[name])), found[name]
