"""Every convention against the library that it names: 20 steps, another learning rate each.

In float64 through the reference back end, and in float32 through the compiled one. Then every
keyword of every convention is changed, which must show. What is deliberately not copied is
at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

import pytest
import pytorch_optimizer
import timm.optim
import torch
from torch import Tensor, nn

import fastlars
from fastlars import conventions
from migrate import peers
from migrate.peer_rows import (
    DEEPSPEED_OPTIONS,
    LIGHTLY_OPTIONS,
    ROWS,
    SIMCLR_OPTIONS,
    SOLO_OPTIONS,
    Row,
    formula,
)
from migrate.peers import AroundSgd, Model, distance, train

BACKEND = {torch.float64: "reference", torch.float32: "cpu"}
# Errors relative to the largest weight of a tensor, after all steps.
TOLERANCE = {
    torch.float64: 1e-13,  # operations in another order: roundings of 1e-16 in 20 steps
    torch.float32: 2e-6,  # the same with 6e-8, and about ten of them in a step
}
SPECIAL = {
    # optax takes 1 - beta2^t in float32: at t = 1 that is 1e-3, known to 6e-8.
    ("optax_lamb", torch.float32): 3e-5,
}


def tolerance(row: Row, dtype: torch.dtype) -> float:
    return SPECIAL.get((row.convention, dtype), TOLERANCE[dtype])


@cache
def of_optax() -> dict[tuple[Row, torch.dtype], list[Tensor]]:
    """All rows for optax, run in one process of its own."""
    chosen = [(row, dtype) for dtype in TOLERANCE for row in ROWS if isinstance(row.make, str)]
    tasks = [(str(row.make), row.options, row.peak, dtype) for row, dtype in chosen]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        results = pool.submit(peers.optax_runs, tasks).result()
    tensors = ([torch.tensor(array) for array in result] for result in results)
    return dict(zip(chosen, tensors, strict=True))


def grouped(name: str, *values: Any) -> Any:
    """Parameters of a convention. One worker runs optax for all of its rows, not each worker."""
    return pytest.param(*values, marks=[pytest.mark.xdist_group("optax")] * ("optax" in name))


@cache
def theirs(row: Row, dtype: torch.dtype) -> list[Tensor]:
    """The peer's weights after all steps."""
    if isinstance(row.make, str):
        return of_optax()[row, dtype]
    model = Model(dtype)
    groups = row.peer_groups(model, 0.0)
    return train(model, row.make(groups, lr=1.0, **row.options), row.peak)


def ours(row: Row, dtype: torch.dtype, **changes: Any) -> list[Tensor]:
    """fastlars' weights after all steps."""
    convention = conventions.by_name[row.convention](**(row.ours | changes))
    model = Model(dtype)
    groups = row.groups(model, convention.get("weight_decay", 0.0))
    optimizer = getattr(fastlars, convention.optimizer)(groups, lr=1.0, **convention)
    return train(model, optimizer, row.peak)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster on one; results do not depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("row", [grouped(row.convention, row) for row in ROWS], ids=str)
def test_equals_the_peer(row: Row, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", BACKEND[dtype])
    assert distance(ours(row, dtype), theirs(row, dtype)) <= tolerance(row, dtype)


def other(keyword: str, value: Any) -> Any:
    """A value that is near, or the alternative, so that a test that is too lax lets it pass."""
    if isinstance(value, bool):
        return not value
    alternatives = {
        "ratio": {"separate": "combined", "combined": "separate"},
        "buffer": {"step": "scaled", "scaled": "step", "gradient": "scaled"},
        "decay": {"update": "gradient", "decoupled": "gradient"},
        "bias_correction": {"rate": True},
        "phi": {(0.0, math.inf): (0.0, 10.0), (0.0, 10.0): (0.0, math.inf)},
        "ratio_bounds": {(0.0, math.inf): (0.002, 1.0), (0.01, 10.0): (0.01, 9.0)},
        "betas": {(0.9, 0.999): (0.9, 0.998)},
        "max_grad_norm": {None: 8.0, 1.0: None},
        "eps": {0.0: 1e-3, 1e-8: 0.0, 1e-6: 1e-8},
        "ratio_eps": {0.0: 1e-6, 1e-6: 0.0},
        "norm_eps": {1e-6: 0.0},
    }
    return alternatives[keyword][value] if keyword in alternatives else value + 0.001


def keywords() -> Iterator[tuple[str, str]]:
    """Every convention with every keyword that has a meaning in it."""
    of_storage = {"lr", "master_weights", "stochastic_rounding", "state_dtype", "capturable"}
    of_storage |= {"fused_unscale"}
    without_ratio = {"ratio", "trust_coefficient", "eps", "phi", "ratio_eps", "trust_clip"}
    without_ratio |= {"ratio_bounds"}
    for name, convention in conventions.by_name.items():
        optimizer = getattr(fastlars, convention.optimizer)([torch.zeros(1)], lr=1.0, **convention)
        meaningless = set(of_storage)
        if convention.get("buffer") != "step":
            meaningless |= {"momentum_correction"}  # is refused
        if convention.get("momentum_correction"):
            meaningless |= {"buffer"}  # any other is refused
        if convention.get("bias_correction") == "rate":
            meaningless |= {"nesterov"}  # is refused
        if not convention.get("adapt", True):
            meaningless |= without_ratio | {"always_adapt"}
            if convention.optimizer != "LARS":
                meaningless -= {"eps"}  # stands in the direction
        yield from ((name, key) for key in optimizer.defaults if key not in meaningless)


@pytest.mark.parametrize(("name", "keyword"), [grouped(n, n, key) for n, key in keywords()])
def test_another_value_shows(name: str, keyword: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: it notices when any one keyword of a convention is wrong."""
    monkeypatch.setenv("FASTLARS_BACKEND", "reference")
    for row in ROWS:
        if row.convention != name or keyword in row.ours:
            continue
        convention = conventions.by_name[name](**row.ours)
        optimizer = getattr(fastlars, convention.optimizer)([torch.zeros(1)], 1.0, **convention)
        changes = {keyword: other(keyword, optimizer.defaults[keyword])}
        if changes == {"nesterov": True} and convention.get("momentum") == 0.0:
            continue
        if keyword == "dampening" and convention.get("nesterov"):
            continue
        changed = distance(ours(row, torch.float64, **changes), theirs(row, torch.float64))
        if changed > 10 * tolerance(row, torch.float64):
            return
    pytest.fail(f"no row notices a wrong {keyword}")


@pytest.mark.parametrize("row", [r for r in ROWS if r.convention == "mlperf_mxnet_lars"], ids=str)
def test_corrected_momentum_has_the_rate_outside(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's correction makes Algorithm 1 what the ports to PyTorch compute, at any schedule."""
    monkeypatch.setenv("FASTLARS_BACKEND", "reference")
    port = ours(row, torch.float64, buffer="scaled", momentum_correction=False)
    assert distance(port, theirs(row, torch.float64)) <= TOLERANCE[torch.float64]


def test_every_convention_has_rows() -> None:
    assert {row.convention for row in ROWS} == set(conventions.by_name)


@pytest.mark.parametrize("name", conventions.by_name)
def test_convention_is_a_mapping(name: str) -> None:
    convention = getattr(conventions, name)
    assert convention.name == name
    assert name in conventions.__all__
    assert "lr" not in convention
    changed = convention(weight_decay=0.125)
    assert dict(changed) == {**convention, "weight_decay": 0.125}
    assert convention.get("weight_decay") != 0.125
    for text in (name, convention.equation, convention.source, *convention.differences):
        assert text in str(convention)


# Quirks of other libraries that the conventions do not copy, shown on their own code or formula.
# If one of these tests fails after an update of a peer, the peer has mended it: then its line in
# fastlars/conventions.py goes too.


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


def test_deepspeeds_earlier_rate_is_a_schedule() -> None:
    """Its releases that correct the rate, and with it the decay, are the uncorrected rule here."""
    options = {"weight_decay": 0.1}
    peer = formula(peers.deepspeed, DEEPSPEED_OPTIONS)
    moves = {}
    for earlier in (True, False):
        grads = ([0.5, -2.0], [1.0, 0.25], [-0.5, 0.125])
        p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        q = nn.Parameter(p.detach().clone())
        theirs = peer([p], lr=0.01, corrects_rate=earlier, **options)
        ours = fastlars.LAMB([q], **conventions.deepspeed_lamb(bias_correction=False, **options))
        for t, grad in enumerate(grads, 1):
            rate = 0.01 * math.sqrt(1.0 - 0.999**t) / (1.0 - 0.9**t)
            ours.param_groups[0]["lr"] = rate
            p.grad = torch.tensor(grad, dtype=torch.float64)
            q.grad = p.grad.clone()
            theirs.step()
            ours.step()
        moves[earlier] = float((p - q).detach().abs().max())
    assert moves[True] < 1e-14
    assert moves[False] > 1e-3


def test_deepspeed_bounds_no_one() -> None:
    """Where a norm is 0 its ratio is 1, also where 1 is above the ceiling, and here too."""
    peer = partial(formula(peers.deepspeed, DEEPSPEED_OPTIONS), lr=0.01, max_coeff=0.5)
    ours = partial(fastlars.LAMB, **conventions.deepspeed_lamb(lr=0.01, ratio_bounds=(0.01, 0.5)))
    for make in (peer, ours):
        # The first direction is the sign of the gradient.
        assert steps_of(make, [0.0, 0.0], [0.6, 0.8]) == [pytest.approx([0.01, 0.01])]
        assert steps_of(make, [3.0, 4.0], [0.6, 0.8]) == [pytest.approx([0.005, 0.005])]


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
