"""How often the intervals of a comparison hold the truth: simulations in which it is known.

python benchmarks/coverage.py [--repeats 4000] [--images 50,1000] [--markdown FILE]

Runs get an image right where a latent score is above 0. The score is the sum of a part of the image, a part of the
image and the network, a part of the seed, and a part of both; no network is better than another in the mean over all
seeds and images. Of each mix of these parts: how often a gain is found (p < 0.05), the mean width of the interval
beside that of Satterthwaite's for crossed effects, and how often Student's t-test on seed means finds a gain.
"""

import argparse
import math
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import scipy
from scipy import stats as scipy_stats

from convattn.compare.stats import gain, simultaneous

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


def main() -> None:
    """Print the table, and write it to a file as well if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--images", default="50,1000", help="numbers of test images, separated by commas")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    error = 100 * math.sqrt(0.05 * 0.95 / given.repeats)
    lines = [
        f"{given.repeats} comparisons for each row: a rate of 5 % is known to {error:.1f} points. "
        f"NumPy {np.__version__}, SciPy {scipy.__version__}; {date.today()}.\n",
        "| mix | seeds | images | false alarms, % | any of five, % | width / Satterthwaite | t-test on seeds, % |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for images, seeds, mix in product(map(int, given.images.split(",")), SEEDS, MIXES):
        lines.append(_row(mix, seeds, images, given.repeats))
        print(lines[-1], flush=True)
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text("\n".join(lines) + "\n")


def _row(mix: str, seeds: int, images: int, repeats: int) -> str:
    random = np.random.default_rng([seeds, images, list(MIXES).index(mix)])
    alarms = of_any = by_t_test = 0
    width = crossed = 0.0
    for repeat in range(repeats):
        # families take their time
        count = FAMILY if repeat % 4 == 0 else 1
        baseline, *variants = _runs(random, mix, seeds, images, 1 + count)
        found = gain(baseline, variants[0])
        alarms += found.p_value < 0.05
        of_any += count > 1 and _any(baseline, variants)
        width += found.high - found.low
        crossed += _satterthwaite(baseline, variants[0])
        means = variants[0].mean(axis=1) - baseline.mean(axis=1)
        by_t_test += means.std() > 0 and _t_test(means)
    rates = (100 * alarms / repeats, 100 * of_any / math.ceil(repeats / 4))
    ratio = f"{width / crossed:.2f}" if crossed else "-"
    return (
        f"| {mix} | {seeds} | {images} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio} | {100 * by_t_test / repeats:.1f} |"
    )


def _runs(random: np.random.Generator, mix: str, seeds: int, images: int, count: int) -> list[np.ndarray]:
    seed, image, both, network = MIXES[mix]
    shared = random.normal(1.5, image, images)
    return [
        shared
        + random.normal(0, network / math.sqrt(2), images)
        + random.normal(0, seed, (seeds, 1))
        + random.normal(0, both, (seeds, images))
        > 0
        for _ in range(count)
    ]


def _any(baseline: np.ndarray, variants: list[np.ndarray]) -> bool:
    gains = {str(number): gain(baseline, one) for number, one in enumerate(variants)}
    return any(one.p_value < 0.05 for one in simultaneous(gains).values())


def _t_test(means: np.ndarray) -> bool:
    error = means.std(ddof=1) / math.sqrt(len(means))
    return bool(2 * scipy_stats.t.sf(abs(means.mean()) / error, len(means) - 1) < 0.05)


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
