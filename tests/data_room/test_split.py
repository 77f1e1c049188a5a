"""Training, validation and test images: stratified, the test images the same for every seed."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convattn.data import Images, check_counts, fold_of, overview, per_class, split
from convattn.errors import DataError

PARTS = ("train", "validation", "test")


def images(**counts: list[int]) -> Images:
    """Images without pixels, so many of each class in each part; `given_in_none` for those in none."""
    labels, parts = [], []
    for part, by_class in counts.items():
        for label, count in enumerate(by_class):
            labels += [label] * count
            parts += ["" if part == "given_in_none" else part] * count
    classes = len(next(iter(counts.values())))
    return Images(
        pixels=np.zeros((len(labels), 1, 1, 3), np.uint8),
        paths=tuple(f"{index}.png" for index in range(len(labels))),
        labels=np.array(labels, dtype=np.int64),
        parts=tuple(parts),
        classes=tuple(f"class {label}" for label in range(classes)),
        size=1,
        left_out=(),
    )


def counted(found: Images, indices: np.ndarray) -> list[int]:
    return np.bincount(found.labels[indices], minlength=len(found.classes)).tolist()


def test_shares_of_every_class() -> None:
    found = images(given_in_none=[100, 50, 20])
    parts = split(found, 3)
    assert counted(found, parts.test) == [20, 10, 4]
    assert counted(found, parts.validation) == [12, 6, 2]
    assert counted(found, parts.train) == [68, 34, 14]


@given(counts=st.lists(st.integers(3, 60), min_size=2, max_size=6), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_every_image_is_in_one_part_and_every_class_in_every_part(counts: list[int], seed: int) -> None:
    found = images(given_in_none=counts)
    check_counts(found)
    parts = split(found, seed)
    everything = np.concatenate([parts.train, parts.validation, parts.test])
    assert np.array_equal(np.sort(everything), np.arange(sum(counts)))
    for part in PARTS:
        indices = getattr(parts, part)
        assert min(counted(found, indices)) >= 1
        assert np.array_equal(indices, np.sort(indices))


def test_the_same_seed_gives_the_same_parts() -> None:
    first, again = (split(images(given_in_none=[30, 30]), 5) for _ in range(2))
    for part in PARTS:
        assert np.array_equal(getattr(first, part), getattr(again, part))


@pytest.mark.parametrize("counts", [{"given_in_none": [40, 40]}, {"train": [40, 40]}])
def test_test_images_are_the_same_for_all_seeds_and_the_rest_is_cut_anew(counts: dict[str, list[int]]) -> None:
    found = images(**counts)
    parts = [split(found, seed) for seed in range(8)]
    assert all(np.array_equal(one.test, parts[0].test) for one in parts)
    assert len({tuple(one.validation) for one in parts}) == 8
    assert len({tuple(one.train) for one in parts}) == 8


def test_cuts_are_random_and_not_the_same_in_every_class() -> None:
    found = images(given_in_none=[40, 40])
    parts = split(found, 0)
    places = [set(parts.test[found.labels[parts.test] == label] % 40) for label in (0, 1)]
    assert places[0] != places[1]
    chosen = np.zeros(80)
    for seed in range(200):
        chosen[split(found, seed).validation] += 1
    rest = np.setdiff1d(np.arange(80), parts.test)
    # each of the 64 images left is chosen in 10 of 64 cuts: 31 of 200, standard deviation 5.1
    assert chosen[parts.test].sum() == 0
    assert chosen[rest].sum() == 200 * 10
    assert chosen[rest].min() > 10 and chosen[rest].max() < 55


def test_given_parts_stay_as_they_are() -> None:
    found = images(train=[5, 6], validation=[2, 2], test=[3, 3])
    for seed in (0, 1):
        parts = split(found, seed)
        assert {found.parts[index] for index in parts.train} == {"train"}
        assert {found.parts[index] for index in parts.validation} == {"validation"}
        assert {found.parts[index] for index in parts.test} == {"test"}
        assert [len(getattr(parts, part)) for part in PARTS] == [11, 4, 6]


def test_missing_validation_is_cut_off_training() -> None:
    found = images(train=[20, 20], test=[3, 3])
    parts = split(found, 0)
    assert counted(found, parts.validation) == [3, 3]
    assert counted(found, parts.train) == [17, 17]
    assert {found.parts[index] for index in parts.test} == {"test"}


def test_missing_test_is_cut_off_training() -> None:
    found = images(train=[20, 20], validation=[3, 3])
    parts = split(found, 0)
    assert counted(found, parts.test) == [4, 4]
    assert counted(found, parts.train) == [16, 16]
    assert {found.parts[index] for index in parts.validation} == {"validation"}


@pytest.mark.parametrize(
    ("counts", "few", "here", "needed"),
    [
        ({"given_in_none": [9, 2, 9]}, "class 1", 2, 3),
        ({"given_in_none": [9, 9, 0]}, "class 2", 0, 3),
        ({"train": [1, 9], "test": [1, 1]}, "class 0", 1, 2),
        ({"train": [1, 9], "validation": [1, 1]}, "class 0", 1, 2),
        ({"train": [9, 0], "validation": [1, 1], "test": [1, 1]}, "class 1", 0, 1),
    ],
)
def test_too_few_images(counts: dict[str, list[int]], few: str, here: int, needed: int) -> None:
    with pytest.raises(DataError, match=f"'{few}' has too few usable images.*: {here}, expected at least {needed}\\b"):
        check_counts(images(**counts))


@pytest.mark.parametrize(
    "counts",
    [
        {"given_in_none": [3, 3]},
        {"train": [2, 2], "test": [1, 1]},
        {"train": [1, 1], "validation": [1, 1], "test": [1, 1]},
    ],
)
def test_just_enough_images(counts: dict[str, list[int]]) -> None:
    found = images(**counts)
    check_counts(found)
    parts = split(found, 0)
    assert all(counted(found, getattr(parts, part)) == [1, 1] for part in PARTS)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_class_that_a_given_part_lacks_is_told(part: str) -> None:
    counts = {"train": [9, 9], "validation": [1, 1], "test": [1, 1], part: [0, 2]}
    found = images(**counts)
    check_counts(found)
    assert per_class(found, split(found, 0)) == counts


# groups


def grouped(groups: list[list[int]], part: str = "given_in_none", **others: list[int]) -> Images:
    """Images in groups, each given by its number of images of each class; those of other parts alone in theirs."""
    totals = np.array(groups).sum(axis=0)
    found = images(**{part: totals.tolist()}, **others)
    numbers = [
        group for label in range(len(totals)) for group, counts in enumerate(groups) for _ in range(counts[label])
    ]
    rest = range(len(groups), len(groups) + len(found.labels) - len(numbers))
    return replace(found, groups=np.array([*numbers, *rest]))


def torn(found: Images, seed: int) -> set[int]:
    """Groups with images in more than one part."""
    parts = split(found, seed)
    inside = [set(found.groups[getattr(parts, part)]) for part in PARTS]  # type: ignore[index]
    return {group for one, other in ((0, 1), (0, 2), (1, 2)) for group in inside[one] & inside[other]}


@given(
    groups=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=3, max_size=30),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_no_group_is_torn_and_every_class_is_in_every_part(groups: list[list[int]], seed: int) -> None:
    found = grouped(groups)
    check_counts(found)
    assert not torn(found, seed)
    parts = split(found, seed)
    assert sum(len(getattr(parts, part)) for part in PARTS) == len(found.labels)
    for part in PARTS:
        assert min(counted(found, getattr(parts, part))) >= 1


@given(
    sizes=st.lists(st.lists(st.integers(1, 20), min_size=3, max_size=15), min_size=2, max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_groups_of_one_class(sizes: list[list[int]], seed: int) -> None:
    groups = [[size * (label == own) for own in range(len(sizes))] for label, some in enumerate(sizes) for size in some]
    found = grouped(groups)
    check_counts(found)
    assert not torn(found, seed)
    for part in PARTS:
        assert min(counted(found, getattr(split(found, seed), part))) >= 1


def test_shares_of_groups() -> None:
    # 40 patients with 5 images each of one class or two
    found = grouped([[5, 0], [0, 5], [3, 2], [1, 4]] * 10)
    for seed in range(5):
        parts = split(found, seed)
        assert [counted(found, parts.test)[label] for label in (0, 1)] == pytest.approx([18, 22], abs=2)
        assert [counted(found, parts.validation)[label] for label in (0, 1)] == pytest.approx([11, 13], abs=3)


def test_test_groups_are_the_same_for_all_seeds_and_the_rest_is_cut_anew() -> None:
    found = grouped([[5, 0], [0, 5], [3, 2], [1, 4]] * 10)
    parts = [split(found, seed) for seed in range(8)]
    assert all(np.array_equal(one.test, parts[0].test) for one in parts)
    assert len({tuple(one.validation) for one in parts}) == 8


def test_a_large_group_stays_in_training() -> None:
    found = grouped([[200, 200], *[[2, 2]] * 30])
    for seed in range(5):
        assert 0 in found.groups[split(found, seed).train]  # type: ignore[index]


def test_given_parts_keep_their_groups() -> None:
    found = grouped([[3, 3]] * 10, "train", test=[4, 4])
    for seed in range(3):
        parts = split(found, seed)
        assert {found.parts[index] for index in parts.test} == {"test"}
        assert counted(found, parts.test) == [4, 4]
        assert not torn(found, seed)


def test_too_few_groups() -> None:
    with pytest.raises(DataError, match="'class 1' has too few groups: 2, expected at least 3; add some, or leave out"):
        check_counts(grouped([[5, 5], [5, 5], [5, 0]]))


def test_groups_that_cannot_be_dealt() -> None:
    # each class is in three groups, and yet there is no way
    found = grouped([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
    check_counts(found)
    with pytest.raises(DataError, match="cannot be dealt to training, validation and test without tearing one"):
        for seed in range(5):
            split(found, seed)


# folds


@given(counts=st.lists(st.integers(6, 40), min_size=2, max_size=5), folds=st.integers(2, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_every_image_is_tested_in_one_fold(counts: list[int], folds: int, seed: int) -> None:
    found = images(given_in_none=counts)
    parts = [split(found, seed, fold=fold, folds=folds) for fold in range(folds)]
    assert np.array_equal(np.sort(np.concatenate([one.test for one in parts])), np.arange(sum(counts)))
    for one in parts:
        assert np.array_equal(np.sort(np.concatenate([one.train, one.validation, one.test])), np.arange(sum(counts)))
        assert min(counted(found, one.train)) >= 1 and min(counted(found, one.validation)) >= 1
        # equal shares of every class, but for one image
        assert all(abs(here - count / folds) < 1 for here, count in zip(counted(found, one.test), counts, strict=True))


def test_folds_are_the_same_for_all_seeds_and_validation_is_not() -> None:
    found = images(given_in_none=[40, 40])
    one, other = (split(found, seed, fold=1, folds=4) for seed in (0, 1))
    assert np.array_equal(one.test, other.test)
    assert not np.array_equal(one.validation, other.validation)


def test_given_parts_do_not_count_in_folds() -> None:
    found = images(train=[20, 20], test=[10, 10])
    assert counted(found, split(found, 0, fold=0, folds=5).test) == [6, 6]
    assert np.array_equal(overview(found, 5).test, np.arange(60))
    assert np.array_equal(overview(found, None).test, split(found, 0).test)


@given(sizes=st.lists(st.integers(1, 6), min_size=30, max_size=60), folds=st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_no_fold_tears_a_group(sizes: list[int], folds: int) -> None:
    classes = np.arange(len(sizes)) % 3
    found = images(given_in_none=[sum(np.array(sizes)[classes == label]) for label in range(3)])
    groups = np.concatenate(
        [np.repeat(np.flatnonzero(classes == label), np.array(sizes)[classes == label]) for label in range(3)]
    )
    found = replace(found, groups=groups)
    for fold in range(folds):
        parts = split(found, 0, fold=fold, folds=folds)
        for one, other in (("train", "test"), ("validation", "test"), ("train", "validation")):
            assert not set(groups[getattr(parts, one)]) & set(groups[getattr(parts, other)])


@pytest.mark.parametrize(("count", "folds", "fits"), [(5, 5, True), (4, 5, False), (3, 2, False), (4, 2, True)])
def test_a_class_with_too_few_images_for_the_folds(count: int, folds: int, fits: bool) -> None:
    found = images(given_in_none=[30, count])
    if fits:
        assert len(np.unique(fold_of(found, folds))) == folds
    else:
        with pytest.raises(DataError, match=f"The class 'class 1' has too few images for {folds} folds: {count}"):
            fold_of(found, folds)


def test_a_class_with_too_few_groups_for_the_folds() -> None:
    found = replace(images(given_in_none=[30, 30]), groups=np.arange(60) // 10)
    with pytest.raises(DataError, match="has too few groups for 5 folds: 3"):
        fold_of(found, 5)
