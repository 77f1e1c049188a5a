"""How often the intervals of the other scores hold the truth: simulations in which it is known.

python benchmarks/scores.py [--repeats 1000] [--images 200,1000] [--markdown FILE]

A network gives each class a latent score: normal parts of the image, of the image and the network, and of both and the
seed, and for the right class a signal with a part of the seed. Its probabilities are the softmax of these scores times
a sharpness; at 1 they are those of Bayes' rule, so that the network is calibrated. Of each mix and score: how often a
gain is found between two equal networks that are somewhat too sure (p < 0.05), and how often the interval of the gain
of a network with more signal, calibrated, holds the truth, known from 200,000 images and quadrature over seeds.
"""

import argparse
import math
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import scipy
from scipy.special import softmax

from convattn.compare import scores

# standard deviations of the parts: seed (of the signal), image, image by network, seed by image
MIXES = {
    "seeds": (0.15, 0.9, 0.1, 0.4),
    "images by network": (0.02, 0.7, 0.6, 0.4),
    "all": (0.05, 0.6, 0.3, 0.75),
}
SHARES = {
    "2 classes": (0.5, 0.5),
    "4 classes": (0.25, 0.25, 0.25, 0.25),
    "4 unequal classes": (0.5, 0.25, 0.15, 0.1),
}
SEEDS = (2, 3, 5, 10)
# signal and sharpness
PLAIN, BETTER = (1.2, 1.5), (1.5, 1.0)
LEARNT = 200_000


def main() -> None:
    """Print the table, and write it to a file as well if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--images", default="200,1000", help="numbers of test images, separated by commas")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    error = 100 * math.sqrt(0.05 * 0.95 / given.repeats)
    names = [score.name.replace("_", " ") for score in scores.SCORES]
    lines = [
        f"False alarms / coverage in %, of {given.repeats} comparisons for each row: 5 % is known to {error:.1f} "
        f"points. NumPy {np.__version__}, SciPy {scipy.__version__}; {date.today()}.\n",
        f"| mix | classes | seeds | images | {' | '.join(names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    print("\n".join(lines), flush=True)
    for mix, kind in product(MIXES, SHARES):
        true = _truth(mix, kind, *BETTER) - _truth(mix, kind, *PLAIN)
        for images, seeds in product(map(int, given.images.split(",")), SEEDS):
            lines.append(_row(mix, kind, seeds, images, given.repeats, true))
            print(lines[-1], flush=True)
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text("\n".join(lines) + "\n")


def _row(mix: str, kind: str, seeds: int, images: int, repeats: int, true: np.ndarray) -> str:
    random = np.random.default_rng([seeds, images, list(MIXES).index(mix), list(SHARES).index(kind)])
    alarms, held = np.zeros(len(true)), np.zeros(len(true))
    for _ in range(repeats):
        labels, shared = _images(random, mix, kind, images)
        signals = MIXES[mix][0] * random.standard_normal((3, seeds))
        values = [
            scores.over_seeds(_network(random, mix, labels, shared, signal + own, sharpness), labels)
            for own, (signal, sharpness) in zip(signals, (PLAIN, PLAIN, BETTER), strict=True)
        ]
        same, better = (scores.gains(values[0], one, labels) for one in values[1:])
        alarms += [one.p_value < 0.05 for one in same.values()]
        held += [one.low <= truth <= one.high for one, truth in zip(better.values(), true, strict=True)]
    cells = [f"{100 * a / repeats:.1f} / {100 * b / repeats:.1f}" for a, b in zip(alarms, held, strict=True)]
    return f"| {mix} | {kind} | {seeds} | {images} | {' | '.join(cells)} |"


def _images(random: np.random.Generator, mix: str, kind: str, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and what all networks have in common."""
    labels = random.choice(len(SHARES[kind]), images, p=SHARES[kind])
    return labels, MIXES[mix][1] * random.standard_normal((images, len(SHARES[kind])))


def _network(
    random: np.random.Generator, mix: str, labels: np.ndarray, shared: np.ndarray, signals: np.ndarray, sharpness: float
) -> list[np.ndarray]:
    """The probabilities of a network, one array for each seed, which has its own signal."""
    _, image, network, both = MIXES[mix]
    shared = shared + network * random.standard_normal(shared.shape)
    shares = np.log(np.bincount(labels, minlength=shared.shape[1]).clip(1) / len(labels))
    found = []
    for signal in signals:
        latent = shared + both * random.standard_normal(shared.shape)
        latent[np.arange(len(labels)), labels] += signal
        found.append(softmax(sharpness * (shares + latent * signal / (image**2 + network**2 + both**2)), axis=1))
    return found


def _truth(mix: str, kind: str, signal: float, sharpness: float) -> np.ndarray:
    """Each score of a network in the mean over all seeds and images."""
    random = np.random.default_rng(1)
    labels, shared = _images(random, mix, kind, LEARNT)
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    values = scores.over_seeds(_network(random, mix, labels, shared, signal + MIXES[mix][0] * nodes, sharpness), labels)
    return np.array(
        [np.average(one.mean(axis=1), weights=weights) for one in (values[score.name] for score in scores.SCORES)]
    )


if __name__ == "__main__":
    main()
