"""Which image is used when."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from fastlars.trainer.data import order as plan
from fastlars.trainer.errors import TrainerError


def taken(some: plan.BatchOrder, step: int, steps: int) -> list[tuple[int, list[int]]]:
    count = steps * some.micro_batches
    return [(epoch, at.tolist()) for epoch, at in islice(some.from_step(step), count)]


def test_an_epoch_uses_each_image_once_but_the_rest() -> None:
    some = plan.BatchOrder(103, 20, 0, 0, 1, seed=0)
    assert (some.steps_per_epoch, some.micro_batches) == (5, 1)
    epochs = [[i for _, at in taken(some, 5 * epoch, 5) for i in at] for epoch in range(3)]
    for order in epochs:
        assert len(order) == len(set(order)) == 100
        assert set(order) <= set(range(103))
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # what is left out changes


@pytest.mark.parametrize("step", [1, 4, 5, 12])
def test_going_on_from_a_step(step: int) -> None:
    some = plan.BatchOrder(103, 20, 5, 0, 1, seed=3)
    assert taken(some, 0, 20)[step * 4 :] == taken(some, step, 20 - step)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_what_one_would_see(size: int) -> None:
    """In each step, the same micro-batches that one process accumulates."""
    alone = plan.BatchOrder(103, 16, 4, 0, 1, seed=1)
    several = [plan.BatchOrder(103, 16, 4, rank, size, seed=1) for rank in range(size)]
    for step in range(8):
        assert taken(alone, step, 1) == [m for some in several for m in taken(some, step, 1)]


def test_seeds_and_epochs_do_not_meet() -> None:
    orders = {
        tuple(torch.randperm(50, generator=plan.generator(seed, epoch)).tolist())
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("images", [1, 5, 100, 101])
def test_evaluation_sees_each_image_once(images: int, size: int) -> None:
    seen = torch.cat(
        [at for rank in range(size) for at in plan.test_batches(images, 8, rank, size)]
    )
    assert sorted(seen.tolist()) == list(range(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 128, 0, 0, 1, 0), "--batch-size 128 exceeds the 100 training images"),
        ((100, 10, 0, 0, 3, 0), "--batch-size 10 is not a multiple of 3 processes"),
        ((100, 20, 3, 0, 2, 0), "--micro-batch 3 does not divide the 10 images that each of 2"),
        ((100, 20, 40, 0, 1, 0), "--micro-batch 40 does not divide the 20 images"),
        ((100, 4, 1, 0, 1, 0), "batch norm needs 2 images"),
        ((100, 2, 0, 0, 2, 0), "batch norm needs 2 images"),
    ],
)
def test_what_does_not_divide(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        plan.BatchOrder(*arguments)
