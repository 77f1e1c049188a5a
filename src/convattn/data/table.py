"""A table that names image files, their classes, and where it knows them, their parts and groups."""

import codecs
import csv
import difflib
import io
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

from convattn import checks
from convattn.data.listing import PARTS, Found, Listing
from convattn.errors import DataError

SUFFIX = ".csv"
NEEDED, OPTIONAL = ("path", "label"), ("split", "group")
EXPECTED = "expected the columns path,label[,split][,group]"
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# spreadsheets put a byte order mark before the first name; that of UTF-32 begins with that of UTF-16
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?", re.IGNORECASE)


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
        DataError: a line with its number, what was expected in it and what came; labels that are numbers with decimals
            or name several classes; fewer than two classes; a split with a class that training lacks; a group that is
            torn between splits.
    """
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path}, line 2: the table has a header only, expected a line for each image.")
    _check_decimals(path, rows)
    _check_several(path, rows)
    rows.sort(key=lambda row: row.path)
    _check_twice(path, rows)
    _check_groups(path, rows)
    classes = _classes(path, rows)
    label_of = {name: label for label, name in enumerate(classes)}
    found = tuple(Found(row.path, label_of[row.label], row.part or "", row.group) for row in rows)
    return Listing(classes, found, path.parent)


def _rows(path: Path) -> Iterator[Row]:
    text = _text(path)
    delimiter = _delimiter(path, text)
    records = _records(path, text, delimiter)
    first, names = next(records)
    names = [name.lower() for name in names]
    _check_columns(f"{path}, line {first}", names)
    for line, cells in records:
        yield _row(path, line, names, cells, delimiter)


def _text(path: Path) -> str:
    """The content of a table.

    Raises:
        DataError: it cannot be read, is empty, or is no text in UTF-8 or in UTF-16 with a byte order mark.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({checks.reason(error)}).") from error
    mark = next((mark for mark in MARKS if content.startswith(mark)), b"")
    encoding, content = MARKS.get(mark, "utf-8"), content[len(mark) :]
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line(content[: error.start].decode(encoding, errors="ignore"))
        raise DataError(f"{path}, line {line}: {_why_undecodable(content, error, encoding)}") from error
    if "\0" in text:
        raise DataError(
            f"{path}, line {_line(text[: text.index(chr(0))])}: a null byte, which is in no table of text (UTF-16 "
            f"without its byte order mark has them): save it as UTF-8."
        )
    if not text.strip():
        raise DataError(f"{path}, line 1: the table is empty, {EXPECTED}.")
    return text


def _line(before: str) -> int:
    """The number of the line that follows a text."""
    return len(re.findall(r"\r\n|\r|\n", before)) + 1


def _why_undecodable(content: bytes, error: UnicodeDecodeError, encoding: str) -> str:
    byte = content[error.start : error.start + 1]
    if encoding != "utf-8":
        return f"damaged text in {encoding.upper()} ({error.reason})."
    try:
        content.decode("cp1252")
        likely = f"probably it is Windows-1252 (cp1252, Latin-1), where it is {byte.decode('cp1252')!r}"
    except UnicodeDecodeError:
        likely = "probably it is in another encoding, such as Latin-1 or that of another system"
    return f"the byte 0x{byte.hex().upper()} is not UTF-8: {likely}. Save the table as UTF-8."


def _delimiter(path: Path, text: str) -> str:
    """The delimiter for which the header has the needed columns.

    Raises:
        DataError: there is none.
    """
    headers = {delimiter: _header(path, text, delimiter) for delimiter in DELIMITERS}
    for delimiter, (_, names) in headers.items():
        if set(NEEDED) <= set(names):
            return delimiter
    line, names = max(headers.values(), key=lambda header: len(header[1]))
    lacking = " and ".join(name for name in NEEDED if name not in names)
    raise DataError(
        f"{path}, line {line}: {EXPECTED}, got {checks.printable(','.join(names))!r}: {lacking} missing (tried the "
        f"delimiters {', '.join(DELIMITERS.values())})."
    )


def _header(path: Path, text: str, delimiter: str) -> tuple[int, list[str]]:
    """The line and the names of the header; none where another delimiter is needed to read it."""
    try:
        line, names = next(_records(path, text, delimiter), (1, []))
    except DataError:
        return 1, []
    return line, [name.lower() for name in names]


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not empty, with their numbers: that of the first where a quoted value has several."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, [cell.strip() for cell in cells]
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: no line of a table ({error}): is a quote open?") from error


def _check_columns(where: str, names: list[str]) -> None:
    for name in (*NEEDED, *OPTIONAL):
        if names.count(name) > 1:
            raise DataError(f"{where}: the column {name!r} is there twice.")
        # a misspelt group that is silently not looked at would tear every patient
        close = difflib.get_close_matches(name, [other for other in names if other not in (*NEEDED, *OPTIONAL)], 1, 0.8)
        if name not in names and close:
            raise DataError(f"{where}: the column {close[0]!r} is not known. Did you mean {name!r}?")


def _row(path: Path, line: int, names: list[str], cells: list[str], delimiter: str) -> Row:
    where = f"{path}, line {line}"
    if len(cells) != len(names):
        raise DataError(
            f"{where}: expected {len(names)} values, got {len(cells)}; the delimiter is a {DELIMITERS[delimiter]}, and "
            f"a value with one in it needs quotes."
        )
    value = dict(zip(names, cells, strict=True))
    for name in (*NEEDED, *OPTIONAL):
        if value.get(name) == "":
            hint = "; an image that belongs to no other has a group of its own" if name == "group" else ""
            raise DataError(f"{where}: the {name} is empty{hint}.")
        if re.search(r"[\r\n]", value.get(name, "")):
            raise DataError(f"{where}: the {name} {value[name]!r} has a line break in it: is a quote open?")
    given = value.get("split")
    if given is not None and given.lower() not in PARTS:
        raise DataError(f"{where}: expected one of {', '.join(PARTS)} as split, got {given!r}.")
    # one file under two spellings of its path is still one file
    file = _normal(path.parent, value["path"])
    _check_file(where, path.parent / file, value["path"])
    return Row(line, file, value["label"], None if given is None else PARTS[given.lower()], value.get("group"))


def _normal(folder: Path, name: str) -> str:
    """A path relative to a folder, without detours; absolute where it leads elsewhere and is given so."""
    whole, base = (Path(os.path.normpath(Path.cwd() / place)) for place in (folder / name, folder))
    inside = whole.is_relative_to(base)
    return (whole.relative_to(base) if inside else Path(os.path.normpath(name))).as_posix()


def _check_file(where: str, file: Path, name: str) -> None:
    """Whether there is a file that can be read; other things, such as a pipe, are never opened."""
    try:
        is_file, exists = file.is_file(), file.exists()
    except OSError as error:
        raise DataError(f"{where}: {name!r} cannot be read ({error.strerror}).") from error
    if not is_file:
        kind = " (a folder)" if file.is_dir() else " (no regular file)" if exists else ""
        raise DataError(f"{where}: no file at {name!r}{kind}; paths are relative to the folder of the table.")
    if not os.access(file, os.R_OK):
        raise DataError(f"{where}: {name!r} cannot be read (no permission).")


def _check_decimals(path: Path, rows: list[Row]) -> None:
    """Whether the labels are classes, not the numbers of a regression; whole ones are classes, 1.0 as well."""
    labels = {row.label for row in rows}
    lists = any("," in label and labels.issuperset(label.split(",")) for label in labels)
    if lists or not all(map(NUMBER.fullmatch, labels)) or all(map(_is_whole, labels)):
        return
    row = next(row for row in rows if not _is_whole(row.label))
    raise DataError(
        f"{path}, line {row.line}: the label {row.label!r} is a number with decimals: convattn compares "
        f"classification; supported is one class for each image, as a name or a whole number. Names of classes need a "
        f"letter, such as 'v{row.label}'."
    )


def _is_whole(label: str) -> bool:
    return _value(label).is_integer()


def _value(label: str) -> float:
    return float(label.replace(",", "."))


def _check_several(path: Path, rows: list[Row]) -> None:
    """Whether each label is one class and not a list of several, which shows in parts that other labels have too."""
    lines: dict[str, int] = {}
    for row in rows:
        lines.setdefault(row.label, row.line)
    labels_of: dict[str, list[str]] = defaultdict(list)
    for label in lines:
        for part in {label, *_parts(label, lines.keys())}:
            labels_of[part].append(label)
    for label, line in lines.items():
        parts = _parts(label, lines.keys())
        shared = [part for part in parts if len(labels_of[part]) > 1]
        if len(parts) > 1 and shared and (len(shared) == len(parts) or _is_list(label)):
            other = next(other for other in labels_of[shared[0]] if other != label)
            raise DataError(
                f"{path}, line {line}: the label {label!r} names several classes ({shared[0]!r} is in {other!r} on "
                f"line {lines[other]} as well); supported is one class for each image."
            )


def _parts(label: str, labels: Set[str]) -> list[str]:
    """The classes that a label names if it is a list, sorted."""
    inner = re.fullmatch(r"[\[({](.*)[])}]", label)
    text = inner[1] if inner else label
    if inner and (quoted := re.findall(r"'([^']*)'|\"([^\"]*)\"", text)):
        return sorted({first or second for first, second in quoted})
    delimiter = next((sign for sign in ";|," if sign in text), None)
    # names of classes have spaces too: "red car", "red bike"
    if delimiter is None and not inner and not all(NUMBER.fullmatch(part) or part in labels for part in text.split()):
        return []
    return sorted({part.strip() for part in text.split(delimiter)} - {""})


def _is_list(label: str) -> bool:
    """Whether a label is written as programs write lists; "projectile, missile" may be the name of a class."""
    return not re.search(r",\s", label) or re.search(r"[;|\[]", label) is not None


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
    if not learned:
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
    numbers = all(map(NUMBER.fullmatch, learned))
    return tuple(sorted(learned, key=lambda label: (_value(label) if numbers else 0, label)))
