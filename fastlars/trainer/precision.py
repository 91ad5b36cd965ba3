"""The precision that the model computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


class Precision:
    """Autocast as --precision says.

    Args:
        wanted: "auto", "fp32" or "bf16".
        device: where the model is.
    """

    def __init__(self, wanted: str, device: torch.device) -> None:
        self._device = device.type
        bf16 = wanted == "bf16" or (
            wanted == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        self._dtype = torch.bfloat16 if bf16 else None

    def autocast(self) -> AbstractContextManager[None]:
        """For a forward pass."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)
