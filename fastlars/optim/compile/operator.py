"""The step as one opaque operator, for torch.compile.

torch.compile cannot trace code that takes the addresses of tensors. Inside a compiled region an
optimizer therefore calls ``torch.ops.fastlars.step``, whose schema names the tensors that it
writes. Outside, it calls the back end directly: torch's dispatcher costs several times as much as
taking the addresses.
"""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict, defaultdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import Backend, Dtypes, Mismatch, StepScalars, Tensors
from fastlars.backends.choose import ChoiceCache
from fastlars.backends.float64 import to_widest, widest
from fastlars.backends.upload import is_capturing
from fastlars.optim.checks import check_lr
from fastlars.optim.gradients import bind_copying_gradients
from fastlars.optim.norm import check_outside_backward
from fastlars.optim.scalars import scalars_for, square_of_norm
from fastlars.optim.states import LOW_PRECISION
from fastlars.rules import RULES, GradientNorm, Rule

_RULES = {kind.__name__: kind for kind in RULES}


def encode(rule: Rule) -> str:
    """A rule as text, which a graph can hold as a constant."""
    return json.dumps([type(rule).__name__, dataclasses.asdict(rule)])


@lru_cache(maxsize=1024)  # a schedule of momentum or weight decay makes a new rule every step
def decode(text: str) -> Rule:
    """The rule that ``encode`` wrote."""
    name, values = json.loads(text)
    return _RULES[name](**values)


def _batches(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    counters: list[Tensor],
    masters: list[Tensor],
    rule: Rule | GradientNorm,
    rounds: bool = False,
) -> list[tuple[Backend, Tensors]]:
    """Sort the operator's flat lists into batches, as a plan sorts the parameters of a group.

    ``states`` has all states of the first parameter, then those of the second, and so on.
    ``masters`` is empty, or has one for each float16 and bfloat16 weight.
    """
    choose = ChoiceCache(rule, rounds)
    columns = [states[k :: len(rule.states)] for k in range(len(rule.states))]
    remaining = iter(masters)
    members_by_key: dict[Any, list[tuple[int, Tensor | None]]] = defaultdict(list)
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        master = next(remaining, None) if w.dtype in LOW_PRECISION else None
        state_dtype = columns[0][i].dtype if columns else torch.float32
        dtypes = Dtypes(w.dtype, g.dtype, state_dtype)
        if master is not None:
            dtypes = Dtypes(master.dtype, g.dtype, state_dtype, copy=w.dtype)
        members_by_key[w.device, dtypes, choose(w, dtypes)].append((i, master))
    batches = []
    for (_, dtypes, backend), members in members_by_key.items():
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
        batches.append((backend, tensors))
    return batches


# Layouts of the weights of recent calls: an operator, unlike a plan, has no object to keep them in.
# Other weights may have the same key; if their layout differs, binding raises Mismatch.
_layouts: OrderedDict[Any, Any] = OrderedDict()
_MAX_LAYOUTS = 256


def _bind_cached(rule: str, backend: Backend, tensors: Tensors) -> Any:
    """Bind a batch, with the layout that the last step of the same weights has cached."""
    weights = tensors.weights
    key = (rule, backend, tensors.dtypes, len(weights), weights[0]._cdata)
    if key in _layouts:
        _layouts.move_to_end(key)
        try:
            return bind_copying_gradients(backend, tensors, _layouts[key])
        except Mismatch:
            pass
    _layouts[key] = backend.layout(weights)
    if len(_layouts) > _MAX_LAYOUTS:
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
    decoded = decode(rule)
    batches = _batches(weights, grads, states, counters, masters, decoded, stochastic_rounding)
    scalars = scalars_for(backend for backend, _ in batches)
    if square_norm is not None:
        scalars.set_square(square_norm)
    for backend, tensors in batches:
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
        of_batch = scalars.of_batch(rate, scale, max_grad_norm, seed, device)
        backend.step(decoded, bound, of_batch)


def _square_norm(weights: list[Tensor], grads: list[Tensor], sizes: list[int]) -> Tensor:
    check_outside_backward()
    # Group by group, with the layouts of the weights, as the eager step does: another order of
    # addition would give other bits.
    batches, begin = [], 0
    for size in sizes:
        end = begin + size
        batches += _batches(weights[begin:end], grads[begin:end], [], [], [], GradientNorm())
        begin = end
    on_device = scalars_for(backend for backend, _ in batches).on_device
    sums = [
        backend.measure(GradientNorm(), _bind_cached("", backend, tensors), StepScalars(0.0))
        for backend, tensors in batches
    ]
    return to_widest(square_of_norm(sums, on_device), grads[0].device)


_library = torch.library.Library("fastlars", "DEF")
_library.define(
    "step(str rule, Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] states, "
    "Tensor(c!)[] counters, Tensor(d!)[] masters, float? lr, Tensor? lr_tensor, float scale, "
    "Tensor? square_norm, float? max_grad_norm, bool stochastic_rounding) -> ()"
)
_library.define("square_norm(Tensor[] weights, Tensor[] grads, int[] sizes) -> Tensor")
# Not torch.library.custom_op, which costs three times as much host time a call.
_library.impl("step", _step, "CompositeExplicitAutograd")
_library.impl("square_norm", _square_norm, "CompositeExplicitAutograd")
torch.library.register_fake("fastlars::step", lambda *args: None, lib=_library)
torch.library.register_fake(
    "fastlars::square_norm",
    lambda weights, grads, sizes: grads[0].new_empty((), dtype=widest(grads[0].device)),
    lib=_library,
)
