"""The precision that the model computes in, and what half precision needs: a gradient scaler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from fastlars.trainer.errors import TrainerError

# Of a scale below it, float16 holds gradients up to a thousand million: no batch has larger ones.
_LEAST_SCALE = 2.0**-14


class Precision:
    """Autocast, and for float16 a GradScaler, as --precision says.

    Args:
        wanted: "auto", "fp32", "bf16" or "fp16".
        device: where the model is.
    """

    def __init__(self, wanted: str, device: torch.device) -> None:
        self._device = device.type
        if wanted == "auto":
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            wanted = "bf16" if bf16 else "fp32"
        self.name = wanted
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
        self._scaler = torch.amp.GradScaler(device.type, enabled=wanted == "fp16")
        self.gradient_scale = self._scaler.get_scale()

    def autocast(self) -> AbstractContextManager[None]:
        """For a forward pass."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to run backward from: its gradients are `gradient_scale` times their size."""
        return self._scaler.scale(loss)

    def step(self, optimizer: Optimizer) -> bool:
        """Step with the gradients of a scaled loss; False where they overflowed, so it did not.

        Raises TrainerError where they overflow at any scale.
        """
        self._scaler.step(optimizer)
        if self._dtype is not torch.float16:
            return True
        before = self.gradient_scale
        self._scaler.update()
        # Waits for the device; so does whoever else wants to know whether to advance a schedule.
        self.gradient_scale = self._scaler.get_scale()
        if self.gradient_scale < _LEAST_SCALE:
            raise TrainerError(
                "the gradients are no finite numbers in --precision fp16, however small the loss "
                "is scaled: try bf16, fp32 or a lower --lr",
                everywhere=True,
            )
        return self.gradient_scale >= before

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty without one."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a scaler's state; nothing where that run or this one has none."""
        if state:
            self._scaler.load_state_dict(state)
            self.gradient_scale = self._scaler.get_scale()
