"""Which image is for training, validation and test. Pure functions of the data and the seed."""

from dataclasses import dataclass, fields, replace

import numpy as np

from convattn import checks
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


def split(images: Images, seed: int, *, fold: int | None = None, folds: int | None = None) -> Split:
    """The parts for one seed: given parts as they are, missing ones cut in equal shares of every class.

    The test images are the same for all seeds; training and validation are cut anew for each seed, the same for all
    variants. A group is never cut: all of its images are in one part, and the shares are as equal as that allows.

    Args:
        images: with the parts that they were given in.
        seed: of the run.
        fold: which of the `folds` is for test, if every image is to be tested once; given parts then do not count.
        folds: how many.

    Raises:
        DataError: a class whose images or groups cannot be dealt to all parts.
    """
    if folds is not None:
        own = fold_of(images, folds) == fold
        return Split(*_cut(images, np.flatnonzero(~own), VALIDATION_SHARE, seed, 1), np.flatnonzero(own))
    parts = np.array(images.parts)
    test = np.flatnonzero(parts == "test")
    validation = np.flatnonzero(parts == "validation")
    train = np.flatnonzero((parts == "train") | (parts == ""))
    if not test.size:
        # where validation is still to be cut, two groups of every class have to be left
        train, test = _cut(images, train, TEST_SHARE, TEST_CUT, 1 if validation.size else 2)
    if not validation.size:
        train, validation = _cut(images, train, VALIDATION_SHARE, seed, 1)
    return Split(train, validation, test)


def overview(images: Images, folds: int | None) -> Split:
    """The parts of the first seed; of folds those of the first one, and all images for test, as all are tested."""
    if folds is None:
        return split(images, 0)
    return replace(split(images, 0, fold=0, folds=folds), test=np.arange(len(images.labels)))


def fold_of(images: Images, folds: int) -> np.ndarray:
    """The fold of each image (N,), the same for all seeds: equal shares of every class, no group torn.

    Raises:
        DataError: a class that would be missing somewhere.
    """
    _check_folds(images, folds)
    selection = checks.extra("sklearn.model_selection", "The cut into folds")
    kind = selection.StratifiedKFold if images.groups is None else selection.StratifiedGroupKFold
    found = np.empty(len(images.labels), dtype=np.int64)
    cut = kind(folds, shuffle=True, random_state=0).split(found, images.labels, images.groups)
    for fold, (_, test) in enumerate(cut):
        found[test] = fold
    for label, name in enumerate(images.classes):
        if len(np.unique(found[images.labels == label])) < 2:
            raise DataError(
                f"The groups with the class {name!r} cannot be dealt to {folds} folds without tearing one: add some, "
                f"or leave out the column group."
            )
    return found


def _check_folds(images: Images, folds: int) -> None:
    """Whether each class is in every fold, and two of its images or groups outside of it, to train and to validate."""
    pairs = np.stack([np.arange(len(images.labels)) if images.groups is None else images.groups, images.labels])
    counts = np.bincount(np.unique(pairs, axis=1)[1], minlength=len(images.classes))
    few = int(counts.argmin())
    if counts[few] < max(folds, 2 + -(-counts[few] // folds)):
        what = "images" if images.groups is None else "groups"
        raise DataError(
            f"The class {images.classes[few]!r} has too few {what} for {folds} folds: {counts[few]}; take fewer folds, "
            f"or add some."
        )


def per_class(images: Images, parts: Split) -> dict[str, list[int]]:
    """How many images of each class are in each part."""
    classes = len(images.classes)
    return {
        field.name: np.bincount(images.labels[getattr(parts, field.name)], minlength=classes).tolist()
        for field in fields(parts)
    }


def check_counts(images: Images) -> None:
    """Raise `DataError` if a class has too few images, or groups of them, for one in every part that is cut.

    A class that a given validation or test part lacks is no error: `per_class` tells it.
    """
    given = set(images.parts)
    # every part that is missing takes at least one of every class from the images for training
    needed = 1 + ("test" not in given) + ("validation" not in given)
    pool = np.flatnonzero(np.isin(images.parts, ("", "train")))
    here = np.bincount(images.labels[pool], minlength=len(images.classes))
    what = "usable images"
    if images.groups is not None and here.min() >= needed:
        pairs = np.unique(np.stack([images.groups[pool], images.labels[pool]]), axis=1)
        here, what = np.bincount(pairs[1], minlength=len(images.classes)), "groups"
    few = int(here.argmin())
    if here[few] < needed:
        where = " in train" if "train" in given else ""
        raise DataError(
            f"The class {images.classes[few]!r} has too few {what}{where}: {here[few]}, expected at least {needed}; "
            + (
                "add images, or remove the class."
                if what == "usable images"
                else "add some, or leave out the column group."
            )
        )


def _cut(images: Images, indices: np.ndarray, share: float, seed: int, left: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a share of every class, at least one image, off `indices`: the rest and the share."""
    labels = images.labels
    if images.groups is not None:
        inside = _whole_groups(images.groups[indices], labels[indices], images.classes, share, seed, left)
        return indices[~inside], indices[inside]
    taken = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        count = max(1, round(share * len(members)))
        taken.append(np.random.default_rng([seed, int(label)]).permutation(members)[:count])
    cut = np.sort(np.concatenate(taken))
    return np.setdiff1d(indices, cut), cut


def _whole_groups(
    groups: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], share: float, seed: int, left: int
) -> np.ndarray:
    """Which images to cut: whole groups, about a share of every class, so that `left` groups of each stay behind."""
    names, group_of = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(counts, (group_of, labels), 1)
    totals, behind = counts.sum(axis=0), (counts > 0).sum(axis=0)
    missing = np.where(totals > 0, np.maximum(1, np.round(share * totals)), 0)
    order = np.random.default_rng(seed).permutation(len(names))
    taken = np.zeros(len(names), dtype=bool)

    def may_go(group: int) -> bool:
        return not taken[group] and bool((behind[counts[group] > 0] > left).all())

    def off(group: int) -> float:
        """How far the shares are off once this group has been taken."""
        return float(np.abs(missing - counts[group]).sum())

    def take(group: int) -> None:
        nonlocal missing, behind
        taken[group], missing, behind = True, missing - counts[group], behind - (counts[group] > 0)

    # one of every class first, and of the class with the fewest groups before others take them
    for label in np.argsort(behind, kind="stable"):
        if totals[label] and not counts[taken, label].any():
            able = [group for group in order if counts[group, label] and may_go(group)]
            if not able:
                raise DataError(
                    f"The groups with the class {classes[label]!r} cannot be dealt to training, validation and test "
                    f"without tearing one: add some, or leave out the column group."
                )
            # at random, but none that is larger than the share as long as there is another
            here = np.abs(missing).sum()
            take(next((group for group in able if off(group) < here), min(able, key=off)))
    for group in order:
        if may_go(group) and off(group) < np.abs(missing).sum():
            take(group)
    return taken[group_of]
