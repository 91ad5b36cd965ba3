"""Weights that are gathered in bfloat16, by FSDP2's protocol for tensor subclasses; 2 processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from distributed.sharded_cases import NARROW, make_model

# What has to stay of the class for FSDP2 to pad a shard, and to cut it.
KEPT = frozenset(
    {
        torch.ops.aten.detach.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.slice.Tensor,
        torch.ops.aten.copy_.default,
        torch.ops.aten.view.default,
        torch.ops.aten.as_strided.default,
        torch.ops.aten._to_copy.default,
        torch.ops.aten.split.Tensor,
        torch.ops.aten.clone.default,
        torch.ops.c10d.scatter_.default,
    }
)


class Bare(Tensor):
    """Keeps its numbers in another tensor, and says nothing of it."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Bare:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*tree_map_only(cls, _inner, args), **tree_map_only(cls, _inner, kwargs or {}))
        return tree_map_only(Tensor, cls, out) if func in KEPT else out

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        # Every rank sends as much.
        rows = -(-outer_size[0] // mesh.size())
        padded = self._inner.new_zeros(rows, *self.shape[1:], dtype=torch.bfloat16)
        padded[: len(self._inner)].copy_(self._inner)
        return (padded,), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        (gathered,) = outputs
        if out is not None:
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
                out.copy_(gathered[: len(out)])
            return None
        whole = gathered.to(dtype)
        return whole, (gathered, whole)


def _inner(tensor: Any) -> Tensor:
    return tensor._inner  # type: ignore[no-any-return]


class Flattened(Bare):
    """Names its inner tensor to torch, beside a scale, as torchao's class does."""

    def __init__(self, inner: Tensor) -> None:
        super().__init__(inner)
        self._scale = torch.ones(())

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_inner", "_scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: None, size: Any, stride: Any) -> Flattened:
        return Flattened(inner["_inner"])


class Slotted(Bare):
    """Keeps its numbers in a slot, and wraps whatever comes out of it."""

    __slots__ = ("kept",)

    def __init__(self, inner: Tensor) -> None:
        self.kept = inner

    @property
    def _inner(self) -> Tensor:  # type: ignore[override]
        return self.kept

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*tree_map_only(cls, _inner, args), **tree_map_only(cls, _inner, kwargs or {}))
        return tree_map_only(Tensor, cls, out)


class Doubled(Bare):
    """Has its numbers in two tensors, and does everything with both."""

    def __init__(self, inner: Tensor) -> None:
        super().__init__(inner)
        self._other = inner.clone()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        both = (tree_map_only(cls, lambda t: t._other, part) for part in (args, kwargs or {}))
        given, named = both
        func(*given, **named)
        return out


class Quantized(Bare):
    """Keeps bytes, and gives out numbers that it has made of them, which nobody keeps."""

    def __init__(self, inner: Tensor) -> None:
        self._bytes = (10 * inner).to(torch.int8)

    @property
    def _inner(self) -> Tensor:  # type: ignore[override]
        return self._bytes.float() / 10


def wrapped(model: nn.Module, kind: Callable[[Tensor], Tensor] | None) -> nn.Module:
    """The model with matrices of a class."""
    for module in model.modules():
        if kind is not None and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(kind(module.weight.detach()))
    return model


def fsdp(kind: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every layer over 2 ranks, unevenly: 5 rows, and of the last layer 1, which one rank has."""
    model = wrapped(nn.Sequential(make_model(NARROW), nn.Linear(6, 1)).to(dtype), kind)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model[0], model[1], model):
        fully_shard(part, mesh=mesh)
    return model


def tensor_parallel(kind: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Matrices over 2 ranks along one dimension or the other, or on both."""
    model = make_model().to(dtype)
    mesh = init_device_mesh("cpu", (2,))
    kind = kind or (lambda t: t)
    for layer, place in ((model[0], Shard(0)), (model[1], Replicate())):
        whole = distribute_tensor(layer.weight.detach(), mesh, [place])
        local = DTensor.from_local(kind(whole.to_local()), mesh, [place], run_check=False)
        layer.weight = nn.Parameter(local)
    return model


def plain(kind: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """No DTensors."""
    return wrapped(make_model().to(dtype), kind)


MODELS = {"fsdp": fsdp, "tensor parallel": tensor_parallel, "plain": plain}
KINDS = {"bare": Bare, "flattened": Flattened, "slotted": Slotted}


def local(tensor: Any) -> Tensor:
    """The numbers that this process holds of a tensor, in a plain tensor."""
    held = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return (held._inner if isinstance(held, Bare) else held).detach()
