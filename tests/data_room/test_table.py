"""A table of files: what it gives, and which line of a wrong one is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from convattn.data import Images, Listing, open_source, split
from convattn.errors import DataError
from small_runs import CLASSES, decoded, write_images

PATHS = [f"{name}/{index:03d}.png" for name in CLASSES for index in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", count=4)


def write(folder: Path, lines: list[str], **options: str) -> Path:
    path = folder / "photos.csv"
    path.write_text("\n".join(lines) + "\n", **{"encoding": "utf-8", **options})
    return path


def listing(path: Path) -> Listing:
    return open_source(path).listing(path.parent / "unpacked")


def rows(*columns: list[str]) -> list[str]:
    return [",".join(cells) for cells in zip(PATHS, [path.split("/")[0] for path in PATHS], *columns, strict=True)]


def test_it_equals_class_folders(folder: Path, tmp_path: Path) -> None:
    path = write(folder, ["path,label", *reversed(rows())])
    assert open_source(path).name == "photos"
    assert listing(path).found == listing(folder).found
    assert listing(path).classes == CLASSES
    images, same = decoded(path, tmp_path / "table"), decoded(folder, tmp_path / "folder")
    assert images.paths == same.paths
    assert np.array_equal(images.pixels, same.pixels)
    assert images.groups is None


def test_splits_have_the_names_that_folders_have(folder: Path) -> None:
    given = ["train", "TRAIN", "val", "test"] * 2 + ["train", "valid", "Validation", "test"]
    path = write(folder, ["path,label,split", *rows(given)])
    parts = ["train", "train", "validation", "test"] * 2 + ["train", "validation", "validation", "test"]
    assert [one.part for one in listing(path).found] == parts


def test_groups_are_numbers(folder: Path, tmp_path: Path) -> None:
    groups = ["anna", "bert", "bert", "cleo"] * 3
    path = write(folder, ["path,label,group", *rows(groups)])
    (folder / "blue" / "000.png").write_bytes(b"")
    images = decoded(path, tmp_path / "out")
    assert images.groups is not None
    # without the broken one
    assert images.groups.tolist() == [1, 1, 2, *[0, 1, 1, 2] * 2]
    again = Images.load(tmp_path / "out")
    assert again.groups is not None
    assert np.array_equal(again.groups, images.groups)


def test_columns_in_any_order_and_case_beside_others(folder: Path) -> None:
    lines = [f"{index},{path.split('/')[0]}, {path} ,train" for index, path in enumerate(PATHS)]
    path = write(folder, ["Age, Label ,PATH,Split", *lines, "", ",,,"], encoding="utf-8-sig")
    assert [one.path for one in listing(path).found] == PATHS


def test_quoted_values(folder: Path) -> None:
    shutil.copy(folder / "red" / "000.png", folder / "a, b.png")
    path = write(folder, ["path,label", *rows(), '"a, b.png","red"'])
    assert listing(path).found[0].path == "a, b.png"


def test_classes_that_are_numbers_are_in_their_order(folder: Path) -> None:
    path = write(folder, ["path,label", *[f"{name},{index}" for index, name in enumerate(PATHS)]])
    assert listing(path).classes == tuple(map(str, range(12)))


def test_the_fingerprint_is_of_the_table_and_its_files(folder: Path) -> None:
    path = write(folder, ["path,label", *rows()[:-1]])
    before = open_source(path).fingerprint()
    # not in the table
    (folder / PATHS[-1]).write_bytes(b"")
    assert open_source(path).fingerprint() == before
    (folder / PATHS[0]).write_bytes(b"")
    changed = open_source(path).fingerprint()
    write(folder, ["path,label", *rows()[:-2]])
    assert len({before, changed, open_source(path).fingerprint()}) == 3


GOOD = rows()
SPLIT = rows(["train", "train", "val", "test"] * 3)
WRONG = {
    "no label": (["path,class", *GOOD], "line 1: expected the columns path,label.*, got 'path,class': label missing"),
    "semicolons": (["path;label", *GOOD], "line 1: expected the columns .*, got 'path;label': path and label missing"),
    "nothing": ([""], "line 1: expected the columns .* got 'nothing'"),
    "a column twice": (["path,label,label", *rows(["a"] * 12)], "line 1: the column 'label' is there twice"),
    "a misspelt column": (["path,label,groups", *rows(["a"] * 12)], "'groups' is not known. Did you mean 'group'"),
    "too few values": (["path,label,split", *GOOD], "line 2: expected 3 values, got 2"),
    "a comma in a value": (["path,label", *GOOD, "a, b.png,red"], "line 14: expected 2 values, got 3.*needs quotes"),
    "an empty label": (["path,label", *GOOD[:3], "blue/003.png,"], "line 5: the label is empty"),
    "an empty split": (["path,label,split", "blue/000.png,blue,"], "line 2: the split is empty"),
    "an empty group": (["path,label,group", "blue/000.png,blue,"], "line 2: the group is empty; an image that belongs"),
    "an unknown split": (["path,label,split", "blue/000.png,blue,dev"], "line 2: expected one of train, .*, got 'dev'"),
    "no file": (["path,label", *GOOD, "nowhere.png,red"], "line 14: no file at 'nowhere.png'; paths are relative to"),
    "a folder": (["path,label", *GOOD, "red,red"], "line 14: no file at 'red'"),
    "twice": (
        ["path,label", *GOOD, "./red/../red/003.png,blue"],
        "line 14: 'red/003.png' with the label 'blue' is on line 13 already, with the label 'red'",
    ),
    "one class": (["path,label", *GOOD[:4]], r"has 1 classes to learn \(blue\), expected at least 2"),
    "no lines": (["path,label"], "has 0 classes to learn, expected at least 2"),
    "no train": (
        ["path,label,split", *rows(["val", "test"] * 6)],
        "has test and validation but no line with .*'train'",
    ),
    "a class of the test alone": (
        ["path,label,split", *SPLIT[:8], "red/000.png,red,test"],
        "line 10: the class 'red' of test is on no line with the split 'train'",
    ),
    "a torn group": (
        ["path,label,split,group", *rows(["train", "train", "val", "test"] * 3, ["a", "b", "c", "d"] * 2 + ["b"] * 4)],
        r"the group 'b' is in train \(line 3\) and in validation \(line 12\): put it into one of them",
    ),
    "an open quote": (["path,label", *GOOD, '"red/000.png,red'], "line 1[45]: no table in UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_line(folder: Path, case: str) -> None:
    lines, message = WRONG[case]
    path = write(folder, lines)
    with pytest.raises(DataError, match=message) as raised:
        listing(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_text_that_is_not_utf8(folder: Path) -> None:
    path = write(folder, ["path,label", "blue/000.png,größe"], encoding="latin-1")
    with pytest.raises(DataError, match="no table in UTF-8"):
        listing(path)


def test_a_part_whose_images_are_all_broken(folder: Path, tmp_path: Path) -> None:
    path = write(folder, ["path,label,split", *SPLIT])
    for name in CLASSES:
        (folder / name / "003.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^No test image can be decoded: blue/003\.png: "):
        decoded(path, tmp_path / "out")


def test_groups_are_split_whole(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", count=20)
    lines = [f"{name}/{index:03d}.png,{name},{name}{index // 2}" for name in CLASSES for index in range(20)]
    images = decoded(write(folder, ["path,label,group", *lines]), tmp_path / "out")
    assert images.groups is not None
    for seed in range(3):
        parts = split(images, seed)
        assert len(parts.test) == 12
        groups = [set(images.groups[here]) for here in (parts.train, parts.validation, parts.test)]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 30
