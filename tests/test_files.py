"""Files that are whole or not there, and known to be what was written."""

import errno
import json
import os
from pathlib import Path

import pytest

from convattn import files
from convattn.errors import ComparisonError, DamagedFile, RunFailed

CONTENT = {"numbers": [1, 2.5, None], "nested": {"b": "ü", "a": True}}


def test_json_comes_back(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", CONTENT)
    assert files.read_json(tmp_path / "a.json") == CONTENT
    assert files.read_json(tmp_path / "nowhere.json") is None
    # other programs read it as well
    assert json.loads((tmp_path / "a.json").read_text())["numbers"] == [1, 2.5, None]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_every_flipped_bit_of_the_content_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, CONTENT)
    content = path.read_bytes()
    harmless = 0
    for position in range(len(content)):
        for bit in (0, 3, 6):
            path.write_bytes(content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :])
            try:
                # one of the spaces between the words, which say nothing
                assert files.read_json(path) == CONTENT
                harmless += 1
            except DamagedFile as error:
                assert str(path) in str(error)
    assert harmless < len(content)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe", b"[" * 10_000, b'{"a": 1e', b"9" * 5000, b'{"checksum": "0"}']
)
def test_what_is_no_such_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"a\.json is damaged \("):
        files.read_json(tmp_path / "a.json")
    assert files.read_intact(tmp_path / "a.json") is None


def test_files_of_other_programs_need_no_checksum(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert files.read_json(tmp_path / "a.json", from_anywhere=True) == {"a": 1}
    (tmp_path / "a.json").write_text('{"a": 1, "checksum": "wrong"}')
    with pytest.raises(DamagedFile):
        files.read_json(tmp_path / "a.json", from_anywhere=True)


def test_sealed_bytes(tmp_path: Path) -> None:
    path, previous = tmp_path / "a", tmp_path / "b"
    assert files.read_sealed(path) is None
    files.write_sealed(path, b"first", previous=previous)
    assert not previous.exists()
    files.write_sealed(path, b"second", previous=previous)
    assert (files.read_sealed(path), files.read_sealed(previous)) == (b"second", b"first")
    content = path.read_bytes()
    for damaged in (content[:-1], content[1:], b"", b"x" + content, content.replace(b"s", b"t")):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match="its checksum is wrong"):
            files.read_sealed(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, previous = tmp_path / "a", tmp_path / "b"
    files.write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, "new", previous=previous)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    files.write(tmp_path / ("x" * 255), "content")
    assert (tmp_path / ("x" * 255)).read_text() == "content"


def test_what_a_killed_process_had_begun_is_removed(tmp_path: Path) -> None:
    files.partial_path(tmp_path / "a").write_text("half")
    (tmp_path / "a.partial").write_text("somebody else's")
    files.remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]


@pytest.mark.parametrize("lacking", ["call", "support", "nothing"])
def test_room_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    def unsupported(*args: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if lacking == "call":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif lacking == "support":
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    files.reserve(tmp_path / "a", 3_000_001)
    about = (tmp_path / "a").stat()
    assert about.st_size == 3_000_001
    # on the disk too, in blocks of 512 bytes
    assert about.st_blocks * 512 >= 3_000_001


def test_room_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        files.reserve(tmp_path / "a", 100)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, RunFailed, r"No room left in out \(.* free\): what is done is kept\. Make room, and the same"),
        (
            errno.EROFS,
            ComparisonError,
            r"out cannot be written: its file system is read-only \(at out/a\)\. Give another",
        ),
        (errno.EACCES, ComparisonError, r"out cannot be written: permission denied \(at out/a\)\. Give another --out"),
        (errno.ENAMETOOLONG, ComparisonError, r"out cannot be written: the name is too long for the file system\."),
        (errno.EIO, RunFailed, r"out: .*Input/output error.* What is done is kept"),
    ],
)
def test_failures_are_one_line_that_names_the_folder(number: int, kind: type, message: str) -> None:
    error = files.explained(OSError(number, os.strerror(number), "out/a"), Path("out"))
    assert type(error) is kind
    with pytest.raises(kind, match=message):
        raise error


def test_sizes_in_words() -> None:
    sizes = [0, 999, 1000, 12_345, 999_400, 999_600, 5e9, 7e15, 3e19]
    assert [files.size(size) for size in sizes] == [
        *("0 bytes", "999 bytes", "1.0 kB", "12.3 kB", "999 kB", "1.0 MB", "5.0 GB", "7.0 PB", "30,000 PB")
    ]
