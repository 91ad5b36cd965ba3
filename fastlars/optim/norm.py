"""The global norm: its sum over processes, and checks that it covers all gradients."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlars.backends.float64 import to_widest
from fastlars.optim.dtensor import process_group_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    NormGroup = ProcessGroup | DeviceMesh


def owner_from_stack() -> str | None:
    """The wrapper that gives an optimizer only a part of the parameters; None without one.

    An optimizer calls this while it is constructed. ZeroRedundancyOptimizer does not identify
    itself to the optimizers that it constructs, so this looks for its frame on the stack.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            return "ZeroRedundancyOptimizer"
        frame = frame.f_back
    return None


def check_norm(what: str, owner: str | None, norm_group: Any) -> None:
    """Raise if ``what``, an argument that needs the global norm, would get only a part of it.

    ``owner`` is the result of ``owner_from_stack``.
    """
    if owner is not None and norm_group is None:
        raise RuntimeError(
            f"{what} under {owner}, which gives each process an optimizer of a part of the "
            "parameters, would use the norm of that part: sum it over the processes, with "
            "optimizer_class=functools.partial(fastlars.LAMB, norm_group=process_group), or leave "
            f"{what} out and call torch.nn.utils.clip_grad_norm_, which returns the norm, before "
            "the step"
        )
    check_outside_backward(what)


def check_outside_backward(what: str = "max_grad_norm") -> None:
    """Raise inside backward, where some gradients are still missing from the norm."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{what} in a step inside backward, such as that of one optimizer for each "
            f"parameter, would use the norm of a part of the gradients: leave {what} out, or "
            "step after backward"
        )


class NormReducer:
    """Sums the square of the norm over the processes of ``norm_group``.

    Copies of an optimizer share it. It cannot be pickled, because process groups cannot.
    """

    def __init__(self, group: NormGroup) -> None:
        if not (hasattr(group, "get_group") or hasattr(group, "rank")):
            raise TypeError(
                "norm_group must be a torch.distributed process group or DeviceMesh, or None, got "
                f"{type(group).__name__}"
            )
        self.group: Any = group

    def __deepcopy__(self, memo: Any) -> NormReducer:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer with a norm_group cannot be pickled, because process groups cannot: save "
            "its state_dict()"
        )

    def sum(self, square: Tensor, device: torch.device) -> Tensor:
        """The square of the norm over all processes. All must call this at every step.

        Args:
            square: the square of this process's norm, float64.
            device: where to reduce if the group is a process group: the parameters' device. A mesh
                reduces on its own device.
        """
        group = self.group
        if hasattr(group, "get_group"):
            # Not always the parameters' device: FSDP2 can keep parameters on the CPU while their
            # mesh is of GPUs.
            mesh_type = group.device_type
            device = device if device.type == mesh_type else torch.device(mesh_type)
            group = process_group_of(group)
        total = to_widest(square, device).clone()
        dist.all_reduce(total, group=group)
        return to_widest(total, square.device)
