"""Sharded parameters: DTensors are stepped shard by shard, and only their sums of squares travel.

FSDP2 (``fully_shard``), its hybrid form and tensor parallelism all make DTensors of a model's
parameters, and an optimizer is given those as any others::

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = fastlars.LAMB(fastlars.parameter_groups(model, weight_decay=0.01), lr=2e-3)

A step measures every shard where it lies, adds up the sums over the ranks that hold the other
shards, and applies the rule to the shards. The sums are one float64 [tensors, sums] array for each
mesh and each choice of its dimensions over which parameters are sharded. With ``max_grad_norm``
there is one more, because LAMB's update depends on the clipped gradient. No parameter, gradient or
state is ever gathered, and of replicated parameters nothing travels.
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
from fastlars.optim.wrapped import Path, inside, is_plain, path_inside

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The shard itself. DTensor.to_local() makes a view of every parameter, and takes 25 times as long.
LOCAL: Path = ("_local_tensor",)
_local: Callable[[Any], Any] = attrgetter(*LOCAL)
_placements = attrgetter("_spec.placements")


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor, without the half second that importing them takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def path_to(tensor: Tensor) -> Path:
    """The attributes that lead to the plain tensor with what this process holds of a tensor."""
    return (LOCAL if is_dtensor(tensor) else ()) + path_inside(local(tensor))


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor, which may be of any class; and of others all."""
    return _local(tensor) if is_dtensor(tensor) else tensor


def shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor, and of others all.

    A plain tensor, wherever a subclass has one (:mod:`fastlars.optim.wrapped`).
    """
    return shards([tensor], path_to(tensor))[0]


def shards(tensors: list[Tensor], path: Path) -> list[Tensor]:
    """What this process holds of tensors that all have it at ``path``, without asking each."""
    for name in path:
        tensors = list(map(attrgetter(name), tensors))
    return tensors


def empty_like(tensor: Any, dtype: torch.dtype) -> Tensor:
    """A new tensor with plain memory, shaped, strided and sharded as ``tensor`` is."""
    like = tensor if is_plain(local(tensor)) else shard(tensor)
    out = torch.empty_like(like, dtype=dtype, requires_grad=False)
    if is_dtensor(like) or not is_dtensor(tensor):
        return out
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    lies = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(out, mesh, placements, run_check=False, **lies)


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


class Over(NamedTuple):
    """A mesh, and those of its dimensions over which parameters are sharded."""

    mesh: DeviceMesh
    dims: tuple[int, ...]


def sharded_over(tensor: Any) -> Over | None:
    """Over what a tensor is sharded; None where this process holds all of it."""
    if not is_dtensor(tensor):
        return None
    mesh = tensor.device_mesh
    places = enumerate(zip(tensor.placements, mesh.shape, strict=True))
    dims = tuple(i for i, (place, size) in places if size > 1 and not place.is_replicate())
    return Over(mesh, dims) if dims else None


@dataclass(frozen=True, eq=False)
class Table:
    """The parameters of a group that are sharded alike, in their order, which is that of every
    rank."""

    over: Over
    size: int


@dataclass(frozen=True, eq=False)
class Shards:
    """The rows of a list's parameters in the table of their group."""

    table: Table
    rows: Tensor


def tables(lists: list[tuple[Over | None, list[int]]]) -> list[tuple[Table, Tensor] | None]:
    """For each list of parameters, the table of all that are sharded alike, and the list's rows.

    Lists may be cut differently from rank to rank, so rows follow the parameters' order.
    """
    members: dict[Over, list[int]] = defaultdict(list)
    for over, indices in lists:
        if over is not None:
            members[over] += indices
    known = {over: Table(over, len(indices)) for over, indices in members.items()}
    row = {over: {i: r for r, i in enumerate(sorted(all_))} for over, all_ in members.items()}
    return [
        None
        if over is None
        else (known[over], torch.tensor([row[over][i] for i in indices], device="cpu"))
        for over, indices in lists
    ]


def unwrapped(tensors: Tensors, path: Path) -> Tensors:
    """The plain tensors of a list whose parameters have theirs at ``path``; counters are plain."""
    params: list[Any] = tensors.weights if tensors.copies is None else tensors.copies
    grads = tensors.grads
    sharded = path[:1] == LOCAL
    if sharded and not _alike(grads, params):
        # A gradient may still be a sum over ranks that is pending, as those of norms are under
        # sequence parallelism: torch's optimizers reduce them too.
        grads = [placed(g, p) for g, p in zip(grads, params, strict=True)]
    outer = LOCAL if sharded else ()
    try:
        return replace(
            tensors,
            weights=shards(tensors.weights, path if tensors.copies is None else outer),
            grads=arrived(shards(grads, outer)),
            states=tuple(shards(each, outer) for each in tensors.states),
            copies=None if tensors.copies is None else shards(tensors.copies, path),
        )
    except AttributeError:  # a state was replaced by a plain tensor, or a parameter's shard
        raise Mismatch("states", 0, "type") from None


def _alike(grads: list[Tensor], params: list[Tensor]) -> bool:
    """Whether gradients are DTensors placed as their parameters are, as FSDP2 leaves them."""
    try:
        return list(map(_placements, grads)) == list(map(_placements, params))
    except AttributeError:
        return False


def arrived(grads: list[Any]) -> list[Tensor]:
    """The plain tensors of gradients, once what a collective still writes to them is there."""
    if set(map(type, grads)) == {Tensor}:
        return grads
    grads = [g.wait() if hasattr(g, "wait") and not is_plain(g) else g for g in grads]
    wrapped = [i for i, g in enumerate(grads) if not is_plain(g)]
    found = inside([grads[i] for i in wrapped]) if wrapped else []
    if len(found) == len(wrapped):
        for i, plain in zip(wrapped, found, strict=True):
            grads[i] = plain
    return grads


def complete(parts: list[tuple[Shards | None, Tensor]]) -> list[Tensor]:
    """Every list's sums of squares, over all shards, with the same bits on all ranks.

    All ranks must come here with the same parameters. They take part in the same collectives in the
    same order: lists are cut differently from rank to rank, but the first list that is sharded over
    something has the first such parameter.
    """
    offsets: dict[int, int] = {}
    sizes: dict[Over, int] = defaultdict(int)
    members: dict[Over, list[int]] = defaultdict(list)
    for i, (shards, _) in enumerate(parts):
        if shards is None:
            continue
        table = shards.table
        members[table.over].append(i)
        if id(table) not in offsets:
            offsets[id(table)] = sizes[table.over]
            sizes[table.over] += table.size
    begun = []
    for over, numbers in members.items():
        # Parameters that FSDP2 keeps on the CPU have a mesh, and so groups, of GPUs.
        device = over.mesh.device_type
        width = parts[numbers[0]][1].shape[1]
        array = torch.zeros(sizes[over], width, dtype=torch.float64, device=device)
        places = []
        for i in numbers:
            shards, sums = parts[i]
            assert shards is not None
            places.append(shards.rows + offsets[id(shards.table)])
            array[places[-1].to(array.device)] = sums.to(array.device)
        begun.append((numbers, places, _begin(array, over)))
    found = [sums for _, sums in parts]
    for numbers, places, finish in begun:
        array = finish()
        for i, place in zip(numbers, places, strict=True):
            found[i] = array.to(found[i].device)[place.to(found[i].device)]
    return found


def _begin(array: Tensor, over: Over) -> Callable[[], Tensor]:
    """Start adding up ``array`` over all shards; what waits for the sums, and returns them."""
    mesh, dims = over
    if any(size > 1 and dim not in dims for dim, size in enumerate(mesh.shape)):
        return lambda: _gathered(array, over)
    group = mesh.get_group(dims[0]) if len(dims) == 1 else group_of(mesh)
    waiting = dist.all_reduce(array, group=group, async_op=True)

    def finish() -> Tensor:
        waiting.wait()
        return array

    return finish


def _gathered(array: Tensor, over: Over) -> Tensor:
    """The sums over the shards where there are replicas of them, which must get the same bits.

    Another group adds up for each replica, and a library may add in another order in each: the
    ranks of a group gather what they have, and add in the order of its ranks.
    """
    # Its name from torch 2.14 on, where the older one warns.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    for dim in over.dims:
        size = over.mesh.size(dim)
        parts = array.new_empty(size * len(array), *array.shape[1:])
        gather(parts, array, group=over.mesh.get_group(dim))
        array = _added(parts.view(size, *array.shape))
    return array


def _added(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in halves: an order that no library or device chooses."""
    left = len(parts)
    while left > 1:
        half = (left + 1) // 2
        parts.narrow(0, 0, left - half).add_(parts.narrow(0, half, left - half))
        left = half
    return parts[0]


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
