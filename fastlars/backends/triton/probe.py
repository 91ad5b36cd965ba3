"""Whether Triton works for a device: found out by compiling and running one small kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from fastlars.backends.triton.launch import OPTIONS, current


@triton.jit
def _increment(place: tl.tensor) -> None:
    tl.store(place, tl.load(place) + 1.0)


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which serves CPU tensors too, slowly."""
    return isinstance(_increment, InterpretedFunction)


def why_not(device: torch.device) -> str:
    """Why kernels cannot run on a device; empty where they can."""
    if device.type == "cpu" and not interprets():
        return "Triton serves cpu in its interpreter alone (TRITON_INTERPRET=1)"
    kernel: Any = _increment
    try:
        place = torch.ones(1, device=device)
        with current(device):
            kernel[(1,)](place, **OPTIONS)
        found = float(place)
    except Exception as error:
        # Whatever goes wrong in a compiler, a driver or a missing C compiler: another back end
        # serves, and the reason is told.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton {triton.__version__} does not run on {device.type}: {lines[0]}"
    return "" if found == 2.0 else f"Triton {triton.__version__} computes 1 + 1 = {found}"
