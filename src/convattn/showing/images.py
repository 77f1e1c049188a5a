"""Images as the network sees them: the size, crop and scaling of a comparison's data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from convattn.data import Scale, read_image


def read(paths: Sequence[Path], size: int, scale: Scale | None = None) -> NDArray[np.uint8]:
    """Read images as (B, size, size, 3); those with more than 8 bits a channel are scaled as the data were.

    Raises:
        DataError: no image at a path, or a file that cannot be decoded.
    """
    return np.stack([read_image(path, size, scale) for path in paths])


def normalised(images: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """The network's input (B, 3, H, W): scaled to 0..1, then shifted by `mean` and divided by `std`."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255
    return ((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).contiguous()


def distinct(paths: Sequence[Path]) -> list[str]:
    """A name for each image, to write its files under: its stem, with a number where another image has it.

    Names that differ in case only are numbered too: to some file systems they are the same.
    """
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names
