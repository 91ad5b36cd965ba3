"""The line about rates that were made for ImageNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastlars.trainer.model import memory
from trainer.helpers import Outcome, facts

Train = Callable[..., Outcome]
HINT = (
    "lr 0.0125 comes from rates for ImageNet; for CIFAR-10's 32 pixels (resnet20, batch 256) "
    "--find-lr suggests 22: try --find-lr, or set --lr"
)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_of_a_run_on_small_images_unless_the_rate_is_given(images: Path, train: Train) -> None:
    flags = ("--batch-size", 8, "--workers", 0, "--max-steps", 1, "--data", images)
    output = ("--output", images.parent / "run")
    told = train(*flags, *output)
    assert told.status == 0, told.err
    assert facts(told.out)["hint"] == HINT
    assert facts(train(*flags, "--dry-run").out)["hint"] == HINT
    for more in (
        ("--resume", *output, "--max-steps", 2),
        ("--dry-run", "--lr", 0.0125),
        ("--dry-run", "--image-size", 65),
        ("--dry-run", "--recipe", "akiba"),
        ("--find-lr", "--output", images.parent / "sweep"),
    ):
        outcome = train(*flags, *more)
        assert outcome.status == 0, outcome.err
        assert "hint" not in outcome.out


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("recipe", ["lars", "goyal", "lamb", "mlperf"])
def test_only_where_the_rate_is_far_from_the_one_found(
    images: Path, train: Train, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """At a batch of 30 every recipe's is; the digits have recipes of their own."""
    monkeypatch.setattr(memory, "check", lambda _context: None)
    flags = ("--dry-run", "--workers", 0, "--batch-size", 30, "--recipe", recipe)
    assert facts(train(*flags, "--data", images).out)["hint"].startswith("lr ")
    assert "hint" not in train(*flags).out
