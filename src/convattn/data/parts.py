"""The images of a run for a training function of the user's own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from convattn.data.batches import Batches, evaluation_batches
from convattn.data.split import Split

HIDDEN = -1


class Part(Dataset[tuple[torch.Tensor, int]]):
    """The images of one part, for indexing or a `torch.utils.data.DataLoader`: pairs of x and label.

    x is (3, S, S), the centre of the image, normalised as the network wants it, not augmented. `labels` (N,) are -1 for
    test images, whose labels no training may see; `paths` are relative to the data.

    Example:
        >>> from convattn.data import Part
        >>> def batches(part: Part):
        ...     return torch.utils.data.DataLoader(part, batch_size=128, shuffle=True)
    """

    def __init__(self, served: Batches, indices: np.ndarray, *, hidden: bool = False) -> None:
        labels = served.images.labels[indices]
        self._served, self._indices = served, indices
        self.labels: np.ndarray = np.full_like(labels, HIDDEN) if hidden else labels
        self.paths = [served.images.paths[index] for index in indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        # a negative place counts from the end, and one beyond it ends a loop over the images
        return self.__getitems__([range(len(self))[place]])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Several images at once, as data loaders ask for them."""
        x = torch.cat(list(evaluation_batches(self._served, self._indices[np.asarray(places)])))
        return list(zip(x, self.labels[np.asarray(places)].tolist(), strict=True))


@dataclass(frozen=True)
class Parts:
    """What a training function may see of the images: each a `Part`, and the names of the classes."""

    train: Part
    validation: Part
    test: Part
    classes: tuple[str, ...]

    @classmethod
    def of(cls, served: Batches, split: Split) -> "Parts":
        """The parts of a run whose images are served like this."""
        return cls(
            Part(served, split.train),
            Part(served, split.validation),
            Part(served, split.test, hidden=True),
            served.images.classes,
        )
