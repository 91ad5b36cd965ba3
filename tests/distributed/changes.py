"""What a training loop may change between backward and optimizer.step(), by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

Change = Callable[[list[nn.Parameter], Any], None]
FACTOR = 0.5


def clip(params: list[nn.Parameter], _: Any) -> None:
    nn.utils.clip_grad_norm_(params, 1e-3)


def replace_gradients(params: list[nn.Parameter], _: Any) -> None:
    for p in params:
        assert p.grad is not None
        p.grad = p.grad * FACTOR


def write_through_data(params: list[nn.Parameter], _: Any) -> None:
    for p in params:
        assert p.grad is not None
        p.grad.data.mul_(FACTOR)


def other_memory(params: list[nn.Parameter], _: Any) -> None:
    for p in params:
        assert p.grad is not None
        p.grad.data = p.grad.data * FACTOR


def drop_one(params: list[nn.Parameter], _: Any) -> None:
    params[0].grad = None


def drop_all(_: list[nn.Parameter], optimizer: Any) -> None:
    optimizer.zero_grad()


def shrink_weights(params: list[nn.Parameter], _: Any) -> None:
    with torch.no_grad():
        for p in params:
            p.mul_(FACTOR)


def shrink_through_data(params: list[nn.Parameter], _: Any) -> None:
    for p in params:
        p.data.mul_(FACTOR)


def swap_weights(params: list[nn.Parameter], _: Any) -> None:
    for p in params:
        p.data = p.data * FACTOR


def halve_states(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params:
        for value in optimizer.state[p].values():
            value.data.mul_(FACTOR)


def clear_states(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params:
        optimizer.state[p] = {}


def set_option(name: str, _: list[nn.Parameter], optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group[name] *= FACTOR


def take_out(params: list[nn.Parameter], optimizer: Any) -> None:
    optimizer.param_groups[0]["params"] = params[2:]


# What a loop does between backward and step(): what was changed, whether every step sees it (else
# the first ones, and debug=True).
CHANGES: dict[str, tuple[Change, str, bool]] = {
    "clipped": (clip, "gradient", True),
    "other gradients": (replace_gradients, "gradient", True),
    "gradients' .data": (write_through_data, "gradient", False),
    "gradients' memory": (other_memory, "gradient", True),
    "a gradient less": (drop_one, "gradient", True),
    "no gradients": (drop_all, "gradient", True),
    "weights": (shrink_weights, "weight", True),
    "weights' .data": (shrink_through_data, "weight", False),
    "weights' memory": (swap_weights, "weight", True),
    "lr": (partial(set_option, "lr"), "hyper-parameter", True),
    "weight decay": (partial(set_option, "weight_decay"), "hyper-parameter", True),
    "states' .data": (halve_states, "state", False),
    "states": (clear_states, "state", True),
    "a parameter less": (take_out, "list of parameters", True),
}
