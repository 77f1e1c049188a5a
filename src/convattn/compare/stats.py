"""The statistics of a comparison: arrays in, numbers out.

A first honest interval: Student's t over seeds, paired, with a standard error that is never below what the choice of
the test images alone would give.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from convattn.errors import InvalidOption

# before any run: how often two trainings disagree on an image, and by how many points seeds differ beyond that
ASSUMED_DISAGREEMENT = 0.10
ASSUMED_SEED_POINTS = 0.5
POWER = 0.8


@dataclass(frozen=True)
class Gain:
    """A gain in percentage points, variant minus baseline, with its interval.

    `low`, `high` and `p_value` are None where a single seed allows none.
    """

    points: float
    low: float | None
    high: float | None
    p_value: float | None
    standard_error: float
    standard_error_seeds: float
    standard_error_images: float


def gain(baseline: np.ndarray, variant: np.ndarray, *, confidence: float = 0.95) -> Gain:
    """The gain of a variant over the baseline, paired over seeds and images.

    With d the differences right/wrong of shape (S seeds, N images):
    gain = mean(d);  se_seeds = sd(mean over images) / sqrt(S);
    se_images = sd(mean over seeds) / sqrt(N), at least 1 / N;
    interval = gain +- t(S - 1) * max(se_seeds, se_images).

    1 / N, one image, is the least step that a score can make: no interval is of zero width.

    Args:
        baseline: boolean (seeds, images), True where the prediction is right.
        variant: the same for the variant, of the same seeds and images.
        confidence: of the interval.

    Raises:
        InvalidOption: arrays of different or wrong shape.
    """
    if baseline.shape != variant.shape or baseline.ndim != 2 or 0 in baseline.shape:
        raise InvalidOption(
            f"gain: expected two arrays of one shape (seeds, images), got {baseline.shape} and {variant.shape}."
        )
    seeds, images = baseline.shape
    difference = 100 * (variant.astype(float) - baseline.astype(float))
    points = float(difference.mean())
    one_image = 100 / images
    spread = float(difference.mean(axis=0).std(ddof=1) / math.sqrt(images)) if images > 1 else one_image
    from_images = max(spread, one_image)
    if seeds == 1:
        return Gain(points, None, None, None, from_images, math.nan, from_images)
    from_seeds = float(difference.mean(axis=1).std(ddof=1) / math.sqrt(seeds))
    error = max(from_seeds, from_images)
    half = float(stats.t.ppf(0.5 + confidence / 2, seeds - 1)) * error
    p_value = float(2 * stats.t.sf(abs(points) / error, seeds - 1))
    # no gain is beyond 100 points
    low, high = max(points - half, -100.0), min(points + half, 100.0)
    return Gain(points, low, high, p_value, error, from_seeds, from_images)


def detectable(seeds: int, images: int) -> float | None:
    """The gain in points that a comparison will probably see, before any run; None for a single seed.

    Assumes that two trainings disagree on 10 % of the images and that seeds differ by half a point beyond that; the
    gain is one whose interval excludes 0 in 80 of 100 comparisons.
    """
    if seeds < 2:
        return None
    variance = 100**2 * ASSUMED_DISAGREEMENT / images + ASSUMED_SEED_POINTS**2
    return detectable_with(math.sqrt(variance / seeds), seeds)


def detectable_with(standard_error: float, seeds: int) -> float:
    """The gain in points whose interval excludes 0 in 80 of 100 comparisons with this standard error."""
    return min(100.0, float(stats.t.ppf(0.975, seeds - 1) + stats.t.ppf(POWER, seeds - 1)) * standard_error)


def seeds_to_decide(found: Gain, seeds: int, smallest: float, *, most: int = 50) -> int | None:
    """The number of seeds at which the interval would leave `smallest`, were gain and spread to stay as they are.

    None if more than `most` seeds would be needed, or no number of them, since the images are too few.
    """
    distance = abs(found.points - smallest)
    spread = found.standard_error_seeds * math.sqrt(seeds)
    for more in range(seeds + 1, most + 1):
        error = max(spread / math.sqrt(more), found.standard_error_images)
        if float(stats.t.ppf(0.975, more - 1)) * error < distance:
            return more
    return None
