"""Quirks of other libraries that the conventions do not copy, shown on their own code or formula.

If one of these tests fails after an update of a peer, the peer has mended it: then its line in
fastlars/conventions.py goes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import timm.optim
import torch
from torch import Tensor, nn

import fastlars
import peers
from fastlars import conventions
from peer_rows import LIGHTLY_OPTIONS, SIMCLR_OPTIONS, SOLO_OPTIONS, formula
from peers import AroundSgd, Model, distance, train


def steps_of(
    make: Callable[..., Any], weight: list[float], *grads: list[float] | None, **options: Any
) -> list[list[float]]:
    """How one parameter moves, step by step, beside another that always has a gradient."""
    p = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    beside = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    optimizer = make([p, beside], **options)
    moves = []
    for g in grads:
        p.grad = None if g is None else torch.tensor([g], dtype=torch.float64)
        beside.grad = torch.ones_like(beside)
        before = p.detach().clone()
        optimizer.step()
        moves.append((before - p.detach()).flatten().tolist())
    return moves


def test_pytorch_optimizer_dampens_the_first_gradient() -> None:
    options = {"lr": 1.0, "momentum": 0.9, "dampening": 0.25, "trust_coefficient": 1.0}
    weight, grad = [3.0, 4.0], [0.6, 0.8]
    (theirs,) = steps_of(pytorch_optimizer.LARS, weight, grad, **options)
    (ours,) = steps_of(fastlars.LARS, weight, grad, **conventions.pytorch_optimizer_lars(**options))
    (torchs,) = steps_of(torch.optim.SGD, weight, grad, lr=1.0, momentum=0.9, dampening=0.25)
    assert ours == pytest.approx([3.0, 4.0])
    assert theirs == pytest.approx([0.75 * 3.0, 0.75 * 4.0])
    assert torchs == pytest.approx(grad), "torch.optim.SGD does not dampen it either"


def test_pytorch_optimizer_decays_without_a_gradient_at_another_rate() -> None:
    options = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.5, "trust_coefficient": 1e-3}
    (theirs,) = steps_of(pytorch_optimizer.LARS, [3.0, 4.0], [0.0, 0.0], **options)
    (ours,) = steps_of(
        fastlars.LARS, [3.0, 4.0], [0.0, 0.0], **conventions.pytorch_optimizer_lars(**options)
    )
    assert theirs == pytest.approx([3e-3, 4e-3])  # q = eta / wd
    assert ours == pytest.approx([1.5, 2.0])  # q = 1


@pytest.mark.parametrize("make", [pytorch_optimizer.LARS, pytorch_optimizer.Lamb])
def test_pytorch_optimizer_overwrites_gradients(make: Callable[..., Any]) -> None:
    def gradient_after(make: Callable[..., Any], **options: Any) -> Tensor:
        p = nn.Parameter(torch.full((2, 2), 3.0))
        p.grad = torch.ones(2, 2)
        make([p], lr=1.0, **options).step()
        return p.grad

    name = f"pytorch_optimizer_{make.__name__.lower()}"
    mine = getattr(fastlars, conventions.by_name[name].optimizer)
    options = {"max_grad_norm": 0.5}
    assert torch.equal(
        gradient_after(mine, **conventions.by_name[name](**options)), torch.ones(2, 2)
    )
    options = {"max_grad_norm": 0.5, "pre_norm": True, "foreach": False}
    assert not torch.equal(gradient_after(make, **options), torch.ones(2, 2))


def test_larc_does_not_clip_zeros() -> None:
    """With a learning rate above 1, a bias that starts at zero takes a full step in apex."""
    grad, zero = [0.6, 0.8], [0.0, 0.0]
    apex = partial(AroundSgd, gradient=peers.larc)
    assert steps_of(apex, zero, grad, lr=5.0) == [pytest.approx([3.0, 4.0])]
    ours = steps_of(fastlars.LARS, zero, grad, lr=5.0, **conventions.apex_larc)
    assert ours == [pytest.approx(grad)]
    timms = steps_of(timm.optim.Lars, zero, grad, lr=5.0, trust_clip=True, always_adapt=True)
    assert timms == [pytest.approx(grad)], "timm's LARC clips it too"


def test_larc_does_not_decay_without_a_gradient() -> None:
    options = {"lr": 1.0, "weight_decay": 0.5}
    apex = partial(AroundSgd, gradient=peers.larc)
    assert steps_of(apex, [3.0, 4.0], [0.0, 0.0], **options) == [[0.0, 0.0]]
    convention = conventions.apex_larc(**options)
    ours = steps_of(fastlars.LARS, [3.0, 4.0], [0.0, 0.0], **convention)
    assert ours == [pytest.approx([1.5, 2.0])]


def test_lightly_does_not_decay_without_a_gradient() -> None:
    options = {"lr": 1.0, "weight_decay": 0.5}
    lightly = partial(formula(peers.lightly, LIGHTLY_OPTIONS), **options)
    assert steps_of(lightly, [3.0, 4.0], [0.0, 0.0]) == [[0.0, 0.0]]
    ours = steps_of(fastlars.LARS, [3.0, 4.0], [0.0, 0.0], **conventions.lightly_lars(**options))
    assert ours == [pytest.approx([1.5, 2.0])]


def test_solo_neither_decays_nor_clips_zeros() -> None:
    grad, zero = [0.6, 0.8], [0.0, 0.0]
    solo = partial(formula(peers.solo, SOLO_OPTIONS), lr=5.0, weight_decay=0.1, clip_lars_lr=True)
    convention = conventions.solo_lars(lr=5.0, weight_decay=0.1, trust_clip=True)
    assert steps_of(solo, zero, grad) == [pytest.approx([3.0, 4.0])]
    assert steps_of(fastlars.LARS, zero, grad, **convention) == [pytest.approx(grad)]
    assert steps_of(solo, grad, zero) == [zero]
    assert steps_of(fastlars.LARS, grad, zero, **convention) == [pytest.approx([0.06, 0.08])]


def test_simclrs_release_never_moves_zeros() -> None:
    grad, zero = [0.6, 0.8], [0.0, 0.0]
    port = formula(peers.simclr, SIMCLR_OPTIONS)
    assert steps_of(port, zero, grad, lr=1.0, released=True) == [zero]
    assert steps_of(port, zero, grad, lr=1.0) == [pytest.approx(grad)]
    ours = steps_of(fastlars.LARS, zero, grad, lr=1.0, **conventions.simclr_lars)
    assert ours == [pytest.approx(grad)]


def test_mlperf_mxnet_has_no_correction_from_zero() -> None:
    """Its lr / previous lr is a division by zero where a warm-up starts from zero."""
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = fastlars.LARS([p], lr=0.0, **conventions.mlperf_mxnet_lars)
    for lr in (0.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert bool(p.isfinite().all())
    assert bool((p < 1.0).all())


LAMBS = {
    "timm_lamb": (timm.optim.Lamb, {"weight_decay": 0.0, "max_grad_norm": None}),
    "apex_lamb": (peers.ApexLamb, {"weight_decay": 0.0, "max_grad_norm": math.inf}),
    "pytorch_optimizer_lamb": (pytorch_optimizer.Lamb, {"adam": True}),
}


@pytest.mark.parametrize("name", LAMBS)
def test_steps_are_counted_by_parameter(name: str) -> None:
    """Adam's first step is lr in every element.

    A gradient that comes one step late has its first step corrected like a second by the peers.
    """
    make, options = LAMBS[name]
    late = (None, [0.5, -2.0])
    convention = conventions.by_name[name](weight_decay=0.0, adapt=False, max_grad_norm=None)
    # pytorch_optimizer corrects the first moment alone.
    reached = 1.0 if name != "pytorch_optimizer_lamb" else 1.0 / math.sqrt(1.0 - 0.999)
    expected = pytest.approx([0.01 * reached, -0.01 * reached], rel=1e-4)
    assert steps_of(fastlars.LAMB, [3.0, 4.0], *late, lr=0.01, **convention)[1] == expected
    assert steps_of(make, [3.0, 4.0], *late, lr=0.01, **options)[1] != expected
    in_time = late[1:]
    assert steps_of(make, [3.0, 4.0], *in_time, lr=0.01, **options)[0] == expected


def test_gluonnlp_counts_the_steps_of_a_group() -> None:
    """Adam's direction, to whose scale a ratio is blind, is of another length than the decay."""
    late, options = (None, [0.5, -2.0]), {"lr": 0.01, "weight_decay": 0.5}
    # Both directions are (1, -1) + 0.5 w at a parameter's first step; |w| is 5.
    expected = pytest.approx([0.01 * 5.0 / math.hypot(2.5, 1.0) * r for r in (2.5, 1.0)], rel=1e-4)
    convention = conventions.gluonnlp_lans(**options)
    assert steps_of(fastlars.LANS, [3.0, 4.0], *late, **convention)[1] == expected
    assert steps_of(peers.GluonnlpLans, [3.0, 4.0], *late, **options)[1] != expected
    assert steps_of(peers.GluonnlpLans, [3.0, 4.0], late[1], **options)[0] == expected


def test_torch_counts_by_parameter_too() -> None:
    moves = steps_of(torch.optim.AdamW, [3.0, 4.0], None, [0.5, -2.0], lr=0.01, weight_decay=0.0)
    assert moves[1] == pytest.approx([0.01, -0.01])


def test_apex_takes_a_norm_of_zero_for_a_limit() -> None:
    options = {"lr": 0.01, "weight_decay": 0.0}
    theirs = steps_of(peers.ApexLamb, [3.0, 4.0], [1.0, 1.0], max_grad_norm=0.0, **options)
    assert theirs == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="max_grad_norm must be positive, or None for no clip"):
        fastlars.LAMB([torch.zeros(1)], **conventions.apex_lamb(max_grad_norm=0.0))
    free = conventions.apex_lamb(max_grad_norm=None, **options)
    assert steps_of(fastlars.LAMB, [3.0, 4.0], [1.0, 1.0], **free)[0] == pytest.approx([0.01] * 2)


def test_timm_clips_by_the_constructors_norm_alone() -> None:
    def moves(make: Callable[..., Any], options: dict[str, Any]) -> float:
        p = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64))
        p.grad = torch.full_like(p, 2.0)
        # An eps of 1 makes Adam's direction depend on the scale of the gradient.
        group = {"params": [p], "max_grad_norm": None}
        make([group], lr=0.01, **(options | {"eps": 1.0, "weight_decay": 0.0})).step()
        return float(3.0 - p[0, 0].detach())

    assert moves(fastlars.LAMB, dict(conventions.timm_lamb)) == pytest.approx(0.01 * 2.0 / 3.0)
    assert moves(timm.optim.Lamb, {}) == pytest.approx(0.01 * 0.5 / 1.5)  # clipped to norm 1


def test_pytorch_optimizer_adds_to_the_global_norm() -> None:
    """Its pre_norm divides by the norm plus 1e-6, so that the two agree to about that."""

    def trained(make: Callable[..., Any], **options: Any) -> list[Tensor]:
        model = Model(torch.float64)
        return train(model, make(model.parameters(), lr=0.05, **options), peak=0.05)

    theirs = trained(pytorch_optimizer.Lamb, pre_norm=True)
    ours = trained(fastlars.LAMB, **conventions.pytorch_optimizer_lamb(max_grad_norm=1.0))
    assert 1e-12 < distance(ours, theirs) < 1e-6
