"""The step as one opaque operator, for torch.compile.

Addresses cannot be traced. Inside a compiled region an optimizer therefore calls
``torch.ops.fastlars.step``, which mutates what its schema says; outside it calls the back end
directly, because the dispatcher costs several times what the addresses do.
"""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict, defaultdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import Backend, Dtypes, Mismatch, StepScalars, Tensors
from fastlars.backends.choose import ChoiceCache
from fastlars.backends.upload import is_capturing
from fastlars.optim.checks import check_lr
from fastlars.optim.gradients import bind_copying_gradients
from fastlars.optim.norm import check_outside_backward
from fastlars.optim.scalars import scalars_for, square_of_norm
from fastlars.optim.states import LOW_PRECISION
from fastlars.rules import RULES, GradientNorm, Rule

_RULES = {kind.__name__: kind for kind in RULES}


def encode(rule: Rule) -> str:
    """A rule as a constant that a graph can hold."""
    return json.dumps([type(rule).__name__, dataclasses.asdict(rule)])


@cache
def decode(text: str) -> Rule:
    """The rule that :func:`encode` wrote."""
    name, values = json.loads(text)
    return _RULES[name](**values)


def _lists(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    counters: list[Tensor],
    masters: list[Tensor],
    rule: Rule | GradientNorm,
    rounds: bool = False,
) -> list[tuple[Backend, Tensors]]:
    """The operator's flat lists, cut as a plan cuts a group. States are listed parameter by
    parameter; there is a master for each weight of low precision, in their order."""
    choose = ChoiceCache(rule, rounds)
    columns = [states[k :: len(rule.states)] for k in range(len(rule.states))]
    remaining = iter(masters)
    by_kind: dict[Any, list[tuple[int, Tensor | None]]] = defaultdict(list)
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        master = next(remaining, None) if w.dtype in LOW_PRECISION else None
        state_dtype = columns[0][i].dtype if columns else torch.float32
        dtypes = Dtypes(w.dtype, g.dtype, state_dtype)
        if master is not None:
            dtypes = Dtypes(master.dtype, g.dtype, state_dtype, copy=w.dtype)
        by_kind[w.device, dtypes, choose(w, dtypes)].append((i, master))
    lists = []
    for (_, dtypes, backend), members in by_kind.items():
        chosen = [weights[i] for i, _ in members]
        tensors = Tensors(
            weights=chosen,
            grads=[grads[i] for i, _ in members],
            states=tuple([column[i] for i, _ in members] for column in columns),
            counters=[counters[i] for i, _ in members] if counters else None,
            copies=None,
            dtypes=dtypes,
        )
        if dtypes.copy is not None:
            tensors.weights = [master for _, master in members if master is not None]
            tensors.copies = chosen
        lists.append((backend, tensors))
    return lists


# What a back end keeps for the weights of an operator, which has no place of its own to keep it.
# Weights that only look like those of before are noticed when they are bound.
_layouts: OrderedDict[Any, Any] = OrderedDict()
_MOST_LAYOUTS = 256


def _bind_cached(rule: str, backend: Backend, tensors: Tensors) -> Any:
    """Checked tensors, over the layout of the last step of the same weights."""
    weights = tensors.weights
    key = (rule, backend, tensors.dtypes, len(weights), weights[0]._cdata)
    if key in _layouts:
        _layouts.move_to_end(key)
        try:
            return bind_copying_gradients(backend, tensors, _layouts[key])
        except Mismatch:
            pass
    _layouts[key] = backend.layout(weights)
    if len(_layouts) > _MOST_LAYOUTS:
        _layouts.popitem(last=False)
    try:
        return bind_copying_gradients(backend, tensors, _layouts[key])
    except Mismatch as mismatch:
        name, index, what = mismatch.args
        raise RuntimeError(
            f"inside torch.compile: {name} {index} has other {what} than its weight, which was "
            "replaced after the step was compiled: take one step outside of torch.compile"
        ) from None


def _step(
    rule: str,
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    counters: list[Tensor],
    masters: list[Tensor],
    lr: float | None,
    lr_tensor: Tensor | None,
    scale: float,
    square_norm: Tensor | None,
    max_grad_norm: float | None,
    stochastic_rounding: bool,
) -> None:
    rate = lr if lr_tensor is None else lr_tensor
    check_lr(rate)
    stepped = decode(rule)
    lists = _lists(weights, grads, states, counters, masters, stepped, stochastic_rounding)
    scalars = scalars_for(backend for backend, _ in lists)
    if square_norm is not None:
        scalars.set_square(square_norm)
    for backend, tensors in lists:
        seed = None
        device = tensors.weights[0].device
        if stochastic_rounding and tensors.dtypes.weight == torch.bfloat16:
            if is_capturing(device):
                raise RuntimeError(
                    "stochastic_rounding does not go with CUDA graphs, such as those of "
                    'mode="reduce-overhead": every replay would round with the same random numbers'
                )
            seed = int(torch.randint(2**62, (), device="cpu"))
        bound = _bind_cached(rule, backend, tensors)
        given = scalars.of_batch(rate, scale, max_grad_norm, seed, device)
        backend.step(stepped, bound, given)


def _square_norm(weights: list[Tensor], grads: list[Tensor], sizes: list[int]) -> Tensor:
    check_outside_backward()
    # Group by group, laid out as the weights: the eager step's order, and so its bits.
    lists, begin = [], 0
    for size in sizes:
        end = begin + size
        lists += _lists(weights[begin:end], grads[begin:end], [], [], [], GradientNorm())
        begin = end
    on_device = all(backend.reads_device for backend, _ in lists)
    sums = [
        backend.measure(GradientNorm(), _bind_cached("", backend, tensors), StepScalars(0.0))
        for backend, tensors in lists
    ]
    return square_of_norm(sums, on_device).to(grads[0].device)


_library = torch.library.Library("fastlars", "DEF")
_library.define(
    "step(str rule, Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] states, "
    "Tensor(c!)[] counters, Tensor(d!)[] masters, float? lr, Tensor? lr_tensor, float scale, "
    "Tensor? square_norm, float? max_grad_norm, bool stochastic_rounding) -> ()"
)
_library.define("square_norm(Tensor[] weights, Tensor[] grads, int[] sizes) -> Tensor")
# define and impl, not custom_op, which costs three times as much host time a call.
_library.impl("step", _step, "CompositeExplicitAutograd")
_library.impl("square_norm", _square_norm, "CompositeExplicitAutograd")
torch.library.register_fake("fastlars::step", lambda *args: None, lib=_library)
torch.library.register_fake(
    "fastlars::square_norm",
    lambda weights, grads, sizes: torch.empty((), dtype=torch.float64, device=grads[0].device),
    lib=_library,
)
