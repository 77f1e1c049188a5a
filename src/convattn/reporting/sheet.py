"""A sheet to draw on: Matplotlib inside, and outside SVG that belongs to the page.

Colours are names of CSS variables of the page, so that a figure follows it into the dark and onto paper; fonts are the
page's; the same drawing gives the same bytes.
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from convattn.checks import extra
from convattn.reporting.text import known, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# a wide drawing for a screen or paper, a narrow one that a phone shows without making it smaller
WIDE, NARROW = 760, 328
COLOURS = ("page", "ink", "muted", "rule", "accent", "zone", "worth", "not-worth", "unclear")
# colours that stand for a variable until the SVG is written; any six digits would do, as long as nobody draws in them
_STAND_IN = {name: f"#fe01{place:02x}" for place, name in enumerate(COLOURS)}
_FRACTION = re.compile(r"-?\d+\.\d+")
_FONT_FAMILY = re.compile(r"font-family:[^;]*(;\s*|$)")
_LINK = "href"


def colour(name: str) -> str:
    """The colour to draw with, so that the page shows its variable `--name`."""
    return _STAND_IN[name]


@contextmanager
def style() -> Iterator[None]:
    """Draw in the report's own style, whatever the user's Matplotlib settings are, and leave them as they were."""
    matplotlib = extra("matplotlib", "the report")
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "convattn",
                # a class may be called "$5 and $10"
                "text.parse_math": False,
                "font.size": 11,
                "text.color": colour("ink"),
                "axes.edgecolor": colour("rule"),
                "axes.labelcolor": colour("muted"),
                "axes.labelsize": 11,
                "axes.unicode_minus": True,
                "grid.color": colour("rule"),
                "grid.linewidth": 0.6,
                "xtick.color": colour("rule"),
                "ytick.color": colour("rule"),
                "xtick.labelcolor": colour("muted"),
                "ytick.labelcolor": colour("muted"),
                "lines.solid_capstyle": "round",
            }
        )
        # the browser sets the text in fonts of its own, whatever Matplotlib's font lacks
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield


class Sheet:
    """A drawing measured in CSS pixels from its top left corner."""

    def __init__(self, name: str, width: float, height: float) -> None:
        self.name, self.width, self.height = name, width, height
        # at 72 dots an inch a point, the unit of Matplotlib's font sizes and line widths, is one pixel
        self.figure: Any = extra("matplotlib.figure", "the report").Figure(figsize=(width / 72, height / 72), dpi=72)
        self.figure.patch.set_visible(False)

    def axes(self, left: float, top: float, right: float, bottom: float) -> "Axes":
        """Axes whose frame keeps these distances from the edges of the sheet, with a bottom line only."""
        size = ((self.width - left - right) / self.width, (self.height - top - bottom) / self.height)
        axes: Axes = self.figure.add_axes((left / self.width, bottom / self.height, *size))
        axes.patch.set_visible(False)
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.tick_params(length=3, labelsize=11)
        axes.set_axisbelow(True)
        return axes

    def text(self, x: float, y: float, words: str, **look: Any) -> None:
        """Words at a place, centred on the line `y` unless told otherwise."""
        look = {"va": "center", **look}
        self.figure.text(x / self.width, 1 - y / self.height, words, **look)

    def svg(self, label: str) -> str:
        """The drawing as an `<svg>` element; `label` is what a screen reader says in its place."""
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(drawn, format="svg", metadata=nothing)
        root = ElementTree.fromstring(drawn.getvalue())
        _adopt(root, self.name)
        root.attrib = {"role": "img", "aria-label": label, "viewBox": f"0 0 {self.width:g} {self.height:g}"}
        return ElementTree.tostring(root, encoding="unicode")


def span(values: Iterable[float | None], margin: float) -> tuple[float, float]:
    """The ends of an axis that shows all these values, with a share of its length added on both sides."""
    finite = [value for value in values if known(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    room = margin * (high - low)
    return low - room, high + room


def ticks(axis: "Axis", most: int, *, sign: bool = False, whole: bool = False) -> None:
    """At most so many round numbers along an axis; with a sign where they are differences."""
    ticker = extra("matplotlib.ticker", "the report")
    axis.set_major_locator(ticker.MaxNLocator(most, steps=(1, 2, 2.5, 5, 10), integer=whole, min_n_ticks=1))
    axis.set_major_formatter(lambda value, _: ("+" if sign and value > 1e-9 else "") + short(round(value, 9)))


def _adopt(element: ElementTree.Element, name: str) -> None:
    """Make an element and all below it part of the page: no namespaces, no style sheet, no ids that could clash."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    if element.tag != "text":
        element.text = None
    element.tail = None
    for key in ("d", "x", "y", "transform"):
        if key in element.attrib:
            element.attrib[key] = " ".join(_FRACTION.sub(_rounded, element.attrib[key]).split())
    if "style" in element.attrib:
        element.attrib["style"] = _in_page_style(element.attrib["style"])
    if _LINK in element.attrib:
        element.attrib[_LINK] = f"#{name}-{element.attrib[_LINK][1:]}"
    for child in list(element):
        if child.tag.endswith("}style"):
            element.remove(child)
            continue
        _adopt(child, name)
        if "id" in child.attrib:
            # only what a <defs> holds is referred to
            if element.tag == "defs":
                child.attrib["id"] = f"{name}-{child.attrib['id']}"
            else:
                del child.attrib["id"]


def _rounded(match: re.Match[str]) -> str:
    """A hundredth of a pixel is finer than any screen, and halves the size of a curve."""
    shown = f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if shown == "-0" else shown


def _in_page_style(declarations: str) -> str:
    declarations = _FONT_FAMILY.sub("", declarations)
    for name, stand_in in _STAND_IN.items():
        declarations = declarations.replace(stand_in, f"var(--{name})")
    return declarations
