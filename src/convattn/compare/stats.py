"""The statistics of a comparison: arrays in, numbers out.

Seeds and images are crossed: every seed is tested on every image. A gain has to hold for new seeds and for new images,
so both are random. With d the differences between variant and baseline, (S seeds, N images), in percentage points:

    A = var(mean over images) / S                                        from seeds, and from seeds by images
    B = max(0, var(mean over seeds) / N - var(d - both means) / (S N))   from images: what all seeds share
    standard error = sqrt(A + B)

The degrees of freedom of A are S - 1, those of B are N - 1. Two intervals are known for such a sum. Satterthwaite's
(Biometrics Bulletin 2, 1946), t(df)^2 (A + B) with df = (A + B)^2 / (A^2 / (S - 1) + B^2 / (N - 1)), is too narrow
at few seeds: at three it misses the truth in up to 8 % of comparisons. The other, t(S - 1)^2 A + t(N - 1)^2 B, with a
quantile for each part (as Graybill and Wang, JASA 75, 1980, have it), is too wide in between. From three seeds on the
square of the half width here is the mean of both at the level of 5 %, and nearer to the second at smaller ones; at two
seeds, where the first fails, it is the second.

Where a gain comes from few images, a test set that lacks such images shows both a small gain and a small spread, and
the interval ends too early on the far side from 0. There it reaches further by the term that Johnson's t-interval has
for skewed data (JASA 73, 1978), (1 + 2 t^2) / 6 times the third central moment of the mean over its variance, though
by no more than half the half width. On the near side, and in p-values, nothing changes.

Where every image is tested, by one of K networks trained on the other folds, the training sets overlap, and what one of
them has by chance most of them have. The correction is that of Nadeau and Bengio (Machine Learning 52, 2003): 1 / K, by
which the variance of a mean over folds goes, becomes 1 / K + 1 / (K - 1), the images tested over those trained on. So
K / (K - 1) times the variance of the mean over images is added. It assumes more than there mostly is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import optimize, special

from convattn.errors import InvalidOption

# before any run: how often two trainings disagree on an image, and by how many points seeds differ beyond that
ASSUMED_DISAGREEMENT = 0.10
ASSUMED_SEED_POINTS = 0.5
POWER = 0.8
# how much Satterthwaite's interval counts at these levels, in between by the logarithm: the smaller the level, the more
# it misses, and at 1 % a half would miss 1.4 times as often as it says
LEVELS, WEIGHTS = (0.01, 0.05), (0.25, 0.5)
# below this a p-value says no more
LEAST_P = 1e-12


@dataclass(frozen=True)
class Spread:
    """The variance of a mean difference, by where it comes from, with the degrees of freedom of each part.

    `third` is the third central moment that images give the mean.
    """

    seeds: float
    images: float
    df_seeds: int
    df_images: int
    third: float = 0.0

    @property
    def standard_error(self) -> float:
        """Of the mean difference, over new seeds and new images."""
        return math.sqrt(self.seeds + self.images)

    @property
    def df(self) -> float:
        """Degrees of freedom by Satterthwaite."""
        parts = self.seeds**2 / self.df_seeds + self.images**2 / self.df_images
        found = (self.seeds + self.images) ** 2 / parts if parts else math.inf
        return max(found, min(self.df_seeds, self.df_images))

    def half_width(self, level: float) -> float:
        """Half the width of the interval that misses the truth at this rate."""
        own = _quantile(level, self.df_seeds) ** 2 * self.seeds + _quantile(level, self.df_images) ** 2 * self.images
        if self.df_seeds == 1:
            return math.sqrt(own)
        pooled = _quantile(level, self.df) ** 2 * (self.seeds + self.images)
        weight = np.interp(math.log(level), np.log(LEVELS), WEIGHTS)
        return math.sqrt((1 - weight) * own + weight * pooled)

    def ends(self, points: float, level: float) -> tuple[float, float]:
        """The interval around these points that misses the truth at this rate."""
        half = self.half_width(level)
        if self.third * points <= 0:
            return points - half, points + half
        quantile = _quantile(level, self.df_images)
        further = (1 + 2 * quantile**2) / 6 * abs(self.third) / self.standard_error**2
        far = half + min(further, half / 2)
        return (points - half, points + far) if points > 0 else (points - far, points + half)

    def p_value(self, points: float) -> float:
        """The level at which the interval around these points begins to exclude 0."""
        if self.half_width(1 - 1e-9) >= abs(points):
            return 1.0
        if self.half_width(LEAST_P) < abs(points):
            return LEAST_P

        def beyond(logarithm: float) -> float:
            return self.half_width(math.exp(logarithm)) - abs(points)

        return math.exp(optimize.brentq(beyond, math.log(LEAST_P), math.log(1 - 1e-9), xtol=1e-10))

    def with_seeds(self, seeds: int) -> "Spread":
        """What is to be expected of another number of seeds."""
        return replace(self, seeds=self.seeds * (self.df_seeds + 1) / seeds, df_seeds=seeds - 1)

    def detectable(self, level: float = 0.05) -> float:
        """The gain in points whose interval excludes 0 in 80 of 100 comparisons like this one."""
        return self.half_width(level) + float(special.stdtrit(self.df, POWER)) * self.standard_error


@dataclass(frozen=True)
class Gain:
    """A gain, variant minus baseline, with its interval: in percentage points, or in units of the score.

    `low`, `high`, `p_value` and `spread` are None where a single seed allows none. `standard_error` squared is the sum
    of the squares of its two parts, from seeds and from images. `level` is the rate at which the interval may miss.
    """

    points: float
    low: float | None
    high: float | None
    p_value: float | None
    standard_error: float
    standard_error_seeds: float
    standard_error_images: float
    level: float = 0.05
    spread: Spread | None = field(default=None, repr=False)

    @property
    def detectable(self) -> float | None:
        """The smallest gain that this comparison would probably have seen; None for a single seed."""
        return None if self.spread is None else self.spread.detectable(self.level)


def gain(
    baseline: np.ndarray,
    variant: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    folds: int | None = None,
) -> Gain:
    """The gain of a variant over the baseline in percentage points, paired over seeds and over images.

    Args:
        baseline: boolean (seeds, images), True where the prediction is right.
        variant: the same for the variant, of the same seeds and images.
        groups: for each image its group, such as the patient or the video: then groups are what a new sample draws.
        confidence: of the interval.
        folds: how many there were, where each image was tested by a network that was trained on the other folds.

    Raises:
        InvalidOption: arrays of different or wrong shape, or fewer than two groups.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> baseline = rng.random((5, 1000)) < 0.80
        >>> found = gain(baseline, baseline | (rng.random((5, 1000)) < 0.10))
        >>> found.low < found.points < found.high
        True
    """
    if baseline.shape != variant.shape or baseline.ndim != 2 or 0 in baseline.shape:
        raise InvalidOption(
            f"gain: expected two arrays of one shape (seeds, images), got {baseline.shape} and {variant.shape}."
        )
    difference = 100 * (variant.astype(float) - baseline.astype(float))
    one_image = 100 / baseline.shape[1]
    return gain_of(difference, groups=groups, confidence=confidence, one_image=one_image, limit=100.0, folds=folds)


def gain_of(
    difference: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    one_image: float = 0.0,
    limit: float = math.inf,
    folds: int | None = None,
) -> Gain:
    """The gain from the differences between variant and baseline in any score that is a mean over images.

    Args:
        difference: (seeds, images); of a score that is no mean, its influence values (see `scores`).
        groups: for each image its group.
        confidence: of the interval.
        one_image: the least step that the score can make: no interval is of zero width.
        limit: no gain is beyond it.
        folds: see `gain`.

    Raises:
        InvalidOption: groups of another length, or fewer than two; fewer than two folds.
    """
    if not 0 < confidence < 1:
        raise InvalidOption(f"gain: confidence must lie between 0 and 1, got {confidence!r}.")
    if folds is not None and folds < 2:
        raise InvalidOption(f"gain: expected at least 2 folds, got {folds!r}.")
    points = float(difference.mean())
    units = difference if groups is None else _by_group(difference, np.asarray(groups))
    seeds = len(units)
    if seeds == 1:
        error = math.sqrt(max(_variance(units[0]) / units.shape[1], one_image**2))
        return Gain(points, None, None, None, error, math.nan, error, 1 - confidence)
    spread = _spread(units, one_image)
    if folds is not None:
        overlap = _variance(units.mean(axis=0)) / units.shape[1] * folds / (folds - 1)
        spread = replace(spread, images=spread.images + overlap)
    found = Gain(
        points,
        None,
        None,
        None,
        spread.standard_error,
        math.sqrt(spread.seeds),
        math.sqrt(spread.images),
        1 - confidence,
        spread,
    )
    return _at(found, 1 - confidence, spread.p_value(points), limit)


def simultaneous(
    gains: Mapping[str, Gain],
    *,
    confidence: float = 0.95,
    shares: Mapping[str, float] | None = None,
    limit: float = 100.0,
) -> dict[str, Gain]:
    """The gains of a family of variants, with intervals that all hold at once, and p-values to match.

    Each interval is at the level of Šidák (JASA 62, 1967): 1 - confidence ** (1 / variants). The family's p-values come
    from the same level, so that one is below 1 - confidence exactly where its interval excludes 0.

    Args:
        gains: by name, from `gain`.
        confidence: with which all intervals hold.
        shares: what share of the level of each variant this look may spend, by its name, see `looks`; by default all.
        limit: no gain is beyond it.
    """
    count = len(gains)
    level = 1 - confidence ** (1 / count) if count else 0.0
    adjusted = {}
    for name, one in gains.items():
        if one.spread is None:
            adjusted[name] = one
            continue
        share = (shares or {}).get(name, 1.0)
        alone = min(1.0, one.spread.p_value(one.points) / share)
        p_value = -math.expm1(count * math.log1p(-alone)) if alone < 1 else 1.0
        adjusted[name] = _at(one, level * share, p_value, limit)
    return adjusted


def detectable(seeds: int, images: int, *, variants: int = 1, folds: int | None = None) -> float | None:
    """The gain in points that a comparison will probably see, before any run; None for a single seed.

    Assumes that two trainings disagree on 10 % of the images and that seeds differ by half a point beyond that; the
    gain is one whose interval excludes 0 in 80 of 100 comparisons.
    """
    if seeds < 2:
        return None
    single = 100**2 * ASSUMED_DISAGREEMENT / images / seeds
    overlap = 0.0 if folds is None else single * folds / (folds - 1)
    level = 1 - 0.95 ** (1 / variants)
    spread = Spread(single + ASSUMED_SEED_POINTS**2 / seeds, overlap, seeds - 1, max(1, images - 1))
    return min(100.0, spread.detectable(level))


def seeds_to_decide(found: Gain, smallest: float, *, most: int = 50) -> int | None:
    """The number of seeds at which the interval would leave `smallest`, were gain and spread to stay as they are.

    None if more than `most` seeds would be needed, or no number of them, since the images are too few.
    """
    if found.spread is None:
        return None
    for seeds in range(found.spread.df_seeds + 2, most + 1):
        if leaves(found.spread.with_seeds(seeds), found, smallest):
            return seeds
    return None


def leaves(spread: Spread, found: Gain, smallest: float) -> bool:
    """Whether with another spread the interval of a gain would leave `smallest`."""
    low, high = spread.ends(found.points, found.level)
    return not low <= smallest <= high


def chance_to_decide(found: Gain, smallest: float, *, seeds: int, level: float) -> float:
    """The probability that with more seeds the interval leaves `smallest`, if gain and spread are what they seem."""
    if found.spread is None:
        return 1.0
    later = found.spread.with_seeds(seeds)
    # how far new seeds will move the gain
    moves = math.sqrt(max(found.spread.seeds - later.seeds, 0.0)) or 1e-12
    low, high = later.ends(found.points, level)
    return float(special.ndtr((low - smallest) / moves) + special.ndtr((smallest - high) / moves))


def _spread(units: np.ndarray, one_image: float) -> Spread:
    seeds, images = units.shape
    rows, columns = units.mean(axis=1), units.mean(axis=0)
    from_seeds = _variance(rows) / seeds
    rest = units - rows[:, None] - columns + units.mean()
    together = float((rest**2).sum()) / max(1, (seeds - 1) * (images - 1)) / (seeds * images)
    if seeds == 2:
        # two seeds may agree by chance, and are then taken to differ as much as single images say
        from_seeds = max(from_seeds, together)
    from_images = max(0.0, _variance(columns) / images - together)
    # one image, right for one seed or, where no difference is another than the rest, for every seed
    least = one_image**2 if units.min() == units.max() else one_image**2 / seeds
    from_images = max(from_images, least - from_seeds)
    third = float(((columns - columns.mean()) ** 3).mean()) / images**2
    return Spread(from_seeds, from_images, seeds - 1, max(1, images - 1), third)


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _by_group(difference: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """A value for each seed and group whose mean over groups is that over images: a ratio of sums, linearised.

    Cochran, Sampling Techniques, 1977, section 2.11: groups differ in size, and a large one weighs more.
    """
    images = difference.shape[1]
    if groups.shape != (images,):
        raise InvalidOption(f"gain: expected a group for each of {images} images, got the shape {groups.shape}.")
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise InvalidOption("gain: all images are of one group; at least two are needed to tell how groups differ.")
    sizes = np.bincount(index)
    rows = difference.mean(axis=1, keepdims=True)
    totals = np.stack([np.bincount(index, weights=row, minlength=len(names)) for row in difference])
    return rows + (totals - rows * sizes) * len(names) / images  # type: ignore[no-any-return]


def _at(found: Gain, level: float, p_value: float, limit: float) -> Gain:
    """A gain with its interval at a level."""
    if found.spread is None:
        return found
    low, high = found.spread.ends(found.points, level)
    return replace(found, low=max(low, -limit), high=min(high, limit), p_value=p_value, level=level)


def _quantile(level: float, df: float) -> float:
    return -float(special.stdtrit(df, level / 2))
