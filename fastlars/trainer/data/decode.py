"""Image files to tensors of bytes."""

from __future__ import annotations

import errno
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from fastlars.trainer.errors import one_line
from fastlars.trainer.process import console

try:
    from torchvision.io import decode_image
except ImportError:  # torchvision 0.29 announces that it will remove its decoders
    decode_image = None

# Recognised by content, whatever the file's name. Few of PIL's other formats occur in data sets,
# and some make PIL run other programs on the file (Ghostscript for EPS).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
_IN_MEMORY = 2**30  # bytes; PIL reads larger files piece by piece
# An image with more pixels than this cannot be in so few bytes: its header is wrong.
_PIXELS_ALWAYS, _PIXELS_PER_BYTE = 2**22, 10_000
# Errors of the machine, not of the image: skipping the image would leave out a good one.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_WHITE_IS_ZERO, _BITS, _MAXIMA = 262, 258, (281, 341)  # tags of TIFF


# PIL and torchvision are silent: the trainer prints a line of its own for a damaged file. Silenced
# once, because every change of the filters makes Python show other libraries' warnings again.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)  # torchvision's
logging.getLogger("PIL").addHandler(logging.NullHandler())  # the default handler is stderr


class BadImageError(Exception):
    """A file cannot be read as an image; the text says why, in a few words."""


def decode(path: str) -> torch.Tensor:
    """The image at `path` in colour: bytes [3, height, width].

    torchvision decodes JPEG, which it does faster than PIL. PIL decodes all else: torchvision 0.29
    crashes on a damaged PNG and returns every frame of an animation. PIL also gets the JPEGs that
    torchvision refuses, because its errors are clearer.
    """
    with _opened(path) as image, console.muted():
        is_jpeg = isinstance(image, JpegImageFile)
        if is_jpeg and decode_image is not None and os.path.getsize(path) <= _IN_MEMORY:
            content = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            with suppress(RuntimeError, ValueError):
                return decode_image(content, mode="RGB")
        return _by_pil(image)


def sides(path: str) -> tuple[int, int]:
    """Width and height of the image at `path`, from its header."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image at `path`, its header read; errors inside the context become BadImageError.

    For damaged files PIL raises exceptions of many classes. It refuses headers of more than
    2 * Image.MAX_IMAGE_PIXELS (179 million) pixels; below that some of its decoders, and libjpeg,
    invent the pixels that a short file lacks.
    """
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # opening a FIFO would wait for its writer
            raise BadImageError("not a regular file")
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _PIXELS_ALWAYS + _PIXELS_PER_BYTE * about.st_size:
                raise BadImageError(
                    f"{image.width} x {image.height} pixels in {about.st_size} bytes"
                )
            yield image
    except Exception as error:
        shortage = isinstance(error, OSError) and error.errno in _SHORTAGES
        if shortage or isinstance(error, (BadImageError, MemoryError)):
            raise
        raise BadImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image (JPEG, PNG, GIF, BMP, PPM, TIFF, WebP), or damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = one_line(error)[:200]
    if isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError)):
        return text
    return f"damaged ({type(error).__name__}: {text})"


def _by_pil(image: Image.Image) -> torch.Tensor:
    # PIL scales a 16-bit PGM to the full 16 bits, whatever the range in its header.
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not deep:
        raise BadImageError(f"pixels of no known range (PIL's mode {image.mode})")
    bits, inverted = _range(image, deep) if isinstance(image, TiffImageFile) else (16, False)
    if not deep:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    # PIL's own conversion would clip at 255.
    grey = (np.array(image) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(255 - grey if inverted else grey).expand(3, -1, -1)


def _range(image: TiffImageFile, deep: bool) -> tuple[int, bool]:
    """How many bits the values of a TIFF use, by its header, and whether 0 is white.

    Cameras of 10 or 12 bits store 16 bits a value, and give the range as the largest value.
    """
    tags = image.tag_v2
    stored = max(tags.get(_BITS, (1,)))
    largest = max((int(max(tags[tag])) for tag in _MAXIMA if tag in tags), default=0)
    bits = max(min(largest.bit_length() or stored, stored), 8)
    if stored == 16 and bits < stored and not deep:
        raise BadImageError(f"colours of {bits} bits in fields of 16, of which PIL drops the lower")
    return bits, tags.get(_WHITE_IS_ZERO) == 0
