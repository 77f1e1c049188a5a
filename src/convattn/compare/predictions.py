"""Verdicts on predictions that were made elsewhere.

A file is a NumPy archive (.npz) of one network: `right`, boolean (seeds, images), or `probabilities`, (seeds, images,
classes), with `labels`, (images,). The images are the same for every network and seed and in the same order, and seeds
go together by their place. `groups`, (images,), may name the patient or video of each image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convattn import checks
from convattn.compare import scores
from convattn.compare.verdicts import Verdict, verdict
from convattn.errors import DataError, InvalidOption


class Predictions(NamedTuple):
    """What networks got right, (seeds, images), of the same images, whose groups and labels may be known.

    `scored` has what `scores.over_seeds` gives where probabilities are known, and None elsewhere; of the baseline under
    None.
    """

    baseline: np.ndarray
    variants: dict[str, np.ndarray]
    groups: np.ndarray | None
    labels: np.ndarray | None
    scored: dict[str | None, dict[str, np.ndarray] | None]

    def other_scores(self, name: str) -> list[dict[str, Any]]:
        """The rows of `scores.rows` of a variant; none where probabilities are unknown."""
        plain, own = self.scored[None], self.scored[name]
        if plain is None or own is None or self.labels is None:
            return []
        return scores.rows(plain, own, self.labels, groups=self.groups)


def judge(baseline: str | Path, variants: Sequence[str | Path], *, smallest_gain: float = 0.5) -> dict[str, Verdict]:
    """The verdicts on the networks of some files, by the names of the files.

    Args:
        baseline: the file of the plain network.
        variants: the files of the others.
        smallest_gain: the smallest gain in percentage points that is worth it.

    Raises:
        DataError: a file that is none, or of other images.
        InvalidOption: two files of one name.
    """
    checks.between("verdict", "smallest_gain", smallest_gain, 0, 100)
    given = read(baseline, variants)
    return verdict(given.baseline, given.variants, smallest_gain=smallest_gain, groups=given.groups)


def read(baseline: str | Path, variants: Sequence[str | Path]) -> Predictions:
    """The predictions in some files, the variants by the names of theirs.

    Raises:
        DataError: a file that is none, or of other images.
        InvalidOption: two files of one name.
    """
    files = [Path(one) for one in variants]
    names = [path.stem for path in files]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidOption(f"verdict: two files are called {twice[0]!r}, and the verdicts bear the files' names.")
    plain = _read(Path(baseline))
    others: dict[str, np.ndarray] = {}
    scored: dict[str | None, dict[str, np.ndarray] | None] = {None: plain.scored}
    for name, path in zip(names, files, strict=True):
        one = _read(path)
        if one.right.shape != plain.right.shape:
            raise DataError(
                f"{path} is of {one.right.shape[0]} seeds and {one.right.shape[1]} images, and {baseline} of "
                f"{plain.right.shape[0]} and {plain.right.shape[1]}: they have to be the same."
            )
        if plain.labels is not None and one.labels is not None and not np.array_equal(plain.labels, one.labels):
            raise DataError(f"{path} has other labels than {baseline}: the images have to be the same, in one order.")
        others[name], scored[name] = one.right, one.scored
    return Predictions(plain.right, others, plain.groups, plain.labels, scored)


class _File(NamedTuple):
    right: np.ndarray
    groups: np.ndarray | None
    labels: np.ndarray | None
    scored: dict[str, np.ndarray] | None


def _read(path: Path) -> _File:
    """What a network got right, and the groups, labels and other scores of the images where the file has them."""
    try:
        with np.load(path) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as an archive of arrays ({checks.reason(error)}).") from error
    groups, labels, scored = arrays.get("groups"), arrays.get("labels"), None
    if "right" in arrays:
        right = arrays["right"]
    elif "probabilities" in arrays and labels is not None:
        probabilities = arrays["probabilities"]
        _check_probabilities(path, probabilities, labels)
        right = probabilities.argmax(axis=2) == labels
        scored = scores.over_seeds(probabilities, labels)
    else:
        raise DataError(f"{path} needs an array `right`, or `probabilities` and `labels`; it has {', '.join(arrays)}.")
    if right.ndim != 2 or 0 in right.shape or not np.isin(right, (0, 1)).all():
        raise DataError(f"{path}: expected `right` as true or false, (seeds, images), got the shape {right.shape}.")
    return _File(right.astype(bool), groups, labels, scored)


def _check_probabilities(path: Path, probabilities: np.ndarray, labels: np.ndarray) -> None:
    fit = probabilities.ndim == 3 and 0 not in probabilities.shape and probabilities.shape[1:2] == labels.shape
    if not fit or not np.isfinite(probabilities).all():
        raise DataError(
            f"{path}: expected finite probabilities (seeds, images, classes) and labels (images,), got "
            f"{probabilities.shape} and {labels.shape}."
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= probabilities.shape[2]:
        raise DataError(f"{path}: expected labels from 0 to {probabilities.shape[2] - 1}, one below the classes.")
