"""Damaged files of every format: each is decoded or refused, and nothing else happens."""

from __future__ import annotations

import io
import multiprocessing
import random
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastlars.trainer.data import decode

WIDTH, HEIGHT = 40, 24
_X, _Y = np.meshgrid(np.linspace(0, 200, WIDTH), np.linspace(0, 250, HEIGHT))
COLOUR = Image.fromarray(np.stack([_X, _Y, 255 - _X], axis=-1).astype(np.uint8))
DEEP = Image.fromarray((_X * 256).astype(np.uint16))
TURNED = {"save_all": True, "append_images": [COLOUR.rotate(90)]}


def saved(mode: str, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    (DEEP if mode == "I;16" else COLOUR.convert(mode)).save(content, kind, **options)
    return content.getvalue()


def plain(magic: str, mode: str, largest: int) -> bytes:
    """A PPM in words."""
    numbers = np.array(COLOUR.convert(mode)).astype(int).ravel() * largest // 255
    return f"{magic}\n# words\n{WIDTH} {HEIGHT}\n{largest}\n{' '.join(map(str, numbers))}".encode()


def interlaced() -> bytes:
    """A PNG in the seven passes of Adam7, which PIL does not write."""
    pixels, passes = np.array(COLOUR), ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
                                        (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # fmt: skip
    rows = [row for x, y, across, down in passes for row in pixels[y::down, x::across]]
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


READ = {
    "jpeg": saved("RGB", "JPEG"),
    "jpeg progressive": saved("RGB", "JPEG", progressive=True),
    "jpeg grey": saved("L", "JPEG"),
    "jpeg cmyk": saved("CMYK", "JPEG"),
    "jpeg with more": saved("RGB", "JPEG", comment=b"x", icc_profile=b"y" * 99, exif=Image.Exif()),
    "jpeg of two": saved("RGB", "MPO", **TURNED),
    "png": saved("RGB", "PNG"),
    "png rgba": saved("RGBA", "PNG"),
    "png palette": saved("P", "PNG"),
    "png 1 bit": saved("1", "PNG"),
    "png 16 bits": saved("I;16", "PNG"),
    "png interlaced": interlaced(),
    "png of two": saved("RGB", "PNG", **TURNED),
    "bmp": saved("RGB", "BMP"),
    "bmp palette": saved("P", "BMP"),
    "ppm": saved("RGB", "PPM"),
    "ppm plain": plain("P3", "RGB", 255),
    "pgm": saved("L", "PPM"),
    "pgm 16 bits": saved("I;16", "PPM"),
    "pgm plain": plain("P2", "L", 4095),
    "pbm": saved("1", "PPM"),
    "webp": saved("RGB", "WEBP"),
    "webp lossless": saved("RGB", "WEBP", lossless=True),
    "webp of two": saved("RGB", "WEBP", **TURNED),
    "gif": saved("P", "GIF"),
    "gif of two": saved("P", "GIF", **TURNED),
    "tiff": saved("RGB", "TIFF"),
    "tiff palette": saved("P", "TIFF"),
    "tiff 16 bits": saved("I;16", "TIFF"),
    "tiff big": saved("RGB", "TIFF", big_tiff=True),
    **{
        f"tiff {kind}": saved("RGB", "TIFF", compression=kind)
        for kind in ("jpeg", "tiff_adobe_deflate", "tiff_deflate", "tiff_lzw", "packbits", "lzma")
    },
    **{
        f"tiff {kind}": saved("1", "TIFF", compression=kind)
        for kind in ("tiff_ccitt", "group3", "group4")
    },
}
OTHERS = {kind: saved("RGB", kind) for kind in ("EPS", "PDF", "ICO", "TGA", "PCX", "SGI")}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bits turned, bytes changed, left out, put in or repeated, or the end cut off."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        # Half of them near the beginning, where the header is.
        at = draw.randrange(min(len(data), draw.choice([32, 200, len(data)])))
        few = draw.choice([1, 2, 4, 8])
        kind = draw.randrange(7)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + few] = draw.randbytes(few)
        elif kind == 2:
            data[at : at + few] = draw.choice([b"\0", b"\x7f", b"\xff"]) * few
        elif kind == 3:
            data[at:at] = draw.randbytes(few)
        elif kind == 4 and len(data) > few + 1:
            del data[at : min(at + few, len(data) - 1)]
        elif kind == 5:
            start = draw.randrange(len(data))
            data[at : at + few] = data[start : start + few]
        elif kind == 6 and draw.randrange(4) == 0:
            data = data[: at + 1]
    return valid_sums(data) if content[1:4] == b"PNG" and draw.randrange(3) else bytes(data)


def valid_sums(data: bytearray) -> bytes:
    """A PNG whose checksums are right, so that PIL looks at what is in it."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def read_all(kinds: dict[str, bytes], count: int, folder: Path, decoded: Any) -> None:
    """Ends the process with status 1 at any exception but BadImageError."""
    for number, (name, content) in enumerate(kinds.items()):
        draw, path = random.Random(name), folder / f"{number}.jpg"
        for _ in range(count):
            path.write_bytes(damaged(content, draw))
            try:
                image = decode.decode(str(path))
            except decode.BadImageError:
                continue
            assert (image.dtype, image.ndim, len(image)) == (torch.uint8, 3, 3)
            decoded[number] += 1
    sys.exit(0)


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path: Path, capfd: pytest.CaptureFixture[str], count: int) -> None:
    """A process of its own reads them, since a decoder may end it."""
    for name, content in READ.items():
        (tmp_path / "0.jpg").write_bytes(content)
        assert decode.decode(str(tmp_path / "0.jpg")).shape == (3, HEIGHT, WIDTH), name
    kinds = READ | OTHERS
    forked = multiprocessing.get_context("fork")
    decoded = forked.Array("i", len(kinds))
    reading = forked.Process(target=read_all, args=(kinds, count, tmp_path, decoded))
    reading.start()
    reading.join()
    assert capfd.readouterr().err == ""
    assert reading.exitcode == 0, max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    counts = dict(zip(kinds, decoded, strict=True))
    print(counts)
    assert not any(counts[name] for name in OTHERS)
    assert 0.2 < sum(counts.values()) / (count * len(READ)) < 0.8  # both are tried
