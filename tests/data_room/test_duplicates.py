"""Planted duplicates are found and put into groups, and images that are merely alike are not."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits

from convattn.compare.verdicts import verdict
from convattn.data import Pair, duplicates, find_clusters, find_duplicates, find_pairs, join_pairs


def scenes(count: int, seed: int, side: int = 32) -> np.ndarray:
    """Images that have shapes of several sizes, as photographs do."""
    random = np.random.default_rng(seed)
    found = np.zeros((count, side, side, 3))
    for cells in (3, 6, 12):
        for index in range(count):
            noise = Image.fromarray(random.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8))
            found[index] += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / 3
    return found.clip(0, 255).astype(np.uint8)


def planted(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Ten of these images, changed, behind all of them."""
    return np.concatenate([images, [np.asarray(change(Image.fromarray(image))) for image in images[:10]]])


def jpeg(image: Image.Image, quality: int = 60) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return Image.open(file)


def window(image: Image.Image, left: float, top: float, side: float) -> Image.Image:
    """A square of an image, from and to in 32nds of its side, as large as the image."""
    unit = image.width / 32
    box = (left * unit, top * unit, (left + side) * unit, (top + side) * unit)
    return image.transform(image.size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)


def cropped(image: Image.Image) -> Image.Image:
    return window(image, 1, 1, 30)


def shifted(image: Image.Image, right: int, down: int) -> Image.Image:
    """The image moved by 32nds of its side; at the border its last pixels again."""
    unit = image.width // 32
    places = np.arange(image.width)
    rows, columns = (np.clip(places - way * unit, 0, image.width - 1) for way in (down, right))
    return Image.fromarray(np.asarray(image)[rows][:, columns])


def frame(image: Image.Image, right: int, down: int, seed: int) -> Image.Image:
    """The next frame of a video: moved, a little brighter, with other noise."""
    noise = np.random.default_rng(seed).normal(0, 5, size=(image.height, image.width, 3))
    pixels = np.asarray(shifted(image, right, down)) * 1.1 + noise
    return jpeg(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), quality=80)


CHANGES = {
    "re-encoded": jpeg,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "cropped": cropped,
    "all of it": lambda image: jpeg(ImageEnhance.Brightness(cropped(image)).enhance(1.1)),
    "cropped by an eighth": lambda image: window(image, 4, 4, 24),
    "a corner": lambda image: window(image, 0, 4, 28),
    "moved": lambda image: shifted(image, 3, -3),
    "a frame": lambda image: frame(image, 1, 1, seed=1),
    "mirrored": lambda image: jpeg(ImageOps.mirror(image)),
    "turned": lambda image: image.rotate(4, Image.Resampling.BILINEAR),
}


@pytest.mark.parametrize("side", [32, 40, 100])
def test_exact_duplicates(side: int) -> None:
    pixels = planted(scenes(60, seed=1, side=side), lambda image: image)
    found = find_duplicates(pixels, np.arange(60, 70), np.arange(60))
    assert [(pair.image, pair.other, pair.exact) for pair in found] == [(60 + at, at, True) for at in range(10)]


@pytest.mark.slow_unless(side=32)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", [32, 96])
def test_near_duplicates(change: str, side: int) -> None:
    pixels = planted(scenes(60, seed=2, side=side), CHANGES[change])
    found = find_duplicates(pixels, np.arange(60, 70), np.arange(60))
    assert {(pair.image, pair.other) for pair in found} == {(60 + at, at) for at in range(10)}
    assert not any(pair.exact for pair in found)
    similarities = [pair.similarity for pair in found]
    assert similarities == sorted(similarities, reverse=True) and similarities[-1] >= 0.75


def test_exact_ones_come_first_and_are_counted_once() -> None:
    images = planted(planted(scenes(60, seed=3), jpeg), lambda image: image)
    # 60 to 69 are re-encoded, 70 to 79 the same; both are sought among the first 60 and the re-encoded
    found = find_duplicates(images, np.arange(70, 80), np.arange(70))
    assert [(pair.image, pair.other) for pair in found] == [(70 + at, at) for at in range(10)]
    among_re_encoded = find_duplicates(images, np.concatenate([np.arange(60, 70), [70]]), np.arange(60))
    assert [pair.exact for pair in among_re_encoded] == [True, *[False] * 10]


def test_only_others_are_looked_at() -> None:
    pixels = planted(scenes(60, seed=4), jpeg)
    assert find_duplicates(pixels, np.arange(60, 65), np.arange(5, 60)) == []


def test_the_most_similar_one_is_named() -> None:
    images = scenes(60, seed=5)
    worse = planted(images, lambda image: jpeg(cropped(image), quality=10))
    better = np.concatenate([worse, [np.asarray(jpeg(Image.fromarray(image))) for image in images[:10]]])
    found = find_duplicates(better, np.arange(10), np.arange(10, 80))
    assert {(pair.image, pair.other) for pair in found} == {(at, 70 + at) for at in range(10)}


ALIKE = {
    "scenes": lambda random: scenes(1000, seed=6),
    "noise": lambda random: random.integers(0, 256, size=(1000, 16, 16, 3)),
    "tiny noise": lambda random: random.integers(0, 256, size=(1000, 8, 8, 3)),
    "one colour": lambda random: random.permutation(1 << 24)[:1000, None, None, None] >> np.array([0, 8, 16]) & 255,
    "one colour and noise": lambda random: (
        random.integers(20, 230, (1000, 1, 1, 1)) + random.integers(0, 9, (1000, 32, 32, 3))
    ),
    "a gradient": lambda random: (
        random.integers(9, 99, (1000, 1, 1, 3)) * np.linspace(1, 2, 32)[:, None, None]
        + random.integers(0, 9, (1000, 32, 32, 3))
    ),
}


@pytest.mark.slow_unless(case=["noise", "tiny noise", "one colour and noise"])
@pytest.mark.parametrize("case", ALIKE)
def test_images_that_are_merely_alike(case: str) -> None:
    pixels = np.array(ALIKE[case](np.random.default_rng(0)))
    pixels = np.broadcast_to(pixels, (1000, max(pixels.shape[1], 8), max(pixels.shape[2], 8), 3)).astype(np.uint8)
    assert find_duplicates(pixels, np.arange(200), np.arange(200, 1000)) == []
    assert find_pairs(pixels, np.arange(1000)) == []


@pytest.mark.parametrize("seed", range(3))
def test_digits(seed: int) -> None:
    grey = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)
    order = np.random.default_rng(seed).permutation(len(grey))
    assert find_duplicates(grey, order[:360], order[360:]) == []
    assert find_clusters(grey, order[:360]).tolist() == list(range(360))


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = planted(scenes(60, seed=7), cropped)
    whole = find_duplicates(pixels, np.arange(50, 70), np.arange(50))
    for name, value in (("ROWS", 7), ("COLUMNS", 11), ("PAIRS", 50), ("PIXELS", 10_000), ("MOST_CANDIDATES", 1)):
        monkeypatch.setattr(duplicates, name, value)
    again = find_duplicates(pixels, np.arange(50, 70), np.arange(50))
    assert len(whole) == 10
    assert [(pair.image, pair.other) for pair in again] == [(pair.image, pair.other) for pair in whole]
    assert [pair.similarity for pair in again] == pytest.approx([pair.similarity for pair in whole], abs=1e-5)


def test_nothing_to_look_for() -> None:
    pixels = scenes(5, seed=8)
    nothing = np.array([], dtype=np.int64)
    assert find_duplicates(pixels, nothing, np.arange(5)) == find_duplicates(pixels, np.arange(5), nothing) == []
    assert find_clusters(pixels, nothing).tolist() == []
    assert find_clusters(pixels, np.array([3])).tolist() == [0]


def clusters(kind: str, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Images of 20 clusters of 5 and of 100 clusters of 1, mixed, and the cluster of each."""
    random = np.random.default_rng(9)
    pixels, numbers = [], []
    for number, pixel in enumerate(scenes(120, seed=10, side=side)):
        image = Image.fromarray(pixel)
        members = [image, *(CLUSTERS[kind](image, place, random) for place in range(4))] if number < 20 else [image]
        pixels += [np.asarray(member.convert("RGB")) for member in members]
        numbers += [number] * len(members)
    order = random.permutation(len(pixels))
    return np.stack(pixels)[order], np.array(numbers)[order]


def enhanced(image: Image.Image, place: int, random: np.random.Generator) -> Image.Image:
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(random.uniform(0.7, 1.3))
    return image


CLUSTERS = {
    "equal": lambda image, place, random: image,
    "re-encoded": lambda image, place, random: jpeg(image, quality=[50, 65, 80, 95][place]),
    "brightness and colour": enhanced,
    "crops": lambda image, place, random: window(image, *random.uniform(0, 2, size=2), random.uniform(26, 30)),
    "frames": lambda image, place, random: frame(image, place + 1, place - 1, seed=place),
    "mirrored": lambda image, place, random: jpeg(ImageOps.mirror(image), quality=[50, 65, 80, 95][place]),
    "turned": lambda image, place, random: image.rotate([-5, -2, 2, 5][place], Image.Resampling.BILINEAR),
}


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one[:, None] == one, other[:, None] == other)


@pytest.mark.slow_unless(kind=["equal", "crops", "frames"])
@pytest.mark.parametrize("kind", CLUSTERS)
def test_clusters(kind: str) -> None:
    pixels, numbers = clusters(kind)
    groups = find_clusters(pixels, np.arange(200))
    assert same_partition(groups, numbers)
    assert sorted(set(groups)) == list(range(120))


def test_pairs_are_those_of_the_clusters() -> None:
    pixels, numbers = clusters("crops")
    pairs = find_pairs(pixels, np.arange(200))
    assert all(numbers[pair.image] == numbers[pair.other] and pair.image != pair.other for pair in pairs)
    assert len({frozenset((pair.image, pair.other)) for pair in pairs}) == len(pairs)
    # nearly all of the ten of each cluster, not only the nearest
    assert 180 <= len(pairs) <= 200
    similarities = [pair.similarity for pair in pairs]
    assert similarities == sorted(similarities, reverse=True) and similarities[-1] >= 0.75


def test_clusters_among_some_images() -> None:
    pixels, numbers = clusters("re-encoded", side=32)
    some = np.random.default_rng(1).permutation(200)[:150]
    assert same_partition(find_clusters(pixels, some), numbers[some])


def test_equal_and_similar_images_are_of_one_cluster() -> None:
    pixels = planted(planted(scenes(60, seed=3), jpeg), lambda image: image)
    # 60 to 69 are re-encoded, 70 to 79 the same
    pairs = find_pairs(pixels, np.arange(80))
    assert [(pair.image, pair.other) for pair in pairs if pair.exact] == [(70 + at, at) for at in range(10)]
    assert {(pair.image, pair.other) for pair in pairs if not pair.exact} == {(at, 60 + at) for at in range(10)}
    groups = join_pairs(np.arange(80), pairs)
    assert same_partition(groups, np.concatenate([np.arange(60), np.arange(10), np.arange(10)]))


def test_known_groups_stay_together() -> None:
    pixels, numbers = clusters("re-encoded", side=32)
    # two clusters each have an image of one patient, and two other images are of another patient
    patients = np.array([f"patient {at}" for at in range(200)], dtype=object)
    first, second = np.flatnonzero(numbers == 3)[0], np.flatnonzero(numbers == 7)[0]
    patients[second] = patients[first]
    alone = np.flatnonzero(numbers >= 20)[:2]
    patients[alone] = "one of two"
    expected = numbers.copy()
    expected[numbers == 7] = 3
    expected[alone] = numbers[alone[0]]
    assert same_partition(find_clusters(pixels, np.arange(200), patients), expected)


def test_pairs_are_joined_one_after_the_other() -> None:
    pairs = [Pair(11, 12, 0.9, False), Pair(14, 12, 0.8, False), Pair(10, 15, 1.0, True)]
    images = np.arange(10, 16)
    assert join_pairs(images, pairs).tolist() == [0, 1, 1, 2, 1, 0]
    assert join_pairs(images, []).tolist() == [0, 1, 2, 3, 4, 5]
    assert join_pairs(images, pairs, np.array([5, 0, 1, 5, 2, 3])).tolist() == [0, 1, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="expected a group for each of 6 images, got 5"):
        join_pairs(images, pairs, np.arange(5))


def test_aligned_images_do_not_form_chains() -> None:
    # one motif with deviations, as faces or scans have
    motif, own = scenes(1, seed=11)[0] / 1.0, scenes(500, seed=12) / 1.0
    pixels = (0.5 * motif + 0.5 * own).astype(np.uint8)
    assert find_clusters(pixels, np.arange(500)).tolist() == list(range(500))
    # duplicates among them are found all the same
    copies = planted(pixels, jpeg)
    pairs = {(pair.image, pair.other) for pair in find_pairs(copies, np.arange(510))}
    # what all have in common leaves little to tell by, and one pair is not similar enough to stand alone
    assert pairs <= {(at, 500 + at) for at in range(10)} and len(pairs) >= 9


def test_two_have_to_be_more_similar_than_three() -> None:
    def pair(image: int, other: int, similarity: float) -> Pair:
        return Pair(image, other, similarity, False)

    alone, chain = [pair(0, 1, 0.9), pair(2, 3, 0.95)], [pair(4, 5, 0.8), pair(5, 6, 0.8)]
    triangle = [pair(7, 8, 0.8), pair(8, 9, 0.8), pair(7, 9, 0.8)]
    assert list(duplicates._confirmed([*alone, *chain, *triangle])) == [alone[1], *triangle]


def test_blocks_do_not_matter_for_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = planted(scenes(60, seed=7), cropped)
    whole = find_pairs(pixels, np.arange(70))
    for name, value in (("ROWS", 30), ("COLUMNS", 21), ("PAIRS", 50), ("PIXELS", 10_000), ("MOST_CANDIDATES", 1)):
        monkeypatch.setattr(duplicates, name, value)
    again = find_pairs(pixels, np.arange(70))
    assert {(pair.image, pair.other) for pair in whole} == {(at, 60 + at) for at in range(10)}
    assert [(pair.image, pair.other) for pair in again] == [(pair.image, pair.other) for pair in whole]
    assert [pair.similarity for pair in again] == pytest.approx([pair.similarity for pair in whole], abs=1e-5)


def test_the_interval_is_as_wide_as_with_named_clusters() -> None:
    pixels, numbers = clusters("frames", side=32)
    groups = find_clusters(pixels, np.arange(200))
    random = np.random.default_rng(13)
    # the images of a cluster are hard or easy together, for each network on its own
    hard = random.normal(size=(2, 1, 120))[:, :, numbers] + random.normal(0, 0.3, size=(2, 4, 200))
    baseline, variant = hard < 0.8
    widths = {
        name: verdict(baseline, {"se": variant}, groups=named)["se"].gain.standard_error_images
        for name, named in {"sought": groups, "named": numbers, "none": None}.items()
    }
    assert widths["sought"] == pytest.approx(widths["named"])
    assert widths["sought"] > 1.3 * widths["none"]
