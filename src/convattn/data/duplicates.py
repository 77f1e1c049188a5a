"""Images that show the same: equal pixels, or re-encoded, in other colours, cropped, moved, mirrored, a little turned.

Near duplicates are sought in three steps, on thumbnails of 24 x 24 cells. Differences between neighbouring cells of a
6 x 6 grid say which pairs to look at: of the whole images, and of windows of them, so that crops, moved and mirrored
images agree as well. Each such pair is aligned. Then the differences between neighbouring cells are compared, strong
and weak edges nearly alike. This similarity knows no brightness or contrast, is zero for featureless images, and has to
be as high as no two images of these data are by chance.

Within a set of images, two that are like no third one have to be more similar than three or more that are all alike.

Measured with the constants below. Within the 10,000 test images of CIFAR-10 (7 s on one thread and 50 MB): 48 images,
15 of which show one car. With one limit for pairs and for larger groups it would be 137; of the 76 pairs among them 3
may show two like things, the others show one picture twice. None in 20 cuts of 360 of scikit-learn's digits, nor among
all 1,797. Of the 10,000 test images of CIFAR-10, 506 are among the
50,000 training images; before the windows in the corners it was 486, of which the 200 least similar were looked at, and
about 5 show two things. Barz and Denzler (2020, arXiv:1902.00423) count 3.3 % by other means.

Of 1,000 images of CIFAR-10 or flowers, 40 clusters of 5 were planted, the others distinct: re-encoded at JPEG quality
50 to 95, in other brightness, contrast and colour, cropped by 1 to 4 of 32 pixels on all sides or in a corner, moved by
1 to 4 of 32 pixels, frames of a video, mirrored, or turned by 2 to 5 degrees. For each change 199 or all 200 images
came into the right group, and no other image into any; 96 % of those cropped by up to 4 pixels on each side by itself.
Pairs instead of clusters of 5: all that are mirrored, 97 % of those re-encoded, 95 % in other brightness, 78 % moved,
and 47 % of crops, frames of a video, and those that are turned. Crops to 24 of 32 pixels are found if central; away
from the centre about every second is not.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array, csgraph
from torch.nn import functional

# images are made this small at once, and seen in no other form: cells a side
SIDE = 24
# the grid of the search: 6 x 6 cells, so 60 differences between neighbours
COARSE = 6
# windows of an image as top, left and side, in 32nds of its side
WHOLE, INNER = (0, 0, 32), (3, 3, 26)
SHIFTED = [(3 + down, 3 + right, 26) for down in (-3, 0, 3) for right in (-3, 0, 3) if (down, right) != (0, 0)]
CORNERS = [(down, right, 28) for down in (0, 4) for right in (0, 4)]
SCALED = [(WHOLE, WHOLE), (WHOLE, INNER), (INNER, WHOLE)]
# a window of one image, one of the other, and whether the other is mirrored
VIEWS = [
    *((ours, theirs, False) for ours, theirs in SCALED),
    *((INNER, window, False) for window in SHIFTED),
    *((WHOLE, window, False) for window in CORNERS),
    *((window, WHOLE, False) for window in CORNERS),
    *((ours, theirs, True) for ours, theirs in SCALED),
]
# of the images of CIFAR-10 after the changes above, 98 % or more agree so far with their original; among 10,000 images
# these are 1.7 pairs an image
LEAST_AGREEMENT = 0.78
# of each image
MOST_CANDIDATES = 8
# the grids on which two images are aligned, with the steps on each
STEPS = {12: 3, 24: 1}
# what an alignment may change: the scale, the angle in radians, and the place in halves of a side
LIMITS = (0.35, 0.15, 0.35)
# how contrast counts: differences far below this share of their root mean square count little, and all far above
# alike. Two silhouettes before an empty sky have one strong edge in common, and no weak ones
SATURATION, LEAST_CONTRAST = 0.25, 0.5
# of the test images of CIFAR-10 nearly all pairs above show one picture, from 0.7 to 0.75 about three of four, and from
# 0.6 to 0.65 fewer than half
LEAST_SIMILARITY = 0.75
# of two images that are like no third one, within a set: of the test images of CIFAR-10 48 are in groups then
LEAST_ALONE = 0.92
# how far above the median similarity of random pairs (after Fisher's transform): in standard deviations, and in
# distances to the 995th of 1,000 pairs. The first is for data that are alike all over, such as aligned scans: images of
# which 40 to 70 % is one motif are all kept apart. The second is for kinds that are alike, such as digits: none is
# found in 20 cuts of scikit-learn's, but 5 are at 3.5 distances to the 990th
LEAST_DEVIATIONS, LEAST_TAILS = 7, 3.2
RANDOM_PAIRS = 4000
# the median of a normal distribution and what lies one deviation above it
ONE_DEVIATION, TAIL = (0.5, 0.8413), 0.995
# beyond so many pairs of images only whole ones are compared, which takes a twentieth of the time
MOST_PAIRS = 5_000_000_000
# images of either part in a block of agreements, pairs that are aligned at a time, and bytes of pixels: about 100 MB
ROWS, COLUMNS, PAIRS, PIXELS = 1024, 2048, 1024, 1 << 23
# red, green and blue in the brightness (ITU-R BT.601)
BRIGHTNESS = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Window = tuple[int, int, int]


@dataclass(frozen=True)
class Pair:
    """Two images that show the same: indices, and 1 for equal pixels, else their similarity."""

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
    first = {digest: index for index, digest in reversed(_digests(pixels, others))}
    pairs = {index: Pair(index, first[key], 1.0, True) for index, key in _digests(pixels, images) if key in first}
    rest = np.array([index for index in images if int(index) not in pairs], dtype=np.int64)
    # from the least similar on, so that the most similar one stays
    pairs |= {pair.image: pair for pair in reversed(_sorted(_near(pixels, rest, others)))}
    return _sorted(pairs.values())


def find_pairs(pixels: np.ndarray, images: np.ndarray) -> list[Pair]:
    """Which of some images show the same as another of them.

    Of several with equal pixels, each is paired with the first, and only the first with near duplicates.

    Args:
        pixels: all images, (N, S, S, 3) bytes; may be a memory map.
        images: indices of those among which pairs are sought.

    Returns:
        Exact duplicates first, then near ones from the most similar on.
    """
    digests = _digests(pixels, images)
    first = {digest: index for index, digest in reversed(digests)}
    exact = [Pair(index, first[digest], 1.0, True) for index, digest in digests if first[digest] != index]
    distinct = np.array([index for index, digest in digests if first[digest] == index], dtype=np.int64)
    return _sorted([*exact, *_confirmed(list(_near(pixels, distinct)))])


def find_clusters(pixels: np.ndarray, images: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """A group number for each of some images, which images that show the same have in common.

    Args:
        pixels: all images, (N, S, S, 3) bytes; may be a memory map.
        images: indices of those that are put into groups, (M,).
        groups: for each of these images a group that it is known to be of, (M,); such groups stay together.

    Returns:
        Numbers from 0 on, (M,).
    """
    return join_pairs(images, find_pairs(pixels, images), groups)


def join_pairs(images: np.ndarray, pairs: list[Pair], groups: np.ndarray | None = None) -> np.ndarray:
    """The group numbers of `find_clusters`, (M,), from pairs that are known: what is paired is of one group.

    Raises:
        ValueError: another number of groups than of images.
    """
    position = {int(index): at for at, index in enumerate(images)}
    edges = [(position[pair.image], position[pair.other]) for pair in pairs]
    if groups is not None:
        if len(groups) != len(images):
            raise ValueError(f"join_pairs: expected a group for each of {len(images)} images, got {len(groups)}.")
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        edges += enumerate(first[inverse])
    rows, columns = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(images), len(images)))
    numbers: np.ndarray = csgraph.connected_components(graph, directed=False)[1]
    return numbers


def _confirmed(pairs: list[Pair]) -> Iterator[Pair]:
    """Pairs that are similar enough to stand alone, or both of whose images are similar to a third one."""
    similar: dict[int, set[int]] = {}
    for pair in pairs:
        similar.setdefault(pair.image, set()).add(pair.other)
        similar.setdefault(pair.other, set()).add(pair.image)
    for pair in pairs:
        if pair.similarity >= LEAST_ALONE or similar[pair.image] & similar[pair.other]:
            yield pair


def _sorted(pairs: Iterable[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: (not pair.exact, -pair.similarity, pair.image, pair.other))


def _digests(pixels: np.ndarray, images: np.ndarray) -> list[tuple[int, bytes]]:
    """The index of each image with a checksum of its pixels."""
    return [
        (int(index), hashlib.blake2b(np.ascontiguousarray(pixels[index]).data, digest_size=16).digest())
        for index in images
    ]


def _near(pixels: np.ndarray, images: np.ndarray, others: np.ndarray | None = None) -> Iterator[Pair]:
    """Pairs of images and others that are similar; without others, of the images themselves."""
    if len(images) == 0 or (others is not None and len(others) == 0):
        return
    ours = _thumbnails(pixels, images)
    theirs = ours if others is None else _thumbnails(pixels, others)
    threshold = _threshold(ours, theirs)
    for rows, columns, views in _candidates(ours, theirs, within=others is None):
        similarity = _similarity(ours, theirs, rows, columns, views)
        for at in np.flatnonzero(similarity >= threshold):
            other = (images if others is None else others)[columns[at]]
            yield Pair(int(images[rows[at]]), int(other), float(similarity[at]), False)


def _candidates(
    ours: np.ndarray, theirs: np.ndarray, *, within: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of thumbnails that agree in one of the views, and in which one they do most: rows, columns, views.

    Of each row, those that agree most. Within one set of thumbnails, only columns behind the row.
    """
    every_view = len(ours) * len(theirs) <= MOST_PAIRS
    for top in range(0, len(ours), ROWS):
        block = ours[top : top + ROWS]
        row_windows, count = _windows(block, 0), len(block)
        floor = np.full(count, LEAST_AGREEMENT, dtype=np.float32)
        best = np.empty((4, 0))
        for left in range(top if within else 0, len(theirs), COLUMNS):
            column_windows = _windows(theirs[left : left + COLUMNS], 1)
            candidates = [best]
            for view, (row_window, column_window, mirrored) in enumerate(VIEWS if every_view else VIEWS[:1]):
                agreement = row_windows[row_window, False] @ column_windows[column_window, mirrored].T
                if within and left < top + count:
                    # rows and columns are counted from the same thumbnail on
                    agreement = np.triu(agreement, 1 + top - left)
                rows, columns = _above(agreement, floor)
                chosen = agreement[rows, columns]
                candidates.append(np.stack([rows, columns + left, np.full(len(rows), view), chosen]))
            best = _best(np.concatenate(candidates, axis=1))
            _raise(floor, best)
        rows, columns, views = best[:3].astype(np.int64)
        yield rows + top, columns, views


def _above(agreement: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the agreement is above the floor of its row; of many, the highest of each row."""
    above = agreement > floor[:, None]
    if np.count_nonzero(above) > MOST_CANDIDATES * len(agreement) and agreement.shape[1] > MOST_CANDIDATES:
        above &= agreement >= np.partition(agreement, -MOST_CANDIDATES, axis=1)[:, -MOST_CANDIDATES, None]
    # much faster than a search in two dimensions
    rows, columns = np.divmod(np.flatnonzero(above), agreement.shape[1])
    return rows, columns


def _best(candidates: np.ndarray) -> np.ndarray:
    """Of candidates (rows, columns, views, agreements) the best view of each pair, and the best pairs of each row."""
    rows, columns, _, agreement = candidates
    candidates = candidates[:, np.lexsort((-agreement, columns, rows))]
    new = np.any(np.diff(candidates[:2], axis=1, prepend=-1) != 0, axis=0)
    candidates = candidates[:, new]
    candidates = candidates[:, np.lexsort((-candidates[3], candidates[0]))]
    place = np.arange(candidates.shape[1]) - np.searchsorted(candidates[0], candidates[0])
    return candidates[:, place < MOST_CANDIDATES]


def _raise(floor: np.ndarray, best: np.ndarray) -> None:
    """Makes the least agreement that a row has kept the floor of the row, where the row has enough of them."""
    rows = best[0].astype(np.int64)
    last = np.searchsorted(rows, rows, side="right") - 1
    full = np.bincount(rows, minlength=len(floor)) == MOST_CANDIDATES
    floor[rows] = np.where(full[rows], best[3][last], floor[rows])


def _windows(thumbnails: np.ndarray, place: int) -> dict[tuple[Window, bool], np.ndarray]:
    """Of the windows that the views have in one place, the differences between cells, of length 1: (B, 60) each."""
    grey, vectors = thumbnails.astype(np.float32), {}
    for window, mirrored in {(theirs, flip) if place else (ours, False) for ours, theirs, flip in VIEWS}:
        top, left, side = (size * SIDE / 32 for size in window)
        down = _weights(SIDE, COARSE, top, top + side)
        across = _weights(SIDE, COARSE, left, left + side)
        cells = down @ (grey[:, :, ::-1] if mirrored else grey) @ across.T
        differences = np.concatenate([np.diff(cells, axis=axis).reshape(len(cells), -1) for axis in (1, 2)], axis=1)
        length = np.linalg.norm(differences, axis=1, keepdims=True)
        # featureless images are like none
        vectors[window, mirrored] = differences / np.maximum(length, 1e-3)
    return vectors


def _threshold(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How similar two images have to be: more than chance makes any of these data."""
    random = np.random.default_rng(0)
    count = min(RANDOM_PAIRS, len(ours) * len(theirs))
    rows, columns = random.integers(0, len(ours), count), random.integers(0, len(theirs), count)
    similarity = _similarity(ours, theirs, rows, columns, np.zeros(count, dtype=np.int64))
    fisher = np.arctanh(similarity.clip(-0.999, 0.999))
    # quantiles instead of mean and deviation, as these would be moved by the very duplicates where images are few
    middle, above = np.quantile(fisher, ONE_DEVIATION)
    # images of one kind, such as a digit, may be alike though few pairs are of one kind. Pairs that are duplicates in
    # most data are left out, as one of a hundred pairs may well be from one video
    tail = np.quantile(fisher[similarity < LEAST_SIMILARITY], TAIL) if similarity.min() < LEAST_SIMILARITY else middle
    limit = middle + max(LEAST_DEVIATIONS * (above - middle), LEAST_TAILS * (tail - middle))
    return max(LEAST_SIMILARITY, float(np.tanh(limit)))


def _similarity(
    ours: np.ndarray, theirs: np.ndarray, rows: np.ndarray, columns: np.ndarray, views: np.ndarray
) -> np.ndarray:
    """How similar pairs of thumbnails are once they are aligned, beginning with a view of each: (P,), at most 1."""
    similarity = np.zeros(len(rows))
    starts = torch.tensor([_start(window, other) for window, other, _ in VIEWS])
    mirrored = np.array([mirror for _, _, mirror in VIEWS])
    for first in range(0, len(rows), PAIRS):
        block = slice(first, first + PAIRS)
        fixed = ours[rows[block]].astype(np.float32)
        moving = theirs[columns[block]].astype(np.float32)
        flip = mirrored[views[block]]
        moving[flip] = moving[flip, :, ::-1]
        similarity[block] = _aligned(torch.from_numpy(fixed), torch.from_numpy(moving), starts[views[block]])
    return similarity


def _start(ours: Window, theirs: Window) -> tuple[float, float, float, float]:
    """The map from one window onto the other, see `_align`."""
    scale = theirs[2] / ours[2]
    down, right = (
        (to + theirs[2] / 2) / 16 - 1 - scale * ((at + ours[2] / 2) / 16 - 1)
        for at, to in zip(ours[:2], theirs[:2], strict=True)
    )
    return scale - 1, 0.0, right, down


def _aligned(fixed: torch.Tensor, moving: torch.Tensor, change: torch.Tensor) -> np.ndarray:
    """The similarity of pairs of images (P, SIDE, SIDE) after their alignment."""
    fixed, moving = fixed[:, None], moving[:, None]
    for cells, steps in STEPS.items():
        small_fixed, small_moving = (functional.avg_pool2d(grey, SIDE // cells) for grey in (fixed, moving))
        for _ in range(steps):
            change = _align(small_fixed, small_moving, change)
    moved, inside = _moved(moving, change)
    ours, theirs = _directions(fixed, inside), _directions(moved, inside)
    length = (ours.square().sum(dim=(1, 2, 3)) * theirs.square().sum(dim=(1, 2, 3))).sqrt()
    similarity: np.ndarray = ((ours * theirs).sum(dim=(1, 2, 3)) / length.clamp(min=1e-6)).numpy()
    return similarity


def _align(fixed: torch.Tensor, moving: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """A Gauss-Newton step towards the similarity transform that makes one image like the other, whatever its contrast.

    Lucas and Kanade, IJCAI 1981. A point (x, y) of the fixed image, from -1 to 1, is sought in the moving one at
    ((1 + a) x - b y + c, b x + (1 + a) y + d).

    Args:
        fixed: brightness, (P, 1, G, G).
        moving: the same of the others.
        change: a, b, c, d of each pair, (P, 4).
    """
    side = fixed.shape[-1]
    edges = functional.pad(moving, (1, 1, 1, 1), mode="replicate")
    across = (edges[:, :, 1:-1, 2:] - edges[:, :, 1:-1, :-2]) * side / 4
    down = (edges[:, :, 2:, 1:-1] - edges[:, :, :-2, 1:-1]) * side / 4
    moved, inside = _moved(torch.cat([moving, across, down], dim=1), change)
    target, _ = _normalised(fixed, inside)
    current, length = _normalised(moved[:, :1], inside)
    across, down = (moved[:, 1:] * inside / length).unbind(dim=1)
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) * 2 / side - 1] * 2, indexing="ij")
    slopes = torch.stack([across * x + down * y, down * x - across * y, across, down], dim=1).flatten(2)
    curvature = slopes @ slopes.transpose(1, 2)
    # keeps the steps of featureless images finite
    curvature = curvature + torch.diag_embed(0.02 * curvature.diagonal(dim1=1, dim2=2) + 1e-4)
    step = torch.linalg.solve(curvature, slopes @ (target - current).flatten(1)[:, :, None])[:, :, 0]
    limits = torch.tensor([LIMITS[0], LIMITS[1], LIMITS[2], LIMITS[2]])
    return torch.minimum(torch.maximum(change + step, -limits), limits)


def _moved(images: torch.Tensor, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (P, C, G, G) as `_align` moves them, and where they have pixels, (P, 1, G, G)."""
    scale, turn, right, down = change.unbind(dim=1)
    rows = [torch.stack([1 + scale, -turn, right], dim=1), torch.stack([turn, 1 + scale, down], dim=1)]
    points = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    inside = (points.abs() <= 1 - 1 / images.shape[-1]).all(dim=-1)[:, None]
    return functional.grid_sample(images, points, align_corners=False), inside.float()


def _normalised(images: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness with mean 0 and length 1 where there are pixels, and its length before."""
    mean = (images * inside).sum(dim=(2, 3), keepdim=True) / inside.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    centred = (images - mean) * inside
    length = centred.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp(min=1e-3)
    return centred / length, length


def _directions(images: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Differences down and across, (P, 2, G - 1, G - 1), of lengths that hardly depend on contrast."""
    down = (images[:, :, 1:] - images[:, :, :-1]) * inside[:, :, 1:] * inside[:, :, :-1]
    across = (images[..., 1:] - images[..., :-1]) * inside[..., 1:] * inside[..., :-1]
    differences = torch.cat([down[..., :-1], across[:, :, :-1]], dim=1)
    lengths = differences.square().sum(dim=1, keepdim=True).sqrt()
    scale = SATURATION * lengths.square().mean(dim=(2, 3), keepdim=True).sqrt() + LEAST_CONTRAST
    return differences / (lengths + scale)


def _thumbnails(pixels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The brightness of each image, made small: (N, SIDE, SIDE) in half precision, a kilobyte an image."""
    thumbnails = np.empty((len(indices), SIDE, SIDE), dtype=np.float16)
    size = max(1, PIXELS // max(1, int(np.prod(pixels.shape[1:]))))
    for start in range(0, len(indices), size):
        block = slice(start, start + size)
        thumbnails[block] = _cells(pixels[indices[block]], SIDE) @ BRIGHTNESS
    return thumbnails


def _cells(images: np.ndarray, cells: int) -> np.ndarray:
    """The mean colours of a grid of cells: (B, cells, cells, 3)."""
    count, side = images.shape[:2]
    weights = _weights(side, cells, 0, side)
    rows: np.ndarray = weights @ images.astype(np.float32).reshape(count, side, side * 3)
    columns: np.ndarray = weights @ rows.reshape(count, cells, side, 3)  # [B, cells, cells, 3]
    return columns


def _weights(side: int, cells: int, start: float, stop: float) -> np.ndarray:
    """How much of each pixel each of the cells between two places has, (cells, side), 1 in all for a cell."""
    edges = np.linspace(start, stop, cells + 1)
    pixel = np.arange(side)
    share = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (share.clip(0) * cells / (stop - start)).astype(np.float32)
