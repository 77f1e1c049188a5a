"""A table that names image files, their classes, and where it knows them, their parts and groups."""

import csv
import difflib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from convattn.data.listing import PARTS, Found, Listing
from convattn.errors import DataError

SUFFIX = ".csv"
NEEDED, OPTIONAL = ("path", "label"), ("split", "group")


class Row(NamedTuple):
    """One line of a table that was found right in itself; `part` and `group` are None without such a column."""

    line: int
    path: str
    label: str
    part: str | None
    group: str | None


def is_table(path: Path) -> bool:
    """Whether this is a file of the name of a table."""
    return path.is_file() and path.suffix.lower() == SUFFIX


def read(path: Path) -> Listing:
    """The classes and files of a table with the columns `path,label[,split][,group]`; paths are relative to its folder.

    Other columns are not looked at.

    Raises:
        DataError: a line with its number, what was expected in it and what came; fewer than two classes; a split with a
            class that training lacks; a group that is torn between splits.
    """
    rows = sorted(_rows(path), key=lambda row: row.path)
    _check_twice(path, rows)
    _check_groups(path, rows)
    classes = _classes(path, rows)
    label_of = {name: label for label, name in enumerate(classes)}
    found = tuple(Found(row.path, label_of[row.label], row.part or "", row.group) for row in rows)
    return Listing(classes, found, path.parent)


def _rows(path: Path) -> Iterator[Row]:
    # spreadsheets put a byte order mark before the first name
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            names = [name.strip().lower() for name in next(lines, [])]
            _check_columns(path, names)
            for cells in lines:
                # an empty line
                if any(cell.strip() for cell in cells):
                    yield _row(path, lines.line_num, names, [cell.strip() for cell in cells])
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {lines.line_num + 1}: no table in UTF-8 ({error}).") from error


def _check_columns(path: Path, names: list[str]) -> None:
    lacking = [name for name in NEEDED if name not in names]
    if lacking:
        raise DataError(
            f"{path}, line 1: expected the columns path,label[,split][,group], got {','.join(names) or 'nothing'!r}: "
            f"{' and '.join(lacking)} missing."
        )
    for name in (*NEEDED, *OPTIONAL):
        if names.count(name) > 1:
            raise DataError(f"{path}, line 1: the column {name!r} is there twice.")
        # a misspelt group that is silently not looked at would tear every patient
        close = difflib.get_close_matches(name, [other for other in names if other not in (*NEEDED, *OPTIONAL)], 1, 0.8)
        if name not in names and close:
            raise DataError(f"{path}, line 1: the column {close[0]!r} is not known. Did you mean {name!r}?")


def _row(path: Path, line: int, names: list[str], cells: list[str]) -> Row:
    where = f"{path}, line {line}"
    if len(cells) != len(names):
        raise DataError(
            f"{where}: expected {len(names)} values, got {len(cells)}; a value with a comma in it needs quotes."
        )
    value = dict(zip(names, cells, strict=True))
    for name in (*NEEDED, *OPTIONAL):
        if value.get(name) == "":
            hint = "; an image that belongs to no other has a group of its own" if name == "group" else ""
            raise DataError(f"{where}: the {name} is empty{hint}.")
    given = value.get("split")
    if given is not None and given.lower() not in PARTS:
        raise DataError(f"{where}: expected one of {', '.join(PARTS)} as split, got {given!r}.")
    # one file under two spellings of its path is still one file
    file = Path(os.path.normpath(value["path"])).as_posix()
    if not (path.parent / file).is_file():
        raise DataError(f"{where}: no file at {value['path']!r}; paths are relative to the folder of the table.")
    return Row(line, file, value["label"], None if given is None else PARTS[given.lower()], value.get("group"))


def _check_twice(path: Path, rows: list[Row]) -> None:
    """Whether every file is named once: named twice, it could be for training and for test, or of two classes."""
    for before, row in itertools.pairwise(rows):
        if before.path == row.path:
            raise DataError(
                f"{path}, line {row.line}: {row.path!r} with the label {row.label!r} is on line {before.line} already, "
                f"with the label {before.label!r}."
            )


def _check_groups(path: Path, rows: list[Row]) -> None:
    """Whether the table's own split leaves its groups whole.

    A torn one is an error and no mere report: the table contradicts itself, and only its author knows which of the two
    columns is right.
    """
    parts: dict[str, Row] = {}
    for row in rows:
        if row.group is None or row.part is None:
            return
        first = parts.setdefault(row.group, row)
        if first.part != row.part:
            raise DataError(
                f"{path}: the group {row.group!r} is in {first.part} (line {first.line}) and in {row.part} (line "
                f"{row.line}): put it into one of them, or leave out the column split, and the groups are kept whole."
            )


def _classes(path: Path, rows: list[Row]) -> tuple[str, ...]:
    given = {row.part for row in rows}
    learned = {row.label for row in rows if row.part in (None, "train")}
    if rows and not learned:
        raise DataError(f"{path} has {' and '.join(sorted(map(str, given)))} but no line with the split 'train'.")
    if len(learned) < 2:
        only = f" ({', '.join(learned)})" if learned else ""
        raise DataError(f"{path} has {len(learned)} classes to learn{only}, expected at least 2.")
    for row in rows:
        if row.label not in learned:
            raise DataError(
                f"{path}, line {row.line}: the class {row.label!r} of {row.part} is on no line with the split 'train'."
            )
    # by number where all of them are numbers, as whoever numbered them meant it
    numbers = all(label.isdecimal() for label in learned)
    return tuple(sorted(learned, key=lambda label: (int(label) if numbers else 0, label)))
