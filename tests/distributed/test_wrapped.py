"""Shards that are tensor subclasses, as those of a float8 all-gather: stepped as plain ones are."""

from __future__ import annotations

import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

import fastlars
import fastlars.optim.wrapped as wrapped_module
from distributed.processes import run
from distributed.wrapped_cases import KINDS, MODELS
from optimizers import OPTIONS, SIMPLE
from tolerances import assert_same_bits

STEPS = 3
LARS, LAMB = OPTIONS["LARS"], OPTIONS["LAMB"]
CLIP = {"max_grad_norm": 0.05}
# name: the class, its options, the type of the weights
RECIPES: dict[str, tuple[Any, dict[str, Any], torch.dtype]] = {
    **{row.kind.__name__: (row.kind, row.options | CLIP, row.dtype) for row in SIMPLE},
    "LAMB masters": (fastlars.LAMB, {**LAMB, "master_weights": True}, torch.bfloat16),
}


def make(layout: str, kind: str | None, recipe: str) -> tuple[nn.Module, Any]:
    from distributed.wrapped_cases import KINDS, MODELS

    optimizer, options, dtype = RECIPES[recipe]
    model = MODELS[layout](KINDS[kind] if kind else None, dtype)
    groups = fastlars.parameter_groups(model, weight_decay=0.01)
    return model, optimizer(groups, **options)


def rewrap_gradients(params: list[Any], kind: Any) -> None:
    """Gradients of the class of their parameters, as of a class that wraps whatever it gives."""
    from torch.distributed.tensor import DTensor

    from distributed.wrapped_cases import Bare, local

    for p in params:
        if not isinstance(getattr(p, "_local_tensor", p), Bare):
            continue
        grad: Any = kind(local(p.grad))
        if isinstance(p, DTensor):
            shape = {"shape": p.shape, "stride": p.stride()}
            grad = DTensor.from_local(grad, p.device_mesh, p.placements, run_check=False, **shape)
        p.grad = grad


def compare(layout: str, kind: str, recipe: str) -> None:
    """Steps with and without the class, from the same gradients, have the same bits."""
    from torch.distributed.tensor import DTensor

    from distributed.sharded_cases import COUNTERS, set_gradients
    from distributed.wrapped_cases import KINDS, Bare, local

    model, optimizer = make(layout, kind, recipe)
    twin, reference = make(layout, None, recipe)
    params, others = list(model.parameters()), list(twin.parameters())
    assert any(isinstance(getattr(p, "_local_tensor", p), Bare) for p in params)
    for step in range(STEPS):
        set_gradients(params, step)
        set_gradients(others, step)
        if step == 1:
            rewrap_gradients(params, KINDS[kind])
        versions = [(p._version, local(p)._version) for p in params]
        optimizer.step()
        reference.step()
        for p, before in zip(params, versions, strict=True):
            assert p._version > before[0]
            assert local(p)._version > before[1]
    ratios, expected = optimizer.trust_ratios(), reference.trust_ratios()
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        name = f"{layout}, {kind}, {recipe}, parameter {i}"
        assert_same_bits(name, local(p), local(q))
        assert ratios[p] == expected[q], name
        for key, value in reference.state[q].items():
            state: Any = optimizer.state[p][key]
            assert_same_bits(f"{name}, {key}", local(state), local(value))
            held = state._local_tensor if isinstance(state, DTensor) else state
            assert type(held) is Tensor, name
            if key not in COUNTERS and isinstance(p, DTensor):
                assert (state.placements, state.shape) == (p.placements, p.shape), name
                assert state.stride() == value.stride(), name


def compare_all(kind: str) -> None:
    for layout, recipe in product(("fsdp", "tensor parallel", "plain"), RECIPES):
        compare(layout, kind, recipe)


@pytest.mark.parametrize("kind", ["bare", "flattened", "slotted"])
def test_a_subclass_is_stepped_as_its_plain_tensor(kind: str) -> None:
    run(2, compare_all, kind)


def train() -> None:
    """Forward and backward too; AdamW(fused) takes the same model."""
    from distributed.wrapped_cases import KINDS, fsdp, local

    for kind in KINDS.values():
        for make_optimizer in (
            lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
            *(row.make for row in SIMPLE),
        ):
            model = fsdp(kind)
            optimizer = make_optimizer(model.parameters())
            losses = []
            for _ in range(4):
                optimizer.zero_grad()
                loss = model(torch.arange(18.0).view(3, 6) / 18).square().mean()
                loss.backward()
                before = [local(p).clone() for p in model.parameters()]
                optimizer.step()
                for p, was in zip(model.parameters(), before, strict=True):
                    assert local(p).numel() == 0 or not torch.equal(local(p), was)
                losses.append(float(loss.detach()))
            # What is gathered for the next forward pass is what was stepped.
            assert losses[-1] < losses[0], losses


def test_models_of_subclasses_train_under_fsdp2() -> None:
    run(2, train)


def checkpoints(folder: str) -> None:
    """A state that was saved continues in the class, whichever way it is loaded."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    from distributed.sharded_cases import set_gradients
    from distributed.wrapped_cases import local

    for recipe, way in product(("LARS", "LAMB masters"), ("state_dict", "dcp")):
        model, optimizer = make("fsdp", "flattened", recipe)
        params = list(model.parameters())
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        other, resumed = make("fsdp", "flattened", recipe)
        if way == "state_dict":
            resumed.load_state_dict(optimizer.state_dict())  # before the first step
        else:
            path = f"{folder}/{recipe}"
            dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
            states = {"optimizer": get_optimizer_state_dict(other, resumed)}
            dcp.load(states, checkpoint_id=path)
            set_optimizer_state_dict(other, resumed, states["optimizer"])
        for p, q in zip(params, other.parameters(), strict=True):
            local(q).copy_(local(p))
        set_gradients(params, 2)
        set_gradients(other.parameters(), 2)
        optimizer.step()
        resumed.step()
        for i, (p, q) in enumerate(zip(params, other.parameters(), strict=True)):
            assert_same_bits(f"{recipe}, {way}, parameter {i}", local(q), local(p))


def test_states_of_subclasses_are_saved_and_loaded(tmp_path: Path) -> None:
    run(2, checkpoints, str(tmp_path))


def states_of_adamw() -> None:
    """AdamW(fused) makes states of the class; LAMB goes on from them with plain ones."""
    from distributed.sharded_cases import set_gradients
    from distributed.wrapped_cases import KINDS, fsdp, local

    for kind in KINDS.values():
        model, twin = fsdp(kind), fsdp(None)
        found = []
        for each in (model, twin):
            params = list(each.parameters())
            adamw = torch.optim.AdamW(params, lr=0.1, fused=True, weight_decay=0.0)
            set_gradients(params, 0)
            adamw.step()
            lamb = fastlars.LAMB(params, lr=0.1, weight_decay=0.0, eps=1e-8)
            lamb.load_state_dict(adamw.state_dict())
            set_gradients(params, 1)
            lamb.step()
            found.append([local(p) for p in params])
        for i, (p, q) in enumerate(zip(*found, strict=True)):
            assert_same_bits(f"parameter {i}", p, q)


def test_states_that_are_subclasses_are_loaded() -> None:
    run(2, states_of_adamw)


def states_by_hand() -> None:
    """States that somebody made of the class between two steps go on as plain ones."""
    from distributed.sharded_cases import set_gradients
    from distributed.wrapped_cases import local

    found = []
    for kind in ("slotted", None):
        model, optimizer = make("fsdp", kind, "LAMB")
        params = list(model.parameters())
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
            for p in params:
                optimizer.state[p]["exp_avg"] = torch.zeros_like(p)
        found.append([local(p) for p in params])
    for i, (p, q) in enumerate(zip(*found, strict=True)):
        assert_same_bits(f"parameter {i}", p, q)


def test_states_of_the_class_are_taken() -> None:
    run(2, states_by_hand)


def refused() -> None:
    """What AdamW would write in no plain tensor, or in two: with the place, and nothing written."""
    from distributed.sharded_cases import set_gradients
    from distributed.wrapped_cases import Doubled, Quantized, plain, tensor_parallel

    for kind, build in product((Doubled, Quantized), (plain, tensor_parallel)):
        model = build(kind)
        params = list(model.parameters())
        set_gradients(params, 0)
        optimizer = fastlars.LARS([{"params": params[1:2]}, {"params": [params[0]]}], **LARS)
        before = params[1].detach().clone()
        with pytest.raises(
            TypeError, match=f"group 1, parameter 0 is a {kind.__name__}: a subclass"
        ):
            optimizer.step()
        assert_same_bits("the other parameter", params[1].detach(), before)
        assert not optimizer.state[params[1]]


def test_other_subclasses_are_refused() -> None:
    run(2, refused)


def test_a_subclass_that_shares_memory_is_refused() -> None:
    from distributed.wrapped_cases import Bare

    inner = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"group 0, parameter 1 shares memory with .*parameter 0"):
        fastlars.LARS([nn.Parameter(inner), nn.Parameter(Bare(inner))], **LARS)


def test_each_parameter_is_unwrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of groups, each of which is held against all others."""
    calls = []

    def counted(tensors: list[Tensor]) -> list[Tensor]:
        calls.append(tensors)
        return unwrap(tensors)

    unwrap = wrapped_module.unwrap
    monkeypatch.setattr(wrapped_module, "unwrap", counted)
    params = [nn.Parameter(KINDS["bare"](torch.ones(4))) for _ in range(10)]
    optimizer = fastlars.LARS([{"params": [p]} for p in params], lr=0.1)
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    assert len(calls) == 10


@pytest.mark.parametrize("row", ["LARS", "LAMB"])
def test_gradients_of_a_subclass(row: str) -> None:
    """Also of a plain parameter, as AdamW(fused=True) takes them."""
    kind, options, _ = RECIPES[row]
    ended = []
    for wrap in (lambda g: g, KINDS["bare"]):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
        optimizer = kind(params, **options)
        for _ in range(STEPS):
            for p in params:
                p.grad = wrap(torch.randn(4, 3))
            optimizer.step()
        ended.append(params)
    for ours, theirs in zip(*ended, strict=True):
        assert_same_bits("weight", ours.detach(), theirs.detach())


def collected() -> None:
    """A hand-written DDP, whose gradients a functional collective still writes to."""
    ended = []
    for kind in ("plain", "functional"):
        w = nn.Parameter(torch.ones(4))
        optimizer = fastlars.LAMB([w], **LAMB)
        for _ in range(STEPS):
            optimizer.zero_grad()
            ((dist.get_rank() + 1.0) * w.square()).sum().backward()
            assert w.grad is not None
            if kind == "plain":
                dist.all_reduce(w.grad)
            else:
                w.grad = all_reduce(w.grad, "sum", dist.group.WORLD)
                assert type(w.grad) is AsyncCollectiveTensor
            optimizer.step()
        ended.append(w.detach())
    assert_same_bits("weight", *ended)


def test_gradients_of_functional_collectives() -> None:
    run(2, collected)


def moved() -> None:
    """Shards that FSDP2 has replaced are kept by nobody."""
    model = MODELS["fsdp"](None)
    params: list[Any] = list(model.parameters())
    optimizer = fastlars.LAMB(params, **LAMB)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        shards = [weakref.ref(p._local_tensor) for p in params]
        model.to(torch.float64).to(torch.float32)  # and back: plans still fit
        assert all(shard() is None for shard in shards)


def test_replaced_shards_are_let_go() -> None:
    run(2, moved)


class Loops(Tensor):
    """Calls with itself again, and so never unwraps."""

    calls = 0

    @staticmethod
    def __new__(cls, value: Tensor) -> Loops:
        return Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_class_that_never_unwraps_is_left_soon() -> None:
    """Not at Python's recursion limit: the stack may end before."""
    assert wrapped_module.path_inside(Loops(torch.ones(3))) == ()
    assert 0 < Loops.calls < 20
