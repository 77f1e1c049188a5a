"""What is wrong with the data although a comparison can be made: leaks, missing classes."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from convattn import checks, files
from convattn.data import Images, Pair, Split, find_duplicates, find_pairs, join_pairs, overview, per_class, split
from convattn.errors import DataError

LEAKS = "leaks.json"
# of the test images. A network that has learned them by heart answers them right, so that they can shift a gain by
# their share of the test images: 0.2 points here, well below the half point that is asked for unless told otherwise
LEAK = 1 / 500
MOST_EXAMPLES, MOST_PICTURES = 20, 6
# side of a picture in pixels: enough to see that two are the same, little enough for a report
PICTURE = 96
NAMES = {"train": "training", "validation": "validation", "test": "test"}


def search(images: Images, folds: int | None, folder: Path) -> dict[str, Any]:
    """The test images that are among those for training and validation, sought once: both are the same for all seeds.

    Of folds, each is sought among the others.

    Gives the numbers of test images with an `exact` or only a `near` duplicate, how many have another class than theirs
    (`other_class`), and some `examples`, the first of them with pictures (PNG in base64); and `within`, what the test
    images have of duplicates among themselves, see `_clusters`.
    """
    path = folder / LEAKS
    duplicates = files.read_intact(path)
    if duplicates is None:
        every = [split(images, 0, fold=fold, folds=folds) for fold in ([None] if folds is None else range(folds))]
        pairs = [
            pair
            for parts in every
            for pair in find_duplicates(images.pixels, parts.test, np.union1d(parts.train, parts.validation))
        ]
        pairs.sort(key=lambda pair: (not pair.exact, -pair.similarity))
        tests = overview(images, folds).test
        duplicates = _told(images, pairs) | {"within": _clusters(images, tests)}
        files.write_json(path, duplicates)
    return duplicates


def units(images: Images, folds: int | None, duplicates: dict[str, Any]) -> np.ndarray | None:
    """For each test image the group that it counts with in an interval; None where each counts by itself.

    Groups are those of the data and clusters of duplicates, put together where they have an image in common.
    """
    tests, clusters = overview(images, folds).test, duplicates["within"]["clusters"]
    named = None if images.groups is None else images.groups[tests]
    if not clusters:
        return named
    pairs = [Pair(image, cluster[0], 1.0, False) for cluster in clusters for image in cluster[1:]]
    return join_pairs(tests, pairs, named)


def check_units(images: Images, folds: int | None, duplicates: dict[str, Any]) -> None:
    """Raise `DataError` where all test images count as one, so that nothing could be said of others."""
    numbers = units(images, folds, duplicates)
    if numbers is not None and len(np.unique(numbers)) < 2:
        why = "are of one group" if not duplicates["within"]["clusters"] else "show the same"
        raise DataError(f"All {len(numbers):,} test images {why}: two that differ are needed to compare networks.")


def _clusters(images: Images, tests: np.ndarray) -> dict[str, Any]:
    """Clusters of test images that show the same, sought among those of no common group: `images` in them, the
    `clusters` themselves as indices of images, and `examples`, pairs as those of `search`."""
    pairs = find_pairs(images.pixels, tests)
    if images.groups is not None:
        pairs = [pair for pair in pairs if images.groups[pair.image] != images.groups[pair.other]]
    numbers = join_pairs(tests, pairs)
    order = np.argsort(numbers, kind="stable")
    parts = np.split(tests[order], np.flatnonzero(np.diff(numbers[order])) + 1)
    clusters = sorted((part.tolist() for part in parts if len(part) > 1), key=len, reverse=True)
    examples = [_example(images, pair) for pair in pairs[:MOST_EXAMPLES]]
    for example, pair in zip(examples, pairs[:MOST_PICTURES], strict=False):
        example["pictures"] = [_picture(images.pixels[pair.image]), _picture(images.pixels[pair.other])]
    keys = {"test": "image", "train": "other", "test_class": "image_class", "train_class": "other_class"}
    return {
        "images": sum(map(len, clusters)),
        "clusters": clusters,
        "examples": [{keys.get(key, key): value for key, value in example.items()} for example in examples],
    }


def within_warning(within: dict[str, Any], tests: int) -> str:
    """What duplicates within the test images mean for the intervals."""
    count, clusters = within["images"], within["clusters"]
    largest = f", the largest of {len(clusters[0])}" if len(clusters[0]) > 2 else ""
    return (
        f"{count:,} of {tests:,} test images show the same as another of them (frames of a video, crops of a picture): "
        f"they are {len(clusters):,} group{'s' if len(clusters) > 1 else ''}{largest}, and each group counts as one "
        f"image in the intervals."
    )


def leak(duplicates: dict[str, Any], tests: int) -> dict[str, Any] | None:
    """How many of the test images are for training as well, and which; None where they are too few to matter."""
    found = duplicates["exact"] + duplicates["near"]
    if found < LEAK * tests:
        return None
    return {
        "test_images": found,
        "of": tests,
        "exact": duplicates["exact"],
        "near": duplicates["near"],
        "pairs": [[one["test"], one["train"]] for one in duplicates["examples"]],
    }


def warning(found: dict[str, Any]) -> str:
    """What a leak means, in place of a verdict."""
    what = f"{found['test_images']:,} of {found['of']:,} test images are in the training images as well"
    return (
        f"Warning: {what} ({found['exact']:,} exactly, {found['near']:,} nearly), so that this is no verdict: "
        f"take them out of the training images, or keep them together with a group, and compare again."
    )


def counts(images: Images, parts: Split) -> dict[str, Any]:
    """Images of each class in each part, the classes that a part lacks, and the parts that have one class only."""
    numbers = per_class(images, parts)
    lacking = {
        part: [name for name, count in zip(images.classes, here, strict=True) if not count]
        for part, here in numbers.items()
    }
    return {
        "per_class": numbers,
        "missing_classes": {part: names for part, names in lacking.items() if names},
        "one_class": [part for part, here in numbers.items() if sum(count > 0 for count in here) == 1],
    }


def warnings(data: dict[str, Any], duplicates: dict[str, Any], tests: int) -> list[str]:
    """A line for everything that a person should know before hours of training."""
    lines = []
    for part, names in data["missing_classes"].items():
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        lines.append(f"No {NAMES[part]} image of {'the class' if len(names) == 1 else 'the classes'} {some}.")
    lines += [f"The {NAMES[part]} images are all of one class." for part in data["one_class"]]
    found, examples = leak(duplicates, tests), duplicates["examples"]
    if examples:
        few = f"{duplicates['exact'] + duplicates['near']} of {tests:,} test images are in the training images as well."
        pair = f"For example {examples[0]['test']} and {examples[0]['train']}."
        lines.append(f"{warning(found) if found else few} {pair}")
    if duplicates["other_class"]:
        odd = next((one for one in examples if one["test_class"] != one["train_class"]), None)
        which = f" For example {odd['test']} and {odd['train']}." if odd else ""
        lines.append(f"{duplicates['other_class']:,} of them have another class there.{which}")
    if duplicates["within"]["clusters"]:
        first = duplicates["within"]["examples"][0]
        lines.append(
            f"{within_warning(duplicates['within'], tests)} For example {first['image']} and {first['other']}."
        )
    return lines


def table(classes: tuple[str, ...], numbers: dict[str, list[int]]) -> list[list[str]]:
    """The number of images of each class in each part, as rows of cells with a heading; of many classes, the ends."""
    order, heading = list(range(len(classes))), "class"
    if len(classes) > MOST_EXAMPLES:
        ranked = sorted(order, key=lambda label: sum(here[label] for here in numbers.values()))
        order, heading = [*ranked[:3], *ranked[-3:]], f"smallest and largest of {len(classes)} classes"
    rows = [[classes[label], *(f"{here[label]:,}" for here in numbers.values())] for label in order]
    return [[heading, *(NAMES[part] for part in numbers)], *rows]


def _told(images: Images, pairs: list[Pair]) -> dict[str, Any]:
    examples = [_example(images, pair) for pair in pairs[:MOST_EXAMPLES]]
    for example, pair in zip(examples, pairs[:MOST_PICTURES], strict=False):
        example["pictures"] = [_picture(images.pixels[pair.image]), _picture(images.pixels[pair.other])]
    labels = images.labels
    return {
        "exact": sum(pair.exact for pair in pairs),
        "near": sum(not pair.exact for pair in pairs),
        "other_class": sum(bool(labels[pair.image] != labels[pair.other]) for pair in pairs),
        "examples": examples,
    }


def _example(images: Images, pair: Pair) -> dict[str, Any]:
    return {
        "test": images.paths[pair.image],
        "train": images.paths[pair.other],
        "test_class": images.classes[images.labels[pair.image]],
        "train_class": images.classes[images.labels[pair.other]],
        "exact": pair.exact,
        "similarity": round(pair.similarity, 3),
    }


def _picture(pixels: np.ndarray) -> str:
    image = checks.extra("PIL.Image", "Pictures of duplicates").fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((PICTURE, PICTURE))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
