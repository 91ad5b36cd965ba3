"""The options of parameter groups: those of every optimizer, and those of its signature."""

from __future__ import annotations

import inspect
import sys
from textwrap import indent
from typing import Any, TypeVar

import torch

Kind = TypeVar("Kind", bound=type)

# Options of every optimizer, whatever its rule.
OPTIONS: dict[str, Any] = {
    "maximize": False,
    "max_grad_norm": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "state_dtype": torch.float32,
    "capturable": False,
    "fused_unscale": None,
}
# Their part of every optimizer's docstring, with norm_group and skip_if, which all take as well.
DESCRIBED = """\
maximize: True steps up the gradient instead of down, to maximize an objective. Default
    False.
max_grad_norm: scale all gradients by one factor so that their common 2-norm is at most
    this, above 0. Default None, no clip. Set it against spikes of the gradient; 1.0 is
    usual for LAMB. The norm covers the gradients of this optimizer, with all shards of
    DTensors; ``norm_group`` adds those of other processes. ``math.inf`` clips nothing, and
    has the norm measured for ``grad_norm``.
master_weights: True keeps a float32 copy of each float16 and bfloat16 parameter in the
    state, 4 bytes an element, steps the copy, and writes its rounding to the parameter in
    the same pass. Default False. Set it where updates are so small that rounding loses
    them.
stochastic_rounding: True rounds bfloat16 parameters up or down at random, without bias;
    seeded by ``torch.manual_seed``; under DDP with the same seed in all processes, so that
    their weights stay the same. Default False. It serves the same end as
    ``master_weights`` without its memory; the two exclude each other.
state_dtype: dtype in which buffers and moments are stored, ``torch.float32`` (default) or
    ``torch.bfloat16``, which takes half the memory and rounds them at every step.
capturable: True reads ``lr`` and counters on the device, so that a step can be recorded
    into a CUDA graph. Default False; leave it unless you record one. Needs a back end for
    such a device.
fused_unscale: True lets the step take the scale and the verdict of a ``GradScaler``, as
    ``fused=True`` does in torch: no pass unscales the gradients, and on a GPU nothing waits
    for the verdict. Lightning then refuses ``gradient_clip_val``, and Accelerate's
    schedulers do not see a skipped step. False leaves both to the ``GradScaler``. Default
    None: True only with float16 parameters or ``capturable``, where a ``GradScaler`` cannot
    do it. True has an effect only if all groups have it.
norm_group: process group or ``DeviceMesh`` over which the squares of the norm are summed, for
    ``max_grad_norm`` and ``skip_if``. Default None: this process alone. Set it where processes
    hold different parameters: the stages of a pipeline, or the processes of a
    ``ZeroRedundancyOptimizer``. All its processes must step together. It is not part of
    ``state_dict()``.
skip_if: skip steps by the norm of all gradients, before the clip. Default None, no step is
    skipped. A number skips steps whose norm is above it or not finite; ``math.inf`` only
    those that are not finite. A callable skips those for which it returns true, a bool or a
    tensor of one element. It is called with the norm, a 0-dim float64 tensor, which is on
    the GPU where a step reads its numbers there; nothing waits as long as the callable does
    not. A skipped step changes nothing, except that a first one makes states;
    ``skipped_steps`` counts it, and ``grad_norm`` is its norm. Also an attribute, which may
    be changed at any time; a recorded CUDA graph keeps what it was recorded with. Not part
    of ``state_dict()``.
"""
RAISES = """
Raises:
    ValueError, TypeError: a value is out of range, parameters share memory, or a tensor cannot
        be stepped. The message names the group and the parameter, and nothing is changed.
"""


def documented(kind: Kind) -> Kind:
    """Put ``DESCRIBED`` into the docstring of an optimizer, in place of its marker."""
    if kind.__doc__ is not None:  # python -OO
        text = inspect.cleandoc(kind.__doc__)  # from Python 3.13 on, the compiler does that
        assert "{shared options}" in text, f"{kind.__name__}: no place for the shared options"
        kind.__doc__ = text.replace("    {shared options}\n", indent(DESCRIBED, "    ") + RAISES)
    return kind


def from_arguments() -> dict[str, Any]:
    """The defaults of groups: the options among the arguments of the calling ``__init__``.

    An option is thus named once, in the signature.
    """
    given = inspect.getargvalues(sys._getframe(1))
    others = ("self", "params", "norm_group", "skip_if")
    return {name: given.locals[name] for name in given.args if name not in others}


def dtypes_to_names(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` with dtypes replaced by their names.

    torch.distributed.checkpoint cannot gather a dtype among the options of a group.
    """
    groups = [{**g, "state_dtype": str(g["state_dtype"])} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def names_to_dtypes(group: dict[str, Any]) -> bool:
    """Replace the name of a dtype in a group by the dtype; return whether the group had one."""
    name = group.get("state_dtype")
    if not (isinstance(name, str) and name.startswith("torch.")):
        return False
    group["state_dtype"] = getattr(torch, name.removeprefix("torch."), name)
    return True
