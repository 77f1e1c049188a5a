"""Images that two parts have in common: pixel for pixel, or nearly so (re-encoded, brighter, a little cropped).

Near duplicates are sought in two steps. A difference hash says which pairs to look at: of 9 x 9 cells, which of two
neighbours is the brighter. Then the pair is looked at: the correlation of the differences between neighbouring cells of
a finer grid. It knows no brightness or contrast, is zero for featureless images, and has to be as high as no two images
of these data are by chance.

Measured with the constants below: on CIFAR-10 (50,000 against 10,000 images, 3 s on one thread and 90 MB) 212 test
images; the 108 least similar pairs were looked at, and all show one picture twice, at times in other colours. Barz and
Denzler (2020, arXiv:1902.00423) count 3.3 % of the test images by other means. None in 20 cuts of scikit-learn's
digits, though 341 of 360 have a similarity above 0.8 to another, and none among images of noise. Of 1,000 images of
CIFAR-10, changed and put among 5,000 others, found again: 999 at JPEG quality 60, 1,000 at 70 % of the brightness, 989
after a crop of 1 of 32 pixels on all sides, but 101 after one of 2 pixels. Images of 256 pixels take 1.6 ms each.
Mirrored ones are not sought.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# 8 bits a row and a column, as is customary (difference hash of 64 bits), in both directions: 144 bits
HASH_CELLS = 9
# of 144 bits; the 99th percentiles of distances are 14 at JPEG quality 60 and 25 after a crop of 1 of 32 pixels, and
# the smallest one between images of noise is 32
MOST_BITS = 30
# the grid of the second look, and its edge that is not looked at: frames are alike in images that are not
CELLS, EDGE = 12, 1
# of the pairs of CIFAR-10 from 0.75 to 0.8, about every seventh shows two things of one kind; above, one of fifty
LEAST_SIMILARITY = 0.8
# standard deviations above the median similarity of random pairs (after Fisher's transform): aligned images, such as
# digits or faces, are all alike, and 9 finds one of 360 digits in 3 of 20 cuts
LEAST_DEVIATIONS = 10
RANDOM_PAIRS = 20_000
# the median of a normal distribution and what lies one deviation above it
ONE_DEVIATION = (0.5, 0.8413)
# of each image, in each block, for data whose hashes are all alike
MOST_CANDIDATES = 8
# images of either part in a block of distances, and bytes of pixels at a time: about 100 MB in all
ROWS, COLUMNS, PIXELS = 1024, 8192, 1 << 23
# red, green and blue in the brightness (ITU-R BT.601)
BRIGHTNESS = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Pair:
    """An image and the one most like it among others: indices, and 1 for equal pixels, else their similarity."""

    image: int
    other: int
    similarity: float
    exact: bool


def find_duplicates(pixels: np.ndarray, images: np.ndarray, others: np.ndarray) -> list[Pair]:
    """Which of some images are among others as well, each with the one most like it.

    Args:
        pixels: all images, (N, S, S, 3) bytes; may be a memory map.
        images: indices of those that are looked for.
        others: indices of those among which they are looked for.

    Returns:
        Exact duplicates first, then near ones from the most similar on.
    """
    pairs = {pair.image: pair for pair in _exact(pixels, images, others)}
    rest = np.array([index for index in images if index not in pairs], dtype=np.int64)
    if len(rest) and len(others):
        pairs |= {pair.image: pair for pair in _near(pixels, rest, others)}
    return sorted(pairs.values(), key=lambda pair: (not pair.exact, -pair.similarity, pair.image))


def _exact(pixels: np.ndarray, images: np.ndarray, others: np.ndarray) -> Iterator[Pair]:
    known: dict[bytes, int] = {}
    for index in others:
        known.setdefault(_digest(pixels[index]), int(index))
    for index in images:
        other = known.get(_digest(pixels[index]))
        if other is not None:
            yield Pair(int(index), other, 1.0, True)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


def _near(pixels: np.ndarray, images: np.ndarray, others: np.ndarray) -> Iterator[Pair]:
    threshold = _threshold(pixels, images, others)
    ours, theirs = _signs(pixels, images), _signs(pixels, others)
    best, found = np.zeros(len(images)), np.zeros(len(images), dtype=np.int64)
    for first in range(0, len(images), ROWS):
        for start in range(0, len(others), COLUMNS):
            rows, columns = _candidates(ours[first : first + ROWS], theirs[start : start + COLUMNS])
            rows, columns = rows + first, columns + start
            similarity = _similarity(pixels, images[rows], others[columns])
            # the most similar one comes last and stays
            order = np.argsort(similarity, kind="stable")
            order = order[similarity[order] > best[rows[order]]]
            best[rows[order]], found[rows[order]] = similarity[order], others[columns[order]]
    for row in np.flatnonzero(best >= threshold):
        yield Pair(int(images[row]), int(found[row]), float(best[row]), False)


def _candidates(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows whose hashes differ in few bits; of each of our rows the nearest."""
    bits = ours.shape[1]
    # a product of signs counts equal bits minus different ones
    agreement = ours @ theirs.T
    rows, columns = np.nonzero(agreement >= bits - 2 * MOST_BITS)
    if len(rows) > MOST_CANDIDATES * len(ours):
        order = np.lexsort((-agreement[rows, columns], rows))
        rows, columns = rows[order], columns[order]
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        rows, columns = rows[place < MOST_CANDIDATES], columns[place < MOST_CANDIDATES]
    return rows, columns


def _threshold(pixels: np.ndarray, images: np.ndarray, others: np.ndarray) -> float:
    """How similar two images have to be: more than chance makes any of these data."""
    random = np.random.default_rng(0)
    count = min(RANDOM_PAIRS, len(images) * len(others))
    similarity = _similarity(pixels, random.choice(images, count), random.choice(others, count))
    # equal images among them have an infinite one; quantiles instead of mean and deviation, as these would be moved by
    # the very duplicates where images are few
    middle, above = np.quantile(np.arctanh(np.clip(similarity, -0.999, 0.999)), ONE_DEVIATION)
    return max(LEAST_SIMILARITY, float(np.tanh(middle + LEAST_DEVIATIONS * (above - middle))))


def _similarity(pixels: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The correlation of the differences between neighbouring cells, for each pair of images."""
    found = np.zeros(len(ours))
    for here in _blocks(pixels, len(ours)):
        one, other = _differences(pixels, ours[here]), _differences(pixels, theirs[here])
        length = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
        # featureless images are like none
        found[here] = (one * other).sum(axis=1) / np.maximum(length, 1e-6)
    return found


def _differences(pixels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    cells = (_cells(pixels[indices], CELLS) @ BRIGHTNESS)[:, EDGE:-EDGE, EDGE:-EDGE]
    down, across = np.diff(cells, axis=1), np.diff(cells, axis=2)
    return np.concatenate([down.reshape(len(cells), -1), across.reshape(len(cells), -1)], axis=1)


def _signs(pixels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The difference hash of each image, its bits as -1 and 1: (N, 144)."""
    signs = np.empty((len(indices), 2 * HASH_CELLS * (HASH_CELLS - 1)), dtype=np.float32)
    for here in _blocks(pixels, len(indices)):
        grey = _cells(pixels[indices[here]], HASH_CELLS) @ BRIGHTNESS
        down, across = grey[:, 1:] > grey[:, :-1], grey[:, :, 1:] > grey[:, :, :-1]
        bits = np.concatenate([down.reshape(len(grey), -1), across.reshape(len(grey), -1)], axis=1)
        signs[here] = np.where(bits, 1, -1)
    return signs


def _cells(images: np.ndarray, cells: int) -> np.ndarray:
    """The mean colours of a grid of cells: (B, cells, cells, 3)."""
    count, side = images.shape[:2]
    edges = np.linspace(0, side, cells + 1)
    start = np.arange(side)
    # how much of each pixel lies in each cell
    share = np.minimum(edges[1:, None], start + 1) - np.maximum(edges[:-1, None], start)
    weights = (share.clip(0) * cells / side).astype(np.float32)
    rows: np.ndarray = weights @ images.astype(np.float32).reshape(count, side, side * 3)
    columns: np.ndarray = weights @ rows.reshape(count, cells, side, 3)  # [B, cells, cells, 3]
    return columns


def _blocks(pixels: np.ndarray, count: int) -> Iterator[slice]:
    size = max(1, PIXELS // max(1, int(np.prod(pixels.shape[1:]))))
    return (slice(start, start + size) for start in range(0, count, size))
