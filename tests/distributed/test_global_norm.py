"""max_grad_norm of an optimizer with a part of the parameters: summed over processes or refused."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlars
from distributed.processes import run
from optimizers import OPTIONS, SIMPLE, Row, parameters, set_gradients, train
from optimizers import one_thread as one_thread
from tolerances import assert_same_bits

LIMIT = 0.05
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


def _stage(rank: int) -> list[nn.Parameter]:
    """The parameters of one stage of a pipeline: its norm says nothing of the other's."""
    return parameters(seed=rank)[: 4 - rank]


def _gradients(params: list[nn.Parameter], rank: int, step: int) -> None:
    set_gradients(params, step, scale=1.0 + 9.0 * rank)


def stages() -> list[tuple[Tensor, Tensor]]:
    """Weights of this rank's stage, and those of one optimizer that has both stages."""
    from torch.distributed.device_mesh import init_device_mesh

    found = []
    rank = dist.get_rank()
    groups = {"group": dist.group.WORLD, "mesh": init_device_mesh("cpu", (2,))}
    for group in groups.values():
        for name, options in OPTIONS.items():
            kind = getattr(fastlars, name)
            mine = _stage(rank)
            optimizer = kind(mine, max_grad_norm=LIMIT, norm_group=group, **options)
            both = [_stage(0), _stage(1)]
            whole = kind([p for each in both for p in each], max_grad_norm=LIMIT, **options)
            for step in range(3):
                _gradients(mine, rank, step)
                for r, each in enumerate(both):
                    _gradients(each, r, step)
                if step == 1:  # a stage without gradients takes part all the same
                    for p in (*both[1], *(mine if rank == 1 else [])):
                        p.grad = None
                optimizer.step()
                whole.step()
            found += [(p.detach(), q.detach()) for p, q in zip(mine, both[rank], strict=True)]
    return found


def test_stages_of_a_pipeline_clip_together() -> None:
    for found in run(2, stages):
        for i, (mine, whole) in enumerate(found):
            torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-7, msg=f"tensor {i}")


def zero() -> list[tuple[Tensor, Tensor]]:
    """Weights under ZeroRedundancyOptimizer, and without it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = []
    for name, options in OPTIONS.items():
        kind = getattr(fastlars, name)
        spread, whole = parameters()[:4], parameters()[:4]
        sharded = ZeroRedundancyOptimizer(
            spread,
            optimizer_class=functools.partial(kind, norm_group=dist.group.WORLD),
            max_grad_norm=LIMIT,
            **options,
        )
        optimizer = kind(whole, max_grad_norm=LIMIT, **options)
        for step in range(3):
            set_gradients(spread, step)
            set_gradients(whole, step)
            sharded.step()
            optimizer.step()
        found += [(p.detach(), q.detach()) for p, q in zip(spread, whole, strict=True)]
    return found


def test_zero_clips_by_the_norm_of_all() -> None:
    for found in run(2, zero):
        for i, (mine, whole) in enumerate(found):
            torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-7, msg=f"tensor {i}")


def refused_by_zero() -> list[str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    messages = []
    for name, options in OPTIONS.items():
        kind = getattr(fastlars, name)
        with pytest.raises(RuntimeError) as raised:
            ZeroRedundancyOptimizer(
                parameters(), optimizer_class=kind, max_grad_norm=LIMIT, **options
            )
        messages.append(str(raised.value))
        # Switched on later: before anything is changed.
        params = parameters()
        later = ZeroRedundancyOptimizer(params, optimizer_class=kind, **options)
        set_gradients(params, 0)
        before = [p.detach().clone() for p in params]
        later.param_groups[0]["max_grad_norm"] = LIMIT
        with pytest.raises(RuntimeError) as raised:
            later.step()
        messages.append(str(raised.value))
        for p, was in zip(params, before, strict=True):
            assert_same_bits("parameter", p, was)
    return messages


def plain_into_zero() -> list[tuple[Tensor, Tensor]]:
    """Weights after a state_dict of one optimizer went on under ZeroRedundancyOptimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = []
    for name, options in OPTIONS.items():
        kind = getattr(fastlars, name)
        params, others = parameters()[:4], parameters()[:4]
        plain = kind(params, **options)
        train(plain, params, range(2))
        sharded = ZeroRedundancyOptimizer(others, optimizer_class=kind, **options)
        sharded.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch keeps its tensors
        for p, q in zip(others, params, strict=True):
            p.data.copy_(q.data)
        train(plain, params, range(2, 4))
        train(sharded, others, range(2, 4))  # type: ignore[arg-type]
        found += [(p.detach(), q.detach()) for p, q in zip(others, params, strict=True)]
    return found


def test_zero_goes_on_from_one_optimizer() -> None:
    for found in run(2, plain_into_zero):
        for i, (mine, whole) in enumerate(found):
            assert_same_bits(f"tensor {i}", mine, whole)


def test_zero_without_a_group_is_refused() -> None:
    for messages in run(1, refused_by_zero):
        assert len(messages) == 2 * len(SIMPLE)
        assert all("max_grad_norm under ZeroRedundancyOptimizer" in m for m in messages)


# Inside backward.


def _by_hooks(make: Callable[..., Any], params: list[nn.Parameter]) -> None:
    """torchtune's way: an optimizer for each parameter, stepped where its gradient is ready."""
    optimizers = {p: make([p]) for p in params}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in params:
        p.register_post_accumulate_grad_hook(step)


def _by_torch(make: Callable[..., Any], params: list[nn.Parameter]) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(make, params, {})


def _loss(params: list[nn.Parameter]) -> Tensor:
    return torch.stack([p.square().sum() for p in params]).sum()


def _by_compiled_hooks(make: Callable[..., Any], params: list[nn.Parameter]) -> None:
    torch._dynamo.reset()

    def step(p: Tensor, compiled: Any) -> None:
        compiled()

    for p in params:
        compiled = torch.compile(make([p]).step, backend="aot_eager")
        p.register_post_accumulate_grad_hook(functools.partial(step, compiled=compiled))


@each_class
@pytest.mark.parametrize("install", [_by_hooks, _by_torch, _by_compiled_hooks])
def test_steps_inside_backward_are_refused(row: Row, install: Any) -> None:
    params = parameters()[:3]
    install(functools.partial(row.make, max_grad_norm=LIMIT), params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="max_grad_norm in a step inside backward"):
        _loss(params).backward()
    for p, was in zip(params, before, strict=True):
        assert_same_bits("parameter", p, was)
    # Without a limit they are taken.
    free = parameters()[:3]
    install(row.make, free)
    _loss(free).backward()
    assert all(not torch.equal(p, was) for p, was in zip(free, before, strict=True))


# The argument.


@each_class
def test_what_is_no_group(row: Row) -> None:
    with pytest.raises(TypeError, match=r"norm_group must be a .* process group or DeviceMesh"):
        row.make(parameters(), norm_group="world")


def copies() -> None:
    optimizer = fastlars.LAMB(parameters(), max_grad_norm=LIMIT, norm_group=dist.group.WORLD)
    assert copy.deepcopy(optimizer).stepper.norm_group is optimizer.stepper.norm_group
    with pytest.raises(TypeError, match="norm_group cannot be pickled"):
        pickle.dumps(optimizer)
    assert all("norm_group" not in group for group in optimizer.state_dict()["param_groups"])


def test_a_copy_does_not_forget_its_group() -> None:
    run(1, copies)


def test_one_process_with_a_group_is_one_without() -> None:
    run(1, _alone)


def _alone() -> None:
    for name, options in OPTIONS.items():
        kind = getattr(fastlars, name)
        params, others = parameters(), parameters()
        train(
            kind(params, max_grad_norm=LIMIT, norm_group=dist.group.WORLD, **options),
            params,
            range(3),
        )
        train(kind(others, max_grad_norm=LIMIT, **options), others, range(3))
        for p, q in zip(params, others, strict=True):
            assert_same_bits("parameter", p, q)
