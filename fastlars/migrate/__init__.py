"""Continue a run with LARS, LAMB or LANS from the optimizer states of another library.

A convention (``fastlars.conventions``) makes a new run compute what another library computes;
``load`` continues a run that another library has begun. Only exact continuations are loaded: a
buffer that holds something else than the optimizer's would is refused, and nothing is changed.
docs/migrating.md has an example for every library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fastlars.conventions import Convention
from fastlars.migrate.formats import FORMATS
from fastlars.migrate.reading import States, from_dict, from_tree
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.checks import location
from fastlars.optim.lamb import LAMB
from fastlars.optim.lans import LANS
from fastlars.optim.lars import LARS
from fastlars.optim.meaning import why_states_differ
from fastlars.optim.states import has_master

__all__ = ["FORMATS", "load"]

_KINDS: dict[str, type[FusedOptimizer]] = {"LARS": LARS, "LAMB": LAMB, "LANS": LANS}


def load(
    optimizer: FusedOptimizer,
    state: Any,
    source: str | Convention,
    *,
    params: Iterable[Any] | None = None,
    convert: Callable[[Any], Any] | None = None,
    lr: float | None = None,
) -> None:
    """Let ``optimizer`` go on from the states of another library's optimizer.

    Momentum buffers, moments and step counts are taken over. Hyper-parameters stay those of
    ``optimizer``, learning rates too: set them, or let a scheduler. States keep their values, and
    take the device and layout of their parameters and the ``state_dtype`` of their group; float32
    masters, if asked for, start from the weights.

    Args:
        optimizer: the ``fastlars.LARS``, ``fastlars.LAMB`` or ``fastlars.LANS`` to load into,
            usually made with the convention of ``source``.
        state: the other optimizer's ``state_dict()``; for ``optax_*`` its ``opt_state``; for
            ``mlperf_*`` a tree with the momentum of every variable.
        source: where the state comes from: a convention, its name, ``"bitsandbytes_lars"`` or
            ``"bitsandbytes_lamb"``.
        params: the parameters in the other optimizer's order, or pairs of name and parameter, such
            as ``model.named_parameters()``. Default None, the order of ``optimizer``; pass them
            where the groups differ, or where states go by name. Parameters that ``optimizer`` does
            not step must be without states.
        convert: for ``optax_*`` and ``mlperf_*``, a callable that makes of a tree shaped like the
            parameters a dict of arrays by parameter name, or a list in the order of ``params``: the
            function with which you moved the weights. Default None, for a tree that is such a dict
            or list already.
        lr: the learning rate of the last step, a float, which ``momentum_correction`` and
            ``dampening`` need. Default None, the rate in the ``state_dict``; pass it for trees,
            which have none.

    Raises:
        ValueError, TypeError: the state is of another optimizer than ``source`` says, holds
            something else than the states of ``optimizer``, or does not fit the parameters. Nothing
            is loaded then.

    Example:
        >>> import torch, fastlars
        >>> from fastlars import conventions, migrate
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> buffer = torch.tensor([0.25, 0.5])  # of torchlars.LARS(torch.optim.SGD(...))
        >>> group = {"lr": 1.0, "momentum": 0.9, "dampening": 0, "nesterov": False, "params": [0]}
        >>> old = {"state": {0: {"momentum_buffer": buffer}}, "param_groups": [group]}
        >>> optimizer = fastlars.LARS([w], lr=1.0, **conventions.torchlars(momentum=0.9))
        >>> migrate.load(optimizer, old, conventions.torchlars)
        >>> optimizer.state[w]["momentum_buffer"]
        tensor([0.2500, 0.5000])
    """
    name = source.name if isinstance(source, Convention) else source
    if name not in FORMATS:
        raise ValueError(f"source must be one of {', '.join(FORMATS)}, got {name!r}")
    form = FORMATS[name]
    if not isinstance(optimizer, _KINDS[form.optimizer]):
        raise TypeError(
            f"{name} states are for fastlars.{form.optimizer}, got {type(optimizer).__name__}"
        )
    for number, group in enumerate(optimizer.param_groups):
        if form.buffer and form.buffer not in _meanings(optimizer, group):
            raise ValueError(
                f"group {number}: a {name} momentum buffer is that of buffer={form.buffer!r}, "
                f"not of buffer={group['buffer']!r}, adapt={group['adapt']}"
            )
    names, order = _ordered(optimizer, params)
    read = from_tree if form.tree else from_dict
    found = read(form, name, state, names, convert, lr)
    if len(found) != len(order):
        raise ValueError(f"{name}: states of {len(found)} parameters for {len(order)} of them")
    _install(optimizer, name, order, found)


def _meanings(optimizer: FusedOptimizer, group: dict[str, Any]) -> set[str]:
    """What a group's momentum buffer holds. With q = 1, "scaled" and "gradient" are the same."""
    alike = {"scaled", "gradient"}
    rule: Any = optimizer.rule_of(group)
    return alike if not rule.adapt and rule.buffer in alike else {rule.buffer}


def _ordered(
    optimizer: FusedOptimizer, params: Iterable[Any] | None
) -> tuple[list[str | None], list[Tensor]]:
    """Names, as far as they are known, and parameters, in the other optimizer's order."""
    named: list[tuple[str | None, Tensor]] = []
    if params is None:
        for group in optimizer.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            named += zip(names, group["params"], strict=True)
    else:
        for each in params:
            name, p = each if isinstance(each, tuple) and len(each) == 2 else (None, each)
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"params must be tensors, or pairs of name and tensor, got {each!r}"
                )
            named.append((name, p))
    return [name for name, _ in named], [p for _, p in named]


def _install(
    optimizer: FusedOptimizer, name: str, order: list[Tensor], found: list[States]
) -> None:
    """Load ``found`` by ``optimizer.load_state_dict``, whose checks then apply to it."""
    whole = optimizer.state_dict()
    index: dict[Tensor, int] = {}
    for group, saved in zip(optimizer.param_groups, whole["param_groups"], strict=True):
        index |= dict(zip(group["params"], saved["params"], strict=True))
    if len(set(order)) != len(order):
        raise ValueError("params has a parameter twice")
    given = dict(zip(order, found, strict=True))
    strangers = [i for i, p in enumerate(order) if p not in index and given[p]]
    if strangers:
        raise ValueError(f"params: number {strangers[0]} has states, but is not of this optimizer")
    if index.keys() - given.keys():
        raise ValueError(f"params lacks {len(index.keys() - given.keys())} of this optimizer's")
    state = {}
    for number, group in enumerate(optimizer.param_groups):
        rule = optimizer.rule_of(group)
        for i, p in enumerate(group["params"]):
            theirs = given[p]
            if not any(each in theirs for each in rule.states):
                continue
            obstacle = why_states_differ(group, theirs)
            if obstacle:
                raise ValueError(f"group {number}: {name}: {obstacle}")
            if rule.counter is not None and theirs.get(rule.counter) is None:
                # load_state_dict takes it for an option that was switched on after the last step.
                raise ValueError(f"{location(number, i)}: no {rule.counter}")
            wanted = {*rule.states, rule.counter}
            state[index[p]] = {k: v for k, v in theirs.items() if k in wanted and v is not None}
            if has_master(p, group):
                state[index[p]]["master"] = p.detach()
    for saved in whole["param_groups"]:
        saved.pop("step", None)  # then counted from the states
    optimizer.load_state_dict({**whole, "state": state})
