"""Intervals against SciPy's tests and against simulations whose truth is known."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from convattn.compare.stats import Gain, Spread, detectable, gain, gain_of, seeds_to_decide, simultaneous
from convattn.errors import InvalidOption

# comparisons in a simulation: the rate of a 95 % interval is then known to 0.6 points
REPEATS = 1500


def right(random: np.random.Generator, shares: np.ndarray, images: int) -> np.ndarray:
    """Runs that get images right at random, each with its own share: (seeds, images)."""
    return random.random((len(shares), images)) < shares[:, None]


def noisy(seeds: int, images: int, points: float, *, spread: float = 0.02, seed: int = 0) -> list[np.ndarray]:
    """A baseline and a variant that is better by some points, in which seeds differ much more than images."""
    random = np.random.default_rng(seed)
    return [right(random, level + random.normal(0, spread, seeds), images) for level in (0.7, 0.7 + points / 100)]


def seeds_alone(seeds: int, seed: int = 0) -> list[np.ndarray]:
    """Runs that differ in how many images they get right, and in nothing else: no image is harder for one of them."""
    random = np.random.default_rng(seed)
    shares = 0.5 + random.normal(0, 0.1, (2, seeds))
    return [right(random, row, 20_000) for row in shares]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(4))
def test_where_seeds_dominate_it_is_the_paired_t_test(seeds: int, seed: int) -> None:
    baseline, variant = seeds_alone(seeds, seed)
    found = gain(baseline, variant)
    a, b = (100 * runs.mean(axis=1) for runs in (variant, baseline))
    expected = scipy_stats.ttest_rel(a, b)
    assert found.standard_error_seeds == pytest.approx(scipy_stats.sem(a - b))
    assert found.standard_error_images < 0.05 * found.standard_error_seeds
    assert found.points == pytest.approx((a - b).mean())
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.01)
    interval = expected.confidence_interval(0.95)
    assert found.low == pytest.approx(max(interval.low, -100), abs=0.01 * (interval.high - interval.low))
    assert found.high == pytest.approx(min(interval.high, 100), abs=0.01 * (interval.high - interval.low))


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_other_confidence(confidence: float) -> None:
    baseline, variant = seeds_alone(5)
    expected = scipy_stats.ttest_rel(100 * variant.mean(axis=1), 100 * baseline.mean(axis=1))
    found, interval = gain(baseline, variant, confidence=confidence), expected.confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=0.02)
    assert found.p_value == gain(baseline, variant).p_value
    assert found.level == pytest.approx(1 - confidence)


def test_where_images_dominate_it_is_their_standard_error() -> None:
    random = np.random.default_rng(0)
    baseline, variant = (np.tile(random.random(200) < share, (4, 1)) for share in (0.6, 0.7))
    found = gain(baseline, variant)
    difference = 100 * (variant[0].astype(float) - baseline[0])
    expected = scipy_stats.ttest_1samp(difference, 0)
    assert found.standard_error_seeds == 0
    assert found.standard_error == found.standard_error_images == pytest.approx(scipy_stats.sem(difference))
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)


def test_the_parts_are_those_of_a_crossed_analysis_of_variance() -> None:
    """Against mean squares taken one by one, as in a textbook."""
    random = np.random.default_rng(3)
    difficulty = random.normal(0, 1, 60)
    runs = difficulty + random.normal(0, 0.5, (2, 4, 1)) + random.normal(0, 1, (2, 4, 60)) > 0
    baseline, variant = runs[0], runs[1] | (difficulty > 1)
    d = 100 * (variant.astype(float) - baseline)
    rows, columns = [np.mean(row) for row in d], [np.mean(column) for column in d.T]
    within_rows = sum((value - np.mean(d)) ** 2 for value in rows) * 60 / 3
    within_columns = sum((value - np.mean(d)) ** 2 for value in columns) * 4 / 59
    rest = sum((d[s, i] - rows[s] - columns[i] + np.mean(d)) ** 2 for s in range(4) for i in range(60)) / (3 * 59)
    assert within_columns > rest
    found = gain(baseline, variant)
    assert found.standard_error_seeds**2 == pytest.approx(within_rows / 240)
    assert found.standard_error_images**2 == pytest.approx((within_columns - rest) / 240)
    assert found.standard_error**2 == pytest.approx((within_rows + within_columns - rest) / 240)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("images", [0.0, 0.3, 1.0, 5.0])
def test_the_interval_lies_between_those_of_others(seeds: int, images: float) -> None:
    spread = Spread(1.0, images, seeds - 1, 1000)
    student = scipy_stats.t.ppf(0.975, seeds - 1)
    satterthwaite = scipy_stats.t.ppf(0.975, (1 + images) ** 2 / (1 / (seeds - 1) + images**2 / 1000))
    satterthwaite *= math.sqrt(1 + images)
    apart = math.hypot(student, scipy_stats.t.ppf(0.975, 1000) * math.sqrt(images))
    half = spread.half_width(0.05)
    if seeds == 2:
        # never narrower than Student's interval on seed means
        assert half == pytest.approx(apart) and half >= student
    else:
        assert min(satterthwaite, apart) * 0.999 <= half <= max(satterthwaite, apart) * 1.001
        assert half <= 1.25 * satterthwaite


def test_a_gain_from_few_images_reaches_further_on_the_far_side() -> None:
    # all seeds gain the same 3 of 400 images
    baseline = np.zeros((5, 400), dtype=bool)
    variant = baseline.copy()
    variant[:, :3] = True
    better, worse = gain(baseline, variant), gain(variant, baseline)
    half, share = better.spread.half_width(0.05), 3 / 400
    t = scipy_stats.t.ppf(0.975, 399)
    third = 100**3 * share * (1 - share) * (1 - 2 * share) / 400**2
    assert better.spread.third == pytest.approx(third)
    assert (1 + 2 * t**2) / 6 * third / better.standard_error**2 == pytest.approx(better.high - better.points - half)
    assert better.points - better.low == pytest.approx(half)
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low))
    assert better.p_value == pytest.approx(worse.p_value)


def test_it_reaches_at_most_half_as_far_again() -> None:
    spread = Spread(0.01, 0.01, 4, 60, third=1.0)
    low, high = spread.ends(0.5, 0.05)
    assert 0.5 - low == pytest.approx(spread.half_width(0.05))
    assert high - 0.5 == pytest.approx(1.5 * spread.half_width(0.05))


def test_a_gain_where_few_errors_are_left_is_held() -> None:
    """Of 98 % right to 99.5 %: the usual interval ends too early where a test set has few of the images that change."""
    random = np.random.default_rng(4)
    missed = missed_by_half = 0
    for _ in range(REPEATS):
        solved = random.random((2, 200)) < np.array([[0.98], [0.75]])
        baseline = np.repeat(solved[:1], 10, axis=0)
        variant = np.repeat(solved[:1] | solved[1:], 10, axis=0)
        found = gain(baseline, variant)
        missed += not found.low <= 1.5 <= found.high
        missed_by_half += abs(found.points - 1.5) > found.points - found.low
    assert missed / REPEATS <= 0.065 < missed_by_half / REPEATS


@pytest.mark.parametrize("level", [0.2, 0.05, 0.001])
def test_p_is_below_the_level_where_the_interval_excludes_none(level: float) -> None:
    spread = Spread(0.5, 0.2, 3, 400)
    half = spread.half_width(level)
    assert spread.p_value(half * 1.001) < level < spread.p_value(half * 0.999)
    assert spread.p_value(0.0) == 1
    assert spread.p_value(-half) == pytest.approx(level)
    assert 0 < spread.p_value(1e9) < 1e-6


def test_never_of_zero_width() -> None:
    # every seed and every image gains the same: nothing
    same = np.ones((5, 40), dtype=bool)
    found = gain(same, same)
    assert found.points == 0
    assert found.standard_error == 2.5
    assert found.low == -found.high == pytest.approx(-2.5 * scipy_stats.t.ppf(0.975, 39))
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


# how far seeds differ, images, seeds on one image, and a variant on some kinds of image, in units of a latent score
MIXES = {
    "seeds": (0.3, 1.0, 0.3, 0.0),
    "seeds by images": (0.02, 1.0, 1.0, 0.0),
    "hard and easy images": (0.05, 3.0, 0.3, 0.0),
    "images by variant": (0.05, 1.0, 0.3, 1.0),
    "all": (0.1, 2.0, 1.0, 0.5),
}


def simulated(random: np.random.Generator, seeds: int, images: int, mix: str, count: int) -> list[np.ndarray]:
    """Runs of several networks none of which is better than another in the mean over all seeds and images."""
    by_seed, by_image, by_both, by_variant = MIXES[mix]
    image = random.normal(1.0, by_image, images)
    return [
        image
        + random.normal(0, by_variant / math.sqrt(2), images)
        + random.normal(0, by_seed, (seeds, 1))
        + random.normal(0, by_both, (seeds, images))
        > 0
        for _ in range(count)
    ]


@pytest.mark.slow_unless(mix="all", seeds=3)
@pytest.mark.slow_unless(seeds=2)
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("mix", MIXES)
def test_intervals_hold_the_truth(mix: str, seeds: int) -> None:
    random = np.random.default_rng(1)
    found = [gain(*simulated(random, seeds, 300, mix, 2)) for _ in range(REPEATS)]
    false_alarms = np.mean([one.p_value < 0.05 for one in found])
    assert false_alarms == np.mean([not one.low <= 0 <= one.high for one in found])
    assert false_alarms <= 0.065
    if mix == "seeds" and seeds > 2:
        # no hiding behind wide intervals
        assert false_alarms >= 0.03


def test_the_t_test_on_seed_means_does_not_hold_where_it_would_matter() -> None:
    """The simulation can tell: a variant that is better on some kinds of image misleads the usual test."""
    random = np.random.default_rng(1)
    alarms = 0
    for _ in range(REPEATS):
        baseline, variant = simulated(random, 5, 300, "images by variant", 2)
        alarms += scipy_stats.ttest_rel(baseline.mean(axis=1), variant.mean(axis=1)).pvalue < 0.05
    assert alarms / REPEATS > 0.15


@pytest.mark.slow
def test_power_is_that_of_the_paired_t_test() -> None:
    # no image is easier for the variant than the others, and it gains a point
    random = np.random.default_rng(2)
    ours = theirs = 0
    for _ in range(REPEATS):
        shared = random.normal(1.0, 1.0, 2000)
        baseline, variant = (
            shared + shift + random.normal(0, 0.03, (10, 1)) + random.normal(0, 0.5, (10, 2000)) > 0
            for shift in (0.0, 0.045)
        )
        ours += gain(baseline, variant).p_value < 0.05
        theirs += scipy_stats.ttest_rel(baseline.mean(axis=1), variant.mean(axis=1)).pvalue < 0.05
    assert 0.3 < theirs / REPEATS < 0.98
    assert abs(ours - theirs) / REPEATS <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["seeds", "all"])
def test_a_family_holds_at_once(mix: str) -> None:
    random = np.random.default_rng(3)
    alarms = 0
    for _ in range(REPEATS):
        baseline, *variants = simulated(random, 5, 200, mix, 6)
        found = simultaneous({str(number): gain(baseline, one) for number, one in enumerate(variants)})
        for one in found.values():
            assert (one.p_value < 0.05) == (not one.low <= 0 <= one.high)
        alarms += any(one.p_value < 0.05 for one in found.values())
    assert alarms / REPEATS <= 0.065


def test_a_family_of_one_is_alone() -> None:
    found = gain(*noisy(5, 300, 3.0))
    (alone,) = simultaneous({"a": found}).values()
    assert (alone.low, alone.high, alone.p_value) == pytest.approx((found.low, found.high, found.p_value))


def test_each_of_a_family_has_a_wider_interval() -> None:
    gains = {str(seed): gain(*noisy(5, 300, 3.0, seed=seed)) for seed in range(4)}
    for name, one in simultaneous(gains).items():
        assert one.low < gains[name].low and one.high > gains[name].high and one.p_value > gains[name].p_value
        assert one.level == pytest.approx(1 - 0.95**0.25)


# groups


def test_groups_are_the_units() -> None:
    """Images of one patient say the same: as many images more say nothing more."""
    random = np.random.default_rng(0)
    # seeds agree on nearly all of them
    patients = [np.tile(random.random(40) < 0.6, (5, 1)) ^ (random.random((5, 40)) < 0.05) for _ in range(2)]
    images = [np.repeat(runs, 25, axis=1) for runs in patients]
    groups = np.repeat(random.permutation(40), 25)
    one, other = gain(*patients), gain(*images, groups=groups)
    assert other.points == pytest.approx(one.points)
    assert other.standard_error == pytest.approx(one.standard_error)
    assert (other.low, other.high) == pytest.approx((one.low, one.high))
    assert gain(*images).standard_error < 0.5 * other.standard_error


def test_each_image_a_group_is_no_groups() -> None:
    baseline, variant = noisy(4, 300, 3.0)
    names = np.array([f"patient {number}" for number in range(300)])
    assert gain(baseline, variant, groups=names).standard_error == pytest.approx(gain(baseline, variant).standard_error)


def test_groups_of_any_size_hold_the_truth() -> None:
    random = np.random.default_rng(5)
    alarms = 0
    for _ in range(REPEATS):
        groups = np.repeat(np.arange(60), random.integers(1, 12, 60))
        kind = random.normal(0, 1.0, (2, 60))[:, groups]
        baseline, variant = (1 + one + random.normal(0, 0.7, (5, len(groups))) > 0 for one in kind)
        alarms += gain(baseline, variant, groups=groups).p_value < 0.05
    assert alarms / REPEATS <= 0.065


@pytest.mark.parametrize("groups", [np.zeros(300), np.arange(299), np.zeros((300, 2))])
def test_wrong_groups(groups: np.ndarray) -> None:
    with pytest.raises(InvalidOption, match=r"gain: (expected a group|all images are of one group)"):
        gain(*noisy(3, 300, 1.0), groups=groups)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_wrong_confidence(confidence: float) -> None:
    with pytest.raises(InvalidOption, match="confidence"):
        gain(*noisy(3, 300, 1.0), confidence=confidence)


def test_any_score_that_is_a_mean() -> None:
    losses = np.random.default_rng(0).normal(0.2, 1.0, (4, 500))
    found = gain_of(losses)
    assert found.points == pytest.approx(losses.mean())
    assert found.low < found.points < found.high
    assert gain_of(10 * losses).high == pytest.approx(10 * found.high)


# what a comparison can see


def test_detectable() -> None:
    assert detectable(1, 1000) is None
    assert detectable(5, 1000) == pytest.approx(2, abs=0.25)
    assert detectable(10, 1000) < detectable(5, 1000) < detectable(3, 1000)
    assert detectable(5, 10_000) < detectable(5, 1000) < detectable(5, 100)
    assert detectable(2, 5) == 100


@pytest.mark.slow_unless(seeds=5, images=0.06)
@pytest.mark.parametrize("images", [0.0, 0.06])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_such_a_gain_is_seen_in_about_80_of_100_comparisons(seeds: int, images: float) -> None:
    random = np.random.default_rng(seeds)
    truth = Spread(0.09, images, seeds - 1, 1000).detectable()
    seen = 0
    for _ in range(2000):
        means = truth + random.normal(0, math.sqrt(images)) + random.normal(0, 0.3 * math.sqrt(seeds), seeds)
        spread = Spread(means.var(ddof=1) / seeds, images, seeds - 1, 1000)
        seen += spread.p_value(means.mean()) < 0.05
    assert 0.72 < seen / 2000 < 0.88


def test_detectable_is_what_its_assumptions_give() -> None:
    # trainings that disagree on a tenth of the images, seeds that differ by half a point beyond that
    random = np.random.default_rng(0)
    seeds, images = 5, 1000
    found = []
    for _ in range(300):
        flipped = random.random((2, seeds, images)) < 0.05
        shifts = random.normal(0, 0.005, seeds)
        found.append((flipped[0].mean(axis=1) - flipped[1].mean(axis=1) + shifts).mean() * 100)
    spread = Spread(float(np.var(found)), 0.0, seeds - 1, images - 1)
    assert spread.detectable() == pytest.approx(detectable(seeds, images), rel=0.1)


def test_more_variants_hide_more() -> None:
    assert detectable(5, 1000) < detectable(5, 1000, variants=4)


# what would settle it


def found(points: float, *, seeds_error: float, images_error: float, seeds: int) -> Gain:
    spread = Spread(seeds_error**2, images_error**2, seeds - 1, 999)
    half = spread.half_width(0.05)
    errors = (spread.standard_error, seeds_error, images_error)
    return Gain(points, points - half, points + half, spread.p_value(points), *errors, 0.05, spread)


def test_seeds_to_decide() -> None:
    open_question = found(0.8, seeds_error=0.2, images_error=0.0, seeds=5)
    assert open_question.low < 0.5 < open_question.high
    needed = seeds_to_decide(open_question, 0.5)
    # the spread between seeds is 0.447 points; at that number the half width falls below the distance of 0.3
    halves = {n: scipy_stats.t.ppf(0.975, n - 1) * 0.2 * math.sqrt(5 / n) for n in range(6, 51)}
    assert needed == min(n for n, half in halves.items() if half < 0.3)
    assert halves[needed - 1] >= 0.3


def test_no_number_of_seeds_settles_what_images_cannot() -> None:
    assert seeds_to_decide(found(0.8, seeds_error=0.1, images_error=0.4, seeds=5), 0.5) is None
    assert seeds_to_decide(found(0.5, seeds_error=0.1, images_error=0.0, seeds=5), 0.5) is None
    assert seeds_to_decide(found(0.6, seeds_error=1.0, images_error=0.0, seeds=5), 0.5) is None
    assert seeds_to_decide(gain(*noisy(1, 300, 1.0)), 0.5) is None


def test_more_seeds_do_not_settle_a_comparison_with_few_images() -> None:
    # runs that agree on all 20 images: the interval stays as wide as one image is
    same = np.ones((5, 20), dtype=bool)
    open_question = gain(same, same)
    needed = seeds_to_decide(open_question, 0.5)
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
