"""Where images come from: class folders, an archive of them, a table of files, or the digits of scikit-learn."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convattn import checks
from convattn.data import archive, class_folders, table
from convattn.data.listing import Found, Listing, validation_as_test
from convattn.data.split import TEST_SHARE
from convattn.errors import DataError

BUILT_IN = "digits"


@dataclass(frozen=True)
class Source:
    """Data that were asked for, before any image is opened. `path` is None for the built-in digits."""

    name: str
    path: Path | None

    def fingerprint(self, listing: Listing | None = None) -> str:
        """A hash of the name and content of every file that is used, or of the archive.

        Args:
            listing: what `listing` returned, so that a folder is not read twice.

        Raises:
            DataError: see `listing`; or a file cannot be read.
        """
        digest = hashlib.blake2b(digest_size=16)
        if self.path is None:
            digest.update(_digits()[0].tobytes())
        elif self.is_archive:
            _update(digest, self.path)
        elif table.is_table(self.path):
            _update(digest, self.path)
            for image in (listing or table.read(self.path)).found:
                _update(digest, self.path.parent / image.path)
        else:
            listing = listing or class_folders.scan(self.path)
            root = listing.root or self.path
            for file in sorted(root / image.path for image in listing.found):
                digest.update(file.relative_to(self.path).as_posix().encode() + b"\0")
                _update(digest, file)
        return digest.hexdigest()

    def listing(self, unpacked: Path, *, val_as_test: bool = False, folds: bool = False) -> Listing:
        """What the source holds; an archive is unpacked to the folder `unpacked` first.

        Args:
            unpacked: a folder that is not there yet.
            val_as_test: take the validation images as test images.
            folds: every image is tested, so that given parts do not count.

        Raises:
            DataError: see `class_folders.scan`, `table.read`, `archive.unpack` and `validation_as_test`.
        """
        listing = self._read(unpacked)
        if folds:
            return listing
        if val_as_test:
            return validation_as_test(listing)
        return replace(listing, notes=(*listing.notes, *_note_on_validation(listing)))

    def _read(self, unpacked: Path) -> Listing:
        if self.path is None:
            return _digit_listing()
        if table.is_table(self.path):
            return table.read(self.path)
        if not self.is_archive:
            return class_folders.scan(self.path)
        unpacked.mkdir(parents=True)
        left_out = archive.unpack(self.path, unpacked)
        listing = class_folders.scan(unpacked, self.path)
        return replace(listing, left_out=(*left_out, *listing.left_out))

    @property
    def is_archive(self) -> bool:
        """Whether it is unpacked before it is listed."""
        return self.path is not None and self.path.is_file() and not table.is_table(self.path)


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
    if path.is_file() and not path.name.lower().endswith((*archive.SUFFIXES, table.SUFFIX)):
        raise DataError(
            f"{path} is a file, expected a folder of class folders or an archive ({', '.join(archive.SUFFIXES)}) of "
            f"one, or a table of files ({table.SUFFIX})."
        )
    name = path.resolve().name
    for suffix in (*archive.SUFFIXES, table.SUFFIX):
        name = name[: -len(suffix)] if path.is_file() and name.lower().endswith(suffix) else name
    return Source(name, path)


def _digit_listing() -> Listing:
    images, labels = _digits()
    found = tuple(Found(f"{label}/{index:04d}", int(label), "") for index, label in enumerate(labels))
    # 16 grey levels and black
    grey = np.round(images * (255 / 16)).astype(np.uint8)
    return Listing(tuple("0123456789"), found, pixels=np.repeat(grey[..., None], 3, axis=3))


def _note_on_validation(listing: Listing) -> tuple[str, ...]:
    parts = [image.part for image in listing.found]
    count = parts.count("validation")
    if not count or "test" in parts:
        return ()
    are = "image of val chooses" if count == 1 else "images of val choose"
    return (
        f"There is no test part: test images are cut from train ({TEST_SHARE * 100:.0f} % of each class), while the "
        f"{count:,} {are} the epoch only; --val-as-test (from Python val_as_test=True) scores on val instead.",
    )


def _digits() -> tuple[np.ndarray, np.ndarray]:
    loaded = checks.extra("sklearn.datasets", "The built-in data 'digits'").load_digits()
    return loaded.images, loaded.target


def _update(digest: "hashlib.blake2b", path: Path) -> None:
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{checks.printable(path)} cannot be read ({checks.reason(error)}).") from error
