"""The precision of the forward pass, and the gradient scaler that float16 needs."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from fastlars.trainer.errors import TrainerError

# Below this loss scale float16 already represents gradients up to 1e9: training has diverged.
_LEAST_SCALE = 2.0**-14


class Precision:
    """Autocast, and for float16 a GradScaler, as --precision says."""

    def __init__(self, wanted: str, device: torch.device) -> None:
        self._device = device.type
        if wanted == "auto":
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            wanted = "bf16" if bf16 else "fp32"
        self.name = wanted
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
        self._scaler = torch.amp.GradScaler(device.type, enabled=wanted == "fp16")
        self.gradient_scale = self._scaler.get_scale()

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self._device, self._dtype, enabled=self._dtype is not None)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to run backward from; it makes gradients `gradient_scale` times as large."""
        return self._scaler.scale(loss)

    def step(self, optimizer: Optimizer) -> bool:
        """Step with the gradients of a scaled loss; False if they overflowed and it was skipped.

        Raises TrainerError where they overflow at any scale.
        """
        self._scaler.step(optimizer)
        if self._dtype is not torch.float16:
            return True
        before = self.gradient_scale
        self._scaler.update()
        # This waits for the device: the schedule advances only if the step was not skipped.
        self.gradient_scale = self._scaler.get_scale()
        if self.gradient_scale < _LEAST_SCALE:
            raise TrainerError(
                "the gradients are NaN or infinite in --precision fp16, however small the loss "
                "is scaled: try bf16, fp32 or a lower --lr",
                everywhere=True,
            )
        return self.gradient_scale >= before

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty if there is none."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a scaler's state, unless it is empty."""
        if state:
            self._scaler.load_state_dict(state)
            self.gradient_scale = self._scaler.get_scale()
