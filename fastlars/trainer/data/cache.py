"""Decoded images of a folder, kept on the device."""

from __future__ import annotations

import time

import torch
from tqdm import tqdm

from fastlars.trainer.data.device_dataset import TEST, DeviceDataset
from fastlars.trainer.data.reader import Reader
from fastlars.trainer.errors import TrainerError

LARGEST = 64  # pixels; of larger images each epoch cuts out other parts
_AT_ONCE = 256  # images that a worker reads
_ON_CPU = 2 * 2**30  # bytes that 'auto' takes there
_OF_GPU = 4  # it takes this part of what is free on a GPU


def wanted(cache: str, side: int, images: int, device: torch.device) -> bool:
    """Whether `images` of `side` pixels are to be kept on the device, as --cache says."""
    if cache == "off" or (cache == "auto" and side > LARGEST):
        return False
    if side > LARGEST:
        raise TrainerError(
            f"--cache on keeps images of up to {LARGEST} pixels, and these are brought to {side}: "
            "set a smaller --image-size"
        )
    if cache == "on":
        return True
    on_gpu = device.type == "cuda"
    limit = torch.cuda.mem_get_info(device)[0] // _OF_GPU if on_gpu else _ON_CPU
    return images * side * side * 3 <= limit


def keep(
    reader: Reader, side: int, device: torch.device, *, what: str, shown: bool
) -> DeviceDataset:
    """Read every image once, showing how far it is."""
    count, started = len(reader.files), time.perf_counter()
    try:
        pixels = torch.empty(count, side, side, 3, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        size = count * side * side * 3 / 2**30
        raise TrainerError(
            f"--cache: {count} images take {size:.1f} GiB, more than {device} has"
        ) from error
    missing = set(range(count))
    asked = torch.arange(count).split(_AT_ONCE)
    with tqdm(
        total=count, desc=f"reading {what} images", unit="img", disable=None if shown else True
    ) as bar:
        for indices, part in zip(asked, reader.read((TEST, i) for i in asked), strict=True):
            pixels[part.indices] = part.pixels
            missing.difference_update(part.indices.tolist())
            bar.update(len(indices))
    if shown:
        tqdm.write(
            f"read {count - len(missing)} {what} images in {time.perf_counter() - started:.1f} s: "
            f"{pixels.nbytes / 1e6:.1f} MB, kept on {device.type}"
        )
    labels = torch.tensor([label for _, label in reader.files], device=device)
    return DeviceDataset(pixels, labels, missing)
