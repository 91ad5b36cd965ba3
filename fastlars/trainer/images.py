"""Image files to tensors of bytes."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

try:
    from torchvision.io import decode_image
except ImportError:  # torchvision 0.29 announces its end
    decode_image = None

_JPEG = b"\xff\xd8\xff"  # how every one begins

# What PIL raises for files that are damaged, too large or no images.
BAD = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decode(path: str) -> torch.Tensor:
    """The image at `path` in colour: bytes [3, height, width]; one of BAD where it cannot be read.

    torchvision decodes JPEG faster than PIL, which has all else: a damaged PNG ends torchvision's
    process (0.29), and of an animation it gives all pictures. What torchvision refuses is PIL's
    too, which says better what is wrong.
    """
    content = np.fromfile(path, dtype=np.uint8)
    if decode_image is not None and content[: len(_JPEG)].tobytes() == _JPEG:
        with suppress(RuntimeError, ValueError):
            return decode_image(torch.from_numpy(content), mode="RGB")
    return _by_pil(content.tobytes())


def _by_pil(content: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(content)) as image:
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of 32 bits (PIL's mode {image.mode}) have no known range")
        if image.mode.startswith("I;16"):  # PIL would cut off at 255
            grey = torch.from_numpy((np.array(image) >> 8).astype(np.uint8))
            return grey.expand(3, -1, -1)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def sides(path: str) -> tuple[int, int]:
    """Width and height of the image at `path`, from its header."""
    with Image.open(path) as image:
        return image.size


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged"
    return str(error)
