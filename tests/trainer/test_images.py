"""Image files of every kind to bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlars.trainer import images

WIDTH, HEIGHT = 40, 24
NO_IMAGE = "not an image (JPEG, PNG, GIF, BMP, PPM, TIFF, WebP), or damaged"


def smooth() -> Image.Image:
    """Colours that vary slowly, so that lossy formats keep them."""
    x, y = np.meshgrid(np.linspace(0, 200, WIDTH), np.linspace(0, 250, HEIGHT))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def expected(mode: str) -> torch.Tensor:
    """What `smooth` is after it has been brought to a mode and back."""
    colour = smooth() if mode == "CMYK" else smooth().convert(mode).convert("RGB")
    return torch.from_numpy(np.array(colour)).permute(2, 0, 1)


@pytest.fixture(params=["torchvision", "PIL"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL alone is what remains when torchvision gives up decoding."""
    if request.param == "PIL":
        monkeypatch.setattr(images, "decode_image", None)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", ".png"), ("RGBA", ".png"), ("L", ".png"), ("LA", ".png"), ("P", ".png"),
        ("1", ".png"), ("RGB", ".jpg"), ("L", ".jpg"), ("CMYK", ".jpg"), ("RGB", ".bmp"),
        ("L", ".bmp"), ("RGB", ".ppm"), ("L", ".pgm"), ("RGB", ".tif"), ("P", ".tif"),
        ("RGB", ".webp"),
    ],
)  # fmt: skip
def test_kinds(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    smooth().convert(mode).save(path)
    found, lossy = images.decode(str(path)), suffix in (".jpg", ".webp")
    assert (found.dtype, found.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    torch.testing.assert_close(
        found.float(), expected(mode).float(), rtol=0, atol=20 if lossy else 0
    )
    assert images.sides(str(path)) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("order", ["<", ">"])  # of bytes, which a TIFF keeps
def test_16_bits_of_grey_keep_their_range(tmp_path: Path, suffix: str, order: str) -> None:
    path, grey = tmp_path / f"image{suffix}", np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray((grey * 256 + (255 - grey)).astype(f"{order}u2")).save(path)
    found = images.decode(str(path))
    assert torch.equal(found, torch.from_numpy(grey.astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.png", b"", NO_IMAGE),
        ("text.jpg", b"hello", NO_IMAGE),
        ("folder.png", None, "not a regular file"),
        ("absent.png", None, "No such file or directory"),
    ],
)
def test_what_is_no_image(tmp_path: Path, name: str, content: bytes | None, why: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name.startswith("folder"):
        path.mkdir()
    with pytest.raises(images.BAD) as error:
        images.decode(str(path))
    assert images.reason(error.value) == why


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_images_cut_short(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(images.BAD) as error:
        images.decode(str(path))
    assert images.reason(error.value)


def test_a_damaged_png(tmp_path: Path) -> None:
    """One wrong byte, in the middle of the pixels."""
    path = tmp_path / "image.png"
    smooth().save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(images.BAD) as error:
        images.decode(str(path))
    assert images.reason(error.value)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_an_animation_is_its_first_picture(tmp_path: Path, kind: str) -> None:
    """Whatever its name says."""
    first, second = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "image.png", kind, save_all=True, append_images=[second])
    found = images.decode(str(tmp_path / "image.png"))
    assert found.tolist() == [[[value] * 9] * 9 for value in (255, 0, 0)]


def test_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(images.BAD, match="no known range"):
        images.decode(str(tmp_path / "image.tif"))
