"""Image files to tensors of bytes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional

try:
    from torchvision.io import decode_image
except ImportError:  # torchvision 0.29 announces its end
    decode_image = None

# What PIL raises for files that are damaged, too large or no images.
BAD = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decode(path: str) -> torch.Tensor:
    """The image at `path` in colour: bytes [3, height, width]; one of BAD where it cannot be read.

    torchvision decodes JPEG and PNG faster than PIL. What it does not know or refuses is PIL's,
    which also says better what is wrong.
    """
    if decode_image is None:
        return _by_pil(path)
    content = np.fromfile(path, dtype=np.uint8)
    try:
        pixels = decode_image(torch.from_numpy(content), mode="RGB")
    except (RuntimeError, ValueError):
        return _by_pil(path)
    return functional.to_dtype(pixels, torch.uint8, scale=True)


def _by_pil(path: str) -> torch.Tensor:
    with Image.open(path) as image:
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
