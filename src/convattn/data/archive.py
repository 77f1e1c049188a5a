"""Archives unpacked within limits: nothing is written outside the folder, and no more than the disk can hold."""

import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from convattn import checks, files
from convattn.data.listing import LeftOut
from convattn.errors import DataError

SUFFIXES = (".tar.xz", ".tar.gz", ".tgz", ".tar", ".zip")
# images hardly shrink in an archive, text and bare pixels do by up to about 20
RATIO = 200
# what every archive may unpack to, whatever its size
ALLOWED = 1 << 30
# above the 14 million images of the largest public data sets of classes
MOST_MEMBERS = 20_000_000
BLOCK = 1 << 20
# names in headers are at most a few thousand bytes, access rights and the like a few million
MOST_HEADER = 64 << 20
# the longest path that Linux takes
LONGEST_LINK = 4096
ADVICE = "unpack it yourself if you trust it, and give the folder."
# the numbers of systems in zip archives
WINDOWS, UNIX = 0, {3, 19}


class _Target:
    """The folder that an archive is unpacked to, and how much has been written there."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self.archive, self.folder = archive, folder
        self.left_out: list[LeftOut] = []
        self.links: list[tuple[str, str]] = []
        self.size = self.members = 0
        self._packed = archive.stat().st_size
        self._free = shutil.disk_usage(folder).free
        self._limit = min(self._free, max(ALLOWED, RATIO * self._packed))

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error that the archive cannot be unpacked."""
        raise DataError(f"{checks.printable(self.archive)} cannot be unpacked: {reason}")

    def add(self, size: int, members: int = 0, *, least: str = "at least ") -> None:
        """Count bytes and members before they are written; `least` says in messages whether more could come.

        Raises:
            DataError: these are more than the limits.
        """
        self.size, self.members = self.size + size, self.members + members
        if self.members > MOST_MEMBERS:
            self.refuse(f"it has more than {MOST_MEMBERS:,} members; {ADVICE}")
        if self.size > self._limit and self._limit == self._free:
            self.refuse(
                f"it unpacks to {least}{files.size(self.size)}, and the disk has {files.size(self._free)} left."
            )
        if self.size > self._limit:
            ratio = self.size // max(1, self._packed)
            self.refuse(f"it unpacks to {least}{files.size(self.size)}, {ratio:,} times its size; {ADVICE}")

    def path(self, name: str) -> Path:
        """Where a member goes.

        Raises:
            DataError: that is outside of the folder.
        """
        path = Path(name)
        if path.anchor or ".." in path.parts:
            self.refuse(f"its member {checks.printable(name)!r} would be written outside of the folder.")
        return self.folder / path

    def make_folder(self, name: str) -> None:
        """Make a folder and those above it."""
        self.path(name).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: IO[bytes], *, counted: bool) -> None:
        """Write a member; its bytes are counted here unless they are `counted` already."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # a second member of the name must not be written into a hard link
        target.unlink(missing_ok=True)
        with target.open("wb") as file:
            while block := content.read(BLOCK):
                if not counted:
                    self.add(len(block))
                file.write(block)

    def leave_out(self, name: str, reason: str) -> None:
        """Name a member that is not unpacked."""
        self.left_out.append(LeftOut(checks.printable(name), reason))

    def make_links(self) -> None:
        """Make the symbolic links, after all files, so that nothing is written through one."""
        root = Path(os.path.realpath(self.folder))
        made: list[tuple[str, Path]] = []
        for name, aim in self.links:
            path = self.path(name)
            try:
                if Path(os.path.realpath(path.parent)) != root / path.parent.relative_to(self.folder):
                    self.leave_out(name, "a link below a link")
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(aim)
                made.append((name, path))
            # a member of the same name, or a disk without links
            except OSError as error:
                if error.errno in files.NO_ROOM:
                    raise
                self.leave_out(name, f"a link that cannot be made ({error.strerror})")
        # where a link leads depends on all others
        for name, path in made:
            if not Path(os.path.realpath(path)).is_relative_to(root):
                path.unlink()
                self.leave_out(name, "a link that leads outside of the archive")


def unpack(archive: Path, folder: Path) -> tuple[LeftOut, ...]:
    """Unpack an archive to an empty folder; return the members that are left out: devices, pipes, links to outside.

    Raises:
        DataError: the archive is damaged or encrypted, too large, or writes outside of the folder.
        OSError: the disk is full.
    """
    target = _Target(archive, folder)
    try:
        if archive.suffix.lower() == ".zip":
            _unpack_zip(target)
        else:
            _unpack_tar(target)
        target.make_links()
    except DataError:
        raise
    # whatever the decompressors raise: TarError, BadZipFile, LZMAError, zlib.error, EOFError, a wrong password
    except Exception as error:
        if isinstance(error, OSError) and error.errno in files.NO_ROOM:
            raise
        raise DataError(
            f"{checks.printable(archive)} cannot be unpacked: {checks.reason(error).rstrip('.:')}."
        ) from error
    return tuple(target.left_out)


def _unpack_zip(target: _Target) -> None:
    with zipfile.ZipFile(target.archive) as zipped:
        members = zipped.infolist()
        # refused before anything is written; declared sizes may lie, so that bytes are counted again below
        target.add(sum(member.file_size for member in members), len(members), least="")
        target.size = 0
        if any(member.flag_bits & 1 for member in members):
            target.refuse("it is encrypted with a password; unpack it yourself, and give the folder.")
        for member in members:
            name, kind = _zip_name(member), _zip_kind(member)
            if name.endswith("/") or kind == stat.S_IFDIR:
                target.make_folder(name)
            elif kind == stat.S_IFREG:
                with zipped.open(member) as content:
                    target.write(name, content, counted=False)
            elif kind == stat.S_IFLNK and member.file_size <= LONGEST_LINK:
                target.links.append((name, os.fsdecode(zipped.read(member))))
            else:
                target.leave_out(name, "no regular file")


def _zip_kind(member: zipfile.ZipInfo) -> int:
    """The kind of file that a member is, as in `stat`; other systems than Unix and macOS do not say it."""
    kind = stat.S_IFMT(member.external_attr >> 16) if member.create_system in UNIX else 0
    return kind or stat.S_IFREG


def _zip_name(member: zipfile.ZipInfo) -> str:
    """The name of a member; some programs for Windows separate folders by backslashes."""
    windows = member.create_system == WINDOWS and "/" not in member.filename
    return member.filename.replace("\\", "/") if windows else member.filename


class _Decompressed:
    """A decompressed stream that refuses to hold a header of any size in memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, size: int) -> bytes:
        if size > MOST_HEADER:
            # the reader takes a `ReadError` for another compression
            raise ValueError(f"a header of {files.size(size)}")
        return self._stream.read(size)


class _Tar(tarfile.TarFile):
    """A tar archive whose headers fit into memory, and whose members are not kept there."""

    # the readers of all compressions call it
    @classmethod
    def taropen(cls, name: Any, mode: Any = "r", fileobj: Any = None, **options: Any) -> "_Tar":
        """Open decompressed data."""
        return super().taropen(name, mode, None if fileobj is None else _Decompressed(fileobj), **options)

    def each(self) -> Iterator[tarfile.TarInfo]:
        """All members in their order."""
        while (member := self.next()) is not None:
            yield member
            # it keeps all of them, which would fill the memory before any limit
            self.members: list[tarfile.TarInfo] = []


def _unpack_tar(target: _Target) -> None:
    with _Tar.open(target.archive) as tar:
        for member in tar.each():
            if member.size < 0:
                target.refuse(f"its member {checks.printable(member.name)!r} has a size below zero.")
            # a sparse file declares more than the archive holds; a header counts as well, or millions would be free
            target.add(member.size + tarfile.BLOCKSIZE, 1)
            if member.isdir():
                target.make_folder(member.name)
            elif member.issym():
                target.links.append((member.name, member.linkname))
            elif member.islnk():
                _link(target, member)
            elif member.isreg() and (content := tar.extractfile(member)) is not None:
                target.write(member.name, content, counted=True)
            else:
                target.leave_out(member.name, "no regular file")


def _link(target: _Target, member: tarfile.TarInfo) -> None:
    """Unpack a hard link, which is a second name of a file before it."""
    source, path = target.path(member.linkname), target.path(member.name)
    if not source.is_file():
        target.leave_out(member.name, "a link to nothing")
    elif source != path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(source, path)
        # a disk without links
        except OSError:
            with source.open("rb") as content:
                target.write(member.name, content, counted=False)
