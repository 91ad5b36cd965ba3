"""Fixtures: the trainer's command line in this process, a tiny model, a tiny image folder."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("torchvision") is not None:  # without it, tests/conftest.py skips these tests
    from benchmarks.accuracy.grid import Grid
    from fastlars.trainer.__main__ import main
    from fastlars.trainer.model import resnet
    from fastlars.trainer.output import pictures
    from trainer.helpers import GRID, UNDRAWN, Outcome, tiny_net, write_images


@pytest.fixture
def train(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the trainer with a command line, in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run trains the tiny model."""
    monkeypatch.setattr(resnet, "build", tiny_net)


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run spends its second on drawing."""
    for name, undrawn in UNDRAWN.items():
        monkeypatch.setattr(pictures, name, undrawn)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder: classes ant, bee and cat, 12 images of each to train and 5 to test."""
    root = tmp_path / "images"
    for seed, name in enumerate(("ant", "bee", "cat")):
        write_images(root / "train" / name, 12, seed)
        write_images(root / "val" / name, 5, seed + 4)
    return root


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    """A small grid of benchmarks/accuracy."""
    path = tmp_path / "grid.ini"
    path.write_text(GRID)
    return Grid(path)
