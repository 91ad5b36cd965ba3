"""What overlap has used during backward, to be compared with what there is in ``step()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer
from fastlars.optim.dtensor import plain_shard
from fastlars.optim.values import kept, same_objects, unchanged

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(tensors: list[Tensor]) -> list[Tensor]:
    """For each tensor the sum of its bits, taken for integers."""
    return [
        local.view(_BITS[local.itemsize]).sum(dtype=torch.int64)
        for local in (plain_shard(t.detach()).resolve_neg() for t in tensors)
    ]


def _together(sums: list[Tensor]) -> Tensor:
    return torch.stack([each.to(sums[0].device) for each in sums])


def _marks(tensors: list[Tensor]) -> list[int]:
    """What changes with every write that autograd sees, and with other memory."""
    return [t._version for t in tensors] + [t.untyped_storage()._cdata for t in tensors]


class Snapshot:
    """Parameters and their gradients at the end of backward."""

    def __init__(
        self, params: list[Tensor], reduced: list[Tensor] | None, states: list[Tensor], exact: bool
    ) -> None:
        """Args:
        params: those whose gradients overlap has used, or will use in later steps.
        reduced: their gradients in DDP's buckets, which are what was used; None where others
            were, in half precision.
        states: of the parameters, as far as there are any.
        exact: also take checksums, which see changes through ``.data``, for a pass over gradients,
            weights and states.
        """
        self._params = params
        self._grads = [p.grad for p in params]
        self._given = [g for g in self._grads if g is not None]
        self._states = states
        self._grad_marks = _marks(self._given)
        self._weight_marks = _marks(params)
        self._sums: list[Tensor] = []
        if exact:
            used = self._given
            if reduced is not None:
                used = [r for r, g in zip(reduced, self._grads, strict=True) if g is not None]
            self._sums = checksums(used + params + states)

    def changed(self) -> str | None:
        """What was changed since, if anything."""
        given = self._given
        same = same_objects([p.grad for p in self._params], self._grads)
        if not same or _marks(given) != self._grad_marks:
            return "gradient"
        if _marks(self._params) != self._weight_marks:
            return "weight"
        if self._sums:
            now = checksums(given + self._params + self._states)
            wrong = (_together(self._sums) != _together(now)).nonzero()
            names = ("gradient",) * len(given) + ("weight",) * len(self._params)
            if len(wrong) > 0:
                return (*names, *["state"] * len(self._states))[int(wrong[0])]
        return None


class Options:
    """The options and the parameters of all groups, when the first bucket arrives."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._values = self._read(optimizer)
        self.members = [list(group["params"]) for group in optimizer.param_groups]

    @staticmethod
    def _read(optimizer: FusedOptimizer) -> list[Any]:
        # skip_if is of no group.
        groups = ([_plain(g[n]) for n in optimizer.defaults] for g in optimizer.param_groups)
        return [optimizer.stepper.needs_norm(optimizer.param_groups), *groups]

    def changed(self, optimizer: FusedOptimizer) -> str | None:
        """What was changed since, if anything."""
        if not same_members(self.members, [group["params"] for group in optimizer.param_groups]):
            return "list of parameters"
        return None if unchanged(self._values, self._read(optimizer)) else "hyper-parameter"


def same_members(known: list[list[Tensor]], now: list[list[Tensor]]) -> bool:
    """Whether lists hold the same parameters, in the same order."""
    return len(known) == len(now) and all(map(same_objects, known, now))


def _plain(value: Any) -> Any:
    """A value to compare with later: of a tensor the number, where reading it does not wait."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return id(value), value._version
    return kept(value)
