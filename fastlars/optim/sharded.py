"""Sharded parameters: DTensors are stepped shard by shard, and only their sums of squares travel.

FSDP2 (``fully_shard``), its hybrid form and tensor parallelism all make DTensors of a model's
parameters, and an optimizer is given those as any others::

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = fastlars.LAMB(fastlars.parameter_groups(model, weight_decay=0.01), lr=2e-3)

A step measures every shard where it lies, adds up the sums in one all-reduce of a float64
[tensors, 2] array for each mesh, and applies the rule to the shards. With ``max_grad_norm`` there
is one more, because LAMB's update depends on the clipped gradient. No parameter, gradient or state
is ever gathered.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlars.backends.base import Mismatch, Tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The shard itself. DTensor.to_local() makes a view of every parameter, at 25 times the price.
_local = attrgetter("_local_tensor")
_placements = attrgetter("_spec.placements")


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor, without the half second that importing them takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor, and of others all."""
    return _local(tensor) if is_dtensor(tensor) else tensor


def shards(tensors: list[Tensor]) -> list[Tensor]:
    """What this process holds of tensors that are all DTensors, without asking each."""
    return list(map(_local, tensors))


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh over which a DTensor is spread; None for other tensors."""
    return tensor.device_mesh if is_dtensor(tensor) else None  # type: ignore[attr-defined]


def placed(tensor: Any, like: Any) -> Tensor:
    """``tensor``, spread as the DTensor ``like`` is; a plain one is whole, and alike everywhere."""
    if not is_dtensor(tensor):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = like.device_mesh
        whole = tensor.to(_local(like).device)
        tensor = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor


@dataclass(frozen=True, eq=False)
class Table:
    """The parameters that a group has on one mesh, in their order, which is that of every rank."""

    mesh: DeviceMesh
    size: int


@dataclass(frozen=True, eq=False)
class Shards:
    """Where the parameters of one list stand among the others of their mesh.

    Attributes:
        table: of all lists of the group on this mesh.
        rows: of the parameters, in the table.
        elsewhere: bool [tensors, 1], True where another rank counts the same elements.
    """

    table: Table
    rows: Tensor
    elsewhere: Tensor | None


def tables(meshes: list[tuple[DeviceMesh | None, list[int]]]) -> list[tuple[Table, Tensor] | None]:
    """A table for each mesh, and the rows in it of each list's parameters.

    Lists may be cut differently from rank to rank, so rows follow the parameters' order.
    """
    members: dict[DeviceMesh, list[int]] = defaultdict(list)
    for mesh, indices in meshes:
        if mesh is not None:
            members[mesh] += indices
    known = {mesh: Table(mesh, len(indices)) for mesh, indices in members.items()}
    row = {mesh: {i: r for r, i in enumerate(sorted(all_))} for mesh, all_ in members.items()}
    return [
        None
        if mesh is None
        else (known[mesh], torch.tensor([row[mesh][i] for i in indices], device="cpu"))
        for mesh, indices in meshes
    ]


def shards_of(table: Table, rows: Tensor, params: list[Any]) -> Shards:
    """A list's place in its table. Replicas are counted on the first rank that holds them."""
    here = table.mesh.get_coordinate()
    assert here is not None
    device = _local(params[0]).device
    again = [
        any(place.is_replicate() and x > 0 for place, x in zip(p.placements, here, strict=True))
        for p in params
    ]
    elsewhere = torch.tensor(again, device=device).unsqueeze(1) if any(again) else None
    return Shards(table, rows.to(device), elsewhere)


def unwrapped(tensors: Tensors) -> Tensors:
    """The shards of a list of DTensors; counters are whole everywhere."""
    params: list[Any] = tensors.weights if tensors.copies is None else tensors.copies
    grads = tensors.grads
    if not _alike(grads, params):
        # A gradient may still be a sum over ranks that is pending, as those of norms are under
        # sequence parallelism: torch's optimizers reduce them too.
        grads = [placed(g, p) for g, p in zip(grads, params, strict=True)]
    try:
        return replace(
            tensors,
            weights=shards(tensors.weights),
            grads=list(map(_arrived, shards(grads))),
            states=tuple(map(shards, tensors.states)),
            copies=None if tensors.copies is None else shards(tensors.copies),
        )
    except AttributeError:  # a state was replaced by a plain tensor
        raise Mismatch("states", 0, "type") from None


def _alike(grads: list[Tensor], params: list[Tensor]) -> bool:
    """Whether gradients are DTensors placed as their parameters are, as FSDP2 leaves them."""
    try:
        return list(map(_placements, grads)) == list(map(_placements, params))
    except AttributeError:
        return False


def _arrived(local: Tensor) -> Tensor:
    return local if type(local) is Tensor else getattr(local, "wait", lambda: local)()


def complete(parts: list[tuple[Shards | None, Tensor]]) -> list[Tensor]:
    """Every list's sums of squares, over all shards: one all-reduce for each mesh.

    It gives the same bits on all ranks, so that replicas stay alike. All ranks must come here with
    the same parameters.
    """
    offsets: dict[int, int] = {}
    sizes: dict[DeviceMesh, int] = defaultdict(int)
    members: dict[DeviceMesh, list[int]] = defaultdict(list)
    for i, (shards, sums) in enumerate(parts):
        if shards is None:
            continue
        table = shards.table
        members[table.mesh].append(i)
        if id(table) not in offsets:
            offsets[id(table)] = sizes[table.mesh]
            sizes[table.mesh] += table.size
        if shards.elsewhere is not None:
            # Not a product: 0 times infinity is not 0.
            sums.masked_fill_(shards.elsewhere, 0.0)
    begun = []
    for mesh, numbers in members.items():
        first = parts[numbers[0]][1]
        array = first.new_zeros(sizes[mesh], 2)
        places = []
        for i in numbers:
            shards, sums = parts[i]
            assert shards is not None
            places.append(shards.rows + offsets[id(shards.table)])
            array[places[-1]] = sums.to(array.device)
        begun.append((numbers, places, *_begin(array, mesh)))
    found = [sums for _, sums in parts]
    for numbers, places, array, waiting in begun:
        if waiting is not None:
            waiting.wait()
        for i, place in zip(numbers, places, strict=True):
            found[i] = array.to(found[i].device)[place.to(found[i].device)]
    return found


def _begin(array: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Any]:
    """Start adding up ``array`` over all ranks of a mesh; what to wait for."""
    if mesh.size() == 1:
        return array, None
    # Parameters that FSDP2 keeps on the CPU have a mesh, and so a group, of GPUs.
    array = array.to(mesh.device_type)
    return array, dist.all_reduce(array, group=group_of(mesh), async_op=True)


# Groups made here, by mesh, and the default group under which they were made.
_groups: dict[DeviceMesh, Any] = {}
_made_under: list[Any] = [None]


def group_of(mesh: DeviceMesh) -> Any:
    """A group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if _made_under[0] is not dist.group.WORLD:
        _groups.clear()
        _made_under[0] = dist.group.WORLD
    if mesh not in _groups:
        # Ranks outside the mesh may be doing something else.
        ranks = sorted(mesh.mesh.flatten().tolist())
        _groups[mesh] = dist.new_group(ranks, use_local_synchronization=True)
    return _groups[mesh]
