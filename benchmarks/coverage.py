"""How often the intervals of a comparison hold the truth: simulations in which it is known.

python benchmarks/coverage.py [--repeats 4000] [--images 50,1000] [--markdown FILE]

Runs get an image right where a latent score is above 0. The score is the sum of a part of the image, a part of the
image and the network, a part of the seed, and a part of both. Four tables, of several mixes of these parts:

1. no network is better than another in the mean over all seeds and images: how often a gain is found (p < 0.05), the
   mean width of the interval beside that of Satterthwaite's for crossed effects, and Student's t-test on seed means;
2. a variant is better or worse by some points: how often the interval misses them;
3. seeds are added until it is decided, or as many as an open verdict proposes, up to four looks: how often an interval
   at any look misses the truth;
4. a gain of one point that is the same on all images: how often it is found, and how often by the paired t-test.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import scipy
from scipy import special
from scipy import stats as scipy_stats

from convattn.compare.rounds import Looks, over
from convattn.compare.stats import gain, seeds_to_decide, simultaneous
from convattn.compare.verdicts import CANNOT_TELL, Verdict, verdict

# standard deviations of the parts: seed, image, seed by image, image by network
MIXES = {
    "seeds": (0.3, 1.0, 0.3, 0.0),
    "seeds by images": (0.02, 1.0, 1.0, 0.0),
    "hard and easy images": (0.05, 3.0, 0.3, 0.0),
    "images by network": (0.05, 1.0, 0.3, 1.0),
    "images by network, seeds": (0.15, 1.0, 0.5, 1.0),
    "images by network, seeds by images": (0.02, 1.0, 1.0, 0.7),
    "all": (0.1, 2.0, 1.0, 0.5),
}
SEEDS = (2, 3, 5, 10)
FAMILY = 5
# accuracy of the baseline in % with the gain in points
GAINS = ((80, 1.0), (80, -3.0), (60, 5.0), (98, 1.0), (98, 1.5))
MOST, SMALLEST, MOST_LOOKS, MOST_PROPOSED = 12, 0.5, 4, 50


def main() -> None:
    """Print the tables, and write them to a file as well if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--images", default="50,1000", help="numbers of test images, separated by commas")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    given = parser.parse_args()
    lines = []
    for line in _tables(given.repeats, [int(images) for images in given.images.split(",")]):
        lines.append(line)
        print(line, flush=True)
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text("\n".join(lines) + "\n")


def _tables(repeats: int, sizes: list[int]) -> Iterator[str]:
    error = 100 * math.sqrt(0.05 * 0.95 / repeats)
    yield (
        f"{repeats} comparisons for each row: a rate of 5 % is known to {error:.1f} points. "
        f"NumPy {np.__version__}, SciPy {scipy.__version__}; {date.today()}."
    )
    yield "\n## No gain\n"
    yield "| mix | seeds | images | false alarms, % | any of five, % | width / Satterthwaite | t-test on seeds, % |"
    yield "|---|---|---|---|---|---|---|"
    for images, seeds, mix in product(sizes, SEEDS, MIXES):
        yield _without(mix, seeds, images, repeats)
    yield "\n## A gain\n"
    yield "| mix | accuracy, % | gain, points | seeds | images | misses, % | width / Satterthwaite |"
    yield "|---|---|---|---|---|---|---|"
    for images, seeds, (accuracy, points), mix in product((200, 1000), SEEDS, GAINS, MIXES):
        yield _with(mix, accuracy, points, seeds, images, repeats // 2)
    yield f"\n## Several looks ({repeats // 4} comparisons for each row; for each family of five {repeats // 8})\n"
    yield (
        f"| mix | variants | images | until decided: misses at any look, % | seeds of a variant, of {MOST} "
        f"| as proposed: misses at any look, % | looks, of {MOST_LOOKS} | every look at 5 %: misses, % |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for images, variants, mix in product((200, 1000), (1, FAMILY), MIXES):
        yield _looked(mix, variants, images, repeats // 4 if variants == 1 else repeats // 8)
    yield "\n## A gain of 1 point, 10 seeds, 2,000 images\n"
    yield "| standard deviation of a seed, points | found, % | by the paired t-test, % |"
    yield "|---|---|---|"
    for seed in (0.02, 0.03, 0.05):
        yield _power(seed, repeats)


def _without(mix: str, seeds: int, images: int, repeats: int) -> str:
    random = np.random.default_rng([seeds, images, list(MIXES).index(mix)])
    alarms = of_any = by_t_test = 0
    width = crossed = 0.0
    for repeat in range(repeats):
        # families take their time
        count = FAMILY if repeat % 4 == 0 else 1
        baseline, *variants = _runs(random, MIXES[mix], seeds, images, [1.5] * (1 + count))
        found = gain(baseline, variants[0])
        alarms += found.p_value < 0.05
        of_any += count > 1 and _any(baseline, variants)
        width += found.high - found.low
        crossed += _satterthwaite(baseline, variants[0])
        by_t_test += _t_test(baseline, variants[0])
    rates = (100 * alarms / repeats, 100 * of_any / math.ceil(repeats / 4))
    return (
        f"| {mix} | {seeds} | {images} | {rates[0]:.1f} | {rates[1]:.1f} | {_ratio(width, crossed)} "
        f"| {100 * by_t_test / repeats:.1f} |"
    )


def _with(mix: str, accuracy: int, points: float, seeds: int, images: int, repeats: int) -> str:
    random = np.random.default_rng([seeds, images, list(MIXES).index(mix), accuracy, round(points * 10) % 1000])
    spread = math.sqrt(sum(part**2 for part in MIXES[mix]) - MIXES[mix][3] ** 2 / 2)
    means = [spread * special.ndtri(share / 100) for share in (accuracy, accuracy + points)]
    missed, width, crossed = 0, 0.0, 0.0
    for _ in range(repeats):
        baseline, variant = _runs(random, MIXES[mix], seeds, images, means)
        found = gain(baseline, variant)
        missed += not found.low <= points <= found.high
        width += found.high - found.low
        crossed += _satterthwaite(baseline, variant)
    return (
        f"| {mix} | {accuracy} | {points:+g} | {seeds} | {images} | {100 * missed / repeats:.1f} "
        f"| {_ratio(width, crossed)} |"
    )


def _looked(mix: str, variants: int, images: int, repeats: int) -> str:
    random = np.random.default_rng([variants, images, list(MIXES).index(mix)])
    wrong = ended = wrong_proposed = looks = wrong_each = 0
    for _ in range(repeats):
        runs = _runs(random, MIXES[mix], MOST_PROPOSED, images, [1.5] * (1 + variants))
        decided, proposed = list(_until_decided(runs)), list(_as_proposed(runs))
        wrong += any(_misses(found) for _, found in decided)
        ended += decided[-1][0]
        wrong_proposed += any(_misses(found) for _, found in proposed)
        looks += len(proposed)
        wrong_each += any(_misses(_look(runs, [seeds], seeds)) for seeds in range(3, MOST + 1))
    rates = [100 * count / repeats for count in (wrong, wrong_proposed, wrong_each)]
    return (
        f"| {mix} | {variants} | {images} | {rates[0]:.1f} | {ended / repeats:.1f} | {rates[1]:.1f} "
        f"| {looks / repeats:.1f} | {rates[2]:.1f} |"
    )


def _until_decided(runs: list[np.ndarray]) -> Iterator[tuple[float, dict[str, Verdict]]]:
    """The mean number of seeds of a variant so far and the verdicts at every look of `--until decided`."""
    ended: dict[str, int] = {}
    for seeds in range(3, MOST + 1):
        looks = list(range(3, seeds + 1))
        found = _look(runs, looks, MOST, ended)
        yield float(np.mean([ended.get(name, seeds) for name in found])), found
        over_now = over(found, Looks(tuple(looks), MOST, ended), MOST, SMALLEST)
        if len(over_now) == len(found):
            return
        ended = {name: ended.get(name, seeds) for name in over_now}


def _as_proposed(runs: list[np.ndarray]) -> Iterator[tuple[int, dict[str, Verdict]]]:
    """The number of seeds and the verdicts at every look, where as many are added as an open verdict proposes."""
    looks = [3]
    while True:
        found = _look(runs, looks, None)
        yield looks[-1], found
        needed = [seeds_to_decide(one.gain, SMALLEST) for one in found.values() if one.word == CANNOT_TELL]
        more = max((seeds for seeds in needed if seeds is not None), default=None)
        if more is None or len(looks) == MOST_LOOKS:
            return
        looks.append(more)


def _look(
    runs: list[np.ndarray], looks: list[int], most: int | None, ended: Mapping[str, int] | None = None
) -> dict[str, Verdict]:
    baseline, *variants = (right[: looks[-1]] for right in runs)
    named = {str(number): right[: (ended or {}).get(str(number))] for number, right in enumerate(variants)}
    return verdict(baseline, named, smallest_gain=SMALLEST, looks=looks, most_seeds=most)


def _misses(found: dict[str, Verdict]) -> bool:
    return any(not one.gain.low <= 0 <= one.gain.high for one in found.values())


def _power(seed: float, repeats: int) -> str:
    random = np.random.default_rng([2000, round(1000 * seed)])
    mix = (seed, 1.0, 0.5, 0.0)
    spread = math.sqrt(sum(part**2 for part in mix))
    means = [spread * special.ndtri(share) for share in (0.8, 0.81)]
    ours = theirs = 0
    for _ in range(repeats):
        baseline, variant = _runs(random, mix, 10, 2000, means)
        ours += gain(baseline, variant).p_value < 0.05
        theirs += _t_test(baseline, variant)
    # by the slope of the accuracy at the mean
    points = 100 * seed / spread * scipy_stats.norm.pdf(special.ndtri(0.8))
    return f"| {points:.1f} | {100 * ours / repeats:.1f} | {100 * theirs / repeats:.1f} |"


def _runs(
    random: np.random.Generator, mix: tuple[float, ...], seeds: int, images: int, means: list[float]
) -> list[np.ndarray]:
    seed, image, both, network = mix
    shared = random.normal(0, image, images)
    return [
        mean
        + shared
        + random.normal(0, network / math.sqrt(2), images)
        + random.normal(0, seed, (seeds, 1))
        + random.normal(0, both, (seeds, images))
        > 0
        for mean in means
    ]


def _any(baseline: np.ndarray, variants: list[np.ndarray]) -> bool:
    gains = {str(number): gain(baseline, one) for number, one in enumerate(variants)}
    return any(one.p_value < 0.05 for one in simultaneous(gains).values())


def _t_test(baseline: np.ndarray, variant: np.ndarray) -> bool:
    means = variant.mean(axis=1) - baseline.mean(axis=1)
    error = means.std(ddof=1) / math.sqrt(len(means))
    return bool(error > 0 and 2 * special.stdtr(len(means) - 1, -abs(means.mean()) / error) < 0.05)


def _ratio(width: float, crossed: float) -> str:
    return f"{width / crossed:.2f}" if crossed else "-"


def _satterthwaite(baseline: np.ndarray, variant: np.ndarray) -> float:
    """The width of the usual interval for crossed random effects; 0 where its variance is negative."""
    d = 100 * (variant.astype(float) - baseline)
    seeds, images = d.shape
    rows, columns = d.mean(axis=1), d.mean(axis=0)
    rest = ((d - rows[:, None] - columns + d.mean()) ** 2).sum() / ((seeds - 1) * (images - 1)) / d.size
    a, b = rows.var(ddof=1) / seeds, columns.var(ddof=1) / images
    variance = a + b - rest
    if variance <= 0:
        return 0.0
    df = variance**2 / (a**2 / (seeds - 1) + b**2 / (images - 1) + rest**2 / ((seeds - 1) * (images - 1)))
    return float(2 * scipy_stats.t.ppf(0.975, max(df, 1.0)) * math.sqrt(variance))


if __name__ == "__main__":
    main()
