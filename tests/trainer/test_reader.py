"""Worker processes that read images: how far ahead, how they end, and what they cannot read."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from fastlars.trainer.data import reader
from fastlars.trainer.data.augment import CentreCrop, CropAndFlip
from fastlars.trainer.data.dataset import TEST, PixelBatch
from fastlars.trainer.data.listing import find
from fastlars.trainer.data.reader import BadImages, Reader
from fastlars.trainer.errors import TrainerError
from trainer.helpers import Outcome, assert_same, load, records, write_images

Train = Callable[..., Outcome]
EpochIndices = tuple[int, torch.Tensor]
Read = Callable[[Iterable[EpochIndices]], Iterator[PixelBatch]]
CPU = torch.device("cpu")


def none_bad() -> BadImages:
    return BadImages(0, shown=True)


def made(root: Path, workers: int, bad_images: BadImages) -> Read:
    """What reads the training images."""
    _, train, _ = find(str(root))
    splits = [(train, CentreCrop(16, whole=True))]
    return partial(Reader(splits, workers, CPU, bad_images).read, 0)


def damage(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:200])
    return str(path)


def test_workers_stay_from_one_reading_to_the_next(images: Path) -> None:
    some = made(images, 2, none_bad())
    found = []
    for _ in range(3):
        assert [len(part.labels) for part in some([(TEST, torch.arange(9))] * 3)] == [9] * 3
        found.append({child.pid for child in multiprocessing.active_children()})
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2
    del some
    assert not found[0] & {child.pid for child in multiprocessing.active_children()}


def test_a_reading_may_be_abandoned(images: Path) -> None:
    some = made(images, 2, none_bad())
    first = next(some([(TEST, torch.arange(n)) for n in range(2, 9)]))
    assert len(first.labels) == 2
    again = [len(part.labels) for part in some([(TEST, torch.arange(n)) for n in (7, 5)])]
    assert again == [7, 5]


def of_both_splits(root: Path, workers: int) -> list[Read]:
    _, train, test = find(str(root))
    splits = [(train, CropAndFlip(16, 3)), (test, CentreCrop(16, whole=True))]
    reader = Reader(splits, workers, CPU, none_bad())
    return [partial(reader.read, split) for split in range(2)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_test_amid_the_training(images: Path, workers: int) -> None:
    """By the same workers, in inference mode; neither affects the other."""
    asked = [(epoch, torch.arange(epoch % 3, 30, 3)) for epoch in range(20)]
    tests = [(TEST, torch.arange(n)) for n in (5, 1, 15)]
    alone, expected = (
        list(some(batches))
        for some, batches in zip(of_both_splits(images, 0), (asked, tests), strict=True)
    )
    others = set(multiprocessing.active_children())
    training, testing = of_both_splits(images, workers)
    found, reading = [], training(asked)
    for amount in (1, 9, 0, 10):
        found += [next(reading) for _ in range(amount)]
        with torch.inference_mode():
            assert_same([tuple(part) for part in testing(tests)], [*map(tuple, expected)])
            next(testing(tests))  # one that is abandoned
        assert len(set(multiprocessing.active_children()) - others) == workers
    assert_same([tuple(part) for part in found], [tuple(part) for part in alone])
    assert not any(part.labels.is_inference() for part in found)
    assert next(reading, None) is None


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("rounds", [2, 29])
def test_a_test_asks_for_little_of_the_training(images: Path, workers: int, rounds: int) -> None:
    """However short the epochs are, the number of waiting training batches does not grow."""
    asked = 0

    def requests() -> Iterator[EpochIndices]:
        nonlocal asked
        while True:
            asked += 1
            yield 0, torch.arange(4)

    training, testing = of_both_splits(images, workers)
    reading = training(requests())
    for taken in range(1, rounds + 1):
        next(reading)
        tests = 9 if taken % 5 == 0 else 1
        assert len(list(testing([(TEST, torch.arange(3))] * tests))) == tests
        assert taken <= asked <= taken + 2 * workers * reader._PREFETCH
    for _ in range(30):  # afterwards all workers have something to do again
        next(reading)
    assert asked == rounds + 30 + workers * reader._PREFETCH


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_queue_is_bounded(images: Path, workers: int) -> None:
    asked = 0

    def requests() -> Iterator[EpochIndices]:
        nonlocal asked
        while True:
            asked += 1
            yield TEST, torch.arange(4)

    for taken, _ in zip(range(1, 6), made(images, workers, none_bad())(requests()), strict=False):
        assert taken <= asked <= taken + max(workers, 1) * reader._PREFETCH


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping(images: Path, capfd: pytest.CaptureFixture[str], workers: int) -> None:
    """Bad images are left out of their batches, reported once, and counted once."""
    bad = [damage(images / "train" / name) for name in ("ant/003.png", "bee/007.png")]
    bad_images = BadImages(2, shown=True)
    some = made(images, workers, bad_images)
    for _ in range(2):
        one, other, none = some(
            [(0, torch.tensor([20, 19, 3, 0])), (0, torch.tensor([2, 4])), (0, torch.tensor([3]))]
        )
        assert one.indices.tolist() == [20, 0]
        assert one.labels.tolist() == [1, 0]
        assert other.indices.tolist() == [2, 4]
        assert len(none.labels) == len(none.pixels) == 0
    assert len(bad_images) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["warning", f"skipped image {path}"] for path in reversed(bad)
    ]
    assert lines[1].endswith("(2 of 2)")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (0, r"cannot read image \S*ant/000.png: .* \(--max-bad-images would skip some\)"),
        (2, r"more than --max-bad-images 2 cannot be read: \S*000.png: .*; \S*001.png: .*; \S*002"),
        (6, r"--max-bad-images 6 cannot be read: \S*000.png: .*; \S*004.png: [^;]*; and 2 more"),
    ],
)
def test_too_many(images: Path, limit: int, message: str) -> None:
    for path in (images / "train" / "ant").iterdir():
        damage(path)
    with pytest.raises(TrainerError, match=message):
        list(made(images, 0, BadImages(limit, shown=True))([(0, torch.arange(36))]))


def test_a_dead_worker(images: Path) -> None:
    """It disturbs nothing until the next batch is asked for, which is an error."""
    found = made(images, 1, none_bad())([(TEST, torch.arange(4))] * 9)
    next(found)
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(TrainerError, match="--workers: a worker process died"):
        list(found)


def test_ctrl_c_is_the_trainers(images: Path) -> None:
    """A terminal sends it to workers too; they go on until the trainer ends them."""

    def requests() -> Iterator[EpochIndices]:
        for _ in range(20):
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGINT)
            yield TEST, torch.arange(4)

    some = made(images, 1, none_bad())
    list(some([(TEST, torch.arange(4))]))  # the worker has started by now
    assert len(list(some(requests()))) == 20


def test_what_travels_to_workers_that_are_not_forked(images: Path) -> None:
    """They receive the data set pickled."""
    _, files, _ = find(str(images))
    dataset = reader._ImageFiles([(files, CentreCrop(16, whole=True)), (files, CropAndFlip(16, 3))])
    copy = pickle.loads(pickle.dumps(dataset))
    for split in range(2):
        copied, original = (some[(split, 2, [5, 30])] for some in (copy, dataset))
        assert_same(copied, original)
        assert original[1] == []


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("side", [16, 72])
def test_resuming_within_an_epoch(tmp_path: Path, train: Train, side: int) -> None:
    """With workers that had read ahead; bad images are missing from the same batches."""
    for part, count in (("train", 18), ("val", 3)):
        for seed, name in enumerate(("ant", "bee")):
            write_images(tmp_path / "images" / part / name, count, seed, side)
    damage(tmp_path / "images" / "train" / "bee" / "007.png")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = (
        "--data", tmp_path / "images", "--image-size", side, "--cache", "off", "--epochs", 1,
        "--max-bad-images", 1, "--batch-size", 8, "--lr", 0.1, "--log-every", 1,
    )  # fmt: skip
    assert train(*settings, "--workers", 0, "--output", whole).status == 0
    for flags in (("--max-steps", 3), ("--max-steps", 0, "--resume")):
        outcome = train(*settings, "--workers", 2, "--output", parts, *flags)
        assert outcome.status == 0, outcome
    assert_same(load(parts), load(whole))
    assert records(parts) == records(whole)
    seen = [record["images"] for record in records(whole) if record["kind"] == "train"]
    assert sorted(set(seen)) == [7, 8]


@pytest.mark.usefixtures("tiny", "no_picture")
def test_too_little_is_left(images: Path, tmp_path: Path, train: Train) -> None:
    for name in ("ant", "bee"):
        for path in (images / "train" / name).iterdir():
            damage(path)
    outcome = train(
        "--data", images, "--max-bad-images", 30, "--batch-size", 2, "--lr", 0.1, "--epochs", 2,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert "images of a forward pass could be read, and batch norm needs 2" in last
