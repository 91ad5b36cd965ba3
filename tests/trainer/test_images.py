"""Image files of every kind to bytes."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlars.trainer.data import decode

WIDTH, HEIGHT = 40, 24
NO_IMAGE = "not an image (JPEG, PNG, GIF, BMP, PPM, TIFF, WebP), or damaged"


def smooth() -> Image.Image:
    """Colours that vary slowly, so that lossy formats preserve them."""
    x, y = np.meshgrid(np.linspace(0, 200, WIDTH), np.linspace(0, 250, HEIGHT))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def expected(mode: str) -> torch.Tensor:
    """What `smooth` is after it has been brought to a mode and back."""
    colour = smooth() if mode == "CMYK" else smooth().convert(mode).convert("RGB")
    return torch.from_numpy(np.array(colour)).permute(2, 0, 1)


@pytest.fixture(params=["torchvision", "PIL"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's decoder, and PIL alone: torchvision is going to remove its decoders."""
    if request.param == "PIL":
        monkeypatch.setattr(decode, "decode_image", None)


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
    found, lossy = decode.decode(str(path)), suffix in (".jpg", ".webp")
    assert (found.dtype, found.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    torch.testing.assert_close(
        found.float(), expected(mode).float(), rtol=0, atol=20 if lossy else 0
    )
    assert decode.sides(str(path)) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("order", ["<", ">"])  # of bytes, which a TIFF keeps
def test_16_bits_of_grey_keep_their_range(tmp_path: Path, suffix: str, order: str) -> None:
    path, grey = tmp_path / f"image{suffix}", np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray((grey * 256 + (255 - grey)).astype(f"{order}u2")).save(path)
    found = decode.decode(str(path))
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
    with pytest.raises(decode.BadImageError) as error:
        decode.decode(str(path))
    assert str(error.value) == why


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_images_cut_short(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(decode.BadImageError) as error:
        decode.decode(str(path))
    assert str(error.value)


def test_a_damaged_png(tmp_path: Path) -> None:
    """One wrong byte, in the middle of the pixels."""
    path = tmp_path / "image.png"
    smooth().save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(decode.BadImageError) as error:
        decode.decode(str(path))
    assert str(error.value)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_an_animation_is_its_first_picture(tmp_path: Path, kind: str) -> None:
    """Whatever its name says."""
    first, second = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "image.png", kind, save_all=True, append_images=[second])
    found = decode.decode(str(tmp_path / "image.png"))
    assert found.tolist() == [[[value] * 9] * 9 for value in (255, 0, 0)]


def test_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(decode.BadImageError, match="no known range"):
        decode.decode(str(tmp_path / "image.tif"))


def tiff(values: np.ndarray, tags: dict[int, tuple[int, ...]]) -> bytes:
    """A little-endian TIFF of one strip; `tags` are added to the required ones or replace them."""
    height, width, channels = (*values.shape, 1)[:3]
    data, at = values.tobytes(), 1000
    every = {
        256: (width,), 257: (height,), 258: (16,) * channels, 259: (1,),
        262: (2 if channels == 3 else 1,), 273: (at,), 277: (channels,), 278: (height,),
        279: (len(data),),
    } | tags  # fmt: skip
    entries, beyond = b"", b""
    for tag, numbers in sorted(every.items()):
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(packed) > 4:
            place = 10 + 12 * len(every) + 4 + len(beyond)
            beyond, packed = beyond + packed, struct.pack("<I", place)
        entries += struct.pack("<HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(every)) + entries + bytes(4) + beyond
    return head.ljust(at, b"\0") + data


def packed_12_bits(values: np.ndarray) -> np.ndarray:
    first, second = values.reshape(-1, 2).T.astype(int)
    three = (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
    return np.stack(three, axis=-1).astype(np.uint8)


RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)  # 12 bits
GREY = torch.arange(256, dtype=torch.uint8).view(16, 16)


@pytest.mark.parametrize(
    "content",
    [
        b"P5 16 16 4095\n" + RAMP.astype(">u2").tobytes(),
        b"P2 16 16 4095\n" + b" ".join(b"%d" % value for value in RAMP.flat),
        b"P5 16 16 65535\n" + (RAMP << 4).astype(">u2").tobytes(),
        b"P6 16 16 4095\n" + RAMP.repeat(3).astype(">u2").tobytes(),
        b"P5 16 16 1000\n" + (GREY.numpy() * (1000 / 255)).round().astype(">u2").tobytes(),
        tiff(RAMP, {281: (4095,)}),
        tiff(RAMP, {281: (4080,)}),  # the largest value there is
        tiff(RAMP << 4, {}),
        tiff(RAMP << 4, {281: (65535,)}),
        tiff(4080 - RAMP, {281: (4095,), 262: (0,)}),  # white is zero
        tiff(packed_12_bits(RAMP), {256: (16,), 257: (16,), 258: (12,), 262: (1,), 277: (1,)}),
    ],
    ids=["pgm", "plain pgm", "pgm 16", "ppm", "pgm 1000", "tiff", "tiff by use", "tiff 16",
         "tiff 16 said", "tiff inverted", "tiff packed"],
)  # fmt: skip
def test_the_header_gives_the_range(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    found = decode.decode(str(path))
    assert found.shape == (3, 16, 16)
    assert (found.int() - GREY.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (tiff(RAMP.astype("<i2"), {339: (2,)}), "no known range"),
        (tiff(RAMP.astype("<i4"), {258: (32,), 339: (2,)}), "no known range"),
        (b"Pf 16 16 -1.0\n" + RAMP.astype("<f4").tobytes(), "no known range"),
        (
            tiff(np.stack([RAMP] * 3, axis=-1), {281: (4095,) * 3}),
            "colours of 12 bits in fields of 16",
        ),
    ],
    ids=["signed", "32 bits", "floats", "colour"],
)
def test_ranges_that_are_not_known(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    with pytest.raises(decode.BadImageError, match=why):
        decode.decode(str(path))


def test_colours_of_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(np.stack([RAMP << 4] * 3, axis=-1), {}))
    assert torch.equal(decode.decode(str(path)), GREY.expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP"])
def test_one_limit_for_all_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """PIL's, which is twice the size that it warns of; the warning is silenced."""
    smooth().save(tmp_path / "image", kind)
    path = str(tmp_path / "image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(decode)  # pytest has put the filters of warnings back
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2)
        assert decode.decode(path).shape == (3, HEIGHT, WIDTH)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    for read in (decode.decode, decode.sides):
        with pytest.raises(decode.BadImageError, match="exceeds limit of 958 pixels"):
            read(path)


@pytest.mark.parametrize(
    ("side", "why"), [(65500, "4290250000 pixels"), (9000, "9000 x 9000 pixels in 7.. bytes")]
)
def test_a_header_that_lies(tmp_path: Path, side: int, why: str) -> None:
    """libjpeg would make up the pixels that are missing."""
    path = tmp_path / "image.jpg"
    smooth().save(path)
    content = path.read_bytes()
    at = content.index(b"\xff\xc0") + 5
    path.write_bytes(content[:at] + struct.pack(">HH", side, side) + content[at + 4 :])
    with pytest.raises(decode.BadImageError, match=why):
        decode.decode(str(path))


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_what_the_machine_lacks_is_no_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Otherwise --max-bad-images would leave out good images."""

    def lacking(*_arguments: object, **_options: object) -> None:
        raise error

    smooth().save(tmp_path / "good.png")
    monkeypatch.setattr("PIL.Image.open", lacking)
    for read in (decode.decode, decode.sides):
        with pytest.raises(type(error)):
            read(str(tmp_path / "good.png"))


def test_no_plain_files(tmp_path: Path) -> None:
    """None of them is opened: opening a FIFO would wait endlessly."""
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket.jpg"))  # absolute ones may be too long
    for name in ("fifo.jpg", "device.jpg", "socket.jpg"):
        for read in (decode.decode, decode.sides):
            with pytest.raises(decode.BadImageError, match="not a regular file"):
                read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a  b\nc.jpg", os.fsdecode(b"\xff\xfe.jpg")])
def test_names_of_any_kind_and_links(tmp_path: Path, name: str) -> None:
    smooth().save(tmp_path / "there.png")
    (tmp_path / name).symlink_to("there.png")
    assert decode.decode(str(tmp_path / name)).shape == (3, HEIGHT, WIDTH)
    (tmp_path / "there.png").unlink()
    with pytest.raises(decode.BadImageError, match="No such file or directory"):
        decode.decode(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "JPEG2000", "ICO", "TGA", "PCX"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    smooth().save(tmp_path / "image.jpg", kind)
    with pytest.raises(decode.BadImageError) as error:
        decode.decode(str(tmp_path / "image.jpg"))
    assert str(error.value) == NO_IMAGE
