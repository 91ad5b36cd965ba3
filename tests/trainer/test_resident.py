"""Images on the device: looked up, shifted, mirrored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlars.trainer.data.augment import ShiftAndFlip, shifted
from fastlars.trainer.data.dataset import TEST, DeviceDataset, PixelBatch

SIDE, MARGIN = 6, 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("flipped", [False, True])
def test_shifts_are_slices_of_a_padded_image(dtype: torch.dtype, flipped: bool) -> None:
    """Compared with slicing, for every offset, all in one batch; the padding is background."""
    offsets = torch.cartesian_prod(*[torch.arange(2 * MARGIN + 1)] * 2)
    images = torch.randint(0, 256, (len(offsets), SIDE, SIDE, 3)).to(dtype)
    found = shifted(images, MARGIN, offsets, torch.full((len(offsets),), flipped), 7)
    assert found.dtype == dtype
    for image, (top, left), window in zip(images, offsets.tolist(), found, strict=True):
        padded = torch.full((SIDE + 2 * MARGIN, SIDE + 2 * MARGIN, 3), 7, dtype=dtype)
        padded[MARGIN:-MARGIN, MARGIN:-MARGIN] = image
        expected = padded[top : top + SIDE, left : left + SIDE]
        assert torch.equal(window, expected.flip(1) if flipped else expected)


def numbered(images: int) -> DeviceDataset:
    """Image n is n throughout, its label 10 * n."""
    pixels = torch.arange(images, dtype=torch.uint8).view(-1, 1, 1, 1)
    return DeviceDataset(pixels.expand(-1, SIDE, SIDE, 3).clone(), 10 * torch.arange(images))


def test_looking_up() -> None:
    one, other = numbered(9).read([(4, torch.tensor([8, 0, 3])), (TEST, torch.tensor([1]))])
    assert one.pixels[:, 0, 0, 0].tolist() == [8, 0, 3]
    assert one.labels.tolist() == [80, 0, 30]
    assert (one.epoch, one.indices.tolist()) == (4, [8, 0, 3])
    assert (other.epoch, other.labels.tolist()) == (TEST, [10])


def test_images_that_are_missing_are_left_out() -> None:
    pixels, labels = torch.zeros(5, SIDE, SIDE, 3, dtype=torch.uint8), torch.arange(5)
    some, none = DeviceDataset(pixels, labels, missing=(1, 4)).read(
        [(0, torch.tensor([4, 3, 0, 1])), (0, torch.tensor([4, 1]))]
    )
    assert some.labels.tolist() == some.indices.tolist() == [3, 0]
    assert len(none.pixels) == len(none.labels) == 0


def test_shifts_depend_on_seed_epoch_and_image_alone() -> None:
    pixels = torch.randint(0, 256, (40, SIDE, SIDE, 3), dtype=torch.uint8)

    def seen(shift: ShiftAndFlip, epoch: int, indices: torch.Tensor) -> torch.Tensor:
        return shift.apply(PixelBatch(pixels[indices], indices, epoch, indices), 0).pixels

    order, shift = torch.randperm(40), ShiftAndFlip(40, 1, MARGIN, flip=True)
    first = seen(shift, 2, torch.arange(40))[order]
    assert not torch.equal(first, seen(shift, 3, order))
    assert torch.equal(first, seen(shift, 2, order))
    assert torch.equal(first, seen(ShiftAndFlip(40, 1, MARGIN, flip=True), 2, order))
    assert not torch.equal(first, seen(ShiftAndFlip(40, 2, MARGIN, flip=True), 2, order))


class Transfers(TorchDispatchMode):
    """Counts the tensors that are sent to another device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = func is torch.ops.aten._to_copy.default
        self.count += copies and (kwargs or {}).get("device") is not None
        return func(*args, **kwargs or {})


def test_a_batch_sends_its_indices_and_no_more() -> None:
    """A copy to a GPU may make the host wait: tables go there once an epoch."""
    device = torch.device("meta")
    images = torch.empty(40, SIDE, SIDE, 3, dtype=torch.uint8, device=device)
    kept = DeviceDataset(images, torch.empty(40, dtype=torch.int64, device=device))
    shift = ShiftAndFlip(40, 0, MARGIN, flip=True)
    batches = kept.read((epoch, torch.arange(8)) for epoch in (0, 0, 0, 0, 1))
    sent = []
    for _ in range(5):
        with Transfers() as transfers:
            assert shift.apply(next(batches), 0).pixels.shape == (8, SIDE, SIDE, 3)
        sent.append(transfers.count)
    assert sent == [3, 1, 1, 1, 3]


def test_every_shift_occurs_as_often() -> None:
    """And half of the images are mirrored: the position of one bright pixel shows both."""
    count = 20_000
    corner = torch.zeros(1, SIDE, SIDE, 1, dtype=torch.uint8)
    corner[0, MARGIN, MARGIN] = 1  # inside at every offset
    at = torch.arange(count)
    batch = PixelBatch(corner.expand(count, -1, -1, -1), at, 0, at)
    found = ShiftAndFlip(count, 0, MARGIN, flip=True).apply(batch, 0).pixels[..., 0]
    assert found.sum(dim=(1, 2)).unique().tolist() == [1]
    rows, columns = found.sum(dim=(0, 2)), found.sum(dim=(0, 1))
    # Rows 0 to 4 evenly; columns the same, or as many from the right where flipped.
    shares = torch.tensor([1, 1, 1, 1, 1, 0]) / 5
    torch.testing.assert_close(rows / count, shares, atol=0.02, rtol=0)
    torch.testing.assert_close(columns / count, (shares + shares.flip(0)) / 2, atol=0.02, rtol=0)
