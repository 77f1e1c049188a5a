"""Batches of images as tensors. Order and augmentation are pure functions of (seed, epoch, position)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from convattn.data.images import Images

# pixels of padding on each side of a small image of 32 pixels before it is cropped (He et al., 2016, section 4.2)
PADDING = 4 / 32


@dataclass(frozen=True)
class Batches:
    """How the training images of one run are served."""

    images: Images
    indices: np.ndarray
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    flip: bool

    def __len__(self) -> int:
        """Batches in an epoch; the images that do not fill the last one are left out of it."""
        return max(1, len(self.indices) // self.batch_size)


def batches(plan: Batches, epoch: int, *, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch from the `first` on: images (B, 3, S, S) and labels (B,), in random order, augmented."""
    count, size = len(plan.indices), plan.images.size
    random = np.random.default_rng([plan.seed, epoch])
    order = plan.indices[random.permutation(count)]
    padding = round(PADDING * size) if plan.images.pixels.shape[1] == size else 0
    room = plan.images.pixels.shape[1] + 2 * padding - size
    offsets = random.integers(0, room + 1, size=(count, 2))
    flipped = random.random(count) < 0.5 if plan.flip else np.zeros(count, dtype=bool)
    for number in range(first, len(plan)):
        here = slice(number * plan.batch_size, (number + 1) * plan.batch_size)
        pixels = _cropped(plan.images.pixels[order[here]], padding, offsets[here], size)
        pixels[flipped[here]] = pixels[flipped[here], :, ::-1]
        yield _normalised(pixels, plan), torch.from_numpy(plan.images.labels[order[here]])


def evaluation_batches(plan: Batches, indices: np.ndarray) -> Iterator[torch.Tensor]:
    """The images of these indices in order, (B, 3, S, S), their centres, not augmented."""
    margin = (plan.images.pixels.shape[1] - plan.images.size) // 2
    inside = slice(margin, margin + plan.images.size)
    for start in range(0, len(indices), plan.batch_size):
        here = indices[start : start + plan.batch_size]
        yield _normalised(plan.images.pixels[here][:, inside, inside], plan)


def _cropped(pixels: np.ndarray, padding: int, offsets: np.ndarray, size: int) -> np.ndarray:
    """One window of `size` at an offset of its own out of every image."""
    if padding:
        pixels = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = offsets[:, 0, None] + np.arange(size)  # [B, S]
    columns = offsets[:, 1, None] + np.arange(size)
    return pixels[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _normalised(pixels: np.ndarray, plan: Batches) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (plan.mean, plan.std))
    return ((x - mean) / std).contiguous()
