"""SimCLR-style pretraining with LARS: match two views of each image within a batch.

``python examples/simclr.py --data FOLDER [--batch-size 4096]``; without --data, on noise.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

import fastlars


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020) of two [n, d] views: each row has 1 partner among 2n - 1."""
    features = functional.normalize(torch.cat([one, other]), dim=1)
    similarity = (features @ features.T / temperature).fill_diagonal_(float("-inf"))
    count = len(one)
    partners = torch.arange(2 * count, device=one.device).roll(count)
    return functional.cross_entropy(similarity, partners)


def main(arguments: list[str] | None = None) -> float:
    """Train; return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with one folder of images a class")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--side", type=int, default=224)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    colours = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    crop, flip = v2.RandomResizedCrop(options.side), v2.RandomHorizontalFlip()
    tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    augment = v2.Compose([crop, flip, colours, v2.RandomGrayscale(0.2), tensor])

    def two_views(image: Any) -> tuple[Tensor, Tensor]:
        return augment(image), augment(image)

    if options.data:
        images = datasets.ImageFolder(options.data, two_views)
    else:
        shape = (3, options.side, options.side)
        images = datasets.FakeData(2 * options.batch_size, shape, transform=two_views)
    batches = DataLoader(images, options.batch_size, shuffle=True, drop_last=True)

    model = models.resnet50()
    model.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128, bias=False))
    model.to(device)

    # Biases and norms have neither decay nor ratio; the rate is the paper's 0.3 x batch / 256.
    groups = fastlars.parameter_groups(model, weight_decay=1e-6)
    lr = fastlars.schedules.linear_scaling(0.3, options.batch_size)
    optimizer = fastlars.LARS(groups, lr=lr, momentum=0.9)
    steps = options.epochs * len(batches)
    schedule = fastlars.schedules.polynomial(optimizer, steps=steps, warmup_steps=steps // 10)
    for epoch in range(options.epochs):
        for (one, other), _ in batches:
            optimizer.zero_grad()
            loss = contrast(model(one.to(device)), model(other.to(device)), temperature=0.1)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
