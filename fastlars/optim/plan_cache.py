"""PlanCache: what a group's plans have checked, for later steps in which other parameters have
gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends.base import Backend, Dtypes
from fastlars.backends.cpu import viewer
from fastlars.optim.dtensor import MeshDims, at_path
from fastlars.optim.values import same_objects
from fastlars.optim.wrapped import Path

if TYPE_CHECKING:
    from fastlars.optim.plan import GroupPlan

# Plans that a group keeps, one for each set of parameters with gradients. A plan holds a few words
# for each tensor.
MAX_PLANS = 8


class BatchKey(NamedTuple):
    """What parameters must have in common to be stepped in one call of a back end."""

    device: torch.device
    dtypes: Dtypes
    backend: Backend
    path: Path  # from a parameter to its plain tensor
    mesh_dims: MeshDims | None  # that shard the parameters


class CheckedParameter(NamedTuple):
    """A parameter that passed all checks with a gradient of this type."""

    grad_type: type
    key: BatchKey
    states: dict[str, Any]
    has_one_element: bool


class PlanCache:
    """The parameters of a group that passed all checks, with the layout that was checked, and the
    group's recent plans.

    Where other parameters have gradients than in the step before (dropped layers, experts, networks
    that take turns), the next plan is made from here. To check each parameter again would cost
    40 us a parameter.
    """

    def __init__(
        self,
        params: list[Tensor],
        checked: dict[int, CheckedParameter],
        before: PlanCache | None,
    ) -> None:
        """Args:
        params: all parameters of the group.
        checked: those that the new plan has checked, by their index in the group.
        before: the cache of earlier plans; its entries are kept where they still hold.
        """
        self.params = params
        self.checked = checked
        if before is not None and before.is_of(params) and before.layout_is_unchanged():
            # Equal keys become one object: plans compare them by identity, because to compare
            # their fields costs 1 us a tensor.
            known = {each.key: each.key for each in before.checked.values()}
            new = {i: c._replace(key=known.get(c.key, c.key)) for i, c in checked.items()}
            self.checked = {**before.checked, **new}
        self.plans: dict[tuple[type, ...], GroupPlan] = {}
        self._layout = self._current_layout()

    def is_of(self, params: list[Tensor]) -> bool:
        """Whether the cache is of these parameters."""
        return same_objects(params, self.params)

    def layout_is_unchanged(self) -> bool:
        """Whether all parameters have the devices, shapes and strides that were checked."""
        try:
            return bool(self._layout == self._current_layout())
        except AttributeError:  # a parameter is of another tensor subclass than before
            return False

    def _current_layout(self) -> Any:
        # Shards are looked up each time: FSDP2 replaces them when a model is moved.
        checked = self.checked.items()
        return _C.Layout(viewer(), [at_path([self.params[i]], c.key.path)[0] for i, c in checked])

    def keep(self, grad_types: tuple[type, ...], plan: GroupPlan) -> None:
        """Keep the plan for a set of gradients, and drop the plan that was unused the longest."""
        self.plans[grad_types] = plan
        if len(self.plans) > MAX_PLANS:
            self.plans.pop(next(iter(self.plans)))
