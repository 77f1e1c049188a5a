"""What a source lists before any image is opened: files, their classes, parts and groups."""

import contextlib
import functools
import importlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convattn import checks
from convattn.errors import DataError

# by these a folder is known to be that of a comparison, even before it has anything else
PLAN, PREPARING, LOCK = "plan.json", "preparing", "convattn.lock"
# and by this its customary name
PREFIX = "convattn-"
PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
# Pillow only recognises these (stubs), or starts another program for them (Ghostscript for EPS)
UNSAFE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
HEIF_SUFFIXES = {".heic", ".heics", ".heif", ".heifs", ".hif"}


@dataclass(frozen=True)
class LeftOut:
    """A file or a folder that is not used, and why; `path` is relative to the data and printable."""

    path: str
    reason: str


@dataclass(frozen=True)
class Found:
    """One image file: its path relative to the data, its class, and the part it was given in ("" if in none).

    `group` names what must not be torn between parts: a patient, a video; None where there are no groups.
    """

    path: str
    label: int
    part: str
    group: str | None = None


@dataclass(frozen=True)
class Listing:
    """The classes and image files of a source, both sorted; `root` is None where `pixels` (N, H, W, 3) are at hand.

    `left_out` has the files and folders that are not used, `notes` plain sentences to be read before training.
    """

    classes: tuple[str, ...]
    found: tuple[Found, ...]
    root: Path | None = None
    pixels: np.ndarray | None = None
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()


@functools.cache
def image_formats() -> tuple[str, ...]:
    """The formats that Pillow opens here by itself; what a file is called does not matter to it, only its content.

    The first call registers the formats of the package pillow-heif where it is installed.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    image = checks.extra("PIL.Image", "Reading images")
    with contextlib.suppress(ImportError):
        heif = importlib.import_module("pillow_heif")
        for name in ("register_heif_opener", "register_avif_opener"):
            # the second is in some versions only
            getattr(heif, name, lambda: None)()
    image.init()
    return tuple(sorted(image.OPEN.keys() - UNSAFE_FORMATS))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The endings of image files that Pillow opens here, in lower case and with their dot.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    formats, extensions = image_formats(), checks.extra("PIL.Image", "Reading images").registered_extensions()
    return frozenset(suffix.lower() for suffix, name in extensions.items() if name in formats)


def is_image(path: Path) -> bool:
    """Whether the ending of a file is that of an image."""
    return path.suffix.lower() in image_suffixes()


def why_no_image(path: Path) -> str:
    """The reason to leave out a file that `is_image` refuses."""
    if path.suffix.lower() in HEIF_SUFFIXES:
        return "needs the package pillow-heif"
    return "no image ending that Pillow reads"


def is_comparison(folder: Path) -> bool:
    """Whether a folder is a comparison of convattn, finished or not."""
    with contextlib.suppress(OSError):
        if (folder / PREPARING).is_file() or (folder / LOCK).is_file():
            return True
        return (folder / PLAN).is_file() and any((folder / name).exists() for name in ("runs", "images.json"))
    return False


def validation_as_test(listing: Listing) -> Listing:
    """The listing with its validation images as test images.

    Raises:
        DataError: there are no validation images, or there are test images already.
    """
    parts = {image.part for image in listing.found}
    if "validation" not in parts:
        raise DataError("The data have no val part, so that it cannot be the test part: leave out --val-as-test.")
    if "test" in parts:
        raise DataError("The data have a test part already, so that val cannot be it: leave out --val-as-test.")
    images = (replace(image, part="test") if image.part == "validation" else image for image in listing.found)
    return replace(listing, found=tuple(images))
