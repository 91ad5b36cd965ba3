"""Decoded images kept on the device: the same pictures as from the files, read once."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from fastlars.trainer.data import decode, image_folder
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.errors import TrainerError
from trainer.helpers import Outcome, assert_same, folder, load, write_images

Train = Callable[..., Outcome]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_pictures(tmp_path: Path, workers: int) -> None:
    """In every epoch, order and batch; also of images that had to be brought to one size."""
    for part, count in (("train", 300), ("test", 7)):  # more than are read at once
        write_images(tmp_path / part / "even", count, 0)
        write_images(tmp_path / part / "odd", 5, 1, side=21)
    kept, read = (
        folder(tmp_path, cache="on", workers=workers),
        folder(tmp_path, cache="off", workers=2 - workers),
    )
    asked = [(epoch, torch.randperm(305)[:60]) for epoch in (0, 0, 3)]
    for one, other in zip(kept.train(asked), read.train(asked), strict=True):
        assert_same(one, other)
    tests = [torch.arange(12), torch.tensor([11, 0])]
    for one, other in zip(kept.test(tests), read.test(tests), strict=True):
        assert_same(one, other)


def test_files_are_read_once(images: Path) -> None:
    others = set(multiprocessing.active_children())
    kept = folder(images, cache="on", workers=1)
    assert set(multiprocessing.active_children()) <= others  # the workers have ended
    for path in images.rglob("*.png"):
        path.unlink()
    labels = torch.cat([labels for _, labels in kept.test([torch.arange(15)])])
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert len(next(kept.train([(0, torch.arange(36))]))[0]) == 36


def test_the_bar_counts_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good ones and bad ones, in batches of which the last is smaller."""
    counts, said = [], []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            counts.append(n)
            return super().update(n)

        @classmethod
        def write(cls, s: str, *_args: Any, **_options: Any) -> None:
            said.append(s)

    monkeypatch.setattr(image_folder, "tqdm", Bar)
    for part, count in (("train", 299), ("test", 7)):
        write_images(tmp_path / part / "ant", count, 0)
    (tmp_path / "train" / "ant" / "bad.png").write_text("hello")
    folder(tmp_path, image_size=16, cache="on", max_bad_images=1)
    assert counts == [256, 44, 7]
    assert [line.split(" in ")[0] for line in said] == [
        "read 299 training images", "read 7 test images",
    ]  # fmt: skip


def decodings(root: Path, keep: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Images decoded to make a folder's data."""
    count, original = 0, decode.decode

    def counted(path: str) -> torch.Tensor:
        nonlocal count
        count += 1
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode", counted)
        folder(root, cache=keep)
    return count


def test_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images that fit."""
    for part in ("train", "val"):
        write_images(tmp_path / "small" / part / "ant", 4, 0, side=64)
        write_images(tmp_path / "large" / part / "ant", 4, 0, side=65)
    assert decodings(tmp_path / "small", "auto", monkeypatch) == 8
    assert decodings(tmp_path / "small", "off", monkeypatch) == 0
    assert decodings(tmp_path / "large", "auto", monkeypatch) == 0
    monkeypatch.setattr(image_folder, "_BYTES_ON_CPU", 8 * 64 * 64 * 3)
    assert decodings(tmp_path / "small", "auto", monkeypatch) == 8
    monkeypatch.setattr(image_folder, "_BYTES_ON_CPU", 8 * 64 * 64 * 3 - 1)
    assert decodings(tmp_path / "small", "auto", monkeypatch) == 0
    assert decodings(tmp_path / "small", "on", monkeypatch) == 8


def test_large_images_cannot_be_kept(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part / "ant", 2, 0, side=65)
    with pytest.raises(TrainerError, match=r"--cache on keeps images of up to 64 pixels, not 224"):
        folder(tmp_path, cache="on")


@pytest.mark.usefixtures("tiny", "no_picture")
def test_images_that_the_device_cannot_keep(
    tmp_path: Path, images: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty

    def full(*size: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8:
            raise RuntimeError("CUDA out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", full)
    flags = ("--data", images, "--batch-size", 4, "--workers", 0, "--output", tmp_path / "run")
    outcome = train(*flags)
    assert outcome.status == 2
    text = "--cache: 36 images of 16 pixels are more than cpu can keep: add --cache off"
    assert text in outcome.err


@pytest.mark.usefixtures("tiny", "no_picture")
def test_resuming_with_and_without(tmp_path: Path, train: Train, images: Path) -> None:
    """--cache does not change the run."""
    settings = ("--data", images, "--epochs", 2, "--batch-size", 8, "--lr", 0.1, "--workers", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    kept = train(*settings, "--cache", "on", "--output", whole)
    assert kept.status == 0
    assert "read 36 training images in " in kept.out
    first = train(*settings, "--cache", "off", "--output", parts, "--max-steps", 3)
    assert first.status == 0
    assert train("--resume", "--output", parts, "--cache", "on", "--max-steps", 0).status == 0
    assert_same(load(parts)["model"], load(whole)["model"])


@pytest.mark.gpu
def test_on_a_gpu(images: Path) -> None:
    """The same bytes as on the CPU; auto keeps them on the GPU."""
    gpu, cpu = folder(images, torch.device("cuda")), folder(images)
    asked = [next(BatchOrder(36, 36, 0, 0, 1, 0).from_step(0))]
    (one, labels), (other, expected) = next(gpu.train(asked)), next(cpu.train(asked))
    assert one.device.type == labels.device.type == "cuda"
    torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=1e-6)
    assert labels.tolist() == expected.tolist()
