"""What a source lists before any image is opened: files, their classes, parts and groups."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class LeftOut:
    """A file that is not used, and why."""

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
    """The classes and image files of a source, both sorted; `root` is None where `pixels` (N, H, W, 3) are at hand."""

    classes: tuple[str, ...]
    found: tuple[Found, ...]
    root: Path | None = None
    pixels: np.ndarray | None = None
