"""LANS: every back end against the paper's algorithm, written here once more in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlars
from backend_cases import BF16, F16, F32, NAMES
from optimizers import one_thread as one_thread
from subprocess_tests import python
from tolerances import assert_close, assert_same_bits

STEPS = 20
INF = math.inf


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every back end in turn, chosen as a user would."""
    name: str = request.param
    monkeypatch.setenv("FASTLARS_BACKEND", name)
    return name


def rate(step: int) -> float:
    """Warm-up, then a wave: another rate at every step."""
    return 0.02 * min(step + 1, 5) / 5 * (1.0 + 0.5 * math.cos(step))


# The algorithm. Names are the paper's, but for g, of which it has one more.


def algorithm(
    x: Tensor,
    grads: list[Tensor],
    *,
    lr: Callable[[int], float] = rate,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    normalize_grad: bool = True,
    norm_eps: float = 0.0,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    decay: str = "update",
    phi: tuple[float, float] = (0.0, INF),
    adapt: bool = True,
    always_adapt: bool = True,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """One block of Algorithm 2 of Zheng et al. 2020, with gluon-nlp's options, in float64.

    Returns the weights, both moments, and the last ratio of the momentum.
    """
    x, (beta1, beta2), lam = x.double(), betas, weight_decay
    m, v, q = torch.zeros_like(x), torch.zeros_like(x), 1.0
    beta3 = 1.0 - beta1 if grad_averaging else 1.0
    with_ratio = adapt and (always_adapt or weight_decay != 0.0)

    def scaled(direction: Tensor) -> tuple[float, Tensor]:
        length, norm = length_of(x), length_of(direction)
        ratio = 1.0
        if with_ratio and length > 0.0 and norm > 0.0:
            ratio = min(max(length, phi[0]), phi[1]) / norm
        return ratio, ratio * direction

    for t, grad in enumerate(grads, start=1):
        g = grad.double() * (-1.0 if maximize else 1.0)
        norm = length_of(g)
        if normalize_grad and norm > 0.0:
            g = g / (norm + norm_eps)
        if decay == "gradient":
            g = g + lam * x
        m = beta1 * m + beta3 * g
        v = beta2 * v + (1.0 - beta2) * g**2
        m_hat, v_hat = m, v
        if bias_correction:
            m_hat, v_hat = m / (1.0 - beta1**t), v / (1.0 - beta2**t)
        pull = lam * x if decay == "update" else torch.zeros_like(x)
        q, along_r = scaled(m_hat / (v_hat.sqrt() + eps) + pull)
        _, along_c = scaled(g / (v_hat.sqrt() + eps) + pull)
        x = x - lr(t - 1) * (beta1 * along_r + beta3 * along_c)
    return x, m, v, q


def length_of(x: Tensor) -> float:
    """The 2-norm, of squares that fit into float64."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return largest * math.sqrt(float((x / largest).square().sum())) if largest > 0.0 else 0.0


# Options have values that show: an eps of 1e-6 that is forgotten would hide in the rounding.
# Elements of a normalized gradient are about 0.01 to 0.3 here.
USUAL = {"weight_decay": 0.1, "betas": (0.8, 0.95)}
OPTIONS: dict[str, dict[str, Any]] = {
    "of the paper": {},
    "its betas": {"betas": (0.9, 0.999)},
    "without decay": {"weight_decay": 0.0},
    "norm_eps": {"norm_eps": 3.0},
    "gradients as they are": {"normalize_grad": False},
    "without averaging": {"grad_averaging": False},
    "decay in the gradient": {"decay": "gradient", "eps": 1e-2},
    "without correction": {"bias_correction": False},
    "phi at most 2": {"phi": (0.0, 2.0)},
    "phi at least 20": {"phi": (20.0, INF)},
    "without adaptation": {"adapt": False},
    "neither decay nor adaptation": {"weight_decay": 0.0, "always_adapt": False},
    "without first moment": {"betas": (0.0, 0.95)},
    "without second moment": {"betas": (0.8, 0.0), "eps": 0.1},
    "eps": {"eps": 0.5},
    "maximize": {"maximize": True},
    "all but the paper's": {
        "normalize_grad": False,
        "grad_averaging": False,
        "bias_correction": False,
        "decay": "gradient",
        "phi": (0.5, 3.0),
        "eps": 1e-2,
    },
}
# A chunk of each back end and a little more; a vector, a number, a layout of its own.
SHAPES = ((17, 1000), (9, 5), (33,), (), (4, 3, 2, 2))


def problem(scale: float = 1.0, shapes: Any = SHAPES) -> tuple[list[Tensor], list[list[Tensor]]]:
    """First weights, and gradients that have a mean, so that both directions differ."""
    generator = torch.Generator().manual_seed(2006)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    if len(shapes) > 4:
        weights[4] = weights[4].contiguous(memory_format=torch.channels_last)
    means = [0.3 * torch.randn(w.shape, generator=generator) for w in weights]
    grads = [
        [scale * (mean + 0.5 * torch.randn(w.shape, generator=generator)) for w, mean in pairs]
        for pairs in [list(zip(weights, means, strict=True))] * STEPS
    ]
    return weights, grads


def trained(params: list[Any], grads: list[list[Tensor]], **options: Any) -> fastlars.LANS:
    optimizer = fastlars.LANS(params, **options)
    for step, now in enumerate(grads):
        optimizer.param_groups[0]["lr"] = rate(step)
        for p, g in zip(params, now, strict=True):
            p.grad = torch.empty_like(p, requires_grad=False).copy_(g)
        optimizer.step()
    return optimizer


def assert_follows(
    optimizer: fastlars.LANS,
    params: list[Any],
    weights: list[Tensor],
    grads: list[list[Tensor]],
    **options: Any,
) -> None:
    """The weights, moments and ratios of a run are those of the algorithm."""
    ratios = optimizer.trust_ratios()
    for i, (p, w) in enumerate(zip(params, weights, strict=True)):
        x, m, v, q = algorithm(w, [now[i] for now in grads], **options)
        state = optimizer.state[p]
        # A step's rounding stays in the weight, and a moment's is forgotten: "300 steps" says it.
        assert_close(f"weight {i}", "300 steps", p.detach(), x, float(x.abs().max()))
        assert_close(f"m {i}", "300 steps", state["exp_avg"], m, float(m.abs().max()))
        assert_close(f"v {i}", "300 steps", state["exp_avg_sq"], v)
        # Of weights and moments, each with the error above.
        assert ratios[p] == pytest.approx(q, rel=1e-5)
        assert state["step"].item() == len(grads)


@pytest.mark.parametrize("name", OPTIONS)
def test_20_steps_follow_the_algorithm(backend: str, name: str) -> None:
    options = {**USUAL, **OPTIONS[name]}
    shapes = SHAPES[1:] if backend == "triton" and name != "of the paper" else SHAPES
    weights, grads = problem(shapes=shapes)
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = trained(params, grads, **options)
    assert_follows(optimizer, params, weights, grads, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_20_steps_in_float64(name: str) -> None:
    options = {**USUAL, **OPTIONS[name]}
    weights, grads = problem(shapes=SHAPES[1:])
    params = [nn.Parameter(w.double()) for w in weights]
    optimizer = trained(params, grads, **options)
    for i, (p, w) in enumerate(zip(params, weights, strict=True)):
        x, m, v, q = algorithm(w, [now[i] for now in grads], **options)
        # Operations in another order: roundings of 1e-16 in 20 steps.
        for actual, expected in zip(
            (p.detach(), *(optimizer.state[p][s] for s in ("exp_avg", "exp_avg_sq"))),
            (x, m, v),
            strict=True,
        ):
            error = (actual - expected).abs().max()
            assert error <= 1e-13 * expected.abs().max()
        assert optimizer.trust_ratios()[p] == pytest.approx(q, rel=1e-7)  # ratios are float32


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_shows(name: str) -> None:
    """The tests above can fail: with one option left out they do, far above their tolerance."""
    if name == "of the paper":
        return
    weights, grads = problem(shapes=SHAPES[1:2])
    options, now = {**USUAL, **OPTIONS[name]}, [g[0] for g in grads]
    right = algorithm(weights[0], now, **options)[0]
    for left_out in OPTIONS[name]:
        others = {k: v for k, v in options.items() if k != left_out or k in USUAL}
        if left_out in USUAL:
            others[left_out] = USUAL[left_out]
        wrong = algorithm(weights[0], now, **others)[0]
        assert (right - wrong).abs().max() > 1e-4 * right.abs().max(), left_out


# Single steps, by hand.


def one_step(weight: list[float], *grads: list[float], **options: Any) -> tuple[Any, list[float]]:
    p = nn.Parameter(torch.tensor(weight))
    optimizer = fastlars.LANS([p], **{"lr": 0.1, "eps": 0.0, **options})
    for grad in grads:
        p.grad = torch.tensor(grad)
        optimizer.step()
    return optimizer, p.tolist()


def test_first_step_by_hand(backend: str) -> None:
    # Both directions are the sign of the gradient, and the decay: (1 + 1.5, -1 + 2).
    optimizer, moved = one_step([3.0, 4.0], [0.3, -0.4], weight_decay=0.5)
    q = 5.0 / math.hypot(2.5, 1.0)
    assert moved == pytest.approx([3.0 - 0.1 * q * 2.5, 4.0 - 0.1 * q], rel=1e-6)
    assert list(optimizer.trust_ratios().values()) == pytest.approx([q], rel=1e-6)
    (state,) = optimizer.state.values()
    assert state["exp_avg"].tolist() == pytest.approx([0.06, -0.08], rel=1e-6)
    assert state["exp_avg_sq"].tolist() == pytest.approx([0.00036, 0.00064], rel=1e-6)


def test_trust_ratio_is_that_of_the_momentum(backend: str) -> None:
    """At the second step r and c differ: here v is (0.5, 0.5), and c has no second element."""
    beta1, beta2 = 0.5, 0.0
    options = {"betas": (beta1, beta2), "eps": 0.25}
    optimizer, moved = one_step([3.0, 4.0], [0.0, 2.0], [0.5, 0.0], **options)
    # Normalized gradients: (0, 1), (1, 0). First step: r = c = (0, 1 / 1.25).
    first = [3.0, 4.0 - 0.1 * 5.0]
    length = math.hypot(*first)
    # m = (0.5, 0.25) corrected by 1 - 0.5^2, v = (1, 0).
    r = (0.5 / 0.75 / 1.25, 0.25 / 0.75 / 0.25)
    q = length / math.hypot(*r)
    c = (1.0 / 1.25, 0.0)
    expected = [
        w - 0.1 * (0.5 * q * a + 0.5 * length / c[0] * b)
        for w, a, b in zip(first, r, c, strict=True)
    ]
    assert moved == pytest.approx(expected, rel=1e-6)
    assert list(optimizer.trust_ratios().values()) == pytest.approx([q], rel=1e-6)


def test_zero_gradients_leave_the_decay(backend: str) -> None:
    optimizer, moved = one_step([3.0, 4.0], [0.0, 0.0], weight_decay=0.5, eps=1e-6)
    assert moved == pytest.approx([2.7, 3.6], rel=1e-6)  # both directions are 0.5 w: w - lr w
    assert list(optimizer.trust_ratios().values()) == pytest.approx([2.0])
    _, moved = one_step([3.0, 4.0], [0.0, 0.0], eps=1e-6)
    assert moved == [3.0, 4.0]


def test_zero_weights_move_by_the_rate(backend: str) -> None:
    optimizer, moved = one_step([0.0, 0.0], [3.0, -4.0], weight_decay=0.5)
    assert moved == pytest.approx([-0.1, 0.1], rel=1e-6)
    assert list(optimizer.trust_ratios().values()) == [1.0]


def test_zeros_among_steps(backend: str) -> None:
    """Gradients that vanish at some steps, and weights that begin at zero."""
    weights, grads = problem(shapes=((9, 5), (33,)))
    weights[1].zero_()
    for step in (0, 3, 4):
        grads[step][0].zero_()
    grads[7][1].zero_()
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = trained(params, grads, **USUAL)
    assert_follows(optimizer, params, weights, grads, **USUAL)


# The scale of the gradient.


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_norms_beyond_the_squares_of_float32(backend: str, scale: float) -> None:
    weights, grads = problem(scale, shapes=SHAPES[0:2])
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = trained(params, grads, **USUAL)
    assert_follows(optimizer, params, weights, grads, **USUAL)


def test_a_clip_changes_nothing(backend: str) -> None:
    weights, grads = problem(shapes=SHAPES[1:])
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = trained(params, grads, max_grad_norm=0.01, **USUAL)
    assert optimizer.grad_norm is not None
    assert float(optimizer.grad_norm) > 1.0, "the clip did not bind"
    assert_follows(optimizer, params, weights, grads, **USUAL)


@pytest.mark.parametrize("limit", [1.0, INF])
def test_a_clip_leaves_a_nan_in_its_tensor(backend: str, limit: float) -> None:
    bad, good = (nn.Parameter(torch.ones(5)) for _ in range(2))
    bad.grad, good.grad = torch.full((5,), math.nan), torch.ones(5)
    fastlars.LANS([bad, good], lr=0.1, max_grad_norm=limit).step()
    assert bad.isnan().all()
    assert good.isfinite().all()


def test_a_clip_comes_before_norm_eps(backend: str) -> None:
    options = {**USUAL, "norm_eps": 0.5}
    weights, grads = problem(shapes=((9, 5),))
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = trained(params, grads, max_grad_norm=1.0, **options)
    clipped = [[g / max(1.0, length_of(g.double())) for g in now] for now in grads]
    assert_follows(optimizer, params, weights, clipped, **options)


# Types.


@pytest.mark.parametrize("name", ["of the paper", "decay in the gradient", "without correction"])
def test_directions_take_moments_as_stored(backend: str, name: str) -> None:
    """With bfloat16 states; every step from what the step before has stored."""
    options = {**USUAL, **OPTIONS[name]}
    weights, grads = problem(shapes=((40, 30), (7,)))
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = fastlars.LANS(params, state_dtype=BF16, **options)
    beta1, beta2 = options["betas"]
    eps, lam = options.get("eps", 1e-6), options["weight_decay"]
    for t in range(1, 6):
        optimizer.param_groups[0]["lr"] = rate(t)
        before = [
            [p.detach().double()]
            + [
                optimizer.state[p][s].double() if optimizer.state[p] else torch.zeros_like(p)
                for s in ("exp_avg", "exp_avg_sq")
            ]
            for p in params
        ]
        for p, g in zip(params, grads[t], strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i, (p, (x, m, v)) in enumerate(zip(params, before, strict=True)):
            g = grads[t][i].double()
            g = g / g.norm()
            inside = options.get("decay") == "gradient"
            g, pull = (g + lam * x, 0.0) if inside else (g, lam * x)
            stored = [optimizer.state[p][s] for s in ("exp_avg", "exp_avg_sq")]
            expected = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            assert_close(f"m {i}", "state", stored[0], expected[0], float(g.abs().max()))
            assert_close(f"v {i}", "state", stored[1], expected[1])
            corrected = options.get("bias_correction", True)
            k1, k2 = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
            d = (stored[1].double() / k2).sqrt() + eps
            r, c = stored[0].double() / k1 / d + pull, g / d + pull
            along = beta1 / r.norm() * r + (1 - beta1) / c.norm() * c
            new = x - rate(t) * x.norm() * along
            largest = float(torch.maximum(x.abs(), (x - new).abs()).max())
            assert_close(f"weight {i}", "weight", p.detach(), new, largest)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_masters_are_the_weights(backend: str, dtype: torch.dtype) -> None:
    weights, grads = problem(shapes=SHAPES[1:])
    weights = [w.to(dtype).float() for w in weights]
    grads = [[g.to(dtype).float() for g in now] for now in grads]
    params = [nn.Parameter(w.to(dtype)) for w in weights]
    optimizer = trained(params, grads, master_weights=True, **USUAL)
    for i, (p, w) in enumerate(zip(params, weights, strict=True)):
        master = optimizer.state[p]["master"]
        x, *_ = algorithm(w, [now[i] for now in grads], **USUAL)
        assert master.dtype == F32
        assert_close(f"master {i}", "300 steps", master, x, float(x.abs().max()))
        assert_same_bits(f"weight {i}", p.detach(), master.to(dtype))


# What a step leaves alone.


@pytest.mark.parametrize(
    "options", [{}, {"normalize_grad": False}, {"max_grad_norm": 0.1}], ids=str
)
def test_gradients_are_read_and_never_written(backend: str, options: dict[str, Any]) -> None:
    weights, grads = problem()
    params = [nn.Parameter(w) for w in weights]
    optimizer = fastlars.LANS(params, **USUAL, **options)
    for p, g in zip(params, grads[0], strict=True):
        p.grad = torch.empty_like(p, requires_grad=False).copy_(g)
    held = [p.grad for p in params]
    for _ in range(2):
        optimizer.step()
    for p, g, before in zip(params, grads[0], held, strict=True):
        assert p.grad is before
        assert_same_bits("gradient", p.grad, g)


# Prints how far the memory of a process rises in a step. In a process of its own: memory that other
# tests have freed would be used again, and the rise not be seen.
GROWTH = """
import re, sys
from pathlib import Path
import torch, fastlars

def read(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

p = torch.nn.Parameter(torch.ones(4_000_000))
p.grad = torch.ones_like(p)
optimizer = fastlars.LANS([p], lr=0.01, weight_decay=0.1)
optimizer.step()  # makes the states
try:
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
except OSError:
    sys.exit("no high-water mark")
before = read("VmRSS")
optimizer.step()
print(read("VmHWM") - before, *sorted(optimizer.state[p]))
"""


@pytest.mark.skipif("cpu" not in NAMES, reason="the emulated GPUs have memory of their own")
def test_a_step_makes_no_tensor_of_a_parameters_size() -> None:
    """LANS elsewhere keeps one: here r and c are computed again instead. The reference shows that
    such a tensor would be seen."""
    growth = {}
    for name in ("cpu", "reference"):
        done = python("-c", GROWTH, FASTLARS_BACKEND=name)
        if "no high-water mark" in done.stdout:
            pytest.skip("this kernel does not reset the high-water mark of a process")
        assert done.returncode == 0, done.stdout
        found, *states = done.stdout.split()
        growth[name] = int(found)
        assert states == ["exp_avg", "exp_avg_sq", "step"]
    size = 4 * 4_000_000
    assert growth["reference"] > size
    assert growth["cpu"] < size / 4
