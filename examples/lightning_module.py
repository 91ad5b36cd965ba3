"""LARS in Lightning: configure_optimizers returns the optimizer and its schedule.

``python examples/lightning_module.py [--batch-size 4096]``
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

import fastlars
from fastlars.logging import layer_statistics, summary


class TrustRatios(lightning.Callback):
    """Log the smallest, median and largest trust ratio every ``log_every_n_steps`` steps."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(summary(layer_statistics(pl_module, trainer.optimizers[0])))


class Classifier(lightning.LightningModule):
    """A ResNet-18 for small images, trained with LARS."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.net = models.resnet18(num_classes=10)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Return the loss; Lightning runs backward and steps the optimizer."""
        images, labels = batch
        loss = functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """LARS with linear scaling; the schedule is stepped every iteration, not every epoch."""
        groups = fastlars.parameter_groups(self.net, weight_decay=1e-4)
        lr = fastlars.schedules.linear_scaling(0.4, self.batch_size)
        optimizer = fastlars.LARS(groups, lr=lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = fastlars.schedules.polynomial(optimizer, steps=steps, warmup_steps=steps // 20)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(arguments: list[str] | None = None) -> None:
    """Train, and write curves to runs/lightning_logs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", help="folder that CIFAR-10 is downloaded to; default: noise")
    options = parser.parse_args(arguments)
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images: Any = datasets.FakeData(2 * options.batch_size, (3, 32, 32), 10, transform)
    if options.data:
        images = datasets.CIFAR10(options.data, download=True, transform=transform)
    batches = DataLoader(images, options.batch_size, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, enable_checkpointing=False, default_root_dir="runs",
        log_every_n_steps=2, callbacks=[TrustRatios()],
    )  # fmt: skip
    trainer.fit(Classifier(options.batch_size), batches)
    print(f"loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
