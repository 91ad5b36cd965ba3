"""grad_norm and skip_if where several processes have the gradients, or step them early."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlars
from distributed.overlap_cases import Setting, count_early, images, make, train_all
from distributed.processes import run
from fastlars.distributed import overlap
from optimizers import OPTIONS, parameters, set_gradients
from optimizers import one_thread as one_thread
from tolerances import TOLERANCES

THRESHOLD = 20.0
Found = list[tuple[float, float, int, bool]]  # norm, that of torch, steps skipped, same weights


# norm_group.


def stages() -> Found:
    """Gradients of the second stage alone are large, in every other step."""
    found = []
    rank = dist.get_rank()
    for name, options in OPTIONS.items():
        both = [parameters(seed=0)[:4], parameters(seed=1)[:3]]
        mine = both[rank]
        kind = getattr(fastlars, name)
        optimizer = kind(mine, skip_if=THRESHOLD, norm_group=dist.group.WORLD, **options)
        for step in range(4):
            set_gradients(both[0], step)
            set_gradients(both[1], step, scale=1000.0 if step % 2 else 1.0)
            every = [p.grad.double() for stage in both for p in stage if p.grad is not None]
            before = [p.detach().clone() for p in mine]
            optimizer.step()
            same = all(torch.equal(p, was) for p, was in zip(mine, before, strict=True))
            expected = float(nn.utils.get_total_norm(every))
            found.append((float(optimizer.grad_norm), expected, int(optimizer.skipped_steps), same))
    return found


def check(found: list[Found], kinds: int) -> None:
    for here in found:
        assert [norm for norm, *_ in here] == [norm for norm, *_ in found[0]]  # to the bit
        for norm, expected, *_ in here:
            assert norm == pytest.approx(expected, rel=TOLERANCES["sum"].arithmetic)
        assert [skipped for _, _, skipped, _ in here] == [0, 1, 1, 2] * kinds
        assert [same for *_, same in here] == [False, True, False, True] * kinds


def test_stages_of_a_pipeline_decide_together() -> None:
    check(run(2, stages), len(OPTIONS))


def scaled_stages() -> list[Any]:
    """The gradients of one stage overflow, and its GradScaler skips the step: so do the others."""
    found = []
    for kind in ("LARS", "LAMB"):
        w = nn.Parameter(torch.ones(4))
        options = {"max_grad_norm": 1.0, "norm_group": dist.group.WORLD, "fused_unscale": True}
        optimizer = getattr(fastlars, kind)([w], lr=0.1, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for step in range(4):
            optimizer.zero_grad()
            factor = float("inf") if (step, dist.get_rank()) == (1, 1) else 1.0
            before = w.detach().clone()
            scaler.scale((factor * w).sum()).backward()
            scaler.step(optimizer)
            scaler.update(2.0)
            norm = round(float(optimizer.grad_norm), 6)
            found.append((norm, int(optimizer.skipped_steps), torch.equal(w, before)))
    return found


def test_stages_skip_together_with_a_gradscaler() -> None:
    norm = round(math.sqrt(8.0), 6)
    expected = [(norm, 0, False), (math.nan, 1, True), (norm, 1, False), (norm, 1, False)]
    for found in run(2, scaled_stages):
        assert repr(found) == repr(expected * 2)


def zero() -> Found:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = []
    for name, options in OPTIONS.items():
        kind = getattr(fastlars, name)
        params = parameters()[:4]
        with pytest.raises(RuntimeError, match=r"^skip_if under Zero.*or leave skip_if out and"):
            ZeroRedundancyOptimizer(
                params, optimizer_class=functools.partial(kind, skip_if=THRESHOLD), **options
            )
        made = functools.partial(kind, skip_if=THRESHOLD, norm_group=dist.group.WORLD)
        optimizer = ZeroRedundancyOptimizer(params, optimizer_class=made, **options)
        for step in range(4):
            set_gradients(params, step)
            if step % 2 and params[0].grad is not None:
                params[0].grad.mul_(1000.0)  # which one process has
            grads = [p.grad.double() for p in params if p.grad is not None]
            before = [p.detach().clone() for p in params]
            optimizer.step()
            same = all(torch.equal(p, was) for p, was in zip(params, before, strict=True))
            inner: Any = optimizer.optim
            expected = float(nn.utils.get_total_norm(grads))
            found.append((float(inner.grad_norm), expected, int(inner.skipped_steps), same))
    return found


def test_zero_decides_by_the_norm_of_all() -> None:
    check(run(2, zero), len(OPTIONS))


# Shards.


def shards(layout: str) -> Found:
    from distributed.sharded_cases import LAYOUTS, backward, whole

    found = []
    for name, options in OPTIONS.items():
        model = LAYOUTS[layout]()
        params: list[Any] = list(model.parameters())
        optimizer = getattr(fastlars, name)(params, skip_if=THRESHOLD, **options)
        for step in range(4):
            backward(model, step)
            for p in params:
                p.grad.mul_(1e4 if step % 2 else 1.0)
            grads = [whole(p.grad).double() for p in params]
            before = [whole(p).clone() for p in params]
            optimizer.step()
            same = all(torch.equal(whole(p), was) for p, was in zip(params, before, strict=True))
            expected = float(nn.utils.get_total_norm(grads))
            found.append((float(optimizer.grad_norm), expected, int(optimizer.skipped_steps), same))
    return found


@pytest.mark.xdist_group("sharded")
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tensor parallel", "side by side"])
def test_shards_decide_alike(layout: str) -> None:
    check(run(4, shards, layout, timeout=600), len(OPTIONS))


# Overlap.


class EveryOther:
    """Skips the second of every two steps."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __call__(self, norm: Tensor) -> bool:
        self.norms.append(float(norm))
        return len(self.norms) % 2 == 0


@pytest.mark.parametrize("mode", ["step", "norms"])
@pytest.mark.parametrize("kind", ["LARS", "LAMB"])
def test_overlapped_steps_are_skipped(kind: str, mode: str) -> None:
    """Nothing is written before the decision, and the bits are those of plain steps."""
    view = {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}
    every = Setting(kind, ddp=view)
    plain = replace(every, optimizer={"skip_if": EveryOther()})
    settings = (every, plain, replace(plain, overlap={"mode": mode}))
    for results in run(2, train_all, *settings):
        all_taken, skipping, overlapped = results
        overlapped.assert_same(skipping)
        assert skipping.ratios == []  # of the last step, which is skipped
        assert overlapped.early[-1] == len(overlapped.params)
        assert not torch.equal(all_taken.params[0], skipping.params[0])
        losses = skipping.losses
        assert len(set(losses)) == len(losses)


def overlapped_numbers(mode: str) -> list[Any]:
    """Of each step: norm, torch's norm, count, weights unchanged, parameters that were early."""
    net = make(Setting())
    ddp = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.001)
    optimizer = fastlars.LAMB(net.parameters(), lr=0.01)
    overlap(ddp, optimizer, mode=mode)  # type: ignore[arg-type]
    found: list[Any] = []
    thresholds = (None, None, math.inf, THRESHOLD, THRESHOLD, math.inf, None)
    for step, threshold in enumerate(thresholds, -1):
        optimizer.zero_grad()
        optimizer.skip_if = threshold
        x, y = images(abs(step), dist.get_rank(), torch.float32)
        scale = {3: 1e4, 4: math.nan}.get(step, 1.0)
        (scale * nn.functional.cross_entropy(ddp(x), y)).backward()
        early = count_early(optimizer)
        before = [p.detach().clone() for p in net.parameters()]
        if step == 5 and mode == "step":  # buckets are stepped, nobody has taken their norm
            optimizer.skip_if = THRESHOLD
            with pytest.raises(RuntimeError, match="a hyper-parameter was changed between backw"):
                optimizer.step()
            continue
        grads = [p.grad.double() for p in net.parameters() if p.grad is not None]
        expected = None if threshold is None else float(nn.utils.get_total_norm(grads))
        optimizer.step()
        norm = None if optimizer.grad_norm is None else float(optimizer.grad_norm)
        pairs = zip(net.parameters(), before, strict=True)
        same = all(torch.equal(p, was) for p, was in pairs)
        counts = int(optimizer.skipped_steps), optimizer.param_groups[0]["step"]
        found.append((norm, expected, counts, same, early > 0))
    return found


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_thresholds_under_overlap(mode: str) -> None:
    found = run(2, overlapped_numbers, mode)
    assert repr(found[0]) == repr(found[1])
    first, second, *others = found[0]
    assert first == (None, None, (0, 1), False, False)
    assert second == (None, None, (0, 2), False, False)
    counts = [(0, 3), (0, 4), (1, 4), (2, 4)]
    for (norm, expected, *rest), count in zip(others, counts, strict=False):
        rel = TOLERANCES["sum"].arithmetic
        assert norm == pytest.approx(expected, rel=rel, nan_ok=True)
        assert rest == [count, count[0] > 0, True]
    if mode == "norms":
        assert found[0][6] == (None, None, (2, 5), False, False)
