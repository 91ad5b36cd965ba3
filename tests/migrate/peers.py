"""Other implementations of LARS, LAMB and LANS on one training problem, for test_conventions.py.

Peers that can be installed are run as they are. Those that cannot (apex, gluon-nlp, torchlars,
TensorFlow's and MXNet's MLPerf code, VICReg's script), or that would bring a trainer along
(lightly, solo-learn, SimCLR's port), stand here as their published formula, step by step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20
Groups = list[dict[str, Any]]
# Shape and scale of the first weights. The names say what a list of names to skip goes by. Norms
# lie on both sides of 10, sizes beside multiples of a vector; a bias starts at zero.
PARAMETERS: dict[str, tuple[tuple[int, ...], float]] = {
    "conv": ((4, 3, 3, 3), 3.0),
    "hidden": ((33, 17), 0.5),
    "head": ((6, 5), 1.0),
    "head_bias": ((33,), 0.0),
    "bn_gain": ((7,), 1.0),
    "temperature": ((), 1.0),
}


@cache
def _values() -> tuple[list[Tensor], list[list[Tensor]]]:
    """First weights, and gradients that grow twentyfold: clips bind at some steps, not at all."""
    generator = torch.Generator().manual_seed(1708)

    def normal(scale: float) -> list[Tensor]:
        shapes = [shape for shape, _ in PARAMETERS.values()]
        return [
            scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        ]

    weights = [w * s for w, (_, s) in zip(normal(1.0), PARAMETERS.values(), strict=True)]
    return weights, [normal(0.05 * (t + 1)) for t in range(STEPS)]


def learning_rate(peak: float, step: int) -> float:
    """Warm-up, then polynomial decay: another one every step."""
    return peak * (step + 1) / 5 if step < 5 else peak * (1.0 - (step - 4) / STEPS) ** 2


class Model(nn.Module):
    """The parameters, and nothing to compute with them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, value in zip(PARAMETERS, _values()[0], strict=True):
            self.register_parameter(name, nn.Parameter(value.to(dtype, copy=True)))


def train(model: nn.Module, optimizer: Any, peak: float) -> list[Tensor]:
    """The weights after all steps."""
    for t, grads in enumerate(_values()[1]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, t)
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of any tensor, relative to its largest element."""
    assert all(bool(e.isfinite().all()) for e in expected)
    return max(
        float((a.double() - e.double()).abs().max() / e.double().abs().max())
        for a, e in zip(actual, expected, strict=True)
    )


class Formula(torch.optim.Optimizer):
    """Runs ``update(p, g, state, group)``, a peer's published rule for one tensor."""

    def __init__(self, params: Any, lr: float, update: Callable[..., None], **defaults: Any):
        self.update = update
        super().__init__(params, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)


def mlperf(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """MLPerf's TensorFlow reference: lr and ratio inside the momentum; skipped: neither."""
    lr, wd = group["lr"], group["weight_decay"]
    trust = 1.0
    if not group["skip"]:
        w_norm, g_norm = p.norm(), g.norm()
        if w_norm > 0 and g_norm > 0:
            trust = group["eeta"] * w_norm / (g_norm + wd * w_norm + group["epsilon"])
        g = g + wd * p
    scaled = lr * trust * g
    mu = group["momentum"]
    if group["correct"]:  # NVIDIA's MXNet code: momentum * (cur_lr / last_lr)
        mu = mu * lr / state.get("last_lr", lr)
        state["last_lr"] = lr
    state["mom"] = mu * state.get("mom", torch.zeros_like(p)) - scaled
    p.add_(group["momentum"] * state["mom"] - scaled if group["nesterov"] else state["mom"])


def vicreg(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """VICReg and Barlow Twins: the ratio over the decayed gradient; vectors: neither."""
    if p.ndim != 1:
        g = g + group["weight_decay"] * p
        p_norm, g_norm = p.norm(), g.norm()
        if p_norm > 0 and g_norm > 0:
            g = g * (group["eta"] * p_norm / g_norm)
    state["mu"] = group["momentum"] * state.get("mu", torch.zeros_like(p)) + g
    p.sub_(group["lr"] * state["mu"])


def nus(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """NUS: momentum of plain gradients; learning rate and ratio outside."""
    wd, trust = group["weight_decay"], 1.0
    w_norm, g_norm = p.norm(), g.norm()
    if group["lars"] and w_norm > 0 and g_norm > 0:
        trust = group["eeta"] * w_norm / (g_norm + wd * w_norm)
    state["buf"] = group["momentum"] * state.get("buf", torch.zeros_like(p)) + g + wd * p
    p.sub_(group["lr"] * trust * state["buf"])


class AroundSgd:
    """A wrapper's formula around torch's own SGD: it rewrites p.grad and hides the weight decay."""

    def __init__(self, params: Any, lr: float, gradient: Callable[..., Tensor], **options: Any):
        names = ("trust_coefficient", "eps", "clip")
        self.options = {name: options.pop(name) for name in names if name in options}
        self.gradient = gradient
        self.inner = torch.optim.SGD(params, lr, **options)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = self.gradient(p, p.grad, group, **self.options)
            group["weight_decay"] = 0.0
        self.inner.step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


def larc(
    p: Tensor,
    g: Tensor,
    group: dict[str, Any],
    trust_coefficient: float = 0.02,
    eps: float = 1e-8,
    clip: bool = True,
) -> Tensor:
    """apex's LARC: where a norm is zero it neither decays nor clips."""
    p_norm, g_norm, wd = p.norm(), g.norm(), group["weight_decay"]
    if p_norm == 0 or g_norm == 0:
        return g
    rate = trust_coefficient * p_norm / (g_norm + p_norm * wd + eps)
    if clip:
        rate = min(rate / group["lr"], 1.0)
    return rate * (g + wd * p)


def torchlars(
    p: Tensor,
    g: Tensor,
    group: dict[str, Any],
    trust_coefficient: float = 1e-3,
    eps: float = 1e-8,
) -> Tensor:
    """torchlars: the ratio is 1 where a norm is zero; the decay stays."""
    p_norm, g_norm, wd = p.norm(), g.norm(), group["weight_decay"]
    rate = 1.0
    if p_norm > 0 and g_norm > 0:
        rate = trust_coefficient * p_norm / (g_norm + p_norm * wd + eps)
    return rate * (g + wd * p)


def _sgd(p: Tensor, d: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """torch's SGD along d, as copies of its code have it."""
    mu = group["momentum"]
    if mu != 0:
        kept = state.get("momentum_buffer")
        b = d.clone() if kept is None else mu * kept + (1.0 - group["dampening"]) * d
        state["momentum_buffer"] = b
        d = d + mu * b if group["nesterov"] else b
    p.sub_(group["lr"] * d)


def lightly(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """lightly, lightning-bolts and torch_optimizer: without a weight decay, plain SGD."""
    if group["weight_decay"] != 0:
        g = larc(p, g, group, group["trust_coefficient"], group["eps"], clip=False)
    _sgd(p, g, state, group)


def solo(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """solo-learn: the same for every weight decay, with LARC's clip on demand."""
    if p.ndim != 1 or not group["exclude_bias_n_norm"]:
        g = larc(p, g, group, group["eta"], group["eps"], group["clip_lars_lr"])
    _sgd(p, g, state, group)


def simclr(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """The port of SimCLR's LARS: the rate inside; skipped, by name: neither ratio nor decay.

    Where its release 1.0.2 has `>= 0`, which always holds, its copies have `> 0`, as Google does.
    """
    trust = 1.0
    if not group["skip"]:
        g = g + group["weight_decay"] * p
        w_norm, g_norm = p.norm(), g.norm()
        if group["released"] or (w_norm > 0 and g_norm > 0):
            trust = group["eeta"] * w_norm / g_norm
    scaled, mu = group["lr"] * trust * g, group["momentum"]
    b = state["momentum_buffer"] = mu * state.get("momentum_buffer", torch.zeros_like(p)) + scaled
    p.sub_(mu * b + scaled if group["use_nesterov"] else b)


def cybertronai(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """cybertronai's LAMB: no bias correction, and the norm of the weights is at most 10."""
    beta1, beta2 = group["betas"]
    state["step"] = state.get("step", 0) + 1
    m = beta1 * state.get("exp_avg", torch.zeros_like(p)) + (1.0 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", torch.zeros_like(p)) + (1.0 - beta2) * g * g
    u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
    w_norm, u_norm = p.norm().clamp(0, group["clamp_value"]), u.norm()
    # torch_optimizer's guard; pytorch_lamb has none, and never moves weights that are all zero.
    ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else torch.ones_like(u_norm)
    state |= {"exp_avg": m, "exp_avg_sq": v}
    state |= {"weight_norm": w_norm, "adam_norm": u_norm, "trust_ratio": ratio}
    p.sub_(group["lr"] * (1.0 if group["adam"] else ratio) * u)


def deepspeed(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """DeepSpeed's FusedLamb: a ratio has a floor and a ceiling, the 1 where a norm is 0 has none.

    ``corrects_rate``: as in earlier releases, which correct the rate and not the moments.
    """
    beta1, beta2 = group["betas"]
    t = state["step"] = state.get("step", 0) + 1
    m = beta1 * state.get("exp_avg", torch.zeros_like(p)) + (1.0 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", torch.zeros_like(p)) + (1.0 - beta2) * g * g
    state |= {"exp_avg": m, "exp_avg_sq": v}
    rate = group["lr"]
    if group["bias_correction"] and group["corrects_rate"]:
        rate *= math.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
    elif group["bias_correction"]:
        m, v = m / (1.0 - beta1**t), v / (1.0 - beta2**t)
    u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
    w_norm, u_norm, ratio = float(p.norm()), float(u.norm()), 1.0
    if w_norm != 0 and u_norm != 0:
        ratio = max(min(w_norm / u_norm, group["max_coeff"]), group["min_coeff"])
    p.sub_(rate * ratio * u)


class ApexLamb(Formula):
    """apex's FusedLAMB: two stages, after a global norm over all groups."""

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        apex = {
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "weight_decay": 0.01,
            "bias_correction": True,
            "adam_w_mode": True,
            "grad_averaging": True,
            "max_grad_norm": 1.0,
            "use_nvlamb": False,
        }
        super().__init__(params, lr, self.update_tensor, **(apex | options))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
        limit = self.defaults["max_grad_norm"]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["clip"] = (norm / limit if limit else math.inf) if norm > limit else 1.0
        super().step()

    @staticmethod
    def update_tensor(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        wd, t = group["weight_decay"], group["step"]
        g = g / group["clip"]
        if not group["adam_w_mode"]:
            g = g + wd * p
        beta3 = 1.0 - beta1 if group["grad_averaging"] else 1.0
        m = state["m"] = beta1 * state.get("m", torch.zeros_like(p)) + beta3 * g
        v = state["v"] = beta2 * state.get("v", torch.zeros_like(p)) + (1.0 - beta2) * g * g
        if group["bias_correction"]:
            m, v = m / (1.0 - beta1**t), v / (1.0 - beta2**t)
        u = m / (v.sqrt() + group["eps"])
        if group["adam_w_mode"]:
            u = u + wd * p
        trust = 1.0
        if (wd != 0 or group["use_nvlamb"]) and p.norm() != 0 and u.norm() != 0:
            trust = float(p.norm() / u.norm())
        p.sub_(group["lr"] * trust * u)


class GluonnlpLans(Formula):
    """gluon-nlp's FusedLANS: one eps in two places, and one count of steps for each group."""

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        gluonnlp = {
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "weight_decay": 0.01,
            "bias_correction": True,
            "adam_w_mode": True,
            "grad_averaging": True,
            "normalize_grad": True,
        }
        super().__init__(params, lr, self.update_tensor, **(gluonnlp | options))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        super().step()

    @staticmethod
    def update_tensor(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        beta3 = 1.0 - beta1 if group["grad_averaging"] else 1.0
        wd, eps, t = group["weight_decay"], group["eps"], group["step"]
        if group["normalize_grad"] and g.norm() != 0:
            g = g / (g.norm() + eps)
        decay = wd * p
        if not group["adam_w_mode"]:
            g, decay = g + decay, torch.zeros_like(p)
        for name in ("exp_avg", "exp_avg_sq", "scaled_grad"):
            state.setdefault(name, torch.zeros_like(p))
        m = state["exp_avg"].mul_(beta1).add_(beta3 * g)
        v = state["exp_avg_sq"].mul_(beta2).add_((1.0 - beta2) * g * g)
        if group["bias_correction"]:
            m, v = m / (1.0 - beta1**t), v / (1.0 - beta2**t)
        root = v.sqrt() + eps
        length, moved = p.norm(), torch.zeros_like(p)
        for share, direction in ((beta1, m / root + decay), (beta3, g / root + decay)):
            norm = direction.norm()
            ratio = float(length / norm) if length != 0 and norm != 0 else 1.0
            moved += share * ratio * direction
        state["scaled_grad"].copy_(g / root + decay)
        p.sub_(group["lr"] * moved)


def optax_runs(rows: Sequence[tuple[str, dict[str, Any], float, torch.dtype]]) -> list[list[Any]]:
    """Weights after all steps, as NumPy arrays, of optax's own ``lars`` or ``lamb``.

    Called in a process of its own: JAX's 64-bit switch is global, and its threads make a later fork
    of the test process unsafe. A mask of True stands for: matrices only.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import optax

    # Eager, and compiled quickly: every operation is compiled once, and there are few steps.
    jax.config.update("jax_disable_most_optimizations", True)
    results = []
    for name, options, peak, dtype in rows:
        jax.config.update("jax_enable_x64", dtype == torch.float64)
        weights, grads = _values()
        masks = {key: [w.ndim > 1 for w in weights] for key in options if "mask" in key}
        rates = jax.numpy.array([learning_rate(peak, t) for t in range(STEPS)])
        rule = getattr(optax, name)(rates.__getitem__, **(options | masks))
        params = [jax.numpy.array(w.to(dtype).numpy()) for w in weights]
        state = rule.init(params)
        for now in grads:
            updates = [jax.numpy.array(g.to(dtype).numpy()) for g in now]
            updates, state = rule.update(updates, state, params)
            params = optax.apply_updates(params, updates)
        results.append([jax.device_get(p) for p in params])
    return results
