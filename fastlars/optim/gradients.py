"""Gradients as autograd and collectives leave them, made ready for a back end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import Backend, Mismatch, Tensors
from fastlars.optim.wrapped import is_plain, unwrap


def plain_gradients(grads: list[Any]) -> list[Tensor]:
    """The plain tensors of gradients, after waiting for collectives that still write to them."""
    if set(map(type, grads)) == {Tensor}:
        return grads
    grads = [g.wait() if hasattr(g, "wait") and not is_plain(g) else g for g in grads]
    wrapped = [i for i, g in enumerate(grads) if not is_plain(g)]
    found = unwrap([grads[i] for i in wrapped]) if wrapped else []
    if len(found) == len(wrapped):
        for i, plain in zip(wrapped, found, strict=True):
            grads[i] = plain
    return grads


def bind_copying_gradients(
    backend: Backend, tensors: Tensors, layout: Any, copied: list[int] | None = None
) -> Any:
    """``backend.bind``; gradients whose strides differ from their weights' are copied first.

    Args:
        backend: checks the tensors and takes their addresses.
        tensors: of one batch.
        layout: what ``backend.layout`` made of the weights.
        copied: indices of the gradients that earlier steps had to copy. Indices that this step
            finds are appended, so that the next step need not fail to bind before it copies them.
    """
    if copied:
        _copy_gradients(tensors, copied)
    try:
        return backend.bind(tensors, layout)
    except Mismatch as mismatch:
        if mismatch.args[0] != "grads" or mismatch.args[2] not in ("strides", "memory"):
            raise
    # Such as a contiguous gradient of a channels_last weight, or a gradient of zeros for which
    # autograd has allocated no memory, as after torch.sgn.
    found = _copy_gradients(tensors, range(len(tensors.grads)))
    if copied is not None:
        copied += found
    return backend.bind(tensors, layout)


def _copy_gradients(tensors: Tensors, indices: Iterable[int]) -> list[int]:
    """Copy those of the gradients whose layout is not their weight's; return their indices."""
    weights, grads = tensors.copies or tensors.weights, list(tensors.grads)
    moved = [i for i in indices if _differs_in_layout(weights[i], grads[i])]
    given = [grads[i] for i in moved]
    for i in moved:
        grads[i] = torch.empty_like(weights[i], dtype=grads[i].dtype, requires_grad=False)
    if moved:
        torch._foreach_copy_([grads[i] for i in moved], given)
    tensors.grads = grads
    return moved


def _differs_in_layout(weight: Tensor, grad: Tensor) -> bool:
    if grad.layout != torch.strided:
        return False  # the checks of a new plan say what is wrong with it
    return grad.stride() != weight.stride() or grad._is_zerotensor()
