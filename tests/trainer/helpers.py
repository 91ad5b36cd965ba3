"""A tiny model, tiny image folders and comparisons, for all tests of the trainer."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from fastlars.trainer.config.settings import Config
from fastlars.trainer.data.image_folder import Folder
from fastlars.trainer.output import pictures

CPU = torch.device("cpu")


# A grid of benchmarks/accuracy: two optimizers and the linear rule, which has no search.
GRID = """
[grid]
images = 6 3
batches = 4 32
search = 0
seeds = 1 2
flags = --model resnet8 --stem small --micro-batch 4 --bn-batch 4 --epochs 1 --warmup-epochs 0
[sgd-linear]
scales = sgd
flags = --recipe goyal --warmup-from {base}
[sgd]
flags = --recipe goyal --warmup-from 0
lr 4 = 0.1 0.2 0.4
lr 32 = 0.1 0.2 0.4
[lars]
flags = --recipe lars
lr 4 = 1 2 4
lr 32 = 1 2 4
"""


@dataclass(frozen=True)
class Outcome:
    """What a run returned and printed."""

    status: int
    out: str
    err: str


def _saved_if_drawn(figure: Figure | None, path: Path, save: Any = pictures.save) -> None:
    if figure is not None:
        save(figure, path)


# What replaces the functions of `pictures` in tests that look at no picture of a run, to save its
# second. The picture of a sweep is drawn.
UNDRAWN: dict[str, Any] = dict.fromkeys(("curves", "heat_map", "norms"), lambda _records: None)
UNDRAWN["save"] = _saved_if_drawn


def tiny_net(_name: str, classes: int, _stem: str, seed: int) -> nn.Module:
    """Convolution, batch norm and classifier: what a ResNet is made of, in 2,000 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(144, classes),
        )
    return net.to(memory_format=torch.channels_last)


def write_images(folder: Path, count: int, seed: int, side: int = 16) -> None:
    """Noise, its brightness the folder's own, so that there is something to learn."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw.integers(0, 128, (side, side, 3)) + 40 * (seed % 4)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")


def folder(
    root: Path | str, device: torch.device = CPU, workers: int = 0, **settings: Any
) -> Folder:
    """A folder's images, prepared."""
    made = Folder(Config(data=str(root), workers=workers, **settings), device)
    made.prepare()
    return made


def facts(out: str) -> dict[str, str]:
    """What a command says of itself, by label; what was broken into lines is in one."""
    found: dict[str, str] = {}
    label = ""
    for line in out.splitlines():
        start, text = line[:10], line[10:]
        if start.strip() and start.endswith(" ") and start.strip().isalpha():
            label, found[start.strip()] = start.strip(), text
        elif label and not start.strip() and text.strip():
            found[label] += f" {text}"
        else:
            label = ""
    return found


def files_below(folder: Path) -> list[str]:
    """Every file and folder in `folder`."""
    return sorted(os.path.relpath(path, folder) for path in folder.rglob("*"))


def load(run: Path) -> dict[str, Any]:
    """The checkpoint of a run directory."""
    state: dict[str, Any] = torch.load(run / "checkpoint.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group.pop("differentiable", None)  # torch's Optimizer adds it to what it loads
    return state


def records(run: Path) -> list[dict[str, Any]]:
    """The log of a run directory, without what no two runs share: speed."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    for record in parsed:
        record.pop("images_per_second", None)
    return parsed


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Equal to the bit, and for tensors in layout too; says where the first difference is."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert sorted(one, key=str) == sorted(other, key=str), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert one.stride() == other.stride(), where
        assert (
            one.contiguous()
            .flatten()
            .view(torch.uint8)
            .equal(other.contiguous().flatten().view(torch.uint8))
        ), where
    else:
        assert one == other, where


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system refuses as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
