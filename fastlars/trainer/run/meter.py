"""Sums of loss and correct answers, kept on the device so that counting does not wait for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Figures:
    """Means over a number of images."""

    loss: float
    accuracy: float
    images: int


class Meter:
    """Adds up batches; float64, so that the order of a million images does not matter."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add one batch."""
        correct = (logits.argmax(dim=1) == labels).sum()
        images = torch.full_like(correct, len(labels))
        self.sums += torch.stack([loss_sum.detach().double(), correct.double(), images.double()])

    def reset(self) -> None:
        """Set all sums to 0."""
        self.sums.zero_()


def figures(sums: torch.Tensor) -> Figures:
    """Means from the sums of one meter, or from those of all processes added up."""
    loss, correct, images = sums.tolist()
    count = max(images, 1.0)
    return Figures(loss / count, correct / count, round(images))
