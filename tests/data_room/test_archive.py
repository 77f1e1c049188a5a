"""Archives: what is unpacked, what is left out, and what is refused before it fills the disk."""

import errno
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from convattn.data import LeftOut, open_source
from convattn.data import archive as archives
from convattn.data.archive import unpack
from convattn.errors import DataError
from small_runs import CLASSES, contents, write_images

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    return folder


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:" + {".tar": "", ".xz": "xz", ".gz": "gz"}[path.suffix]) as tar:
        for member, content in members:
            member.size = len(content) if content else member.size
            tar.addfile(member, io.BytesIO(content))
    return path


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, aim: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, aim
    return member


def zip_of(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for member, content in members:
            zipped.writestr(member, content, zipfile.ZIP_DEFLATED)
    return path


def zip_member(name: str, kind: int) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (kind | 0o644) << 16
    return member


def make_limit(monkeypatch: pytest.MonkeyPatch, *, allowed: int = 1 << 30, free: int = 1 << 40) -> None:
    monkeypatch.setattr(archives, "ALLOWED", allowed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))


def written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_zip_that_unpacks_to_much_more_is_refused_before_anything_is_written(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_limit(monkeypatch, allowed=1_000_000)
    archive = zip_of(tmp_path / "a.zip", ("red/0.png", bytes(4_500_000)))
    ratio = 4_500_000 // archive.stat().st_size
    assert ratio > 200
    with pytest.raises(
        DataError, match=rf"a\.zip cannot be unpacked: it unpacks to 4\.5 MB, {ratio:,} times its size;"
    ):
        unpack(archive, target)
    assert contents(target) == {}


def test_a_zip_below_the_ratio_is_unpacked(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_limit(monkeypatch, allowed=0)
    content = os.urandom(20_000)
    assert unpack(zip_of(tmp_path / "a.zip", ("a.png", content)), target) == ()
    assert contents(target) == {"a.png": content}


def test_a_small_archive_may_unpack_to_a_gibibyte(tmp_path: Path, target: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", ("a.png", bytes(3_000_000)))
    assert 3_000_000 / archive.stat().st_size > archives.RATIO
    assert archives.ALLOWED == 2**30
    assert unpack(archive, target) == ()


def test_a_zip_that_lies_about_its_sizes(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_limit(monkeypatch, allowed=100_000)
    archive = zip_of(tmp_path / "a.zip", ("a.png", bytes(4_500_000)))
    archive.write_bytes(archive.read_bytes().replace(struct.pack("<L", 4_500_000), struct.pack("<L", 10)))
    with pytest.raises(DataError, match=r"a\.zip cannot be unpacked: Bad CRC-32"):
        unpack(archive, target)
    assert written(target) <= 10


def test_bytes_of_a_zip_are_counted_while_they_are_written(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_limit(monkeypatch, allowed=1_500_000)
    archive = zip_of(tmp_path / "a.zip", ("a.png", bytes(4_500_000)))
    # a reader that believed a declared size of nothing
    infolist = zipfile.ZipFile.infolist

    def lying(zipped: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        members = [zipfile.ZipInfo(member.filename) for member in infolist(zipped)]
        monkeypatch.setattr(zipped, "open", lambda member: io.BytesIO(bytes(4_500_000)))
        return members

    monkeypatch.setattr(zipfile.ZipFile, "infolist", lying)
    with pytest.raises(DataError, match=r"it unpacks to at least 2\.1 MB, \d+ times its size"):
        unpack(archive, target)
    assert written(target) <= 1_500_000


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_a_tar_that_unpacks_to_more_stops_at_the_limit(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    make_limit(monkeypatch, allowed=1_500_000)
    monkeypatch.setattr(archives, "RATIO", 0)
    members = [(tar_member(f"red/{index}.png"), bytes(1_000_000)) for index in range(4)]
    archive = tar_of(tmp_path / f"a{suffix}", *members)
    with pytest.raises(DataError, match=r"it unpacks to at least 2\.0 MB, [\d,]+ times its size; unpack it yourself"):
        unpack(archive, target)
    assert written(target) == 1_000_000


def test_a_sparse_tar(tmp_path: Path, target: Path) -> None:
    # a terabyte of nothing in two blocks
    member = tar_member("red/0.png")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(10**12)}
    member.pax_headers["GNU.sparse.map"] = "0,0"
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
    with pytest.raises(DataError, match=r"it unpacks to at least 1\.0 TB, "):
        unpack(path, target)
    assert contents(target) == {}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_more_than_the_disk_holds(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    make_limit(monkeypatch, free=2_000_000)
    content = os.urandom(3_000_000)
    if kind == "zip":
        archive = zip_of(tmp_path / "a.zip", ("a.png", content))
    else:
        archive = tar_of(tmp_path / "a.tar", (tar_member("a.png"), content))
    with pytest.raises(DataError, match=r"it unpacks to (at least )?3\.0 MB, and the disk has 2\.0 MB left"):
        unpack(archive, target)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_too_many_members(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert archives.MOST_MEMBERS == 20_000_000
    monkeypatch.setattr(archives, "MOST_MEMBERS", 2)
    names = ["a.png", "b.png", "c.png"]
    if kind == "zip":
        archive = zip_of(tmp_path / "a.zip", *((name, b"1") for name in names))
    else:
        archive = tar_of(tmp_path / "a.tar", *((tar_member(name), b"1") for name in names))
    with pytest.raises(DataError, match="it has more than 2 members; unpack it yourself if you trust it"):
        unpack(archive, target)


def test_a_tar_with_a_huge_header(tmp_path: Path, target: Path) -> None:
    header = tar_member("a.png", tarfile.XHDTYPE)
    header.size = 70 << 20
    path = tmp_path / "a.tar.xz"
    with lzma.open(path, "wb", preset=0) as file:
        file.write(header.tobuf())
        for _ in range(70):
            file.write(bytes(1 << 20))
    with pytest.raises(DataError, match=r"a\.tar\.xz cannot be unpacked: .*a header of 73\.4 MB"):
        unpack(path, target)


def test_a_full_disk_is_no_fault_of_the_archive(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str) -> io.BytesIO:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = zip_of(tmp_path / "a.zip", ("a.png", b"1"))
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left") as raised:
        unpack(archive, target)
    assert not isinstance(raised.value, DataError)


@pytest.mark.parametrize("name", ["../up.png", "a/../../up.png", "/tmp/up.png"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar with links"])
def test_names_that_lead_out(tmp_path: Path, target: Path, name: str, kind: str) -> None:
    if kind == "zip":
        archive = zip_of(tmp_path / "a.zip", (name, b"1"))
    elif kind == "tar":
        archive = tar_of(tmp_path / "a.tar", (tar_member(name), b"1"))
    else:
        archive = tar_of(tmp_path / "a.tar", (tar_member("a.png", tarfile.LNKTYPE, name), b""))
    with pytest.raises(DataError, match=rf"its member '{name}' would be written outside of the folder"):
        unpack(archive, target)
    assert contents(target) == {}


def test_links_in_a_tar(tmp_path: Path, target: Path) -> None:
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "0.png").write_bytes(b"secret")
    archive = tar_of(
        tmp_path / "a.tar",
        (tar_member("red/0.png"), b"red"),
        (tar_member("red/1.png", tarfile.SYMTYPE, "0.png"), b""),
        (tar_member("red/2.png", tarfile.LNKTYPE, "red/0.png"), b""),
        (tar_member("red/3.png", tarfile.LNKTYPE, "nowhere/0.png"), b""),
        (tar_member("red/4.png", tarfile.SYMTYPE, "../../secret/0.png"), b""),
        (tar_member("blue", tarfile.SYMTYPE, "red"), b""),
        (tar_member("green", tarfile.SYMTYPE, str(outside)), b""),
        (tar_member("green/planted", tarfile.SYMTYPE, "red"), b""),
        # each seems to stay inside without the other
        (tar_member("step", tarfile.SYMTYPE, "turn/../secret"), b""),
        (tar_member("turn", tarfile.SYMTYPE, "."), b""),
    )
    left_out = unpack(archive, target)
    out = "a link that leads outside of the archive"
    assert set(left_out) == {
        LeftOut("red/3.png", "a link to nothing"),
        LeftOut("red/4.png", out),
        LeftOut("green", out),
        LeftOut("green/planted", "a link below a link"),
        LeftOut("step", out),
    }
    assert {path: content for path, content in contents(target).items() if content} == {
        "red/0.png": b"red",
        "red/1.png": b"red",
        "red/2.png": b"red",
    }
    assert (target / "blue").readlink() == Path("red")
    assert contents(outside) == {"0.png": b"secret"}


def test_a_file_below_a_link_is_not_written_through_it(tmp_path: Path, target: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    archive = tar_of(
        tmp_path / "a.tar",
        (tar_member("red", tarfile.SYMTYPE, str(outside)), b""),
        (tar_member("red/0.png"), b"red"),
    )
    assert unpack(archive, target) == (LeftOut("red", "a link that cannot be made (File exists)"),)
    assert contents(outside) == {}
    assert contents(target) == {"red": None, "red/0.png": b"red"}


def test_a_second_file_of_a_name_does_not_change_its_hard_link(tmp_path: Path, target: Path) -> None:
    archive = tar_of(
        tmp_path / "a.tar",
        (tar_member("a.png"), b"first"),
        (tar_member("b.png", tarfile.LNKTYPE, "a.png"), b""),
        (tar_member("a.png"), b"second"),
    )
    unpack(archive, target)
    assert contents(target) == {"a.png": b"second", "b.png": b"first"}


def test_devices_and_pipes_in_a_tar_are_left_out(tmp_path: Path, target: Path) -> None:
    kinds = {"pipe.png": tarfile.FIFOTYPE, "disk.png": tarfile.BLKTYPE, "zero.png": tarfile.CHRTYPE}
    archive = tar_of(tmp_path / "a.tar", *((tar_member(f"red/{name}", kind), b"") for name, kind in kinds.items()))
    assert unpack(archive, target) == tuple(LeftOut(f"red/{name}", "no regular file") for name in kinds)
    assert contents(target) == {}


def test_links_and_pipes_in_a_zip(tmp_path: Path, target: Path) -> None:
    archive = zip_of(
        tmp_path / "a.zip",
        ("red/0.png", b"red"),
        (zip_member("red/1.png", stat.S_IFLNK), b"0.png"),
        (zip_member("red/2.png", stat.S_IFLNK), b"/etc/hostname"),
        (zip_member("red/3.png", stat.S_IFIFO), b""),
    )
    assert set(unpack(archive, target)) == {
        LeftOut("red/2.png", "a link that leads outside of the archive"),
        LeftOut("red/3.png", "no regular file"),
    }
    assert contents(target) == {"red": None, "red/0.png": b"red", "red/1.png": b"red"}
    assert (target / "red" / "1.png").readlink() == Path("0.png")


def test_names_of_old_zips(tmp_path: Path, target: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", ("gr__n/0.png", b"green"))
    # letters of code page 437 instead of UTF-8
    archive.write_bytes(archive.read_bytes().replace(b"gr__n", "grün/".encode("cp437")[:4] + b"n"))
    with zipfile.ZipFile(archive) as zipped:
        name = zipped.namelist()[0]
    unpack(archive, target)
    assert contents(target) == {name.split("/")[0]: None, name: b"green"}
    assert name.startswith("grü")


def test_backslashes_of_zips_from_windows(tmp_path: Path, target: Path) -> None:
    member = zipfile.ZipInfo("red-0.png")
    member.create_system = 0
    archive = zip_of(tmp_path / "a.zip", (member, b"red"))
    archive.write_bytes(archive.read_bytes().replace(b"red-0.png", b"red\\0.png"))
    unpack(archive, target)
    assert contents(target) == {"red": None, "red/0.png": b"red"}


def test_what_is_left_out_is_in_the_listing(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=2)
    os.mkfifo(data / "red" / "pipe.png")
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as tar:
        tar.add(data, "data")
    (data / "red" / "pipe.png").unlink()
    listed = open_source(tmp_path / "photos.tar.gz").listing(tmp_path / "unpacked")
    assert listed.left_out == (LeftOut("data/red/pipe.png", "no regular file"),)
    assert listed.found == open_source(data).listing(tmp_path).found


def test_messages_about_an_archive_name_it_and_not_where_it_was_unpacked(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=2)
    for name in CLASSES[1:]:
        shutil.rmtree(data / name)
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", data))
    with pytest.raises(DataError, match=rf"^{archive} has only the class folder 'blue' \(2 images\)"):
        open_source(archive).listing(tmp_path / "unpacked")
