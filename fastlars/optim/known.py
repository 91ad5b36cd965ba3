"""Known: what plans have found out about the parameters of a group, for the plans after them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import fastlars._C as _C
from fastlars.backends.base import Backend, Dtypes
from fastlars.backends.cpu import viewer
from fastlars.optim.sharded import Over, shards
from fastlars.optim.values import same_objects
from fastlars.optim.wrapped import Path

if TYPE_CHECKING:
    from fastlars.optim.plan import Plan

# Of a group, for that many sets of gradients; one holds a few words for each tensor.
MOST_PLANS = 8


class Kind(NamedTuple):
    """What parameters must have alike to be stepped in one call."""

    device: torch.device
    dtypes: Dtypes
    backend: Backend
    path: Path  # to the plain tensor of a parameter
    over: Over | None


class Row(NamedTuple):
    """A parameter that was checked with a gradient of this type."""

    grad_type: type
    kind: Kind
    states: dict[str, Any]
    single: bool  # it has one element


class Known:
    """The parameters of a group that were checked, and how they lay then.

    Where other parameters get gradients than in the step before (dropped layers, experts, networks
    that take turns), the next plan takes from here what would cost 40 us to check for each of them.
    """

    def __init__(self, params: list[Tensor], rows: dict[int, Row], before: Known | None) -> None:
        """Args:
        params: all parameters of the group.
        rows: of those that the plan has checked, by their place in the group.
        before: what earlier plans knew; it is kept where it still holds.
        """
        self.params = params
        self.rows: dict[int, Row] = rows
        if before is not None and before.is_of(params) and before.lie_as_before():
            # Dtypes are told apart by identity, because to compare them costs 1 us for each tensor.
            alike = {row.kind: row.kind for row in before.rows.values()}
            new = {i: row._replace(kind=alike.get(row.kind, row.kind)) for i, row in rows.items()}
            self.rows = {**before.rows, **new}
        self.plans: dict[tuple[type, ...], Plan] = {}
        self._layout = self._lies()

    def is_of(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters."""
        return same_objects(params, self.params)

    def lie_as_before(self) -> bool:
        """Whether all have the devices, shapes and strides with which they were checked."""
        try:
            return bool(self._layout == self._lies())
        except AttributeError:  # another tensor subclass than before
            return False

    def _lies(self) -> Any:
        # Shards are not kept: FSDP2 replaces them where a model is moved.
        rows = self.rows.items()
        now = [shards([self.params[i]], row.kind.path)[0] for i, row in rows]
        return _C.Layout(viewer(), now)

    def keep(self, types: tuple[type, ...], plan: Plan) -> None:
        """Keep the plan of a set of gradients, and forget the one that was longest not in use."""
        self.plans[types] = plan
        if len(self.plans) > MOST_PLANS:
            self.plans.pop(next(iter(self.plans)))
