"""RMSprop warm-up: its transition, and every back end across it against the equations."""

from __future__ import annotations

import ctypes
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlars
from backend_cases import F64, NAMES
from core_library import core as core
from fastlars.rules import RmspropWarmupRule
from optimizers import one_thread as one_thread
from tolerances import assert_close, assert_same_bits

EPOCH = 40.0  # steps; of ImageNet at a batch of 32,768


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every back end in turn, chosen as a user would."""
    name: str = request.param
    monkeypatch.setenv("FASTLARS_BACKEND", name)
    return name


def rule(center: float, period: float, transition: Any = "smooth") -> RmspropWarmupRule:
    return RmspropWarmupRule(center_steps=center, period_steps=period, transition=transition)


# The share of SGD.

EPOCHS = {0: 0.0092, 2: 0.0204, 5: 0.0677, 8: 0.2247, 10: 0.5, 11: 0.7, 12: 0.9, 12.5: 1.0, 80: 1.0}


@pytest.mark.parametrize(("epoch", "share"), EPOCHS.items())
def test_share_of_sgd_by_epoch(epoch: float, share: float) -> None:
    found = rule(10 * EPOCH, 5 * EPOCH).sgd_share(epoch * EPOCH)
    assert found == pytest.approx(share, abs=5e-5)


def test_share_of_sgd_is_smooth_at_the_center() -> None:
    made, h = rule(400.0, 200.0), 1e-3
    below, at, above = (made.sgd_share(400.0 + x) for x in (-h, 0.0, h))
    assert at == 0.5
    assert (at - below) / h == pytest.approx(1.0 / 200.0, rel=1e-4)
    assert (above - at) / h == pytest.approx(1.0 / 200.0, rel=1e-4)


def test_printed_transition_is_twice_as_steep_and_ends_at_1() -> None:
    made, smooth = rule(400.0, 200.0, "printed"), rule(400.0, 200.0)
    shares = [made.sgd_share(step) for step in range(600)]
    assert shares[:401] == [smooth.sgd_share(step) for step in range(401)]
    assert shares[425] == pytest.approx(0.5 + 2.0 * 25.0 / 200.0, rel=1e-15)
    # As printed it would be 1.5 just before 12.5 epochs, and RMSprop's share -0.5.
    assert shares[450:] == [1.0] * 150
    assert all(a <= b for a, b in pairwise(shares))


@pytest.mark.parametrize(
    ("center", "period"),
    [
        (400.0, 200.0),
        (401.5, 333.3),
        (0.0, 10.0),
        (0.3, 1.0),
        (7.999999999999, 4.0),
        (50.0, 1e-3),  # exp(2 / period) would leave float64, exp(-2 center / period) as well
        (1e7, 10.0),
        (3.0, 1e7),
    ],
)
@pytest.mark.parametrize("transition", RmspropWarmupRule.CHOICES["transition"])
def test_kernels_have_the_same_share_of_sgd(
    core: ctypes.CDLL, center: float, period: float, transition: str
) -> None:
    made = rule(center, period, transition)
    names = ("center_steps", "rise", "below", "shrink")
    numbers = [ctypes.c_double(made.constants[name]) for name in names]
    near = [max(0.0, math.floor(center) + k) for k in range(-3, 4)]
    for step in [0.0, 1.0, 57.0, 399.0, *near, center + period, 2.0**24]:
        found = core.share(*numbers, ctypes.c_double(math.floor(step)))
        # The power's rounding errors: one of 2^-53 for every step to the center, at most.
        assert found == pytest.approx(made.sgd_share(math.floor(step)), rel=1e-12, abs=1e-300)
        assert 0.0 <= found <= 1.0


# Steps.


def trained(
    params: list[Tensor], steps: range, grads: list[list[Tensor]], **options: Any
) -> fastlars.RMSpropWarmup:
    """Take steps at a rate that changes, with the given gradients."""
    optimizer = fastlars.RMSpropWarmup(params, **options)
    for step in steps:
        optimizer.param_groups[0]["lr"] = rate(step)
        for p, g in zip(params, grads[step], strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return optimizer


def rate(step: int) -> float:
    return 0.05 * (1.0 + 0.5 * math.cos(step / 20.0))


def equations(
    w: Tensor, grads: list[Tensor], *, center: float, period: float, printed: bool, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Akiba et al.'s update as it is printed, step by step, in float64; decay enters the
    gradient."""
    mu1, mu2, eps, eta_rmsprop = 0.9, 0.99, 1e-8, 3e-4
    w, m, delta = w.double(), torch.zeros_like(w, dtype=F64), torch.zeros_like(w, dtype=F64)
    for t, grad in enumerate(grads):
        eta = rate(t)
        if t < center:
            alpha_sgd = 0.5 * math.exp(2.0 * (t - center) / period)
        elif t < center + (period / 4.0 if printed else period / 2.0):
            alpha_sgd = 0.5 + (2.0 if printed else 1.0) * (t - center) / period
        else:
            alpha_sgd = 1.0
        alpha_rmsprop = (1.0 - alpha_sgd) * eta_rmsprop / eta
        g = grad.double() + decay * w
        if alpha_sgd < 1.0:
            m = mu2 * m + (1.0 - mu2) * g * g
        delta = mu1 * delta - (alpha_sgd + alpha_rmsprop / (m.sqrt() + eps)) * g
        w = w + eta * delta
    return w, -delta, m


@pytest.mark.parametrize("transition", RmspropWarmupRule.CHOICES["transition"])
def test_300_steps_across_the_transition(backend: str, transition: str) -> None:
    if backend == "triton" and transition == "printed":
        pytest.skip("interpreted it takes 15 seconds, and the printed form is other numbers alone")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((9, 5), (7,))]
    grads = [
        [0.1 * torch.randn(w.shape, generator=generator) + 0.02 for w in weights]
        for _ in range(300)
    ]
    params = [nn.Parameter(w.clone()) for w in weights]
    options = {"center_steps": 120.0, "period_steps": 90.5, "weight_decay": 0.01}
    optimizer = trained(params, range(300), grads, transition=transition, **options)
    for i, (p, w) in enumerate(zip(params, weights, strict=True)):
        new, buffer, square = equations(
            w,
            [g[i] for g in grads],
            center=120.0,
            period=90.5,
            printed=transition == "printed",
            decay=0.01,
        )
        state = optimizer.state[p]
        largest = float(new.abs().max())
        assert_close(f"weight {i}", "300 steps", p.detach(), new, largest)
        scale = float(buffer.abs().max())
        assert_close(f"buffer {i}", "300 steps", state["momentum_buffer"], buffer, scale)
        assert_close(f"squares {i}", "300 steps", state["square_avg"], square)
        assert state["step"].item() == 300.0


def test_first_step_by_hand(backend: str) -> None:
    # m = 0.01 g^2: g / sqrt(m) is 10 times the sign of g. At 32,768 and rate 6.4 the paper's
    # constants give a share of 4.645e-5 for RMSprop, in four digits.
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    p.grad = torch.tensor([0.004, -0.5])
    optimizer = fastlars.RMSpropWarmup([p], lr=6.4, center_steps=400, period_steps=200)
    optimizer.step()
    share = 0.5 * math.exp(-4.0)
    buffer = [share * 0.004 + 4.645e-4, share * -0.5 - 4.645e-4]
    assert optimizer.state[p]["momentum_buffer"].tolist() == pytest.approx(buffer, rel=2e-4)
    assert optimizer.state[p]["square_avg"].tolist() == pytest.approx([1.6e-7, 2.5e-3], rel=1e-5)
    expected = [1.0 - 6.4 * buffer[0], -2.0 - 6.4 * buffer[1]]
    assert p.tolist() == pytest.approx(expected, rel=1e-5)
    assert optimizer.trust_ratios() == {p: 1.0}


def test_a_rate_of_0_has_no_rmsprop_term(backend: str) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    p.grad = torch.tensor([0.5, 0.0])
    optimizer = fastlars.RMSpropWarmup([p], lr=0.0, center_steps=0, period_steps=10)
    optimizer.step()
    assert p.tolist() == [1.0, -2.0]
    assert optimizer.state[p]["momentum_buffer"].tolist() == [0.25, 0.0]
    assert optimizer.state[p]["square_avg"].tolist() == pytest.approx([0.0025, 0.0])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert p[0].item() < 1.0
    assert p[1].item() == -2.0


# Once warmed up.

WARM = {"center_steps": 1.0, "period_steps": 2.0}  # from the third step on


def warmed_up() -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) for shape in ((33,), (4, 3))]
    grads = [[torch.randn(w.shape, generator=generator) for w in weights] for _ in range(9)]
    return [nn.Parameter(w) for w in weights], grads


def test_warmed_up_step_is_sgd_with_momentum(backend: str) -> None:
    params, grads = warmed_up()
    optimizer = trained(params, range(2), grads, weight_decay=0.01, **WARM)
    others, torchs = ([nn.Parameter(p.detach().clone()) for p in params] for _ in range(2))
    sgd = fastlars.LARS(others, lr=0.1, weight_decay=0.01, adapt=False, buffer="scaled")
    of_torch = torch.optim.SGD(torchs, lr=0.1, momentum=0.9, weight_decay=0.01)
    for p, q, r in zip(params, others, torchs, strict=True):
        for each, other in ((q, sgd), (r, of_torch)):
            other.state[each]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    for step in range(2, 9):
        for each, group in ((optimizer, params), (sgd, others), (of_torch, torchs)):
            each.param_groups[0]["lr"] = rate(step)
            for p, g in zip(group, grads[step], strict=True):
                p.grad = g
            each.step()
    for p, q, r in zip(params, others, torchs, strict=True):
        assert_same_bits("weight", p.detach(), q.detach())
        buffers = [
            o.state[x]["momentum_buffer"] for o, x in ((optimizer, p), (sgd, q), (of_torch, r))
        ]
        assert_same_bits("buffer", buffers[0], buffers[1])
        # torch may fuse multiplications and additions.
        assert_close("weight", "weight", p.detach(), r.detach().double(), 5.0)
        assert_close("buffer", "state", buffers[0], buffers[2].double(), 5.0)


def test_squares_are_neither_read_nor_written_once_warmed_up(backend: str) -> None:
    params, grads = warmed_up()
    optimizer = trained(params, range(2), grads, **WARM)
    for p, g in zip(params, grads[2], strict=True):
        optimizer.state[p]["square_avg"].fill_(math.nan)
        optimizer.state[p]["square_avg"][0] = 7.0
        p.grad = g
    optimizer.step()
    for p in params:
        assert p.isfinite().all()
        square = optimizer.state[p]["square_avg"]
        assert square[0].eq(7.0).all()
        assert square[1:].isnan().all()


def test_each_parameter_has_its_own_transition(backend: str) -> None:
    """One that gets its first gradient late begins then, beside others that are warmed up."""
    params, grads = warmed_up()
    optimizer = fastlars.RMSpropWarmup(params, lr=0.1, **WARM)
    for step in range(4):
        params[0].grad = grads[step][0]
        params[1].grad = grads[step][1] if step == 3 else None
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [4.0, 1.0]
    alone = nn.Parameter(warmed_up()[0][1].detach())
    alone.grad = grads[3][1]
    fastlars.RMSpropWarmup([alone], lr=0.1, **WARM).step()
    assert_same_bits("late", params[1].detach(), alone.detach())
