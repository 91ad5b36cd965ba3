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
# What docstrings say of them, and of norm_group and skip_if, which all optimizers take, too.
DESCRIBED = """\
maximize: step up the gradient instead of down.
max_grad_norm: clip the norm of all gradients together to this, positive, or None. Those
    are the gradients of this optimizer, and of DTensors all shards: see ``norm_group``.
    ``math.inf`` clips nothing, and has the norm measured for ``grad_norm``.
master_weights: keep a float32 master of float16 and bfloat16 parameters in the state, step
    that, and write its rounding in the same pass.
stochastic_rounding: round bfloat16 parameters up or down at random, without bias; seeded
    by ``torch.manual_seed``. Not with ``master_weights``.
state_dtype: of buffers and moments, ``torch.float32`` or ``torch.bfloat16``.
capturable: read ``lr`` and counters on the device, so that a step can be recorded into a
    CUDA graph. Needs a back end for such a device.
fused_unscale: True lets the step take the scale and the verdict of a ``GradScaler``, as
    ``fused=True`` does in torch: no pass unscales the gradients, and on a GPU nothing waits
    for the verdict. Lightning then refuses ``gradient_clip_val``, and Accelerate's
    schedulers do not see a skipped step. None: only with float16 parameters or
    ``capturable``, where a ``GradScaler`` cannot do it. Counts where all groups have it.
norm_group: process group or :class:`~torch.distributed.device_mesh.DeviceMesh` over which
    the squares of the norm are summed, for ``max_grad_norm`` and ``skip_if``: the stages of
    a pipeline, or the processes of a ``ZeroRedundancyOptimizer``, each of which has other
    parameters. All its processes must step together. It is not part of ``state_dict()``.
skip_if: skip steps by the norm of all gradients, before the clip. A number: those whose
    norm is above it or not finite; ``math.inf``: those that are not finite alone. A
    callable: those for which it returns true, a bool or a tensor of one element, when it is
    given the norm, a 0-dim float64 tensor, on the GPU where a step reads its numbers there;
    nothing waits as long as the callable does not. A skipped step changes nothing, but a
    first one makes states; ``skipped_steps`` counts it, and ``grad_norm`` is its norm. Also
    an attribute, which may be changed at any time; a recorded CUDA graph keeps what it was
    recorded with. Not part of ``state_dict()``.
"""
RAISES = """
Raises:
    ValueError, TypeError: a value is out of range, parameters share memory, or a tensor cannot be
        stepped. Messages name the group and the parameter, and nothing is changed.
"""


def documented(kind: Kind) -> Kind:
    """Put :data:`DESCRIBED` into the docstring of an optimizer, in place of its marker."""
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
