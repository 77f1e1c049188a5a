"""Files of a folder that outlasts crashes: each is whole or not there, and is known to be what was written.

A file is written beside its place, synchronised with the disk, and renamed. JSON files have a checksum of their own
content as a key, other files at their end; where a file is read by other programs too, its digest is kept elsewhere.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convattn import checks
from convattn.errors import ComparisonError, ConvattnError, DamagedFile, RunFailed

CHECKSUM = "checksum"
DIGEST_BYTES = 16
# what a process that was killed may leave
PARTIAL = ".convattn-*.partial"
BLOCK = 1 << 20
UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}


def write(path: Path, content: bytes | str, *, previous: Path | None = None) -> None:
    """Replace a file in one step.

    Args:
        path: the file.
        content: what it is to have.
        previous: where to keep what it had; nowhere by default.

    Raises:
        OSError: it cannot be written; the file is what it was.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            synchronise(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """Where a process writes what is to become a file; short, since the name of the file may be as long as allowed."""
    return path.with_name(PARTIAL.replace("*", f"{os.getpid()}-{hash(path.name) & 0xFFFFFFFF:x}"))


def replace(partial: Path, path: Path) -> None:
    """Give a file that was written whole its name, in a way that outlasts a crash of the machine."""
    partial.replace(path)
    # folders cannot be opened on Windows
    if os.name != "nt":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            synchronise(folder)
        finally:
            os.close(folder)


def synchronise(descriptor: int) -> None:
    """Wait until the disk has what was written; file systems that have no such call keep it as they do."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file by an object, to which its checksum is added."""
    body = json.loads(json.dumps(content))
    write(path, json.dumps({**body, CHECKSUM: _checksum(body)}, indent=1))


def read_json(path: Path, *, from_anywhere: bool = False) -> dict[str, Any] | None:
    """The object that `write_json` wrote, without its checksum; None where there is no such file.

    Args:
        path: the file.
        from_anywhere: other programs write such files as well, and need not add a checksum.

    Raises:
        DamagedFile: it is not what was written.
    """
    try:
        body = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    # ValueError: no JSON, no text, or a number of thousands of digits; or a folder lies in the place of the file
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise DamagedFile(f"{path} is damaged ({checks.reason(error)}).") from error
    if not isinstance(body, dict):
        raise DamagedFile(f"{path} is damaged (it is a {type(body).__name__}, not an object).")
    checksum = body.pop(CHECKSUM, None)
    if checksum != _checksum(body) and not (checksum is None and from_anywhere):
        raise DamagedFile(f"{path} is damaged (its checksum is wrong).")
    return body


def read_intact(path: Path) -> dict[str, Any] | None:
    """The object that `write_json` wrote, where it can be computed again: None where it is missing or damaged."""
    try:
        return read_json(path)
    except DamagedFile:
        return None


def write_sealed(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Replace a file of bytes, to which their digest is added; see `write`."""
    write(path, content + hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest(), previous=previous)


def read_sealed(path: Path) -> bytes | None:
    """The bytes that `write_sealed` wrote; None where there is no such file.

    Raises:
        DamagedFile: they are not what was written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest() != digest:
        raise DamagedFile(f"{path} is damaged (its checksum is wrong).")
    return body


def digest(path: Path) -> str:
    """A hash of the content of a file."""
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            whole.update(block)
    return whole.hexdigest()


def reserve(path: Path, size: int) -> None:
    """Make a file of so many bytes, all of which have their place on the disk.

    A file that only promises its size ends the process that maps it, once the disk is full.

    Raises:
        OSError: there is no room for it.
    """
    with path.open("wb") as file:
        try:
            # what the system lacks, and what some file systems refuse
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            zeros = bytes(BLOCK)
            for start in range(0, size, BLOCK):
                file.write(zeros[: min(BLOCK, size - start)])
        synchronise(file.fileno())


def free_bytes(folder: Path) -> int:
    """The room that is left on the disk of a folder, which need not be there yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed had begun to write, in a folder."""
    for path in folder.glob(PARTIAL):
        path.unlink(missing_ok=True)


def explained(error: OSError, folder: Path) -> ConvattnError:
    """What a failure to write in a folder means for the user, in one line."""
    name = checks.shown(folder)
    if error.errno in NO_ROOM:
        return RunFailed(
            f"No room left in {name} ({size(free_bytes(folder))} free): what is done is kept. Make room, and the same "
            f"command goes on."
        )
    reasons = {
        errno.EROFS: "its file system is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.ENAMETOOLONG: "the name is too long for the file system",
    }
    if error.errno in reasons:
        what = checks.shown(error.filename) if error.filename else name
        inside = "" if what == name or error.errno == errno.ENAMETOOLONG else f" (at {what})"
        return ComparisonError(f"{name} cannot be written: {reasons[error.errno]}{inside}. Give another --out.")
    return RunFailed(f"{name}: {checks.reason(error)}. What is done is kept, and the same command goes on.")


def size(count: float) -> str:
    """A number of bytes for people: 12.3 MB."""
    # enormous ones are beyond what floating-point numbers hold
    count, unit = min(count, 1e30), 0
    while count >= 999.5 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:,.0f} {UNITS[unit]}" if unit == 0 or count >= 99.95 else f"{count:.1f} {UNITS[unit]}"


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=DIGEST_BYTES).hexdigest()
