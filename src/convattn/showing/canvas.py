"""What all figures share: a sheet measured in inches, its title, and a colour scale that does not blow up noise."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convattn.checks import extra
from convattn.showing.watching import Seen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS = 120
# of a title, and the margin around everything, in inches
TITLE, MARGIN = 0.85, 0.2
MUTED, RULE = "#5b6470", "#c4cad1"
# gates closer together than this are drawn as the same colour
LEAST = 0.02


@dataclass(frozen=True)
class Scale:
    """A range of colours: around `centre` where it has two directions."""

    low: float
    high: float
    centre: float | None

    @property
    def mappable(self) -> Any:
        """Values to colours."""
        norm = extra("matplotlib.colors", "convattn show").Normalize(self.low, self.high)
        colours = "viridis" if self.centre is None else "coolwarm"
        return extra("matplotlib.cm", "convattn show").ScalarMappable(norm, colours)


def scale(arrays: Sequence[NDArray[Any]], centre: float, least: float) -> Scale:
    """The range of all values together, from their 1st to their 99th percentile and at least `least` long.

    Where values lie on both sides of `centre`, it is symmetric around it.
    """
    values = np.concatenate([array.ravel() for array in arrays])
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (1, 99)) if len(values) else (centre, centre)
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    if not low < centre < high:
        return Scale(float(low), float(high), None)
    reach = float(max(centre - low, high - centre))
    return Scale(centre - reach, centre + reach, centre)


class Sheet:
    """A figure whose parts are placed in inches from its top left corner, below its title."""

    def __init__(self, width: float, height: float, title: str, *notes: str) -> None:
        self.width, self.height = width, height + TITLE
        figure = extra("matplotlib.figure", "convattn show").Figure
        self.figure: Figure = figure(figsize=(self.width, self.height), dpi=DOTS, facecolor="white")
        self.pictures: Axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        self.pictures.set_axis_off()
        self.pictures.set_autoscale_on(False)
        self._line(0.22, title, 12, 0.66, weight="bold")
        for line, note in enumerate(notes):
            self._line(0.47 + 0.18 * line, note, 9, 0.57, color=MUTED)

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """Axes with a frame of this size at this place."""
        bottom = self.height - TITLE - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes: Axes = self.figure.add_axes(box)
        axes.spines[:].set_color(RULE)
        axes.tick_params(color=RULE, labelcolor=MUTED, labelsize=8, length=3)
        return axes

    def picture(self, pixels: NDArray[Any], left: float, top: float, width: float, height: float) -> None:
        """An image in a frame; all of them on one invisible pair of axes, since hundreds of axes take seconds."""
        box = (left, left + width, top + TITLE + height, top + TITLE)
        self.pictures.imshow(pixels, extent=box, aspect="auto", interpolation="nearest")
        xs, ys = (box[0], box[1], box[1], box[0], box[0]), (box[2], box[2], box[3], box[3], box[2])
        self.pictures.plot(xs, ys, color=RULE, linewidth=0.8)

    def text(self, left: float, top: float, words: str, **look: Any) -> None:
        """Words, whose left end is at this place unless told otherwise."""
        look = {"va": "center", **look}
        self.figure.text(left / self.width, 1 - (top + TITLE) / self.height, words, **look)

    def _line(self, top: float, words: str, size: float, letter: float, **look: Any) -> None:
        """A line above everything, cut to the width of the sheet; letters are about `letter` times their size wide."""
        fits = int((self.width - 2 * MARGIN) * 72 / (size * letter))
        self.text(MARGIN, top - TITLE, shortened(words, fits), size=size, **look)

    def colour_bar(self, colours: Scale, left: float, top: float, height: float, label: str) -> None:
        """The colours of a scale and their values."""
        axes = self.axes(left, top, 0.14, height)
        bar = self.figure.colorbar(colours.mappable, cax=axes, extend="both", extendfrac=0.03)
        bar.outline.set_edgecolor(RULE)
        axes.tick_params(color=RULE, labelcolor=MUTED, labelsize=8, length=3)
        bar.set_label(label, size=8, color=MUTED)

    def save(self, path: Path) -> Path:
        """Write a PNG."""
        self.figure.savefig(path, format="png")
        return path


@contextmanager
def style() -> Iterator[None]:
    """Draw in the same style whatever the user's Matplotlib settings are, and leave them as they were."""
    matplotlib = extra("matplotlib", "convattn show")
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        # a class may be called "$5 and $10"
        matplotlib.rcParams["text.parse_math"] = False
        # a box for a letter that the font lacks is no reason to stop
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield


def predicted(seen: Seen, place: int) -> str:
    """The class that the network sees in an image, and how sure it is."""
    best = int(seen.predictions[place].argmax())
    return f"{shortened(seen.about['classes'][best], 20)} ({seen.predictions[place, best]:.1%})"


def origin(seen: Seen) -> str:
    """Which network a figure shows."""
    return f"{seen.about['variant']} on {seen.about['backbone']}, checkpoint {seen.checkpoint}"


def shortened(words: str, most: int) -> str:
    """Words of at most that many letters, the middle left out where they are longer."""
    if len(words) <= most:
        return words
    first = most // 2
    return f"{words[:first]}…{words[len(words) - (most - first - 1) :]}"
