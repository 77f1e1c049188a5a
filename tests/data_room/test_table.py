"""A table of files: what it gives, and which line of a wrong one is named."""

import os
import re
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
    "no columns": (
        ["file;class", *GOOD],
        "line 1: expected the columns .*, got 'file,class': path and label missing "
        r"\(tried the delimiters comma, semicolon, tab, bar\)",
    ),
    "semicolons above commas": (
        ["path;label", *GOOD],
        "line 2: expected 2 values, got 1; the delimiter is a semicolon",
    ),
    "nothing": ([""], r"line 1: the table is empty, expected the columns path,label\[,split\]\[,group\]"),
    "a column twice": (["path,label,label", *rows(["a"] * 12)], "line 1: the column 'label' is there twice"),
    "a misspelt column": (["path,label,groups", *rows(["a"] * 12)], "'groups' is not known. Did you mean 'group'"),
    "too few values": (["path,label,split", *GOOD], "line 2: expected 3 values, got 2"),
    "a comma in a value": (["path,label", *GOOD, "a, b.png,red"], "line 14: expected 2 values, got 3.*needs quotes"),
    "an empty label": (["path,label", *GOOD[:3], "blue/003.png,"], "line 5: the label is empty"),
    "an empty split": (["path,label,split", "blue/000.png,blue,"], "line 2: the split is empty"),
    "an empty group": (["path,label,group", "blue/000.png,blue,"], "line 2: the group is empty; an image that belongs"),
    "an unknown split": (["path,label,split", "blue/000.png,blue,dev"], "line 2: expected one of train, .*, got 'dev'"),
    "no file": (["path,label", *GOOD, "nowhere.png,red"], "line 14: no file at 'nowhere.png'; paths are relative to"),
    "a folder": (["path,label", *GOOD, "red,red"], r"line 14: no file at 'red' \(a folder\); paths are relative"),
    "a long path": (["path,label", *GOOD, f"{'a' * 300}.png,red"], r"line 14: 'aaa.*' cannot be read \(File name too"),
    "twice": (
        ["path,label", *GOOD, "./red/../red/003.png,blue"],
        "line 14: 'red/003.png' with the label 'blue' is on line 13 already, with the label 'red'",
    ),
    "one class": (["path,label", *GOOD[:4]], r"has 1 classes to learn \(blue\), expected at least 2"),
    "no lines": (["path,label"], "line 2: the table has a header only, expected a line for each image"),
    "a null byte": (["path,label", *GOOD[:2], "a\0.png,red"], "line 4: a null byte, which is in no table of text"),
    "a line break in a path": (
        ["path,label", *GOOD[:2], '"blue/\n002.png",blue'],
        r"line 4: the path 'blue/\\n002.png' has a line break in it: is a quote open\?",
    ),
    "a line break in a label": (["path,label", '"blue/002.png","bl\nue"', *GOOD], r"line 2: the label 'bl\\nue' has a"),
    "a line after one with a line break": (
        ["path,label,about", 'blue/002.png,blue,"two\nlines"', "nowhere.png,red,one"],
        "line 4: no file at 'nowhere.png'",
    ),
    "decimals": (
        ["path,label", *(f"{path},{index}" for index, path in enumerate(PATHS[:3])), "red/000.png,0.37"],
        "line 5: the label '0.37' is a number with decimals: convattn compares classification; supported is one class",
    ),
    "a small number": (
        ["path,label", "red/000.png,1e-3", "red/001.png,2.0"],
        "line 2: the label '1e-3' is a number with",
    ),
    "a decimal comma": (["path;label", "red/000.png;0,37", "red/001.png;0,52"], "line 2: the label '0,37' is a number"),
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
    "an open quote": (
        ["path,label", *GOOD, '"red/000.png,red'],
        r"line 14: no line of a table \(.*\): is a quote open\?",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_line(folder: Path, case: str) -> None:
    lines, message = WRONG[case]
    path = write(folder, lines)
    with pytest.raises(DataError, match=message) as raised:
        listing(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_the_line_and_the_encoding_of_text_that_is_not_utf8(folder: Path) -> None:
    # far behind what is read at once
    lines = ["path,label,about", *(f"{line},{'x' * 50}" for line in GOOD * 500), "blue/000.png,größe,x"]
    path = write(folder, lines, encoding="latin-1")
    with pytest.raises(
        DataError, match=r"line 6002: the byte 0xF6 is not UTF-8: probably .* \(cp1252, .* is 'ö'\. Save"
    ):
        listing(path)


def test_text_in_an_unknown_encoding(folder: Path) -> None:
    path = folder / "photos.csv"
    path.write_bytes(b"path,label\r\nblue/000.png,\x81\r\n")
    with pytest.raises(DataError, match="line 2: the byte 0x81 is not UTF-8: probably it is in another encoding"):
        listing(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_text_with_a_byte_order_mark(folder: Path, encoding: str) -> None:
    path = write(folder, ["path,label", *GOOD[4:], "blue/000.png,größe"], encoding=encoding)
    assert listing(path).classes == ("green", "größe", "red")


def test_utf16_of_the_other_byte_order(folder: Path) -> None:
    path = folder / "photos.csv"
    path.write_bytes(b"\xfe\xff" + "\n".join(["path,label", *GOOD]).encode("utf-16-be"))
    assert listing(path).classes == CLASSES


def test_damaged_utf16(folder: Path) -> None:
    path = write(folder, ["path,label", *GOOD], encoding="utf-16")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"line 13: damaged text in UTF-16-LE \(truncated data\)"):
        listing(path)


def test_a_table_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, ["path,label", *GOOD])

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"photos\.csv cannot be read \(.*Permission denied\)"):
        listing(path)


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("quote", ["", '"'])
def test_delimiters(folder: Path, delimiter: str, quote: str) -> None:
    cells = [["about", "path", "label"], *(["", *line.split(",")] for line in GOOD)]
    lines = [delimiter.join(f"{quote}{cell}{quote}" for cell in line) for line in cells]
    path = write(folder, ["", *lines])
    assert listing(path).found == listing(folder).found


def test_a_comma_in_a_table_with_semicolons(folder: Path) -> None:
    shutil.copy(folder / "red" / "000.png", folder / "a, b.png")
    path = write(folder, ["path;label", *(line.replace(",", ";") for line in GOOD), "a, b.png;red"])
    assert listing(path).found[0].path == "a, b.png"


def test_a_pipe_in_a_table_is_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    path = write(folder, ["path,label", *GOOD, "pipe.png,red"])
    with pytest.raises(DataError, match=r"line 14: no file at 'pipe\.png' \(no regular file\); paths are relative"):
        listing(path)


def test_a_file_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, ["path,label", *GOOD])
    monkeypatch.setattr(os, "access", lambda file, mode: Path(file) != folder / "red" / "001.png")
    with pytest.raises(DataError, match=r"line 11: 'red/001\.png' cannot be read \(no permission\)"):
        listing(path)


def labelled(folder: Path, labels: list[str]) -> Path:
    """A semicolon table whose images have these labels in turn."""
    return write(folder, ["path;label", *(f'{path};"{labels[i % len(labels)]}"' for i, path in enumerate(PATHS))])


@pytest.mark.parametrize(
    ("labels", "several", "shared"),
    [
        (["a", "a;b", "c"], "a;b", "a"),
        (["b;a", "c;a"], "b;a", "a"),
        (["c", "a|b", "b|d"], "a|b", "b"),
        (["a", "a,b", "c"], "a,b", "a"),
        (["a", "b", "a, b"], "a, b", "a"),
        (["a", "b", "a b"], "a b", "a"),
        (["['a']", "['a', 'b']", "['c']"], "['a', 'b']", "a"),
        (["['a' 'b']", "['b' 'c']"], "['a' 'b']", "b"),
        (["[a, b]", "[b, c]"], "[a, b]", "b"),
        (["0 1 1", "1 0 1"], "0 1 1", "0"),
        (["1", "2", "1,2"], "1,2", "1"),
    ],
)
def test_several_classes_of_an_image(folder: Path, labels: list[str], several: str, shared: str) -> None:
    line = 2 + labels.index(several)
    message = re.escape(f"line {line}: the label {several!r} names several classes ({shared!r} is in ")
    with pytest.raises(DataError, match=message + r".*; supported is one class for each image\."):
        listing(labelled(folder, labels))


@pytest.mark.parametrize(
    "labels",
    [
        ["red car", "red bike", "blue car"],
        ["projectile, missile", "missile"],
        ["maillot", "maillot, tank suit"],
        ["a;b", "c;d"],
        ["['a']", "['b']"],
        ["v0.5", "v0.7"],
        ["0.5", "none"],
        ["1.5T", "3.0T"],
    ],
)
def test_names_of_classes_that_are_no_lists_and_no_decimals(folder: Path, labels: list[str]) -> None:
    assert listing(labelled(folder, labels)).classes == tuple(sorted(labels))


def test_whole_numbers_as_pandas_writes_them(folder: Path) -> None:
    labels = [f"{number}.0" for number in range(12)]
    assert listing(labelled(folder, labels)).classes == tuple(labels)


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


def test_one_file_under_two_spellings(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=2)
    for other in (data / "blue" / "000.png", "../data/blue/000.png", "./red/../blue/000.png"):
        (data / "t.csv").write_text(f"path,label\nblue/000.png,a\nred/000.png,b\n{other},b\n")
        with pytest.raises(DataError, match=r"line 4: 'blue/000\.png' with the label 'b' is on line 2 already"):
            open_source(data / "t.csv").listing(tmp_path / "unpacked")
