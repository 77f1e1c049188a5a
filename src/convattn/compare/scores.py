"""Other scores than accuracy, with intervals by the same inference: arrays in, numbers out.

Of each network and seed, a score is turned into a value for each image whose mean is the score (see `score_values` for
how, and for the sources). The differences of these values between variant and baseline go to `stats.gain_of`, as right
and wrong do for accuracy, so that an interval holds for new seeds and new images.

A gain is always variant minus baseline, so of log loss and of calibration error a gain below zero is an improvement:
see `Score.higher_is_better`. Each interval is for its row alone: verdicts are on accuracy.

The calibration error is too large by more the fewer the images, and more so that of a calibrated network; its interval
is wider by what that can be, and its gain is nearer to none than the truth.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convattn.compare import score_values
from convattn.compare.stats import Gain, gain_of, simultaneous
from convattn.errors import InvalidOption
from convattn.tables import aligned

# beside the values of the scores: by how much the calibration error may be too large
CALIBRATION, BIAS = "calibration_error", "calibration_bias"
BETTER, WORSE, UNCLEAR = "better", "worse", "unclear"


@dataclass(frozen=True)
class Score:
    """A score: `values` gives those of the images from class probabilities and labels, see `score_values`.

    `one_image` tells from the labels the least step that counts, below which no standard error falls.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    values: Callable[[np.ndarray, np.ndarray], np.ndarray]
    one_image: Callable[[np.ndarray], float]


def influence(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """For each score the values of the images, by its name, of one network and seed; their mean is the score.

    They are NaN where the score has no value: see AUROC, log loss and calibration error.

    Args:
        probabilities: of the classes, (images, classes).
        labels: the right classes, (images,), from 0.

    Raises:
        InvalidOption: arrays that do not fit each other, or labels that are no classes.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or 0 in probabilities.shape:
        raise InvalidOption(
            f"scores: expected probabilities (images, classes) and labels (images,), got {probabilities.shape} and "
            f"{labels.shape}."
        )
    if not np.isin(labels, np.arange(probabilities.shape[1])).all():
        raise InvalidOption(f"scores: labels must be whole numbers from 0 to {probabilities.shape[1] - 1}.")
    labels = labels.astype(int)
    return {score.name: score.values(probabilities, labels) for score in SCORES}


def over_seeds(seeds: Iterable[np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """The influence values of a network, (seeds, images) by score, from its probabilities seed by seed.

    Only the probabilities of one seed are held at a time, if `seeds` loads them as they are asked for. Beside the
    scores is `calibration_bias`, (seeds, 1): by how many points the calibration error may be too large.
    """
    found = [{**influence(one, labels), BIAS: np.array([score_values.calibration_bias(one, labels)])} for one in seeds]
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def first(values: Mapping[str, np.ndarray], seeds: int) -> dict[str, np.ndarray]:
    """The same of the first seeds."""
    return {name: one[:seeds] for name, one in values.items()}


def gains(
    baseline: Mapping[str, np.ndarray],
    variant: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    folds: int | None = None,
) -> dict[str, Gain | None]:
    """The gain of a variant in each score, from what `over_seeds` gives; None where the score has no value.

    Args:
        baseline: of the plain network.
        variant: the same, of the same seeds and images.
        labels: the right classes, (images,).
        groups: for each image its group, see `stats.gain`.
        confidence: of each interval alone.
        folds: see `stats.gain`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 300)
        >>> baseline, variant = (rng.dirichlet(np.ones(3), (4, 300)) for _ in range(2))
        >>> found = gains(over_seeds(baseline, labels), over_seeds(variant, labels), labels)
        >>> found["log_loss"].low < found["log_loss"].points < found["log_loss"].high
        True
    """
    found: dict[str, Gain | None] = {}
    for score in SCORES:
        difference = variant[score.name] - baseline[score.name]
        known = np.isfinite(difference).all()
        limit = 100.0 if score.unit == "points" else math.inf
        how: dict[str, Any] = {"groups": groups, "confidence": confidence, "folds": folds, "limit": limit}
        found[score.name] = gain_of(difference, one_image=score.one_image(labels), **how) if known else None
    error = found[CALIBRATION]
    if error is not None:
        found[CALIBRATION] = _allowing(error, float(baseline[BIAS].mean()), float(variant[BIAS].mean()))
    return found


def rows(
    baseline: Mapping[str, np.ndarray],
    variant: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    folds: int | None = None,
) -> list[dict[str, Any]]:
    """What `gains` finds as rows of a table, one for each score; None for what is not known.

    `change` is `better` or `worse` where the interval excludes none, in the sense of the score, else `unclear`.
    """
    found = gains(baseline, variant, labels, groups=groups, confidence=confidence, folds=folds)
    return [_row(score, baseline[score.name], variant[score.name], found[score.name]) for score in SCORES]


def table(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """The other scores of variants, as results have them, in lines with a heading; none where none are known."""
    heading = ["variant", "score", "better if", "baseline", "variant", "gain", "95 % interval", "variant is"]
    cells = [
        [
            variant["name"],
            f"{row['title']}, {row['unit']}",
            "higher" if row["higher_is_better"] else "lower",
            *("-" if row[key] is None else f"{row[key]:.4g}" for key in ("baseline", "variant")),
            "-" if row["gain"] is None else f"{row['gain']:+.3g}",
            "-" if row["interval95"] is None else "{:+.3g} to {:+.3g}".format(*row["interval95"]),
            row["change"] or "-",
        ]
        for variant in variants
        for row in variant["other_scores"]
    ]
    return ["", *aligned([heading, *cells], "<<<>>>><")] if cells else []


def class_gains(
    baseline: np.ndarray,
    variant: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    folds: int | None = None,
) -> list[Gain | None]:
    """The gain in accuracy on the images of each class (recall), with intervals that hold for all classes at once.

    The images of the class are the units, or its groups; the family is that of `stats.simultaneous`.

    Args:
        baseline: boolean (seeds, images), True where the prediction is right.
        variant: the same for the variant, of the same seeds and images.
        labels: the right classes, (images,).
        classes: how many there are.
        groups: for each image its group, see `stats.gain`.
        confidence: with which all intervals hold.
        folds: see `stats.gain`.

    Returns:
        For each class a gain; None where it has no test image, or where all of them are of one group.
    """
    found = {}
    for label in range(classes):
        own = np.flatnonzero(labels == label)
        if not len(own) or (groups is not None and len(np.unique(groups[own])) < 2):
            continue
        difference = 100 * (variant[:, own].astype(float) - baseline[:, own])
        within = None if groups is None else groups[own]
        found[str(label)] = gain_of(difference, groups=within, one_image=100 / len(own), limit=100.0, folds=folds)
    together = simultaneous(found, confidence=confidence)
    return [together.get(str(label)) for label in range(classes)]


def _allowing(found: Gain, baseline: float, variant: float) -> Gain:
    """A gain whose two scores may each be too large by so much: the interval covers what either could be."""
    if found.spread is None or found.low is None or found.high is None:
        return found
    left = abs(found.points) - (variant if found.points > 0 else baseline)
    low, high = max(found.low - variant, -100.0), min(found.high + baseline, 100.0)
    return replace(found, low=low, high=high, p_value=found.spread.p_value(max(left, 0.0)))


def _row(score: Score, baseline: np.ndarray, variant: np.ndarray, found: Gain | None) -> dict[str, Any]:
    alone = found is None or found.low is None or found.high is None
    ends = None if alone else [found.low, found.high]  # type: ignore[union-attr]
    return {
        "name": score.name,
        "title": score.title,
        "unit": score.unit,
        "higher_is_better": score.higher_is_better,
        "baseline": None if found is None else float(baseline.mean()),
        "variant": None if found is None else float(variant.mean()),
        "gain": None if found is None else found.points,
        "interval95": ends,
        "p_value": None if found is None else found.p_value,
        "change": _change(score, ends),
    }


def _change(score: Score, ends: list[Any] | None) -> str | None:
    if ends is None:
        return None
    if ends[0] <= 0 <= ends[1]:
        return UNCLEAR
    return BETTER if (ends[0] > 0) == score.higher_is_better else WORSE


def _one_of_its_class(labels: np.ndarray) -> float:
    """By how many points one image more that is right moves a mean over classes, as a root of a mean square."""
    sizes = np.bincount(labels)
    return 100 * math.sqrt((1 / sizes[sizes > 0]).sum() / len(labels)) / int((sizes > 0).sum())


def _one_of_all(labels: np.ndarray) -> float:
    """By how many points one image more that is right moves a mean over images."""
    return 100 / len(labels)


def _one_halved(labels: np.ndarray) -> float:
    """By how many nats the log loss moves where the probability of one image is halved."""
    return math.log(2) / len(labels)


SCORES = (
    Score("macro_f1", "macro-F1", "points", True, score_values.macro_f1, _one_of_its_class),
    Score("balanced_accuracy", "balanced accuracy", "points", True, score_values.balanced_accuracy, _one_of_its_class),
    Score("auroc", "AUROC, mean of one against the rest", "points", True, score_values.auroc, _one_of_its_class),
    Score("log_loss", "log loss", "nats", False, score_values.log_loss, _one_halved),
    Score(
        CALIBRATION,
        f"calibration error (ECE, {score_values.BINS} bins)",
        "points",
        False,
        score_values.calibration_error,
        _one_of_all,
    ),
)
