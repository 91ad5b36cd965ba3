"""Snapshots of what was used during backward, which ``step()`` checks for changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import is_dense
from fastlars.in_backward.released import is_released
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.dtensor import is_dtensor, plain_shard
from fastlars.optim.values import comparable_copy, same_objects, unchanged

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 2**20  # elements


def checksums(tensors: list[Tensor]) -> list[Tensor]:
    """For each tensor, the sum of its elements' bits, read as integers."""
    return [_checksum(plain_shard(t.detach()).resolve_neg()) for t in tensors]


def _checksum(tensor: Tensor) -> Tensor:
    if is_dense(tensor):  # in the order of its memory, which needs no copy
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    bits = tensor.view(_BITS[tensor.itemsize])
    # Part by part: torch makes a copy in int64 of what it adds up.
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_PART)]).sum()


def _stacked(sums: list[Tensor]) -> Tensor:
    return torch.stack([each.to(sums[0].device) for each in sums])


def _versions_and_storages(tensors: list[Tensor]) -> list[int]:
    """Numbers that change if autograd sees a write to a tensor, or if its memory is replaced."""
    plain = [plain_shard(t) if is_dtensor(t) else t for t in tensors]
    # A write to a DTensor raises its own version alone, one to its shard the shard's.
    return [t._version for t in (*tensors, *plain)] + [t.untyped_storage()._cdata for t in plain]


def _largest(grads: list[Tensor]) -> Tensor:
    """The largest shard on the CPU; an empty tensor without one.

    There autograd does not see what multi-tensor functions write into a DTensor (pytorch#191154).
    clip_grad_norm_ and GradScaler.unscale_ write all elements.
    """
    shards = (plain_shard(g) for g in grads if is_dtensor(g))
    return max(
        (s for s in shards if s.is_cpu), key=Tensor.numel, default=torch.empty(0, device="cpu")
    )


def _sample(shard: Tensor) -> Tensor:
    """The bits of up to 2,048 of its elements."""
    flat = shard.reshape(-1)
    return flat[:: max(1, len(flat) // 1024)].clone().view(_BITS[flat.itemsize])


class TensorSnapshot:
    """Parameters, their gradients and states at the end of backward.

    Attributes:
        unseen: whether ``changed`` has found a write of which autograd knows nothing.
    """

    def __init__(
        self, params: list[Tensor], reduced: list[Tensor] | None, states: list[Tensor], exact: bool
    ) -> None:
        """Args:
        params: parameters whose gradients were used, or will be in later steps.
        reduced: their gradients in DDP's buckets, if those were used; None if others were:
            gradients in half precision, or ``p.grad``.
        states: the states of the parameters.
        exact: also take checksums, which find changes through ``.data``, at the cost of reading all
            gradients, weights and states once more.
        """
        self._params = params
        self._grads = [p.grad for p in params]
        self._present = [g for g in self._grads if g is not None and not is_released(g)]
        self._states = states
        self._grad_versions = _versions_and_storages(self._present)
        self._weight_versions = _versions_and_storages(params)
        self.unseen = False
        self._largest = _largest(self._present)
        self._sample = _sample(self._largest)
        self._sums: list[Tensor] = []
        if exact:
            used = self._present
            if reduced is not None:
                used = [r for r, g in zip(reduced, self._grads, strict=True) if g is not None]
            self._sums = checksums(used + params + states)

    def changed(self) -> str | None:
        """Name the first thing that was changed since, if any."""
        grads = self._present
        same = same_objects([p.grad for p in self._params], self._grads)
        if not same or _versions_and_storages(grads) != self._grad_versions:
            return "gradient"
        if _versions_and_storages(self._params) != self._weight_versions:
            return "weight"
        self.unseen = True  # what is found from here on
        if not torch.equal(self._sample, _sample(self._largest)):
            return "gradient"
        if self._sums:
            current = checksums(grads + self._params + self._states)
            wrong = (_stacked(self._sums) != _stacked(current)).nonzero()
            names = ("gradient",) * len(grads) + ("weight",) * len(self._params)
            if len(wrong) > 0:
                return (*names, *["state"] * len(self._states))[int(wrong[0])]
        self.unseen = False
        return None


class OptionsSnapshot:
    """The options and the parameters of all groups when the first bucket arrives."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._values = self._read(optimizer)
        self.members = [list(group["params"]) for group in optimizer.param_groups]

    @staticmethod
    def _read(optimizer: FusedOptimizer) -> list[Any]:
        # needs_norm includes skip_if, which is not an option of groups.
        groups = ([_comparable(g[n]) for n in optimizer.defaults] for g in optimizer.param_groups)
        return [optimizer.stepper.needs_norm(optimizer.param_groups), *groups]

    def changed(self, optimizer: FusedOptimizer) -> str | None:
        """Name the first thing that was changed since, if any."""
        if not same_param_lists(
            self.members, [group["params"] for group in optimizer.param_groups]
        ):
            return "list of parameters"
        return None if unchanged(self._values, self._read(optimizer)) else "hyper-parameter"


def same_param_lists(known: list[list[Tensor]], current: list[list[Tensor]]) -> bool:
    """Whether the groups hold the same parameters, in the same order."""
    return len(known) == len(current) and all(map(same_objects, known, current))


def _comparable(value: Any) -> Any:
    """A copy of an option to compare with later; of a GPU tensor its identity and version, because
    to read the tensor the host would have to wait."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return id(value), value._version
    return comparable_copy(value)
