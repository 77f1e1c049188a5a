"""Where images come from: class folders, an archive of them, a table of files, or the digits of scikit-learn."""

import hashlib
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convattn import checks
from convattn.data import table
from convattn.data.listing import PARTS, Found, Listing
from convattn.errors import DataError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar", ".zip")
# left by file managers, never meant
CLUTTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}
BUILT_IN = "digits"


@dataclass(frozen=True)
class Source:
    """Data that were asked for, before any image is opened. `path` is None for the built-in digits."""

    name: str
    path: Path | None

    def fingerprint(self) -> str:
        """A hash of every file's name and content, or of the archive.

        Raises:
            DataError: a table names files that are not there.
        """
        digest = hashlib.blake2b(digest_size=16)
        if self.path is None:
            digest.update(_digits()[0].tobytes())
        elif table.is_table(self.path):
            _update(digest, self.path)
            for one in table.read(self.path).found:
                _update(digest, self.path.parent / one.path)
        elif self.path.is_file():
            _update(digest, self.path)
        else:
            for file in _files(self.path):
                digest.update(file.relative_to(self.path).as_posix().encode() + b"\0")
                _update(digest, file)
        return digest.hexdigest()

    def listing(self, unpacked: Path) -> Listing:
        """What the source holds; an archive is unpacked to the folder `unpacked` first.

        Raises:
            DataError: see `scan` and `table.read`; or the archive is damaged.
        """
        if self.path is None:
            return _digit_listing()
        if table.is_table(self.path):
            return table.read(self.path)
        if self.path.is_dir():
            return scan(self.path)
        unpacked.mkdir(parents=True)
        try:
            if self.path.suffix.lower() == ".zip":
                with zipfile.ZipFile(self.path) as zipped:
                    zipped.extractall(unpacked)
            else:
                with tarfile.open(self.path) as archive:
                    archive.extractall(unpacked, filter="data")
        # whatever the decompressors raise: TarError, BadZipFile, LZMAError, zlib.error, EOFError, a wrong password
        except Exception as error:
            raise DataError(f"{self.path} cannot be unpacked: {error}.") from error
        return scan(unpacked)


def open_source(data: str | Path) -> Source:
    """The source of a name: `digits`, a folder, an archive or a table.

    Raises:
        DataError: there is no such folder or file, or it is neither.
    """
    if str(data) == BUILT_IN and not Path(BUILT_IN).is_dir():
        return Source(BUILT_IN, None)
    path = Path(data)
    if not path.exists():
        raise DataError(
            f"No data at {path}: give a folder of class folders, an archive of one, a {table.SUFFIX} of files, or "
            f"'{BUILT_IN}'."
        )
    if path.is_file() and not path.name.lower().endswith((*ARCHIVES, table.SUFFIX)):
        raise DataError(
            f"{path} is a file, expected a folder of class folders or an archive ({', '.join(ARCHIVES)}) of one, or a "
            f"table of files ({table.SUFFIX})."
        )
    name = path.resolve().name
    for suffix in (*ARCHIVES, table.SUFFIX):
        name = name[: -len(suffix)] if path.is_file() and name.lower().endswith(suffix) else name
    return Source(name, path)


def scan(root: Path) -> Listing:
    """The classes and image files below a folder.

    Raises:
        DataError: fewer than two classes, a part with a class that training lacks, or a file that is no image.
    """
    folders = _folders(root)
    while len(folders) == 1 and folders[0].name.lower() not in PARTS:
        root, folders = folders[0], _folders(folders[0])
    given = {folder.name.lower(): folder for folder in folders if folder.name.lower() in PARTS}
    if given:
        _check_parts(root, folders, given)
    classes = [folder.name for folder in (_folders(given["train"]) if given else folders)]
    if len(classes) < 2:
        raise DataError(
            f"{root} has {len(classes)} class folders, expected at least 2: one folder for each class, with its images "
            f"in it, directly or below train/ and test/."
        )
    found = []
    for name, folder in given.items():
        here = {folder.name for folder in _folders(folder)}
        # a class that only training has can be learned; one that it lacks cannot, and is often the other one misspelt
        if here - set(classes):
            odd = sorted(here ^ set(classes))
            raise DataError(f"{folder} and {given['train']} differ in the class folders {', '.join(odd[:5])}.")
        images = _images(root, folder, classes, PARTS[name])
        if not images:
            raise DataError(f"{folder} has class folders but no images in them.")
        found += images
    if not given:
        found = _images(root, root, classes, "")
    return Listing(tuple(classes), tuple(found), root)


def _digit_listing() -> Listing:
    images, labels = _digits()
    found = tuple(Found(f"{label}/{index:04d}", int(label), "") for index, label in enumerate(labels))
    # 16 grey levels and black
    grey = np.round(images * (255 / 16)).astype(np.uint8)
    return Listing(tuple("0123456789"), found, pixels=np.repeat(grey[..., None], 3, axis=3))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    loaded = checks.extra("sklearn.datasets", "The built-in data 'digits'").load_digits()
    return loaded.images, loaded.target


def _check_parts(root: Path, folders: list[Path], given: dict[str, Path]) -> None:
    other = [folder.name for folder in folders if folder.name.lower() not in PARTS]
    if other:
        raise DataError(
            f"{root} has the folder {other[0]!r} beside {', '.join(given)}: is it a class, or another part?"
        )
    if "train" not in given:
        raise DataError(f"{root} has {', '.join(given)} but no train folder.")
    if len({PARTS[name] for name in given}) < len(given):
        raise DataError(f"{root} has two folders for one part: {', '.join(given)}.")


def _images(root: Path, folder: Path, classes: list[str], part: str) -> list[Found]:
    found = []
    for label, name in enumerate(classes):
        for file in _files(folder / name):
            path = file.relative_to(root).as_posix()
            if file.suffix.lower() not in SUFFIXES:
                raise DataError(
                    f"{path} is no image ({', '.join(sorted(SUFFIXES))}): move it out of the class folders."
                )
            found.append(Found(path, label, part))
    return found


def _files(root: Path) -> list[Path]:
    """All files below a folder, through links as well, but clutter and what lies in a folder of clutter."""
    found: list[Path] = []
    entered: set[str] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        # a folder that links to one above it would be entered for ever
        entered.add(os.path.realpath(here))
        links = {name for name in folders if os.path.realpath(Path(here, name)) in entered}
        folders[:] = [name for name in folders if name not in links and not _is_clutter(Path(name))]
        found += [Path(here, name) for name in files if not _is_clutter(Path(name))]
    return sorted(found)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_clutter(path))


def _is_clutter(path: Path) -> bool:
    return path.name.startswith(".") or path.name in CLUTTER


def _update(digest: "hashlib.blake2b", path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
