"""Models sharded in every way, and the same steps without sharding, for 4 processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastlars.optim.base import FusedOptimizer
from tolerances import assert_close

COUNTERS = ("step", "last_lr")
WIDE, NARROW = 8, 5  # 5 rows over 4 ranks: shards of 2, 2, 1 and 0


@functools.cache
def cpu_mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """One mesh for the models of all cases: a mesh makes process groups, and a group threads."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def make_model(width: int = WIDE) -> nn.Sequential:
    """Two linear layers and a norm, the same on every rank."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, width), nn.Linear(width, 6), nn.LayerNorm(6))


def fsdp(policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """Every layer over 4 ranks, unevenly."""
    model = make_model(NARROW)
    mesh = cpu_mesh(4)
    for part in (*model, model):
        fully_shard(part, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return model


def fsdp_bf16() -> nn.Module:
    return fsdp(MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def fsdp_columns() -> nn.Module:
    """One layer along its second dimension, where FSDP2 takes even shards alone."""
    model = make_model()
    mesh = cpu_mesh(4)
    columns = model[1].weight
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if p is columns else 0))
    return model


def hsdp() -> nn.Module:
    """Replicated over 2, sharded over 2."""
    model = make_model(NARROW)
    fully_shard(model, mesh=cpu_mesh(2, 2, names=("rep", "shard")))
    return model


def tensor_parallel() -> nn.Module:
    """Linear layers over 4 ranks, one bias replicated; the norm has plain parameters."""
    model = make_model()
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, cpu_mesh(4), plan)
    return model


def sequence_parallel() -> nn.Module:
    """The norm works on a part of the sequence: its gradients are sums that are pending."""
    model = make_model()
    plan = {
        "0": ColwiseParallel(),
        "1": RowwiseParallel(output_layouts=Shard(1)),
        "2": SequenceParallel(),
    }
    parallelize_module(model, cpu_mesh(4), plan)
    return model


def _both(mesh: Any) -> nn.Module:
    model = make_model()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model


def two_dimensions() -> nn.Module:
    """FSDP2 over tensor parallel: a mesh of 2 x 2, and one of 2 for the norm."""
    return _both(cpu_mesh(2, 2, names=("dp", "tp")))


def part_of_the_ranks() -> nn.Module:
    """As above in each half of the ranks: no mesh spans all of them."""
    return _both(cpu_mesh(2, 1, 2, names=("pp", "dp", "tp")))


def side_by_side() -> nn.Module:
    """One layer sharded, the others plain."""
    model = make_model(NARROW)
    fully_shard(model[0], mesh=cpu_mesh(4))
    return model


# name: how
LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "fsdp": fsdp,
    "fsdp bf16": fsdp_bf16,
    "fsdp columns": fsdp_columns,
    "hsdp": hsdp,
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
    "two dimensions": two_dimensions,
    "part of the ranks": part_of_the_ranks,
    "side by side": side_by_side,
}


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, wherever its shards are."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def groups(params: list[Any]) -> list[dict[str, Any]]:
    """Matrices in one group, vectors in another, and the last in one that is not adapted."""
    vectors = [p for p in params if p.dim() < 2]
    return [
        {"params": [p for p in params if p.dim() >= 2]},
        {"params": vectors[:-1], "weight_decay": 0.1},
        {"params": vectors[-1:], "weight_decay": 0.0, "adapt": False},
    ]


def reports(optimizer: FusedOptimizer) -> dict[Tensor, Tensor]:
    """What the last step has reported of every parameter: its trust ratio, and norms."""
    results = optimizer.stepper.results
    return {p: row for r in results for p, row in zip(r.params, r.report, strict=True)}


def backward(model: nn.Module, step: int) -> None:
    """Gradients of random data; different on those ranks whose gradients FSDP2 averages."""
    averages = hasattr(model, "unshard")
    torch.manual_seed(100 * step + (dist.get_rank() // 2 if averages else 0))
    model.zero_grad()
    model(torch.randn(3, 4, 6)).float().square().mean().backward()


Moved = list[tuple[str, tuple[int, ...]]]


class Collectives(TorchDispatchMode):
    """Notes every collective, and the shape of each tensor that it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Moved = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what DTensor does comes here, tensor by tensor
        name = func.name()
        if "c10d" in func.namespace and not name.endswith(("wait_tensor", "_wrap_tensor_autograd")):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
            self.seen += [(name.split("::")[1], tuple(t.shape)) for t in tensors]
        return func(*args, **(kwargs or {}))


class Pair:
    """Sharded parameters and their optimizer, and the same parameters, whole, with theirs."""

    def __init__(
        self, params: Iterable[Any], make: Callable[..., FusedOptimizer], **options: Any
    ) -> None:
        self.params = list(params)
        self.twins = [nn.Parameter(whole(p)) for p in self.params]
        self.optimizer = make(groups(self.params), **options)
        self.reference = make(groups(self.twins), **options)

    def step(self) -> Moved:
        """One step of both, from the same gradients; the collectives of the sharded one."""
        for p, twin in zip(self.params, self.twins, strict=True):
            twin.grad = None if p.grad is None else whole(p.grad)
        self.reference.step()
        with Collectives() as collectives:
            self.optimizer.step()
        return collectives.seen

    def differences(self) -> list[str]:
        """Where weights, states or reports disagree beyond rounding. All ranks ask together."""
        found = []
        for kind, name, actual, expected in [*self._reports(), *self._tensors()]:
            # Whoever raised here would leave the others waiting for the next tensor's shards.
            try:
                finite = expected[expected.isfinite()].abs()
                scale = float(finite.max()) if finite.numel() else 0.0
                assert_close(name, kind, actual, expected, scale)
            except AssertionError as error:
                found.append(str(error))
        return found

    def _reports(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Ratios and norms, those of whole layers."""
        found, expected = reports(self.optimizer), reports(self.reference)
        for i, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            assert (p in found) == (twin in expected)
            if p in found:
                names = "ratio", *self.optimizer.rule.norms
                for name, ours, theirs in zip(names, found[p], expected[twin], strict=True):
                    yield "ratio", f"{name} {i}", ours, theirs

    def _tensors(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        for i, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            states, others = self.optimizer.state[p], self.reference.state[twin]
            # A rounded weight is held against its master: two masters a hair apart may round apart.
            yield "weight", f"weight {i}", whole(p), whole(others.get("master", twin))
            assert states.keys() == others.keys()
            for name, value in states.items():
                assert isinstance(value, DTensor) == (
                    isinstance(p, DTensor) and name not in COUNTERS
                )
                yield "state", f"{name} {i}", whole(value), others[name]


def split_replicas(params: Iterable[Any]) -> list[str]:
    """Parameters of which two ranks that hold the same part hold different bits."""
    found = []
    for i, p in enumerate(params):
        part: Any = ()
        if isinstance(p, DTensor):
            at = zip(p.device_mesh.get_coordinate() or (), p.placements, strict=True)
            part = [x for x, placement in at if not placement.is_replicate()]
            part = (p.device_mesh.mesh.flatten().tolist(), part)
        mine = here(p).clone()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (part, mine))
        if any(other == part and not torch.equal(mine, tensor) for other, tensor in everyone):
            found.append(f"parameter {i}")
    return found


def set_gradients(params: Iterable[Any], step: int) -> None:
    """Gradients of a seed alone, whatever the number of ranks, placed as their parameters."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = (0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = grad
