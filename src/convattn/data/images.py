"""Images decoded once, to one array of bytes on disk that all runs share."""

import contextlib
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convattn import checks, files
from convattn.data.decoding import Deep, Range, Scale, decode_file, pillow, side_of
from convattn.data.listing import Found, LeftOut, Listing
from convattn.errors import DamagedFile, DataError

ARRAY, INDEX = "images.npy", "images.json"
# up to here images are padded before they are cropped at random; above, stored with a margin to crop from
SMALL = 64
# the customary margin: 256 pixels stored for 224 used
MARGIN = 256 / 224
NO_PIXELS = np.empty((0, 0, 0, 3), dtype=np.uint8)
# images that are decoded before the next ones are begun, so that memory stays small where the disk is slow
BLOCK = 1024
# files that a sentence names
EXAMPLES = 3


@dataclass(frozen=True)
class Findings:
    """What a person should know of the images before they are trained on; images are named by their paths.

    Attributes:
        notes: sentences of the listing.
        deep: the number of images with more than 8 bits a channel.
        scale: how these were brought to 8 bits; None where there is none.
        pages: the number of pages of files with several, of which the first is used.
        single_colour: images all of whose pixels are equal.
        alike: classes of two or more images, all of which are equal.
    """

    notes: tuple[str, ...] = ()
    deep: int = 0
    scale: Scale | None = None
    pages: dict[str, int] = field(default_factory=dict)
    single_colour: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Findings":
        """The findings that `dataclasses.asdict` made a dictionary of."""
        listed = {key: tuple(content[key]) for key in ("notes", "single_colour", "alike")}
        scale = None if content["scale"] is None else Scale(**content["scale"])
        return cls(**{**content, **listed, "scale": scale})

    def sentences(self, count: int) -> list[str]:
        """What there is to say of `count` images: what was done first, then what may be wrong."""
        lines = [*self.notes]
        if self.scale is not None:
            lines.append(
                f"{self.deep:,} of {count:,} images have more than 8 bits a channel: in all of them {self.scale}."
            )
        if self.pages:
            more = sum(self.pages.values()) - len(self.pages)
            lines.append(
                f"{_files(list(self.pages))} more than one page, of which the first is used: {more:,} further pages "
                f"are not."
            )
        if self.single_colour:
            lines.append(
                f"{len(self.single_colour):,} of {count:,} images are of a single colour: {_some(self.single_colour)}."
            )
        if self.alike:
            classes = "the class" if len(self.alike) == 1 else f"{len(self.alike)} classes"
            lines.append(f"All images of {classes} {_some(self.alike)} are equal.")
        return lines


@dataclass(frozen=True)
class Images:
    """Decoded images (N, S, S, 3) of bytes, with their paths, classes and parts.

    `size` is the side that networks see, at most the stored side S. `groups` has a number for each image, the same for
    those that belong together (a patient, a video); None where the data name no groups.
    """

    pixels: np.ndarray
    paths: tuple[str, ...]
    labels: np.ndarray
    parts: tuple[str, ...]
    classes: tuple[str, ...]
    size: int
    left_out: tuple[LeftOut, ...]
    groups: np.ndarray | None = None
    findings: Findings = Findings()

    @classmethod
    def load(cls, folder: Path, *, verify: bool = False) -> "Images":
        """The images that `decode` wrote to a folder; without pixels if the array has been removed since.

        Args:
            folder: where they are.
            verify: read all pixels once, and compare them with what was written.

        Raises:
            DamagedFile: a file is missing, or not what was written.
        """
        index = files.read_json(folder / INDEX)
        if index is None:
            raise DamagedFile(f"{folder / INDEX} is missing.")
        pixels = _load_pixels(folder / ARRAY, (index["places"], index["side"], index["side"], 3))
        # files left out leave room at the end
        pixels = pixels[: len(index["paths"])]
        if verify and len(pixels) and _digest(_digests(pixels)) != index["digest"]:
            raise DamagedFile(f"{folder / ARRAY} is damaged (its checksum is wrong).")
        return cls(
            pixels=pixels,
            paths=tuple(index["paths"]),
            labels=np.array(index["labels"], dtype=np.int64),
            parts=tuple(index["parts"]),
            classes=tuple(index["classes"]),
            size=index["size"],
            left_out=tuple(LeftOut(**file) for file in index["left_out"]),
            groups=None if index["groups"] is None else np.array(index["groups"], dtype=np.int64),
            findings=Findings.of(index["findings"]),
        )


def stored_size(size: int) -> int:
    """The side in pixels at which images are stored that networks see at `size`."""
    return size if size <= SMALL else round(size * MARGIN)


def array_bytes(count: int, size: int) -> int:
    """The bytes of the array of so many images that networks see at `size`."""
    return count * stored_size(size) ** 2 * 3


def read_image(path: Path, size: int, scale: Scale | None = None) -> np.ndarray:
    """One image file as a network sees it: (size, size, 3) bytes, the shorter side scaled, the centre cut out.

    Args:
        path: the file.
        size: the side in pixels.
        scale: of images with more than 8 bits, that of the data the network was trained on; by default the image's own.

    Raises:
        DataError: no such file, or one that cannot be decoded.
    """
    margin = (stored_size(size) - size) // 2
    image = decode_file(path).image
    if isinstance(image, Deep):
        image = image.pixels(scale or Scale.of([image.range]))
    return _fitted(image, stored_size(size))[margin : margin + size, margin : margin + size]


def decode(
    listing: Listing,
    folder: Path,
    *,
    image_size: int | None,
    wanted_size: int | None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Images:
    """Decode all images of a listing into a folder, and return them.

    Files that cannot be decoded are left out and named in the result.

    Args:
        listing: classes and files.
        folder: where the array goes.
        image_size: the side in pixels that networks see; None for `wanted_size`, or the images' own if that is smaller.
        wanted_size: the side that the network was made for, if any.
        progress: called with the number of images done and of all.

    Raises:
        DataError: no image of a given part can be decoded.
        OSError: there is no room for the array.
    """
    size = image_size or default_size(listing, wanted_size)
    side, places = stored_size(size), max(len(listing.found), 1)
    partial = files.partial_path(folder / ARRAY)
    try:
        pixels = _reserved(partial, (places, side, side, 3))
        written = _write_pixels(listing, pixels, side, progress)
        _check_parts_kept(listing, written)
        digests = _digests(pixels[: len(written.kept)])
        pixels.flush()
        index = {
            "paths": [image.path for image in written.kept],
            "labels": [image.label for image in written.kept],
            "parts": [image.part for image in written.kept],
            "classes": listing.classes,
            "size": size,
            "side": side,
            "places": places,
            "digest": _digest(digests),
            "left_out": [asdict(file) for file in (*listing.left_out, *written.left_out)],
            "groups": _numbered([image.group for image in written.kept]),
            "findings": asdict(_findings(listing, written, pixels, digests)),
        }
        del pixels
        files.replace(partial, folder / ARRAY)
    finally:
        partial.unlink(missing_ok=True)
    files.write_json(folder / INDEX, index)
    return Images.load(folder)


def default_size(listing: Listing, wanted: int | None) -> int:
    """The side in pixels that networks see: what one wants, or the images' own if that is smaller."""
    own = _typical_side(listing)
    # without a wish of the network, the size of customary training
    return min(own, wanted or 224)


class _Fitted(NamedTuple):
    """An image as it is stored, or the range of one that is still to be scaled; and the pages of its file."""

    image: np.ndarray | Range
    pages: int = 1


@dataclass
class _Written:
    """The images that are in the array, in its order; those that are not; what was seen of deep ones and of pages."""

    kept: list[Found] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    ranges: dict[int, Range] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)

    @property
    def scale(self) -> Scale | None:
        return Scale.of(self.ranges.values()) if self.ranges else None


def _reserved(path: Path, shape: tuple[int, ...]) -> Any:
    """A new array of bytes on disk, whose whole room is taken."""
    header = io.BytesIO()
    about = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype=np.uint8)) | {"shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    files.reserve(path, len(header.getvalue()) + math.prod(shape))
    with path.open("r+b") as file:
        file.write(header.getvalue())
    return np.lib.format.open_memmap(path, mode="r+")


def _load_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        pixels = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return NO_PIXELS
    # EOFError: an empty file
    except (ValueError, EOFError, SyntaxError, OSError) as error:
        raise DamagedFile(f"{path} is damaged ({checks.reason(error)}).") from error
    if pixels.dtype != np.uint8 or pixels.shape != shape:
        raise DamagedFile(f"{path} is damaged (it is of another shape).")
    return pixels  # type: ignore[no-any-return]


def _write_pixels(listing: Listing, pixels: Any, side: int, progress: Callable[[int, int], None]) -> _Written:
    """Write what can be decoded to the array. Deep images come last: only then it is known how they are scaled."""
    written, count = _Written(), len(listing.found)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def decoded(indices: range) -> Iterator[_Fitted | LeftOut]:
            for start in range(0, len(indices), BLOCK):
                yield from pool.map(lambda index: _decoded(listing, index, side), indices[start : start + BLOCK])

        for index, image in enumerate(decoded(range(count))):
            _take(written, listing.found[index], image, pixels)
            progress(index + 1, count)
        scale = written.scale
        if scale is not None:
            places = list(written.ranges)
            for start in range(0, len(places), BLOCK):
                block = places[start : start + BLOCK]
                scaled = pool.map(lambda place: _scaled(listing, written.kept[place], side, scale), block)
                for place, values in zip(block, scaled, strict=True):
                    pixels[place] = values
    return written


def _take(written: _Written, source: Found, image: _Fitted | LeftOut, pixels: Any) -> None:
    """Note an image that was decoded, and write it unless it is deep."""
    if isinstance(image, LeftOut):
        written.left_out.append(image)
        return
    place = len(written.kept)
    if isinstance(image.image, Range):
        written.ranges[place] = image.image
    else:
        pixels[place] = image.image
    if image.pages > 1:
        written.pages[source.path] = image.pages
    written.kept.append(source)


def _decoded(listing: Listing, index: int, side: int) -> _Fitted | LeftOut:
    """An image of the listing, fitted to its place unless it is deep, or why there is none."""
    if listing.pixels is not None:
        return _Fitted(_fitted(listing.pixels[index], side))
    path = listing.found[index].path
    try:
        decoded = decode_file((listing.root or Path()) / path, path)
    except DataError as error:
        # without the machine's own path, which the reason may repeat
        return LeftOut(path, f"{error.__cause__ or error}".replace(f"{listing.root}/", ""))
    if isinstance(decoded.image, Deep):
        # decoded again once all ranges are known, rather than kept
        return _Fitted(decoded.image.range, decoded.pages)
    return _Fitted(_fitted(decoded.image, side), decoded.pages)


def _scaled(listing: Listing, source: Found, side: int, scale: Scale) -> np.ndarray:
    image = decode_file((listing.root or Path()) / source.path, source.path).image
    if not isinstance(image, Deep):
        raise DataError(f"{source.path} changed while it was read.")
    return _fitted(image.pixels(scale), side)


def _check_parts_kept(listing: Listing, written: _Written) -> None:
    """Whether every given part has an image left: one without would be cut off another, and nobody would know."""
    part_of = {image.path: image.part for image in listing.found}
    lost = set(part_of.values()) - {image.part for image in written.kept} - {""}
    for file in written.left_out:
        if part_of[file.path] in lost:
            raise DataError(f"No {part_of[file.path]} image can be decoded: {file.path}: {file.reason}.")


def _findings(listing: Listing, written: _Written, pixels: Any, digests: list[bytes]) -> Findings:
    kept = written.kept
    single = tuple(file.path for file, image in zip(kept, pixels, strict=False) if (image == image[:1, :1]).all())
    by_class: dict[int, list[bytes]] = {}
    for image, digest in zip(kept, digests, strict=True):
        by_class.setdefault(image.label, []).append(digest)
    alike = tuple(
        listing.classes[label] for label, same in sorted(by_class.items()) if len(same) > 1 and len(set(same)) == 1
    )
    return Findings(listing.notes, len(written.ranges), written.scale, written.pages, single, alike)


def _digests(pixels: np.ndarray) -> list[bytes]:
    """A hash of each image."""
    return [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in pixels]


def _digest(digests: list[bytes]) -> str:
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _numbered(groups: list[str | None]) -> list[int] | None:
    """A number for each name, the same for the same name; None without names."""
    if None in groups or not groups:
        return None
    return np.unique(np.array(groups), return_inverse=True)[1].tolist()  # type: ignore[no-any-return]


def _fitted(image: np.ndarray, side: int) -> np.ndarray:
    """The shorter side scaled to `side`, the centre of the longer one cut out: (side, side, 3) bytes."""
    height, width = image.shape[:2]
    if min(width, height) != side:
        scale = side / min(width, height)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
        scaled = pillow().fromarray(image).resize((width, height), pillow().Resampling.BILINEAR)
        image = np.asarray(scaled, dtype=np.uint8)
    left, top = (width - side) // 2, (height - side) // 2
    return image[top : top + side, left : left + side]


def _typical_side(listing: Listing) -> int:
    """The median shorter side of about 200 images, from their headers."""
    if listing.pixels is not None:
        return int(listing.pixels.shape[1])
    sides = []
    for file in listing.found[:: max(1, len(listing.found) // 200)]:
        # a broken file is reported when it is decoded
        with contextlib.suppress(Exception):
            sides.append(side_of((listing.root or Path()) / file.path))
    return int(np.median(sides)) if sides else 1


def _files(paths: list[str]) -> str:
    if len(paths) == 1:
        return f"{checks.shown(paths[0])} has"
    return f"{len(paths):,} files ({_some(paths)}) have"


def _some(names: "list[str] | tuple[str, ...]") -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - EXAMPLES:,} more" if len(names) > EXAMPLES else ""
    return ", ".join(checks.shown(name) for name in names[:EXAMPLES]) + more
