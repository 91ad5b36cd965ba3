"""DTensors: each process steps its own shard, and only sums of squares are all-reduced.

FSDP2 (``fully_shard``), its hybrid form and tensor parallelism all make DTensors of a model's
parameters, and an optimizer takes DTensors like any other parameters::

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = fastlars.LAMB(fastlars.parameter_groups(model, weight_decay=0.01), lr=2e-3)

Each rank measures its own shards, all-reduces their sums of squares with the ranks that hold the
other shards (``all_reduce_sums``), and applies the rule to its shards. The sums are one float64
array [tensors, sums] for each mesh and each set of its dimensions over which parameters are
sharded; float32 on a device without float64. With ``max_grad_norm`` there is one more all-reduce,
because LAMB's update depends on the clipped gradient. No parameter, gradient or state is gathered,
and replicated parameters need no communication.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastlars.backends.base import Mismatch, Tensors
from fastlars.backends.float64 import to_widest, widest
from fastlars.optim.gradients import plain_gradients
from fastlars.optim.wrapped import Path, is_plain, path_inside

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The shard itself: DTensor.to_local() makes a view of it, which takes 25 times as long.
LOCAL: Path = ("_local_tensor",)
_local: Callable[[Any], Any] = attrgetter(*LOCAL)
_placements = attrgetter("_spec.placements")


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor, without the half second that importing them takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def path_to_plain(tensor: Tensor) -> Path:
    """The attributes that lead from a tensor to ``plain_shard``."""
    return (LOCAL if is_dtensor(tensor) else ()) + path_inside(local_tensor(tensor))


def local_tensor(tensor: Tensor) -> Tensor:
    """The shard of a DTensor, which may be a subclass itself; any other tensor unchanged."""
    return _local(tensor) if is_dtensor(tensor) else tensor


def plain_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor, all of any other tensor.

    The result is a plain tensor, also where a subclass keeps its numbers in one
    (``fastlars.optim.wrapped``).
    """
    local = local_tensor(tensor)
    return local if is_plain(local) else at_path([local], path_inside(local))[0]


def at_path(tensors: list[Tensor], path: Path) -> list[Tensor]:
    """Follow the attributes of ``path`` from each tensor. All tensors must have that path."""
    for name in path:
        tensors = list(map(attrgetter(name), tensors))
    return tensors


def empty_like(tensor: Any, dtype: torch.dtype) -> Tensor:
    """A new tensor with plain memory, shaped, strided and sharded as ``tensor`` is."""
    like = tensor if is_plain(local_tensor(tensor)) else plain_shard(tensor)
    out = torch.empty_like(like, dtype=dtype, requires_grad=False)
    if is_dtensor(like) or not is_dtensor(tensor):
        return out
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    whole = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(out, mesh, placements, run_check=False, **whole)


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The device mesh of a DTensor; None for other tensors."""
    return tensor.device_mesh if is_dtensor(tensor) else None  # type: ignore[attr-defined]


def redistribute_like(tensor: Any, like: Any) -> Tensor:
    """``tensor`` with the placements of the DTensor ``like``. A plain ``tensor`` must be whole, and
    equal on all ranks."""
    if not is_dtensor(tensor):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = like.device_mesh
        whole = tensor.to(_local(like).device)
        tensor = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor


class MeshDims(NamedTuple):
    """A device mesh, and those of its dimensions over which parameters are sharded."""

    mesh: DeviceMesh
    dims: tuple[int, ...]


def sharded_over(tensor: Any) -> MeshDims | None:
    """The mesh dimensions that shard a tensor; None where this process holds all of it."""
    if not is_dtensor(tensor):
        return None
    mesh = tensor.device_mesh
    places = enumerate(zip(tensor.placements, mesh.shape, strict=True))
    dims = tuple(i for i, (place, size) in places if size > 1 and not place.is_replicate())
    return MeshDims(mesh, dims) if dims else None


@dataclass(frozen=True, eq=False)
class SumsTable:
    """Describes the array of sums of one group's parameters that are sharded over the same mesh
    dimensions: a row for each, in the order of the group, which is the same on every rank."""

    mesh_dims: MeshDims
    size: int  # rows


@dataclass(frozen=True, eq=False)
class TableRows:
    """The rows of one batch's parameters in the ``SumsTable`` of their group."""

    table: SumsTable
    rows: Tensor


def table_rows(
    batches: list[tuple[MeshDims | None, torch.device, list[int]]],
) -> list[TableRows | None]:
    """For each batch of a group's parameters, their rows, on its device; None if not sharded.

    Ranks may cut a group into different batches, so rows follow the order of the group.
    """
    members: dict[MeshDims, list[int]] = defaultdict(list)
    for key, _, indices in batches:
        if key is not None:
            members[key] += indices
    table = {key: SumsTable(key, len(indices)) for key, indices in members.items()}
    row = {key: {i: r for r, i in enumerate(sorted(all_))} for key, all_ in members.items()}
    return [
        None
        if key is None
        else TableRows(
            table[key], torch.tensor([row[key][i] for i in indices], device="cpu").to(device)
        )
        for key, device, indices in batches
    ]


def plain_tensors(tensors: Tensors, path: Path) -> Tensors:
    """The plain tensors of a batch whose parameters have theirs at ``path``; counters are plain."""
    params: list[Any] = tensors.weights if tensors.copies is None else tensors.copies
    grads = tensors.grads
    sharded = path[:1] == LOCAL
    if sharded and not placed_alike(grads, params):
        # A gradient may still be a pending sum over ranks, as that of a norm layer under sequence
        # parallelism: torch's optimizers reduce it too.
        grads = [redistribute_like(g, p) for g, p in zip(grads, params, strict=True)]
    outer = LOCAL if sharded else ()
    try:
        return replace(
            tensors,
            weights=at_path(tensors.weights, path if tensors.copies is None else outer),
            grads=plain_gradients(at_path(grads, outer)),
            states=tuple(at_path(each, outer) for each in tensors.states),
            copies=None if tensors.copies is None else at_path(tensors.copies, path),
        )
    except AttributeError:  # a state was replaced by a plain tensor, or a parameter's shard
        raise Mismatch("states", 0, "type") from None


def placed_alike(grads: list[Tensor], params: list[Tensor]) -> bool:
    """Whether gradients are DTensors placed as their parameters are, as FSDP2 leaves them."""
    try:
        return list(map(_placements, grads)) == list(map(_placements, params))
    except AttributeError:
        return False


def all_reduce_sums(batches: list[tuple[TableRows | None, Tensor]]) -> list[Tensor]:
    """Every batch's sums of squares over all shards, with the same bits on all ranks.

    All ranks must call this with the same parameters. They then enter the same collectives in the
    same order. Ranks may cut their parameters into different batches, but a batch is listed at the
    place of its first parameter, so mesh dimensions first occur in the same order on every rank.
    """
    offsets: dict[int, int] = {}  # where a table begins in the array of its mesh dimensions
    sizes: dict[MeshDims, int] = defaultdict(int)
    members: dict[MeshDims, list[int]] = defaultdict(list)
    for i, (rows, _) in enumerate(batches):
        if rows is None:
            continue
        table = rows.table
        members[table.mesh_dims].append(i)
        if id(table) not in offsets:
            offsets[id(table)] = sizes[table.mesh_dims]
            sizes[table.mesh_dims] += table.size
    started = []
    for mesh_dims, indices in members.items():
        # Parameters that FSDP2 offloads to the CPU have a mesh, and so process groups, of GPUs.
        device = torch.device(mesh_dims.mesh.device_type)
        width = batches[indices[0]][1].shape[1]
        array = torch.zeros(sizes[mesh_dims], width, dtype=widest(device), device=device)
        places = []
        for i in indices:
            rows, sums = batches[i]
            assert rows is not None
            places.append(rows.rows + offsets[id(rows.table)])
            array[places[-1].to(device)] = to_widest(sums, device)
        started.append((indices, places, _all_reduce_async(array, mesh_dims)))
    reduced = [sums for _, sums in batches]
    for indices, places, finish in started:
        array = finish()
        for i, place in zip(indices, places, strict=True):
            reduced[i] = to_widest(array, reduced[i].device)[place.to(reduced[i].device)]
    return reduced


def _all_reduce_async(array: Tensor, mesh_dims: MeshDims) -> Callable[[], Tensor]:
    """Start to sum ``array`` over all shards; return a function that waits, and returns the sum."""
    mesh, dims = mesh_dims
    if any(size > 1 and dim not in dims for dim, size in enumerate(mesh.shape)):
        return lambda: _sum_in_rank_order(array, mesh_dims)
    group = mesh.get_group(dims[0]) if len(dims) == 1 else process_group_of(mesh)
    waiting = dist.all_reduce(array, group=group, async_op=True)

    def finish() -> Tensor:
        waiting.wait()
        return array

    return finish


def _sum_in_rank_order(array: Tensor, mesh_dims: MeshDims) -> Tensor:
    """Sum over the shards of parameters that also have replicas, which must get the same bits.

    Each replica's shards are summed by another process group, and a library may add in another
    order in each group. So the ranks of a group gather the addends, and add in rank order.
    """
    # all_gather_single is the name from torch 2.14 on, where the older name warns.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    for dim in mesh_dims.dims:
        size = mesh_dims.mesh.size(dim)
        parts = array.new_empty(size * len(array), *array.shape[1:])
        gather(parts, array, group=mesh_dims.mesh.get_group(dim))
        array = _sum_in_halves(parts.view(size, *array.shape))
    return array


def _sum_in_halves(parts: Tensor) -> Tensor:
    """The sum over the first dimension, pairwise: the order depends on no library or device."""
    left = len(parts)
    while left > 1:
        half = (left + 1) // 2
        parts.narrow(0, 0, left - half).add_(parts.narrow(0, half, left - half))
        left = half
    return parts[0]


# Process groups made here, by mesh, and the default group that existed then: destroying that one
# destroys these too.
_groups: dict[DeviceMesh, Any] = {}
_groups_made_under: list[Any] = [None]


def process_group_of(mesh: DeviceMesh) -> Any:
    """A process group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if _groups_made_under[0] is not dist.group.WORLD:
        _groups.clear()
        _groups_made_under[0] = dist.group.WORLD
    if mesh not in _groups:
        # Synchronized among these ranks alone: ranks outside the mesh do not call this.
        ranks = sorted(mesh.mesh.flatten().tolist())
        _groups[mesh] = dist.new_group(ranks, use_local_synchronization=True)
    return _groups[mesh]
