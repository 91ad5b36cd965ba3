"""Image folders: what is read, and every way in which they can be wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastlars.trainer.data import listing
from fastlars.trainer.data.image_folder import _sample
from fastlars.trainer.errors import TrainerError
from trainer.helpers import Outcome, files_below, folder, write_images

Train = Callable[..., Outcome]


def test_what_is_read(images: Path) -> None:
    (images / "train" / "ant" / "notes.txt").write_text("not an image")
    (images / "train" / ".cache").mkdir()
    some = folder(images)
    assert some.classes == ("ant", "bee", "cat")
    assert (some.train_size, some.test_size) == (36, 15)
    assert (some.image_size, some.stem) == (16, "small")
    pixels, labels = next(some.test([torch.arange(15)]))
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert pixels.shape == (15, 3, 16, 16)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    with Image.open(images / "val" / "bee" / "002.png") as image:
        expected = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(16, 16, 3)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(pixels[7].permute(1, 2, 0), (expected - mean) / std)


def test_large_images_become_224(tmp_path: Path) -> None:
    for part in ("train", "test"):  # test/ does where there is no val/
        write_images(tmp_path / part / "wide", 3, 0, side=100)
    some = folder(tmp_path)
    assert (some.image_size, some.stem) == (224, "imagenet")
    assert next(some.train([(0, torch.arange(2))]))[0].shape == (2, 3, 224, 224)
    assert next(some.test([torch.arange(2)]))[0].shape == (2, 3, 224, 224)


def test_what_is_hidden_is_left_out(images: Path) -> None:
    """At every depth: files that macOS, Jupyter and file managers put next to images."""
    for place in (images, images / "train", images / "val" / "bee", images / "train" / "ant"):
        write_images(place / ".ipynb_checkpoints" / "deep", 2, 0)
    (images / "train" / "cat" / "._000.png").write_bytes(bytes(99))
    _, train, test = listing.find(str(images))
    assert (len(train), len(test)) == (36, 15)
    assert not [path for path, _ in train + test if "/." in path]


def sized(root: Path, sides: dict[str, list[int]]) -> Path:
    """A folder of classes, with images of these sides."""
    for part in ("train", "val"):
        for name, each in sides.items():
            (root / part / name).mkdir(parents=True)
            for number, side in enumerate(each):
                image = Image.new("L", (side, side // 2))
                image.save(root / part / name / f"{number:04}.png")
    return root


@pytest.mark.parametrize(
    ("sides", "size"),
    [
        ({"ant": [10] + [100] * 9, "bee": [100] * 9}, 224),  # a thumbnail that comes first
        ({"ant": [10] * 9, "bee": [100] * 9}, 224),  # a class of thumbnails
        ({"ant": [100] + [10] * 9, "bee": [10] * 9}, 224),
        ({"ant": [16] * 9, "bee": [16] * 8 + [20]}, 20),
        ({"ant": [16] * 9, "bee": [16]}, 16),
        ({"ant": [100] * 9, "bee": [65]}, 224),
        ({"ant": [4]}, 8),
    ],
)
def test_the_size_that_images_are_brought_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sides: dict[str, list[int]], size: int
) -> None:
    """One line reports it if images are enlarged that would have been used as they are."""
    assert folder(sized(tmp_path, sides), cache="off").image_size == size
    every = sorted(side for each in sides.values() for side in each)
    told = every[0] <= 64 and every[0] < every[-1]
    assert capfd.readouterr().err == told * (
        f"warning: the longer sides of {len(every)} training images are from {every[0]} to "
        f"{every[-1]} pixels: all are resized to {size} (--image-size sets another)\n"
    )


def test_some_images_of_every_class_are_looked_at() -> None:
    """Only as many as needed: reading headers from a remote disk is slow."""
    few = [("", label) for label in (0, 0, 0, 1) + (2,) * 1000]
    found = [label for _, label in _sample(few)]
    assert [found.count(label) for label in range(3)] == [3, 1, 85]
    assert len(_sample([("", label) for label in range(1000) for _ in range(5)])) == 1000
    assert len(_sample([("", label) for label in range(5000) for _ in range(2)])) == 1024
    named = [(str(number), 0) for number in range(512)]
    assert _sample(named) == named[::2]


def test_a_bad_image_in_the_sample_counts(images: Path) -> None:
    damage(images / "train" / "bee" / "004.png")
    (images / "train" / "ant" / "000.png").write_text("hello")
    assert len(folder(images, cache="off", max_bad_images=1).bad_images) == 1
    with pytest.raises(TrainerError, match=r"ant/000\.png"):
        folder(images)
    for path in (images / "train").glob("*/*.png"):
        path.write_text("hello")
    with pytest.raises(TrainerError, match=r"none of 36 training images can be read.*--image-size"):
        folder(images, max_bad_images=99)


@pytest.mark.parametrize("size", [16, 80])
def test_augmentation_is_the_same_in_every_worker(images: Path, size: int) -> None:
    batches = [(2, torch.tensor([0, 30])), (3, torch.tensor([30, 0]))]
    alone = [b[0] for b in folder(images, image_size=size, seed=1, cache="off").train(batches)]
    spread = [
        b[0] for b in folder(images, workers=2, image_size=size, seed=1, cache="off").train(batches)
    ]
    assert all(torch.equal(a, b) for a, b in zip(alone, spread, strict=True))
    assert not torch.equal(alone[0], alone[1].flip(0))


@pytest.mark.parametrize("side", [16, 72])
def test_half_of_the_images_are_mirrored(tmp_path: Path, side: int) -> None:
    """Their left half is dark."""
    image = Image.new("RGB", (side, side))
    image.paste((255, 255, 255), (side // 2, 0, side, side))
    for part in ("train", "val"):
        (tmp_path / part / "ant").mkdir(parents=True)
        image.save(tmp_path / part / "ant" / "0.png")
    some = folder(tmp_path, image_size=side)
    pixels = torch.cat([p for p, _ in some.train((e, torch.tensor([0, 0])) for e in range(100))])
    light = pixels.mean(dim=(1, 2))  # of each column
    turned = (light[:, : side // 2].sum(dim=1) > light[:, side // 2 :].sum(dim=1)).float().mean()
    assert 0.3 < turned < 0.7


@pytest.mark.parametrize("keep", ["on", "off"])
def test_a_batch_of_bad_images_is_left_out_of_a_test(images: Path, keep: str) -> None:
    for name in ("002.png", "003.png"):
        damage(images / "val" / "ant" / name)
    # Its size is asked for, and known from the others.
    (images / "train" / "ant" / "000.png").write_text("hello")
    some = folder(images, cache=keep, max_bad_images=3)
    assert some.image_size == 16
    counts = [len(labels) for _, labels in some.test(torch.arange(15).split(2))]
    assert counts == [2, 2, 2, 2, 2, 2, 1]
    assert len(some.bad_images) == 3
    assert some.test_size == 15


def damage(path: Path) -> None:
    """Cut an image short, as an interrupted copy does."""
    path.write_bytes(path.read_bytes()[:200])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (shutil.rmtree, "cannot read {0}: No such file or directory"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "{0} has no folder train/"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "{0} has no folder val/ or test/"),
    "no class folders": (
        lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()],
        "{0}/train has no class folders",
    ),
    "empty class": (
        lambda root: [path.unlink() for path in (root / "train" / "bee").iterdir()],
        "class folder {0}/train/bee has no images",
    ),
    "empty class to test": (
        lambda root: [path.unlink() for path in (root / "val" / "cat").iterdir()],
        "class folder {0}/val/cat has no images",
    ),
    "class only to train": (
        lambda root: shutil.rmtree(root / "val" / "cat"),
        "class cat is in {0}/train but not in {0}/val",
    ),
    "class only to test": (
        lambda root: shutil.rmtree(root / "train" / "ant"),
        "class ant is in {0}/val but not in {0}/train",
    ),
    "too few images": (
        lambda root: [(root / "train" / "ant" / f"{n:03}.png").unlink() for n in range(5)],
        "--batch-size 36 exceeds the 31 training images",
    ),
    "a damaged image to train": (
        lambda root: damage(root / "train" / "bee" / "007.png"),
        "cannot read image {0}/train/bee/007.png: ",
    ),
    "a damaged image to test": (
        lambda root: damage(root / "val" / "ant" / "003.png"),
        "cannot read image {0}/val/ant/003.png: ",
    ),
    "text for an image": (
        lambda root: (root / "train" / "ant" / "000.png").write_text("hello"),
        "cannot read image {0}/train/ant/000.png: not an image (JPEG, ",
    ),
    "a FIFO for an image": (
        lambda root: os.mkfifo(root / "train" / "ant" / "00.jpg"),
        "cannot read image {0}/train/ant/00.jpg: not a regular file",
    ),
    "a FIFO for an image to test": (
        lambda root: os.mkfifo(root / "val" / "ant" / "00.jpg"),
        "cannot read image {0}/val/ant/00.jpg: not a regular file",
    ),
    "a name of two lines": (
        lambda root: (root / "val" / "ant" / "a  b\nc.jpg").touch(),
        "cannot read image {0}/val/ant/a  b\\nc.jpg: not an image",
    ),
    "a link to where it is": (
        lambda root: (root / "train" / "bee" / "again").symlink_to("."),
        "{0}/train/bee/again leads back to a folder that it is in",
    ),
    "two links to each other": (
        lambda root: [
            (root / "train" / name / "other").symlink_to(f"../{other}")
            for name, other in (("ant", "bee"), ("bee", "ant"))
        ],
        "{0}/train/ant/other/other leads back to a folder that it is in",
    ),
    "a folder that is a file": (
        lambda root: (shutil.rmtree(root), root.write_text("hello")),
        "cannot read {0}: Not a directory",
    ),
}


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize(
    ("kind", "cache", "workers"),
    [(kind, "on", 0) for kind in BAD]
    + [(kind, "off", workers) for kind in BAD if "damaged" in kind for workers in (0, 1)],
)
def test_bad_folder(
    images: Path, tmp_path: Path, train: Train, kind: str, cache: str, workers: int
) -> None:
    """Status 2, one line that says what and where, and nothing left behind."""
    spoil, message = BAD[kind]
    spoil(images)
    outcome = train(
        "--data", images, "--epochs", 2, "--batch-size", 36, "--lr", 0.1,
        "--workers", workers, "--cache", cache, "--output", tmp_path / "runs" / "one",
    )  # fmt: skip
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("fastlars.trainer: error: ")
    assert message.format(images) in outcome.err
    assert len(outcome.err.splitlines()) == 1
    trained = "to test" in kind and cache == "off"  # an epoch, which a resumed run need not repeat
    assert (tmp_path / "runs" / "one" / "checkpoint.pt").exists() == trained
    if not trained:
        assert [name for name in files_below(tmp_path) if not name.startswith("images")] == []


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions do not bind root: act as nobody meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the test's own folder, opened: nobody may not pass through those above it."""
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("inside")
def test_no_permission_for_a_folder(images: Path) -> None:
    (images / "train" / "bee").chmod(0)
    with unprivileged(), pytest.raises(TrainerError) as error:
        folder("images")
    assert str(error.value) == "--data: cannot read images/train/bee: Permission denied"


@pytest.mark.usefixtures("inside")
def test_no_permission_for_an_image(images: Path) -> None:
    (images / "train" / "bee" / "004.png").chmod(0)
    with unprivileged(), pytest.raises(TrainerError) as error:
        list(folder("images").train([(0, torch.arange(36))]))
    assert str(error.value) == (
        "cannot read image images/train/bee/004.png: Permission denied "
        "(--max-bad-images would skip some)"
    )


@pytest.mark.usefixtures("tiny", "no_picture")
def test_damage_found_after_a_checkpoint_keeps_it(
    images: Path, tmp_path: Path, train: Train
) -> None:
    """What was trained stays, and the run goes on once the image is whole again."""
    run, image = tmp_path / "run", images / "train" / "bee" / "007.png"
    whole = image.read_bytes()
    settings = ("--data", images, "--epochs", 2, "--batch-size", 8, "--lr", 0.1, "--workers", 0)
    assert train(*settings, "--cache", "off", "--output", run, "--max-steps", 4).status == 0
    damage(image)
    outcome = train("--output", run, "--resume", "--max-steps", 0)
    assert outcome.status == 2
    assert str(image) in outcome.err
    assert (run / "checkpoint.pt").exists()
    image.write_bytes(whole)
    assert train("--output", run, "--resume", "--max-steps", 0).status == 0
