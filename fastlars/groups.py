"""Parameter groups that leave biases and norms out of weight decay, adaptation, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Rule = Callable[[str, nn.Parameter], bool]
# What an optimizer writes into a group: parameters, their names, and the steps that it took.
_OWN = ("params", "param_names", "step")
Excluded = Literal["none", "norms", "norms+biases"] | Rule


def parameter_groups(
    params: Params,
    weight_decay: float,
    *,
    no_decay: Excluded = "norms+biases",
    no_ratio: Excluded = "norms+biases",
    exclude: Rule | None = None,
    adapt_excluded: bool = False,
) -> list[dict[str, Any]]:
    """Groups in which biases and norms have, by default, neither weight decay nor trust ratio.

    Matrices and filters are decayed and adapted. A bias or the gain of a normalisation layer has at
    most one dimension. Their norms are small or zero at the start, so that a layer-wise ratio
    stalls them, and every large-batch recipe since Goyal et al. 2017 and Jia et al. 2018 leaves
    some of them out of weight decay. MLPerf's reference leaves them out of both, LAMB's authors
    only the norms.

    Args:
        params: a model, or what an optimizer takes: parameters, pairs of name and parameter (as of
            ``model.named_parameters()``), or a list of dicts, each a parameter group. Shared
            parameters appear once, where they come first; frozen ones are left out. Each group is
            split by itself and keeps its other keys, such as ``lr``. Its own ``weight_decay``
            counts, and not the argument; groups out of ``optimizer.param_groups`` always have one,
            which may be 0. A group with ``weight_decay`` 0 or ``adapt`` False keeps that for all
            its parameters.
        weight_decay: wd of the decayed parameters, a float of at least 0, which the optimizer
            checks. No default: 1e-4 is usual for ResNet-50, 0.01 for BERT.
        no_decay: which parameters have no weight decay. ``"norms+biases"`` (default): all of at
            most one dimension. ``"norms"``: gains and biases of normalisation layers, which needs a
            model; they are known by having at most one dimension in a module without any larger
            parameter of its own. ``"none"``: all parameters are decayed. A callable: those for
            which ``no_decay(name, parameter)`` is true; the name is None where no names were given,
            so that a rule about names fails at once instead of matching nothing.
        no_ratio: which parameters have no trust ratio (``adapt=False``); same values, same default.
            Take ``"none"`` to reproduce a library that adapts all, ``"norms"`` for LAMB's authors.
        exclude: a callable as above for both, in place of ``no_decay`` and ``no_ratio``. Default
            None. Take it for rules about names, as ``lambda name, p: name.endswith("bias")``.
        adapt_excluded: True stands for ``no_ratio="none"``, and adapts also what ``exclude`` names.
            Default False. Take it where only the decay should leave parameters out.

    Returns:
        A list of dicts for an optimizer, up to four for each group given, in this order: decayed
        and adapted, only decayed, only adapted, neither. ``params`` are pairs of name and
        parameter, or parameters alone where no names were given. ``weight_decay`` is always a key,
        ``adapt`` where it is False or was given; options without a key are the optimizer's. Groups
        without parameters are left out. The arguments are not changed, but an iterator is used up.

    Raises:
        ValueError: there are no trainable parameters; some have names and others not; a group has
            no ``params``, or another number of ``param_names``; an argument is not one of its
            choices, or two exclude each other; ``"norms"`` without a model; a callable asked for
            the shape of a lazy module's parameter before the first forward pass. What a callable
            raises is passed on.
        TypeError: ``params`` or something in it is none of the above, for example a plain tensor of
            a ``state_dict``; ``exclude`` is not a callable.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> def show(groups):
        ...     for group in groups:
        ...         print([name for name, _ in group.pop("params")], group)
        >>> show(parameter_groups(model, weight_decay=1e-4))
        ['0.weight'] {'weight_decay': 0.0001}
        ['0.bias', '1.weight', '1.bias'] {'weight_decay': 0.0, 'adapt': False}
        >>> show(parameter_groups(model, 1e-4, no_decay="norms", no_ratio="none"))
        ['0.weight', '0.bias'] {'weight_decay': 0.0001}
        ['1.weight', '1.bias'] {'weight_decay': 0.0}

        A rule about names:

        >>> show(parameter_groups(model, 1e-4, exclude=lambda name, p: name.endswith("bias")))
        ['0.weight', '1.weight'] {'weight_decay': 0.0001}
        ['0.bias', '1.bias'] {'weight_decay': 0.0, 'adapt': False}

        Groups that have learning rates:

        >>> linear, norm = model[0].named_parameters("linear"), model[1].named_parameters("norm")
        >>> show(parameter_groups([{"params": linear, "lr": 0.5}, {"params": norm}], 1e-4))
        ['linear.weight'] {'lr': 0.5, 'weight_decay': 0.0001}
        ['linear.bias'] {'lr': 0.5, 'weight_decay': 0.0, 'adapt': False}
        ['norm.weight', 'norm.bias'] {'weight_decay': 0.0, 'adapt': False}
    """
    if exclude is not None:
        if not callable(exclude):
            raise TypeError(f"exclude must be a callable or None, got {exclude!r}")
        if (no_decay, no_ratio) != ("norms+biases", "norms+biases"):
            raise ValueError("exclude takes the place of no_decay and no_ratio: leave them out")
        no_decay = no_ratio = exclude
    undecayed, unadapted = _rule("no_decay", no_decay, params), _rule("no_ratio", no_ratio, params)
    if adapt_excluded:
        unadapted = _nothing
    made: list[dict[str, Any]] = []
    for group, entries in _read(params):
        made += _split(group, entries, weight_decay, (undecayed, unadapted))
    if not made:
        raise ValueError(f"{type(params).__name__} has no trainable parameters")
    return made


class _Entry(NamedTuple):
    """A parameter, and its name in messages. ``name`` is None where none was given."""

    where: str
    # Any: users' rules are annotated with str and nn.Parameter, which almost all entries are.
    name: Any
    parameter: Any


def _read(params: Params) -> list[tuple[dict[str, Any], list[_Entry]]]:
    """Groups with their trainable parameters; a model or a flat list is one group."""
    given = params.named_parameters() if isinstance(params, nn.Module) else params
    if not _has_order(given):
        raise TypeError(
            "params must be a model, parameters, pairs of name and parameter, or a list of "
            f"parameter groups, got {type(params).__name__}"
        )
    items: list[Any] = list(given)
    if items and isinstance(items[0], dict):
        read = [(group, _of_group(group, f"group {i}")) for i, group in enumerate(items)]
    else:
        read = [({}, _entries(items))]
    every = [entry for _, entries in read for entry in entries]
    for entry in every:
        if (entry.name is None) != (every[0].name is None):
            raise ValueError(f"{entry.where}: either all parameters have names, or none")
    first = {entry.parameter: entry for entry in reversed(every)}
    return [
        (group, [e for e in entries if e.parameter.requires_grad and first[e.parameter] is e])
        for group, entries in read
    ]


def _of_group(group: Any, where: str) -> list[_Entry]:
    if not isinstance(group, dict):
        raise TypeError(f"{where} must be a dict as those before it, got {type(group).__name__}")
    if "params" not in group:
        raise ValueError(f'{where} has no "params"')
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    if not _has_order(params):
        raise TypeError(
            f"{where}: params must be parameters, or pairs of name and parameter, "
            f"got {type(params).__name__}"
        )
    items = list(params)
    if "param_names" in group:
        names = group["param_names"]
        if len(names) != len(items):
            raise ValueError(f"{where} has {len(names)} param_names for {len(items)} params")
        items = list(zip(names, items, strict=True))
    return _entries(items, f"{where}, ")


def _has_order(value: Any) -> bool:
    # A mapping would give its keys, a string its letters, a tensor its rows; a set, any order.
    wrong = (Tensor, str, Mapping, set, frozenset)
    return isinstance(value, Iterable) and not isinstance(value, wrong)


def _entries(items: list[Any], prefix: str = "") -> list[_Entry]:
    return [_entry(item, f"{prefix}parameter {i}") for i, item in enumerate(items)]


def _entry(item: Any, where: str) -> _Entry:
    name, parameter = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
    if isinstance(name, str):
        where += f" ({name})"
    if not (isinstance(name, str | None) and isinstance(parameter, Tensor)):
        parts = item if isinstance(item, tuple) else (item,)
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"{where} must be a parameter, or a pair of name and parameter, got {got}")
    if not (parameter.requires_grad or isinstance(parameter, nn.Parameter)):
        raise TypeError(f"{where} is a tensor without requires_grad, as in a state_dict")
    return _Entry(where, name, parameter)


def _split(
    group: dict[str, Any], entries: list[_Entry], weight_decay: float, rules: tuple[Rule, Rule]
) -> list[dict[str, Any]]:
    """Up to four groups, with all other keys of the given one."""
    kept = {key: value for key, value in group.items() if key not in _OWN}
    decay = kept.get("weight_decay", weight_decay)
    never_decayed = bool(kept.get("weight_decay") == 0)  # an array of numpy answers with an array
    never_adapted = kept.get("adapt") is False
    no_decay, no_ratio = rules
    parts: dict[tuple[bool, bool], list[Any]] = {}
    for entry in entries:
        undecayed = _asked(no_decay, entry)
        # Call a shared rule once: a user's rule may print or count.
        unadapted = undecayed if no_ratio is no_decay else _asked(no_ratio, entry)
        part = parts.setdefault((undecayed or never_decayed, unadapted or never_adapted), [])
        part.append(entry.parameter if entry.name is None else (entry.name, entry.parameter))
    return [
        {"params": part, **kept, "weight_decay": 0.0 if undecayed else decay}
        | ({"adapt": False} if unadapted else {})
        for (undecayed, unadapted), part in sorted(parts.items(), key=lambda item: item[0])
    ]


def _rule(keyword: str, which: Excluded, params: Params) -> Rule:
    if callable(which):
        return which
    if which == "none":
        return _nothing
    if which == "norms+biases":
        return _is_small
    if which != "norms":
        raise ValueError(
            f'{keyword} must be "none", "norms", "norms+biases" or a callable, got {which!r}'
        )
    if not isinstance(params, nn.Module):
        raise ValueError(f'{keyword}="norms" needs a model: norms are known by their modules')
    norms = _of_norms(params)
    return lambda name, parameter: _is_small(name, parameter) and name in norms


def _nothing(name: str, parameter: Tensor) -> bool:
    return False


def _is_small(name: str, parameter: Tensor) -> bool:
    return parameter.ndim <= 1


def _of_norms(model: nn.Module) -> set[str]:
    """Parameters of modules whose own parameters all have at most one dimension."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        # What torch's weight_norm and the like make of a weight lies in a child of its module.
        held = module.parametrizations.parameters() if is_parametrized(module) else ()
        if all(parameter.ndim <= 1 for parameter in (*own.values(), *held)):
            names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names


def _asked(rule: Rule, entry: _Entry) -> bool:
    """A rule's verdict on a parameter; an error where it asks for a shape that is not there yet."""
    lazy = is_lazy(entry.parameter)
    try:
        with _NoShape() if lazy else nullcontext():
            return bool(rule(entry.name, entry.parameter))
    except (RuntimeError, ValueError) as error:
        if not lazy:
            raise
        raise ValueError(
            f"{entry.where} has no shape yet, for its module is lazy: run a forward pass first"
        ) from error


class _NoShape(TorchFunctionMode):
    """Refuses ``ndim`` and ``size()`` of a lazy parameter. torch answers them as for a vector
    without elements, so that a weight would pass for a bias; most others it refuses itself."""

    refused = (Tensor.ndim.__get__, Tensor.size)  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.refused and is_lazy(args[0]):
            raise ValueError  # _asked says of which parameter
        return func(*args, **(kwargs or {}))
