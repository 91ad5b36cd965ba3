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
except ImportError:  # torchvision 0.29 announces its end
    decode_image = None

# What is told apart by content, whatever the name says. Of PIL's other formats few are images of a
# data set, and some have the file run by other programs (EPS by Ghostscript).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
_IN_MEMORY = 2**30  # bytes of a file that torchvision gets as a whole
_PIXELS_ALWAYS, _PIXELS_PER_BYTE = 2**22, 10_000  # more pixels cannot be in so few bytes
_LONGEST_REASON = 200  # characters
# Of the machine, not of the image: skipping the image would leave out a good one.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_WHITE_IS_ZERO, _BITS, _MAXIMA = 262, 258, (281, 341)  # TIFF's tags


def _hush_pil() -> None:
    """Silence PIL and torchvision: the trainer prints a line of its own for a damaged file.

    Once for all, since each change of the filters has other libraries' warnings shown again.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)  # torchvision's
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # without one, stderr is


_hush_pil()


class BadImageError(Exception):
    """A file that cannot be read as an image; the text says why, in a few words."""


BAD = BadImageError


def decode(path: str) -> torch.Tensor:
    """The image at `path` in colour: bytes [3, height, width]; BAD where it cannot be read.

    JPEG by torchvision, which is faster; all else by PIL: torchvision 0.29 crashes on a damaged PNG
    and returns every frame of an animation. PIL also tries what torchvision refuses, because its
    errors are clearer.
    """
    with _opened(path) as image, console.muted():
        jpeg = isinstance(image, JpegImageFile)
        if jpeg and decode_image is not None and os.path.getsize(path) <= _IN_MEMORY:
            content = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            with suppress(RuntimeError, ValueError):
                return decode_image(content, mode="RGB")
        return _by_pil(image)


def sides(path: str) -> tuple[int, int]:
    """Width and height of the image at `path`, from its header; BAD where it cannot be read."""
    with _opened(path) as image:
        return image.size


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image (JPEG, PNG, GIF, BMP, PPM, TIFF, WebP), or damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = (BadImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
    text = one_line(error)[:_LONGEST_REASON]
    return text if isinstance(error, known) else f"damaged ({type(error).__name__}: {text})"


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image at `path`, of which the header has been read.

    PIL refuses headers of more than 2 * Image.MAX_IMAGE_PIXELS (179 million) pixels. Some of its
    decoders, and libjpeg, make up what is missing from a short file. For damaged files it raises
    exceptions of many kinds.
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
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            raise
        raise BadImageError(reason(error)) from error


def _by_pil(image: Image.Image) -> torch.Tensor:
    # PIL brings a 16-bit PGM to all of 16 bits, whatever its header says.
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not wide:
        raise BadImageError(f"pixels of no known range (PIL's mode {image.mode})")
    bits, inverted = _range(image, wide) if isinstance(image, TiffImageFile) else (16, False)
    if not wide:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    # PIL itself would cut off at 255.
    grey = (np.array(image) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(255 - grey if inverted else grey).expand(3, -1, -1)


def _range(image: TiffImageFile, wide: bool) -> tuple[int, bool]:
    """How many bits the values of a TIFF take, by its header, and whether the highest is black.

    Cameras of 10 or 12 bits fill fields of 16, and tell of it by the largest value.
    """
    tags = image.tag_v2
    there = max(tags.get(_BITS, (1,)))
    largest = max((int(max(tags[tag])) for tag in _MAXIMA if tag in tags), default=0)
    bits = max(min(largest.bit_length() or there, there), 8)
    if there == 16 and bits < there and not wide:
        raise BadImageError(f"colours of {bits} bits in fields of 16, of which PIL drops the lower")
    return bits, tags.get(_WHITE_IS_ZERO) == 0
