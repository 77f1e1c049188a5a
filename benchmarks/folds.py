"""How often the intervals of a comparison with folds hold the truth: simulations of networks that learn.

python benchmarks/folds.py [--repeats 1000] [--markdown FILE]

Two kinds of network are trained in five folds: ridge regressions (one label against the other) on random rectified
features, drawn anew for each seed. The truth is what the second gains over the first in the mean over training sets of
the size that a fold leaves, over features and over new images, from 4,000 of each. Of each pair of networks: how often
the 95 % interval misses it as it is, and how often without the correction for training sets that overlap.
"""

import argparse
import math
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import scipy

from convattn.compare.stats import gain

FOLDS, SIDE, NOISE = 5, 8, 0.7
IMAGES, SEEDS = (100, 300, 1000), (3, 5, 10)
TRUTHS, NEW_IMAGES = 4000, 1000
# of each network: random features, whether it sees the inputs as they are too, and the penalty of the ridge
PAIRS = {
    "the same": ((20, False, 0.1), (20, False, 0.1)),
    "more features": ((10, False, 0.1), (60, False, 0.1)),
    "inputs beside features": ((20, False, 0.1), (20, True, 0.1)),
    "inputs, strong penalty": ((60, False, 10.0), (60, True, 10.0)),
    "inputs, hardly a penalty": ((60, False, 0.001), (60, True, 0.001)),
}
Network = tuple[int, bool, float]


def main() -> None:
    """Print the table, and write it to a file as well if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    error = 100 * math.sqrt(0.05 * 0.95 / given.repeats)
    lines = [
        f"{given.repeats} comparisons for each row: a rate of 5 % is known to {error:.1f} points. "
        f"NumPy {np.__version__}, SciPy {scipy.__version__}; {date.today()}.\n",
        "| networks | images | seeds | true gain | interval misses it, % | uncorrected, % | width / uncorrected |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for (name, pair), images in product(PAIRS.items(), IMAGES):
        random = np.random.default_rng([images, list(PAIRS).index(name)])
        truth = _truth(random, pair, images - images // FOLDS)
        for seeds in SEEDS:
            lines.append(_row(random, name, images, seeds, truth, given.repeats))
            print(lines[-1], flush=True)
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text("\n".join(lines) + "\n")


def _row(random: np.random.Generator, name: str, images: int, seeds: int, truth: float, repeats: int) -> str:
    misses = uncorrected = 0
    width = narrow = 0.0
    for _ in range(repeats):
        baseline, variant = _compared(random, PAIRS[name], images, seeds)
        found, alone = gain(baseline, variant, folds=FOLDS), gain(baseline, variant)
        misses += not found.low <= truth <= found.high
        uncorrected += not alone.low <= truth <= alone.high
        width, narrow = width + found.high - found.low, narrow + alone.high - alone.low
    rates = f"{100 * misses / repeats:.1f} | {100 * uncorrected / repeats:.1f}"
    return f"| {name} | {images} | {seeds} | {truth:+.2f} | {rates} | {width / narrow:.2f} |"


def _compared(
    random: np.random.Generator, pair: tuple[Network, Network], images: int, seeds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which images two networks get right, each when its fold is the one that is not trained on: (seeds, images)."""
    x, y = _draw(random, images)
    fold_of = random.permutation(images) % FOLDS
    right = np.empty((2, seeds, images), dtype=bool)
    for seed, fold, place in product(range(seeds), range(FOLDS), range(2)):
        test = fold_of == fold
        predict = _trained(random, pair[place], x[~test], y[~test])
        right[place, seed, test] = predict(x[test]) == y[test]
    return right[0], right[1]


def _truth(random: np.random.Generator, pair: tuple[Network, Network], images: int) -> float:
    total = 0.0
    for _ in range(TRUTHS):
        x, y = _draw(random, images)
        new_x, new_y = _draw(random, NEW_IMAGES)
        first, second = (np.mean(_trained(random, network, x, y)(new_x) == new_y) for network in pair)
        total += 100 * float(second - first)
    return total / TRUTHS


def _draw(random: np.random.Generator, images: int) -> tuple[np.ndarray, np.ndarray]:
    x = random.normal(size=(images, SIDE))
    score = x.sum(axis=1) / math.sqrt(SIDE) + x[:, 0] * x[:, 1]
    return x, score + random.normal(0, NOISE, images) > 0


def _trained(
    random: np.random.Generator, network: Network, x: np.ndarray, y: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    hidden, inputs, penalty = network
    weights = random.normal(size=(SIDE + 1, hidden)) / math.sqrt(hidden)

    def features(x: np.ndarray) -> np.ndarray:
        ones = np.ones((len(x), 1))
        rectified = np.maximum(np.hstack([x, ones]) @ weights, 0)
        return np.hstack([rectified, ones, x] if inputs else [rectified, ones])

    seen = features(x)
    fitted = np.linalg.solve(seen.T @ seen + penalty * np.eye(seen.shape[1]), seen.T @ (2.0 * y - 1))
    return lambda new: features(new) @ fitted > 0


if __name__ == "__main__":
    main()
