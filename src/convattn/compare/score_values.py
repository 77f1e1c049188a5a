"""Scores of predictions as values of single images, whose mean is the score: arrays in, numbers out.

Each function takes class probabilities (images, classes) and the right classes (images,), and gives a value for each
image, in percentage points or nats. For a score T of N images, T(-i) being that without image i, the values are

    T + (N - 1) (mean of T(-j) - T(-i))

Tukey's pseudo-values, less the jackknife's estimate of the bias (Miller, The jackknife - a review, Biometrika 61,
1974); their variance errs towards too large (Efron and Stein, The jackknife estimate of variance, Annals of Statistics
9, 1981). T(-i) follows from counts; where the derivative of T is at hand, it takes the place of the difference (the
infinitesimal jackknife of Jaeckel, Bell Laboratories, 1972). Each score says which.

Means over classes are over the classes that have a test image; a class leaves with its last one.
"""

import math

import numpy as np
from scipy import special

# the least probability of the right class that log loss tells apart: that of single precision, as in scikit-learn
FLOOR = float(np.finfo(np.float32).eps)
# bins of equal width, as in Guo et al., ICML 2017, table 1
BINS = 15


def macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean over classes of F1 = 2 hits / (images of the class + predictions of it); by jackknife, from counts.

    It is the "averaged F1" of Opitz and Burst (Macro F1 and macro F1, 2019, arXiv:1911.03347).
    An image counts in the F1 of its class and of the class that was predicted, and in no other.
    """
    chosen = probabilities.argmax(axis=1)
    right = chosen == labels
    sizes, hits, both = _counts(chosen, labels, probabilities.shape[1])
    tested = sizes > 0
    f1 = np.where(tested, _ratio(2 * hits, both), 0.0)
    own = _ratio(2 * (hits[labels] - right), both[labels] - 1 - right)
    # a prediction less of another class
    other = np.where(right | ~tested[chosen], 0.0, _ratio(2 * hits[chosen], both[chosen] - 1) - f1[chosen])
    return _jackknifed(f1.sum(), f1.sum() - f1[labels] + own + other, sizes, labels)


def balanced_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean over classes of the share of their images that are right; by jackknife, from counts.

    Brodersen et al., The balanced accuracy and its posterior distribution, ICPR 2010.
    """
    chosen = probabilities.argmax(axis=1)
    sizes, hits, _ = _counts(chosen, labels, probabilities.shape[1])
    recall = _ratio(hits, sizes)
    own = _ratio(hits[labels] - (chosen == labels), sizes[labels] - 1)
    return _jackknifed(recall.sum(), recall.sum() - recall[labels] + own, sizes, labels)


def _counts(chosen: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each class its images, the right predictions, and its images and predictions together."""
    sizes = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[chosen == labels], minlength=classes)
    return sizes, hits, sizes + np.bincount(chosen, minlength=classes)


def _jackknifed(total: float, without: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The values of a mean over classes in points, from its sum over classes and from those sums without each image."""
    classes = int((sizes > 0).sum())
    # a class leaves with its last image
    means = without / np.maximum(classes - (sizes[labels] == 1), 1)
    return 100 * (total / classes + (len(labels) - 1) * (means.mean() - means))  # type: ignore[no-any-return]


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean over classes of the area under the ROC curve of one class against the rest; of two, that of the second.

    Each class counts the same, as in scikit-learn's `multi_class="ovr", average="macro"`; Provost and Domingos (Well-
    trained PETs, 2000) weigh classes by their frequency, Hand and Till (Machine Learning 45, 2001) average over pairs.
    The values are the structural components of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988), scaled so that
    the variance of one area is theirs exactly. No value for a single class, and, where two classes are
    all there are, for a single image of one.
    """
    sizes = np.bincount(labels, minlength=probabilities.shape[1])
    tested = np.flatnonzero(sizes)
    enough = len(tested) > 2 or (len(tested) == 2 and sizes[tested].min() > 1)
    if not enough or not np.isfinite(probabilities).all():
        return np.full(len(labels), np.nan)
    counted = tested if probabilities.shape[1] > 2 else tested[1:]
    values, areas = np.zeros(len(labels)), np.zeros(len(sizes))
    for label in counted:
        areas[label], components = _one_against_rest(probabilities[:, label], labels == label)
        values += components / len(counted)
    mean = areas[counted].mean()
    # a single image has no spread of its own: its class leaves with it
    last = sizes[labels] == 1
    values[last] += (len(labels) - 1) * (areas[labels[last]] - mean) / max(len(counted) - 1, 1)
    return 100 * (mean + values - values.mean())  # type: ignore[no-any-return]


def _one_against_rest(scores: np.ndarray, own: np.ndarray) -> tuple[float, np.ndarray]:
    """The area under a ROC curve, and how far each image's component is from it, scaled to DeLong's variance.

    The component of an image is the share of images of the other kind that it is on the right side of, ties being half:
    from ranks in O(N log N), as in Sun and Xu (IEEE Signal Processing Letters 21, 2014).
    """
    scores, ordered = np.ascontiguousarray(scores), np.sort(scores[own])
    count, positive = len(scores), len(ordered)
    negative = count - positive
    # for each image how many of its class lie below, and how many not above
    below, up_to = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    components = 1 - (below + up_to) / (2 * positive)
    under = np.cumsum(np.bincount(up_to[~own], minlength=positive + 1))
    not_over = np.cumsum(np.bincount(below[~own], minlength=positive + 1))
    components[own] = (under[below[own]] + not_over[up_to[own] - 1]) / (2 * negative)
    area = float(components[own].mean())
    scale = np.where(own, positive * max(positive - 1, 1), negative * max(negative - 1, 1))
    return area, (components - area) * np.sqrt(count * (count - 1) / scale)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log of the probability of the right class, at least `FLOOR`, in nats; a mean over images as it is.

    No value where the rows are no probabilities.
    """
    if not _are_probabilities(probabilities):
        return np.full(len(labels), np.nan)
    given = probabilities[np.arange(len(labels)), labels].astype(float)
    return -np.log(np.clip(given, FLOOR, 1.0))  # type: ignore[no-any-return]


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The expected calibration error (ECE) of the predicted class; by infinitesimal jackknife with fixed bins.

    Guo et al. (ICML 2017, section 2): with g the sum over a bin of right minus confidence, divided by the number of all
    images, the sum over 15 bins of equal width of |g|. An image's value is the sign of g times its right minus
    confidence. The error is too large, since g errs by chance and |g| knows no sign: see `calibration_bias`. No value
    where the rows are no probabilities.
    """
    if not _are_probabilities(probabilities):
        return np.full(len(labels), np.nan)
    place, excess, _ = _in_bins(probabilities, labels)
    return 100 * np.sign(np.bincount(place, excess, BINS))[place] * excess  # type: ignore[no-any-return]


def calibration_bias(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """By how many points the calibration error may be too large; NaN where it has no value.

    With s the standard error of g in a calibrated network, E|g| exceeds |E g| by 2 s (phi(z) - z Phi(-z)), z being
    |E g| / s: from 0.8 s at z = 0 down to nothing (the mean of a folded normal). Of what |E g| could be, the least is
    taken: |g| - 2 s, or 0. No estimate of |E g| is without bias, so an interval has to allow for it (Armstrong and
    Kolesar, Econometrica 86, 2018).
    """
    if not _are_probabilities(probabilities):
        return math.nan
    place, excess, confidence = _in_bins(probabilities, labels)
    gap = np.abs(np.bincount(place, excess, BINS))
    error = np.sqrt(np.bincount(place, confidence * (1 - confidence), BINS))
    least = np.maximum(_ratio(gap, error) - 2, 0)
    density = np.exp(-(least**2) / 2) / math.sqrt(2 * math.pi)
    return float(100 * (2 * error * (density - least * special.ndtr(-least))).sum() / len(labels))


def _in_bins(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each image its bin, right minus confidence, and confidence."""
    chosen = probabilities.argmax(axis=1)
    confidence = np.minimum(probabilities[np.arange(len(labels)), chosen].astype(float), 1.0)
    # a bin holds its upper end
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return place, (chosen == labels) - confidence, confidence


def _are_probabilities(rows: np.ndarray) -> bool:
    # single and half precision round
    return bool(rows.min() >= 0 and np.abs(rows.sum(axis=1, dtype=float) - 1).max() < 1e-2)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, and 0 where it is of nothing."""
    found: np.ndarray = np.divide(above, below, out=np.zeros(np.shape(below)), where=below != 0)
    return found
