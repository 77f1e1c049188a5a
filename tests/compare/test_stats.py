"""Intervals against SciPy's tests and against simulations whose truth is known."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from convattn.compare.stats import Gain, detectable, detectable_with, gain, seeds_to_decide
from convattn.errors import InvalidOption

# comparisons in a simulation: the rate of a 95 % interval is then known to 0.8 points
REPEATS = 800


def right(random: np.random.Generator, shares: np.ndarray, images: int) -> np.ndarray:
    """Runs that get images right at random, each with its own share: (seeds, images)."""
    return random.random((len(shares), images)) < shares[:, None]


def noisy(seeds: int, images: int, points: float, *, spread: float = 0.02, seed: int = 0) -> list[np.ndarray]:
    """A baseline and a variant that is better by some points, in which seeds differ much more than images."""
    random = np.random.default_rng(seed)
    return [right(random, level + random.normal(0, spread, seeds), images) for level in (0.7, 0.7 + points / 100)]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(4))
def test_where_seeds_dominate_it_is_the_paired_t_test(seeds: int, seed: int) -> None:
    baseline, variant = noisy(seeds, 20_000, 1.0, spread=0.05, seed=seed)
    found = gain(baseline, variant)
    a, b = (100 * runs.mean(axis=1) for runs in (variant, baseline))
    expected = scipy_stats.ttest_rel(a, b)
    assert found.standard_error_seeds > found.standard_error_images
    assert found.points == pytest.approx((a - b).mean())
    assert found.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert found.low == pytest.approx(max(interval.low, -100))
    assert found.high == pytest.approx(min(interval.high, 100))


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_other_confidence(confidence: float) -> None:
    baseline, variant = noisy(5, 20_000, 1.0, spread=0.05)
    expected = scipy_stats.ttest_rel(100 * variant.mean(axis=1), 100 * baseline.mean(axis=1))
    found, interval = gain(baseline, variant, confidence=confidence), expected.confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)


def test_where_images_dominate_it_is_their_standard_error() -> None:
    random = np.random.default_rng(0)
    baseline, variant = (np.tile(random.random(200) < share, (4, 1)) for share in (0.6, 0.7))
    found = gain(baseline, variant)
    difference = 100 * (variant[0].astype(float) - baseline[0])
    error = scipy_stats.sem(difference)
    assert found.standard_error_seeds == 0
    assert found.standard_error == found.standard_error_images == pytest.approx(error)
    assert found.high - found.low == pytest.approx(2 * scipy_stats.t.ppf(0.975, 3) * error)
    assert found.p_value == pytest.approx(2 * scipy_stats.t.sf(abs(difference.mean()) / error, 3))


def test_never_of_zero_width() -> None:
    # every seed and every image gains the same: nothing
    same = np.ones((5, 40), dtype=bool)
    found = gain(same, same)
    assert found.points == 0
    assert found.standard_error == 2.5
    assert found.low == -found.high == pytest.approx(-2.5 * scipy_stats.t.ppf(0.975, 4))
    assert found.p_value == 1


def test_a_gain_of_all_points_is_no_certainty() -> None:
    found = gain(np.zeros((3, 10), dtype=bool), np.ones((3, 10), dtype=bool))
    assert (found.points, found.high) == (100, 100)
    assert found.low < 100


def test_intervals_end_at_100_points() -> None:
    random = np.random.default_rng(0)
    found = gain(*(random.random((2, 6)) < 0.5 for _ in range(2)))
    assert (found.low, found.high) == (-100, 100)


def test_a_single_seed_has_no_interval() -> None:
    random = np.random.default_rng(0)
    baseline, variant = (random.random((1, 50)) < share for share in (0.5, 0.6))
    found = gain(baseline, variant)
    assert found.points == pytest.approx(100 * (variant.mean() - baseline.mean()))
    assert (found.low, found.high, found.p_value) == (None, None, None)
    assert math.isnan(found.standard_error_seeds)


@pytest.mark.parametrize("seeds", [1, 4])
def test_the_other_way_round(seeds: int) -> None:
    baseline, variant = noisy(seeds, 300, 3.0)
    there, back = gain(baseline, variant), gain(variant, baseline)
    assert there.points == pytest.approx(-back.points)
    assert there.p_value == pytest.approx(back.p_value)
    if seeds > 1:
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_the_order_of_seeds_and_images_does_not_matter() -> None:
    baseline, variant = noisy(4, 300, 3.0)
    random = np.random.default_rng(1)
    seeds, images = random.permutation(4), random.permutation(300)
    there, shuffled = gain(baseline, variant), gain(baseline[seeds][:, images], variant[seeds][:, images])
    for name in ("points", "low", "high", "p_value", "standard_error"):
        assert getattr(there, name) == pytest.approx(getattr(shuffled, name))


def test_pairing_counts() -> None:
    # what seeds have in common cancels out
    random = np.random.default_rng(0)
    shared = random.normal(0, 0.1, 5)
    baseline, variant = (right(random, level + shared, 50_000) for level in (0.6, 0.62))
    assert gain(baseline, variant).standard_error < 0.5
    assert gain(baseline, variant[::-1]).standard_error > 2


@pytest.mark.parametrize(
    ("baseline", "variant"),
    [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((4,), (4,)), ((0, 4), (0, 4)), ((3, 0), (3, 0)), ((1, 2, 3), (1, 2, 3))],
)
def test_wrong_shapes(baseline: tuple[int, ...], variant: tuple[int, ...]) -> None:
    with pytest.raises(InvalidOption, match=r"gain: expected two arrays of one shape \(seeds, images\), got"):
        gain(np.zeros(baseline, dtype=bool), np.zeros(variant, dtype=bool))


def test_the_arrays_are_not_changed() -> None:
    baseline, variant = noisy(3, 20, 1.0)
    copies = baseline.copy(), variant.copy()
    gain(baseline, variant)
    assert np.array_equal(baseline, copies[0]) and np.array_equal(variant, copies[1])


def covered(seeds: int, *, spread: float, points: float = 0.8, images: int = 1000) -> tuple[float, float]:
    """How often the interval holds the true gain, and how often p < 0.05 for a gain of none."""
    random = np.random.default_rng(seeds)
    held = rejected = 0
    for _ in range(REPEATS):
        levels = 0.7 + random.normal(0, spread, (3, seeds)) + np.array([[0], [points / 100], [0]])
        baseline, variant, same = (right(random, shares, images) for shares in levels)
        found = gain(baseline, variant)
        held += found.low <= points <= found.high
        rejected += gain(baseline, same).p_value < 0.05
    return held / REPEATS, rejected / REPEATS


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold_the_truth(seeds: int) -> None:
    held, rejected = covered(seeds, spread=0.06)
    assert 0.93 <= held <= 0.98
    assert rejected <= 0.07


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold_the_truth_where_seeds_differ_little(seeds: int) -> None:
    held, rejected = covered(seeds, spread=0.001)
    assert held >= 0.93
    assert rejected <= 0.07


# what a comparison can see


def test_detectable() -> None:
    assert detectable(1, 1000) is None
    assert detectable(5, 1000) == pytest.approx(2, abs=0.25)
    assert detectable(10, 1000) < detectable(5, 1000) < detectable(3, 1000)
    assert detectable(5, 10_000) < detectable(5, 1000) < detectable(5, 100)
    assert detectable(2, 5) == 100


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_such_a_gain_is_seen_in_about_80_of_100_comparisons(seeds: int) -> None:
    random = np.random.default_rng(seeds)
    means = detectable_with(0.3, seeds) + random.normal(0, 0.3 * math.sqrt(seeds), (20_000, seeds))
    seen = scipy_stats.ttest_1samp(means, 0, axis=1).pvalue < 0.05
    assert 0.72 < seen.mean() < 0.88


def test_detectable_is_what_its_assumptions_give() -> None:
    # trainings that disagree on a tenth of the images, seeds that differ by half a point beyond that
    random = np.random.default_rng(0)
    seeds, images = 5, 1000
    found = []
    for _ in range(300):
        flipped = random.random((2, seeds, images)) < 0.05
        shifts = random.normal(0, 0.005, seeds)
        found.append((flipped[0].mean(axis=1) - flipped[1].mean(axis=1) + shifts).mean() * 100)
    assert detectable_with(float(np.std(found)), seeds) == pytest.approx(detectable(seeds, images), rel=0.1)


# what would settle it


def found(points: float, *, seeds_error: float, images_error: float, seeds: int) -> Gain:
    error = max(seeds_error, images_error)
    half = scipy_stats.t.ppf(0.975, seeds - 1) * error
    return Gain(points, points - half, points + half, 0.5, error, seeds_error, images_error)


def test_seeds_to_decide() -> None:
    open_question = found(0.8, seeds_error=0.2, images_error=0.01, seeds=5)
    assert open_question.low < 0.5 < open_question.high
    needed = seeds_to_decide(open_question, 5, 0.5)
    # the spread between seeds is 0.447 points; at that number the half width falls below the distance of 0.3
    halves = {n: scipy_stats.t.ppf(0.975, n - 1) * 0.2 * math.sqrt(5 / n) for n in range(6, 51)}
    assert needed == min(n for n, half in halves.items() if half < 0.3)
    assert halves[needed - 1] >= 0.3


def test_no_number_of_seeds_settles_what_images_cannot() -> None:
    assert seeds_to_decide(found(0.8, seeds_error=0.1, images_error=0.4, seeds=5), 5, 0.5) is None
    assert seeds_to_decide(found(0.5, seeds_error=0.1, images_error=0.0, seeds=5), 5, 0.5) is None
    assert seeds_to_decide(found(0.6, seeds_error=1.0, images_error=0.0, seeds=5), 5, 0.5) is None


def test_more_seeds_do_not_settle_a_comparison_with_few_images() -> None:
    # runs that agree on all 20 images: the interval stays as wide as one image is
    same = np.ones((5, 20), dtype=bool)
    open_question = gain(same, same)
    needed = seeds_to_decide(open_question, 5, 0.5)
    if needed is not None:
        decided = gain(np.ones((needed, 20), dtype=bool), np.ones((needed, 20), dtype=bool))
        assert decided.high < 0.5


def test_it_works_without_torch() -> None:
    code = """
import sys
import numpy as np
from convattn.compare.stats import gain
print(gain(np.zeros((3, 10), dtype=bool), np.ones((3, 10), dtype=bool)).points)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["100.0", "False"], done.stderr
