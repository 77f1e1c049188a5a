"""Which image is for training, validation and test. Pure functions of the data and the seed."""

from dataclasses import dataclass

import numpy as np

from convattn.data.images import Images
from convattn.errors import DataError

# of the images that were given in no part, and of those left for training
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.15
# the test images are the same for all seeds: cut with a number that is none
TEST_CUT = 2**32


@dataclass(frozen=True)
class Split:
    """Indices of images, each sorted."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(images: Images, seed: int) -> Split:
    """The parts for one seed: given parts as they are, missing ones cut in equal shares of every class.

    The test images are the same for all seeds; training and validation are cut anew for each seed, the same for all
    variants.
    """
    parts = np.array(images.parts)
    test = np.flatnonzero(parts == "test")
    validation = np.flatnonzero(parts == "validation")
    train = np.flatnonzero((parts == "train") | (parts == ""))
    if not test.size:
        train, test = _cut(train, images.labels, TEST_SHARE, TEST_CUT)
    if not validation.size:
        train, validation = _cut(train, images.labels, VALIDATION_SHARE, seed)
    return Split(train, validation, test)


def check_counts(images: Images) -> None:
    """Raise `DataError` if a class has too few images for one in every part."""
    given = set(images.parts)
    for part in sorted(given):
        # a part that is missing takes at least one image of every class from here
        needed = 1
        if part in ("", "train"):
            needed = 1 + ("test" not in given) + ("validation" not in given)
        here = np.bincount(images.labels[np.array(images.parts) == part], minlength=len(images.classes))
        few = int(here.argmin())
        if here[few] < needed:
            where = f" in {part}" if part else ""
            raise DataError(
                f"The class {images.classes[few]!r} has too few usable images{where}: {here[few]}, expected at least "
                f"{needed}; add images, or remove its folder."
            )


def _cut(indices: np.ndarray, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a share of every class, at least one image, off `indices`: the rest and the share."""
    taken = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        count = max(1, round(share * len(members)))
        taken.append(np.random.default_rng([seed, int(label)]).permutation(members)[:count])
    cut = np.sort(np.concatenate(taken))
    return np.setdiff1d(indices, cut), cut
