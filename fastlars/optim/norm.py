"""The global norm: over which processes it is summed, and who would take a part of it for all."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlars.optim.dtensor import process_group_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    NormGroup = ProcessGroup | DeviceMesh


def owner_of_this() -> str | None:
    """Whose part an optimizer is that is being made; None where nobody is known to own it."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module is not None else None
    while module is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            return "ZeroRedundancyOptimizer"
        frame = frame.f_back
    return None


def check_norm(what: str, owner: str | None, norm_group: Any) -> None:
    """Raise where ``what`` needs the global norm, and would get that of a part of the gradients."""
    if owner is not None and norm_group is None:
        raise RuntimeError(
            f"{what} under {owner}, which gives each process an optimizer of a part of the "
            "parameters, would go by the norm of that part: sum it over the processes, with "
            "optimizer_class=functools.partial(fastlars.LAMB, norm_group=process_group), or leave "
            f"{what} out and call torch.nn.utils.clip_grad_norm_, which returns the norm, before "
            "the step"
        )
    check_outside_backward(what)


def check_outside_backward(what: str = "max_grad_norm") -> None:
    """Raise where a norm is taken while gradients are still to come."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{what} in a step inside backward, such as that of one optimizer for each "
            f"parameter, would go by the norm of a part of the gradients: leave {what} out, or "
            "step after backward"
        )


class Processes:
    """The processes over which the squares of the norm are summed.

    A copy of the optimizer in the same process has the same; it cannot be sent to another.
    """

    def __init__(self, group: NormGroup) -> None:
        if not (hasattr(group, "get_group") or hasattr(group, "rank")):
            raise TypeError(
                "norm_group must be a torch.distributed process group or DeviceMesh, or None, got "
                f"{type(group).__name__}"
            )
        self.group: Any = group

    def __deepcopy__(self, memo: Any) -> Processes:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer with a norm_group cannot be pickled, because process groups cannot: save "
            "its state_dict()"
        )

    def sum(self, square: Tensor, device: torch.device) -> Tensor:
        """The square of the norm, over all processes, which all come here at every step.

        Args:
            square: float64, of this process.
            device: of the parameters, for groups that do not say which they reduce on.
        """
        group = self.group
        if hasattr(group, "get_group"):
            # Parameters that FSDP2 keeps on the CPU have a mesh of GPUs.
            kind = group.device_type
            device = device if device.type == kind else torch.device(kind)
            group = process_group_of(group)
        total = square.to(device, copy=True)
        dist.all_reduce(total, group=group)
        return total.to(square.device)
