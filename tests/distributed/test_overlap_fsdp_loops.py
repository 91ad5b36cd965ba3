"""What training loops do under FSDP2: the bits, and the collectives, of no overlap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

import fastlars
from distributed.changes import CHANGES, clip
from distributed.fsdp_cases import EVERY, Net, Run, compare, failing, net
from distributed.overlap_cases import count_early, is_ahead
from distributed.processes import run
from distributed.wrapped_cases import Flattened, wrapped
from fastlars.distributed import overlap
from fastlars.in_backward.engine import WATCHED_STEPS

RECOVERS = hasattr(FSDPModule, "reset_iter_state")  # not in older versions of torch
CLIP = {"max_grad_norm": 0.05}


def unused(kind: str, mode: str, overlapped: bool) -> Run:
    """Blocks and norms that are left out, and parameters that are frozen: others in each step."""
    one = Run(overlapped, kind, mode)
    for number in range(12):
        one.module.skipped = {number % 3, (number // 2) % 4}
        one.module.bare = number % 4 > 1
        for i, p in enumerate(one.params):
            p.requires_grad_(number < 5 or (i + number) % 5 != 0)
        one.go(range(number, number + 1))
    return one


def accumulated(kind: str, mode: str, synced: bool, overlapped: bool) -> Run:
    """Three backward passes a step, of which the last one alone reduces, or all."""
    one = Run(overlapped, kind, mode)
    for number in range(6):
        one.optimizer.zero_grad(set_to_none=number % 2 == 0)
        for part in range(3 if number > 0 else 1):
            one.module.set_requires_gradient_sync(synced or part == 2 or number == 0)
            one.backward(3 * number + part)
        one.step()
    return one


def scaled(kind: str, mode: str, options: dict[str, Any], overlapped: bool) -> Run:
    """Also one that clips by itself, and an overflow."""
    one = Run(overlapped, kind, mode, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    for number in range(WATCHED_STEPS + 4):
        one.optimizer.zero_grad()
        factor = float("inf") if number == 4 else 1.0
        scaler.scale(factor * one.loss(number)).backward()
        if number in (1, 3, 5):
            scaler.unscale_(one.optimizer)
            nn.utils.clip_grad_norm_(one.params, 0.5)
        one.step(partial(scaler.step, one.optimizer))
        before = scaler.get_scale()
        scaler.update()
        assert number != 4 or scaler.get_scale() < before
    return one


def changed(kind: str, mode: str, options: dict[str, Any], debug: bool, overlapped: bool) -> Run:
    """A change of each kind between backward and step(), each in a step of its own; later in the
    run, where checksums are not taken, those that are seen without."""
    one = Run(overlapped, kind, mode, grouped=False, debug=debug, **options)
    numbers = iter(range(99))
    one.go(next(numbers) for _ in range(3 if debug else WATCHED_STEPS))
    # What writes with multi-tensor functions is found, but ends all early work.
    for change, _, always in sorted(CHANGES.values(), key=lambda entry: entry[0] is clip):
        if debug or always:
            one.go([next(numbers), next(numbers)])  # the first one measures nothing early
            one.optimizer.zero_grad()
            one.backward(next(numbers))
            assert not overlapped or bool(one.optimizer.overlap_hook.in_flight) == is_ahead(
                kind, mode, bool(options)
            )
            change(one.params, one.optimizer)
            one.step()
    return one


def changed_by_one(kind: str, overlapped: bool) -> Run:
    """Gradients that one rank alone changes: it measures again, the other does not."""
    one = Run(overlapped, kind, max_grad_norm=None if kind == "LARS" else 0.1)
    for number in range(16):
        one.optimizer.zero_grad()
        one.backward(number)
        if dist.get_rank() == 1 and number % 3 == 2:
            for p in one.params:
                p.grad.to_local().mul_(0.5)
        one.step()
    return one


def failed(kind: str, mode: str, overlapped: bool) -> Run:
    """A backward pass that fails on all ranks, whose gradients are thrown away."""
    one = Run(overlapped, kind, mode)
    for number in range(0, 12, 4):
        one.go(range(number, number + 3))
        one.optimizer.zero_grad()
        with pytest.raises(ZeroDivisionError), failing(one.module.blocks[0]):
            one.backward(number + 3)
        one.module.reset_iter_state()
    return one


def restored(kind: str, mode: str, overlapped: bool) -> Run:
    """States that are loaded between steps: by each rank, by one alone, as a checkpoint."""
    one = Run(overlapped, kind, mode).go(range(4))
    one.optimizer.load_state_dict(one.optimizer.state_dict())
    one.go(range(4, 7))
    if dist.get_rank() == 1:  # which so measures nothing early in the next step
        one.optimizer.load_state_dict(one.optimizer.state_dict())
    one.go(range(7, 10))
    weights, states = get_state_dict(one.module, one.optimizer)
    kept = {name: value.clone() for name, value in weights.items()}
    one.go(range(10, 12))
    set_state_dict(one.module, one.optimizer, model_state_dict=kept, optim_state_dict=states)
    return one.go(range(12, 15))


def thrown_away(kind: str, mode: str, overlapped: bool) -> Run:
    """Gradients of a backward pass without a step, and a step without a backward pass."""
    one = Run(overlapped, kind, mode)
    for number in range(9):
        one.optimizer.zero_grad()
        one.backward(number)
        if number % 3 != 1:
            one.step()
    for p in one.params:
        p.grad = torch.zeros_like(p)
    one.step()
    return one.go(range(9, 11))


def regrouped(kind: str, mode: str, overlapped: bool) -> Run:
    """Lists of parameters, and options, that change between steps."""
    one = Run(overlapped, kind, mode).go(range(3))
    matrices, vectors, _ = one.optimizer.param_groups
    taken = matrices["params"].pop(1)
    one.go(range(3, 5))
    vectors["params"].append(taken)
    vectors["lr"], vectors["weight_decay"] = 0.03, 0.2
    one.go(range(5, 7))
    matrices["params"].reverse()
    matrices["max_grad_norm"] = 0.1
    one.go(range(7, 9))
    matrices["max_grad_norm"] = None
    one.optimizer.skip_if = 100.0
    return one.go(range(9, 11))


def removed(kind: str, overlapped: bool) -> Run:
    """Removed between a backward pass and its step, and set up anew."""
    one = Run(overlapped, kind).go(range(4))
    one.optimizer.zero_grad()
    one.backward(4)
    if one.handle is not None:
        one.handle.remove()
    one.step()
    one.go(range(5, 7))
    if overlapped:
        assert one.optimizer.overlap_hook is None
        one.handle = overlap(one.module, one.optimizer)
    return one.go(range(7, 11))


def two_optimizers(overlapped: bool) -> Run:
    """Each steps a part of the model, and is overlapped."""
    one = Run(overlapped, "LAMB")
    mine = [p for block in one.module.blocks for p in block.parameters()]
    for group in one.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if all(p is not q for q in mine)]
    other = fastlars.LARS(mine, lr=0.5, weight_decay=0.1)
    if overlapped:
        overlap(one.module, other, mode="norms")
    for number in range(5):
        one.optimizer.zero_grad()
        other.zero_grad()
        one.backward(number)
        if overlapped and number > 1:
            assert count_early(other) == len(mine)
        other.step()
        one.step()
    return one


def normalized_in_part(overlapped: bool) -> Run:
    """LANS that normalizes the gradients of one group alone: the others' moments are advanced."""
    one = Run(overlapped, "LANS")
    one.optimizer.param_groups[0]["normalize_grad"] = False
    return one.go(range(4))


def compiled(what: str) -> Any:
    model = net()
    for part in model.blocks if what == "blocks" else (model,):
        part.compile(backend="aot_eager")
    return model


def of_model(make: Callable[[], Any], overlapped: bool) -> Run:
    return Run(overlapped, model=make()).go(range(4))


def every_habit() -> dict[str, list[int]]:
    both = [("LARS", "step"), ("LAMB", "step"), ("LAMB", "norms"), ("LANS", "step")]
    # Those that write nothing during backward.
    reads = [(k, m) for k, m in both if (k, m) != ("LAMB", "step")]
    quiet: list[tuple[str, str, Any]] = [("LARS", "step", {}), ("LAMB", "step", CLIP)]
    models: dict[str, Callable[[], Any]] = {
        "offloaded": partial(net, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "resharded": partial(net, reshard_after_forward=True),
        "wrapped": partial(net, lambda: wrapped(Net(), Flattened)),
        "checkpointed": partial(net, partial(Net, reentrant=False)),
        "checkpointed, reentrant": partial(net, partial(Net, reentrant=True)),
        "blocks compiled": partial(compiled, "blocks"),
        "compiled": partial(compiled, "all"),
    }
    return compare(
        {
            **{f"unused, {k}, {m}": partial(unused, k, m) for k, m in both},
            **{f"accumulated, {k}, {m}": partial(accumulated, k, m, False) for k, m in both},
            **{f"summed, {k}, {m}": partial(accumulated, k, m, True) for k, m in reads},
            **{f"scaled, {k}, {m}": partial(scaled, k, m, o) for k, m, o in quiet},
            **{f"changed, {k}, {m}": partial(changed, k, m, o, True) for k, m, o in quiet},
            **{f"changed later, {k}, {m}": partial(changed, k, m, o, False) for k, m, o in quiet},
            **{f"changed by one, {k}": partial(changed_by_one, k) for k in ("LARS", "LAMB")},
            **{f"failed, {k}": partial(failed, k, "step") for k in ("LARS", "LANS") if RECOVERS},
            **{f"restored, {k}, {m}": partial(restored, k, m) for k, m in both},
            **{f"thrown away, {k}, {m}": partial(thrown_away, k, m) for k, m in reads},
            **{f"regrouped, {k}, {m}": partial(regrouped, k, m) for k, m in both},
            **{f"removed, {k}": partial(removed, k) for k in ("LARS", "LAMB")},
            "two optimizers": two_optimizers,
            "normalized in part": normalized_in_part,
            **{name: partial(of_model, make) for name, make in models.items()},
        }
    )


def test_every_habit() -> None:
    """Early sums are taken, and used, but where the loop leaves none."""
    for rank, found in enumerate(run(2, every_habit)):
        for name, seen in found.items():
            never = name.startswith("summed") or ("LAMB, norms" in name and "regrouped" not in name)
            assert any(seen) != never, (name, seen)
            assert not any(seen[:2]), (name, seen)
        adapted = EVERY - 1
        assert found["accumulated, LAMB, step"] == [0, 0, *[adapted] * 4]
        assert found["unused, LARS, step"][2:6] == [4, 0, 9, 10]
        assert found["normalized in part"] == [0, 0, EVERY, EVERY]
        loaded = found["restored, LAMB, step"]
        mine = 0 if rank == 1 else adapted
        expected = [adapted, 0, adapted, mine, adapted, 0, adapted]
        assert [loaded[i] for i in (3, 4, 5, 7, 11, 12, 14)] == expected
        # A step after one whose sums were in vain takes none.
        alone = [EVERY, 0, EVERY, EVERY] if rank == 1 else [EVERY] * 4
        assert found["changed by one, LAMB"][2:6] == alone
