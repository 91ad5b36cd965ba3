"""The Triton back end: launches over tables on the device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastlars.backends import cpu
from fastlars.backends.base import Scalars, Tensors
from fastlars.backends.sending import Sender, is_capturing
from fastlars.backends.triton import lamb, lars, rmsprop_warmup, sums
from fastlars.backends.triton.launch import LARGE_OPTIONS, OPTIONS, SMALL_OPTIONS, current
from fastlars.backends.triton.table import BLOCK, Addresses, Chunks
from fastlars.rules import GradientNorm, LambRule, LarsRule, RmspropWarmupRule, Rule

LANES = 128
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
NUMBERS: dict[type[Rule], tuple[str, ...]] = {
    LarsRule: ("momentum", "dampening", "weight_decay", "trust_coefficient", "eps"),
    LambRule: ("beta1", "beta2", "eps", "weight_decay", "lower", "upper", "ratio_eps"),
    RmspropWarmupRule: (
        *("momentum", "weight_decay", "square_decay", "eps", "lr_rmsprop"),
        *("center_steps", "rise", "below", "shrink"),
    ),
}


def numbers(rule: Rule) -> dict[str, float]:
    """The rule's numbers, by the names of the kernels' parameters."""
    return {name: float(getattr(rule, name)) for name in NUMBERS[type(rule)]}


def choices(rule: Rule) -> dict[str, Any]:
    """The rule's options, for each of which kernels are compiled anew."""
    if isinstance(rule, LarsRule):
        return {
            "BUFFER": rule.BUFFERS.index(rule.buffer),
            "COMBINED": rule.ratio == "combined",
            "NESTEROV": rule.nesterov,
            "CORRECTS": rule.momentum_correction,
            "TRUST_CLIP": rule.trust_clip,
        }
    if isinstance(rule, LambRule):
        return {
            "DECAY": rule.DECAYS.index(rule.decay),
            "CORRECTION": rule.CORRECTIONS.index(rule.bias_correction),
            "AVERAGING": rule.grad_averaging,
            "TRUST_CLIP": rule.trust_clip,
        }
    return {}


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which serves CPU tensors too, slowly."""
    return isinstance(sums.total, InterpretedFunction)


@dataclass(frozen=True)
class Layout:
    """What weights of given shapes need for every step; it outlives the tensors of the day."""

    checked: Any  # fastlars._C.Layout
    sender: Sender
    chunks: Chunks
    addresses: Addresses


@dataclass(frozen=True)
class Bound:
    """Addresses on the device, and the tensors that own them."""

    chunks: Chunks
    table: Tensor
    tensors: Tensors

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.chunks.device)


class Triton:
    """float32, bfloat16 and float16 weights and gradients in any mix; float32 or bfloat16 states.

    ``measure`` takes two launches, ``apply`` one, and one more where a counter is left to advance,
    whatever the number of tensors. Sums of squares have the same bits from run to run.
    """

    name = "triton"
    reads_device = True

    def __init__(self) -> None:
        self._checks = cpu.Cpu()

    def layout(self, weights: list[Tensor]) -> Layout:
        sender = Sender(weights)
        checked = self._checks.layout(weights)
        chunks = Chunks(weights, sender)
        return Layout(checked, sender, chunks, Addresses(len(weights), sender))

    def bind(self, tensors: Tensors, layout: Layout) -> Bound:
        checked = self._checks.bind(tensors, layout.checked)
        if is_capturing(layout.chunks.device):
            layout.sender.recorded.append(layout.chunks)
        return Bound(layout.chunks, layout.addresses.table(checked.native), tensors)

    def measure(self, rule: Rule | GradientNorm, bound: Bound, now: Scalars) -> Tensor:
        chunks, kinds = bound.chunks, bound.tensors.kinds
        found = bound.empty(chunks.tensors, 2, dtype=torch.float64)
        slots = bound.empty(chunks.count, 2, dtype=torch.float64)
        arguments: dict[str, Any] = {
            "table": bound.table,
            "numel": chunks.numel,
            "chunks": chunks.chunk,
            "slots": slots,
            "numbers": now.doubles,
            "lr": now.lr,
            "gradient_scale": now.gradient_scale,
            "GRADS": TYPES[kinds.grad],
            "BLOCK": BLOCK,
        }
        grid = (chunks.count,)
        with current(chunks.device):
            if isinstance(rule, GradientNorm):
                sums.measure_gradient[grid](**arguments, **OPTIONS)
            else:
                arguments |= {"WEIGHTS": TYPES[kinds.weight], **numbers(rule), **choices(rule)}
                if isinstance(rule, LarsRule):
                    lars.measure[grid](**arguments, **OPTIONS)
                else:
                    lamb.measure[grid](**arguments, STATES=TYPES[kinds.state], **OPTIONS)
            sums.total[(chunks.tensors,)](
                bound.table,
                chunks.first,
                slots,
                found,
                now.doubles,
                COUNTS=isinstance(rule, LambRule),
                LANES=LANES,
                **SMALL_OPTIONS,
            )
        return found

    def apply(self, rule: Rule, bound: Bound, now: Scalars, sums: Tensor | None) -> Tensor:
        chunks, tensors = bound.chunks, bound.tensors
        kinds = tensors.kinds
        if not rule.adapt:
            sums = None
        elif sums is None or sums.shape != (chunks.tensors, 2) or sums.dtype != torch.float64:
            raise ValueError(f"apply needs float64 sums of shape [{chunks.tensors}, 2]")
        else:
            sums = sums.contiguous()
        ratios = bound.empty(chunks.tensors, dtype=torch.float32)
        copies = TYPES[kinds.copy] if kinds.copy is not None else None
        rounds = now.seed is not None and kinds.weight == torch.bfloat16 and copies is None
        arguments: dict[str, Any] = {
            "table": bound.table,
            "numel": chunks.numel,
            "chunks": chunks.chunk,
            "ratios": ratios,
            "numbers": now.doubles,
            "lr": now.lr,
            "gradient_scale": now.gradient_scale,
            "seed": now.seed or 0,
            **numbers(rule),
            **choices(rule),
            "WEIGHTS": TYPES[kinds.weight],
            "GRADS": TYPES[kinds.grad],
            "STATES": TYPES[kinds.state] if tensors.states else None,
            "COPIES": copies,
            "STOCHASTIC": rounds,
            "BLOCK": BLOCK,
        }
        grid = (chunks.count,)
        with current(chunks.device):
            if isinstance(rule, LarsRule):
                counts = tensors.counters is not None
                lars.apply[grid](**arguments, sums=sums, COUNTS=counts, **OPTIONS)
            elif isinstance(rule, LambRule):
                counts = sums is None
                lamb.apply[grid](**arguments, sums=sums, **OPTIONS)
            else:
                counts = True
                rmsprop_warmup.apply[grid](**arguments, **LARGE_OPTIONS)
            if counts:
                _advance(rule, bound, now)
        return ratios

    def step(self, rule: Rule, bound: Bound, now: Scalars) -> Tensor:
        return self.apply(rule, bound, now, self.measure(rule, bound, now) if rule.adapt else None)


def _advance(rule: Rule, bound: Bound, now: Scalars) -> None:
    """In a launch of its own: programs of the last one may still read the counters."""
    tensors = bound.chunks.tensors
    sums.advance[((tensors + LANES - 1) // LANES,)](
        bound.table,
        tensors,
        now.doubles,
        now.lr,
        REMEMBERS=isinstance(rule, LarsRule),
        LANES=LANES,
        **SMALL_OPTIONS,
    )
