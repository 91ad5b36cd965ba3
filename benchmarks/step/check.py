"""Checks a step before it is timed: it must move the weights as the specification does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.models import Shapes, gradients, parameters
from benchmarks.step.contenders import Contender

# Large enough that a step shows in bfloat16 weights.
CHECK_LR = {"lars": 100.0, "lamb": 0.1, "lans": 0.1, "rmsprop": 1e-4, "rmsprop-warm": 0.1}
# A chunk and a bit, many chunks, and tensors with a ragged end.
CHECK_SHAPES: Shapes = [(64, 32), (32, 16, 3, 3), (301, 100), (3,)]
# Roundings of sums in another order; in bfloat16 a few weights then fall on the other side.
CHECK_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

Record = Callable[[Callable[[], object]], Callable[[], object]]


def _moved(
    contender: Contender, rule: str, params: list[nn.Parameter], record: Record
) -> list[torch.Tensor]:
    """How far three steps move the weights, on the CPU."""
    before = [p.detach().clone() for p in params]
    grads = gradients(params)
    saved = [g.clone() for g in grads]
    with contender.planning():
        optimizer = contender.build(params)
        for group in optimizer.param_groups:
            group["lr"] = CHECK_LR[rule]
        step: Callable[[], object] = optimizer.step
        for number in range(3):
            step()
            torch._foreach_copy_(grads, saved)
            if number == 0 and contender.graph:
                step = record(step)
        if hasattr(optimizer, "settle"):  # it steps copies of its own
            optimizer.settle()
    after = [p.detach() for p in params]
    return [(a.double() - b.double()).cpu() for a, b in zip(after, before, strict=True)]


def check(
    contender: Contender,
    ours: Contender,
    rule: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    record: Record = lambda call: call,
) -> None:
    """No time without a right result: three steps on a small problem move the weights alike.

    Args:
        contender: whose steps are looked at; exact ones are held to the specification's numbers,
            others, whose rules differ in details, to their direction.
        ours: fastlars, of which the reference back end on the CPU takes the same steps.
        device: where the contender's steps are taken.
        dtype: of the parameters; low precision goes with masters.
        record: makes a CUDA graph of a step, for contenders that are to be recorded.
    """
    original = parameters(CHECK_SHAPES, dtype=dtype)
    copies = []
    for p in original:
        copy = nn.Parameter(p.detach().clone().to(device))
        copy.grad = p.grad.clone().to(device) if p.grad is not None else None
        copies.append(copy)
    specification = Contender(ours.build, ours.package, backend="reference")
    moved = (
        _moved(contender, rule, copies, record),
        _moved(specification, rule, original, record),
    )
    for mine, right in zip(*moved, strict=True):
        assert mine.abs().sum() > 0.0, "the step moves nothing"
        cosine = torch.nn.functional.cosine_similarity(mine.flatten(), right.flatten(), dim=0)
        assert cosine > 0.99, f"the step points elsewhere: cosine {float(cosine):.4f}"
        if contender.exact:
            error = float((mine - right).norm() / right.norm())
            assert error < CHECK_ERROR[dtype], f"the step is off by {error:.2g} of its length"
