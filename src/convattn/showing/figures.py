"""The figures: spatial gates over an image, channel gates as bars, feature maps as a grid."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convattn.showing.canvas import LEAST, MARGIN, MUTED, RULE, Scale, Sheet, origin, predicted, scale, shortened
from convattn.showing.summary import output
from convattn.showing.watching import Array, Seen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# a gate whose values lie closer together than this is flat
FLAT = 0.01
# how bright a colour stays where the image is black
DARKEST = 0.65
# maps shown of a layer, in a square grid
MOST = 64
# from this many channels on, bars would be thinner than the gaps between them
BARS = 64
# images whose predictions a title about all of them tells
NAMED = 3
BARS_NOTE = "Bars: each channel's mean over the images; whiskers, or grey: from the least to the largest"
INK, DAMPED, AMPLIFIED = "#1f2933", "#3b6fb6", "#c2553d"


def spatial(seen: Seen, place: int, colours: Scale) -> Sheet:
    """The spatial gates of every site, laid over one image."""
    gates = {site: arrays["spatial"][place, 0] for site, arrays in seen.sites.items() if "spatial" in arrays}
    cell, gap, label = 2.0, 0.2, 0.52
    # at least three, as wide as a title
    columns = max(3, min(5, len(gates) + 1))
    rows = math.ceil((len(gates) + 1) / columns)
    width = 2 * MARGIN + columns * (cell + gap) + 0.85
    note = "Colours: 1st to 99th percentile of all sites and images, shaded by the image" + _unchanged(seen)
    sheet = Sheet(width, rows * (cell + label) + MARGIN, _title(seen, place, "Spatial gates"), origin(seen), note)
    image = seen.images[place]
    for position, (site, gate) in enumerate([("", None), *gates.items()]):
        left = MARGIN + position % columns * (cell + gap)
        top = position // columns * (cell + label) + label - 0.1
        if gate is None:
            sheet.picture(image, left, top, cell, cell)
            sheet.text(left, top - 0.28, "the image as the network sees it", size=9)
            sheet.text(left, top - 0.11, f"{image.shape[1]} × {image.shape[0]} pixels", size=8, color=MUTED)
            continue
        sheet.picture(_overlay(image, gate, colours), left, top, cell, cell)
        sheet.text(left, top - 0.28, f"{shortened(site, 19)}  ({gate.shape[1]} × {gate.shape[0]})", size=9)
        sheet.text(left, top - 0.11, _described(gate), size=8, color=MUTED)
    height = min(rows * (cell + label) - label, 2 * cell + label)
    sheet.colour_bar(colours, width - 0.95, label - 0.1, height, "gate")
    return sheet


def spatial_scale(seen: Seen) -> Scale | None:
    """One range of colours for the spatial gates of all sites and images; None where there are none."""
    gates = [arrays["spatial"] for arrays in seen.sites.values() if "spatial" in arrays]
    return scale(gates, 1.0, LEAST) if gates else None


def channel(seen: Seen) -> Sheet | None:
    """The channel gates of every site: the mean over the images, and whiskers from the least to the largest."""
    gates = {site: arrays["channel"][:, :, 0, 0] for site, arrays in seen.sites.items() if "channel" in arrays}
    if not gates:
        return None
    ends = [1.0] if seen.blended else [0.0]
    low, high = _reach([*gates.values()], ends)
    columns, panel = (1, 8.0) if len(gates) == 1 else (2, 5.6)
    height, label, tick = 1.25, 0.5, 0.55
    rows = math.ceil(len(gates) / columns)
    width = 2 * MARGIN + columns * (panel + tick)
    note = BARS_NOTE + _unchanged(seen)
    sheet = Sheet(width, rows * (height + label) + 0.45, _title(seen, None, "Channel gates"), origin(seen), note)
    for position, (site, gate) in enumerate(gates.items()):
        # down the columns, in the order of the network
        left = MARGIN + tick + position // rows * (panel + tick)
        top = label - 0.15 + position % rows * (height + label)
        axes = sheet.axes(left, top, panel - 0.1, height)
        axes.set_ylim(low, high)
        if seen.blended:
            _bars(axes, gate, 1.0)
        else:
            _bars(axes, gate, 0.0, above=DAMPED)
        sheet.text(left, top - 0.13, f"{shortened(site, 30)}{_strength(seen.sites[site])}", size=9)
        sheet.text(left + panel - 0.1, top - 0.13, _described(gate.mean(axis=0)), size=8, color=MUTED, ha="right")
    return sheet


def pool(seen: Seen) -> Sheet | None:
    """What a pooling head makes of the network's own pooled vector, channel by channel."""
    heads = {site: arrays for site, arrays in seen.sites.items() if "pooled" in arrays}
    if not heads:
        return None
    panel, height, label = 8.0, 2.0, 0.5
    title = _title(seen, None, "Pooling head")
    sheet = Sheet(panel + 1.0, 2 * len(heads) * (height + label) + 0.45, title, origin(seen), BARS_NOTE)
    for position, (site, arrays) in enumerate(heads.items()):
        for row, (words, vectors) in enumerate(_vectors(arrays).items()):
            top = label - 0.15 + (2 * position + row) * (height + label)
            axes = sheet.axes(0.75, top, panel, height)
            axes.set_ylim(*_reach([vectors], [0.0]))
            _bars(axes, vectors, 0.0, above=AMPLIFIED if row else DAMPED)
            sheet.text(0.75, top - 0.13, f"{shortened(site, 30)}: {words}", size=9)
            sheet.text(0.75 + panel, top - 0.13, _described(vectors.mean(axis=0)), size=8, color=MUTED, ha="right")
    return sheet


def maps(seen: Seen, place: int) -> Sheet:
    """The feature maps of the layer for one image, as a grid."""
    if seen.maps is None or seen.layer is None:
        raise ValueError("no layer was watched")
    all_maps = seen.maps[place]
    shown_maps = all_maps[:MOST]
    colours = scale([all_maps], 0.0, 1e-6)
    count, (channels, rows, columns) = len(shown_maps), all_maps.shape
    side = math.ceil(math.sqrt(count))
    cell = max(0.85, 3.4 / side)
    tall, left, top = cell * rows / columns, 2 * MARGIN + 2.0, 0.35
    lines = math.ceil(count / side)
    width = left + side * cell + 1.0
    height = max(2.6, lines * (tall + 0.16)) + MARGIN + 0.1
    title = _title(seen, place, f"Feature maps of {shortened(seen.layer, 28)}")
    note = "Colours: 1st to 99th percentile of all channels of this image"
    sheet = Sheet(width, height, title, origin(seen), note)
    sheet.picture(seen.images[place], MARGIN, top, 2.0, 2.0)
    which = f"all {channels} channels" if channels == count else f"the first {count} of {channels} channels"
    sheet.text(MARGIN, top - 0.13, "the image as the network sees it", size=9)
    sheet.text(MARGIN, top + 2.2, f"{which},", size=9)
    sheet.text(MARGIN, top + 2.37, f"{columns} × {rows} positions", size=9)
    for number, one in enumerate(shown_maps):
        x, y = left + number % side * cell, top + number // side * (tall + 0.16)
        sheet.picture(colours.mappable.to_rgba(one), x, y, cell * 0.94, tall * 0.94)
        sheet.text(x, y - 0.07, str(number), size=7, color=MUTED)
    sheet.colour_bar(colours, width - 0.85, top, max(2.0, lines * (tall + 0.16) - 0.2), "value")
    return sheet


def _title(seen: Seen, place: int | None, what: str) -> str:
    count = len(seen.paths)
    if place is None and count > 1:
        listed = ", ".join(predicted(seen, one) for one in range(min(count, NAMED)))
        more = f" and {count - NAMED} more" if count > NAMED else ""
        return f"{what}: {count} images, predicted {listed}{more}"
    place = place or 0
    return f"{what}: {shortened(seen.paths[place].name, 28)}, predicted {predicted(seen, place)}"


def _unchanged(seen: Seen) -> str:
    return "; 1 leaves the map as it is" if seen.blended else ""


def _overlay(image: NDArray[np.uint8], gate: Array, colours: Scale) -> NDArray[np.float64]:
    """The gate in colour, darker where the image is dark; a flat gate as its mean, so that noise draws no pattern."""
    values = np.full_like(gate, gate.mean()) if np.ptp(gate) < FLAT else gate
    height, width = image.shape[:2]
    # the gate of the position that each pixel falls into
    rows, columns = (np.arange(side) * steps // side for side, steps in zip((height, width), gate.shape, strict=True))
    grey = image @ np.array([0.299, 0.587, 0.114]) / 255
    colour = colours.mappable.to_rgba(values)[rows][:, columns, :3]
    return np.asarray(colour * (DARKEST + (1 - DARKEST) * grey[..., None]))


def _described(values: Array) -> str:
    if np.ptp(values) < FLAT:
        return f"flat at {values.mean():.3f} (range {np.ptp(values):.4f})"
    return f"min {values.min():.3f}   mean {values.mean():.3f}   max {values.max():.3f}"


def _bars(axes: "Axes", values: Array, base: float, above: str = AMPLIFIED, below: str = DAMPED) -> None:
    """A bar for each channel from `base` to the mean over the images, with whiskers; a band where there are many."""
    mean, least, most = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    channels = np.arange(len(mean))
    axes.set_xlim(-0.7, len(mean) - 0.3)
    axes.locator_params(axis="x", integer=True)
    if len(mean) <= BARS:
        tones = [above if value > base else below for value in mean]
        axes.bar(channels, mean - base, bottom=base, color=tones, width=0.72)
        if len(values) > 1:
            axes.vlines(channels, least, most, color=INK, linewidth=0.8)
    else:
        for part, tone in ((mean > base, above), (mean <= base, below)):
            axes.fill_between(channels, base, np.where(part, mean, base), step="mid", color=tone, linewidth=0)
        axes.fill_between(channels, least, most, step="mid", color=INK, alpha=0.25, linewidth=0)
    axes.axhline(base, color=INK, linewidth=0.8)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)


def _reach(arrays: list[Array], ends: list[float]) -> tuple[float, float]:
    """An axis on which all finite values and the `ends` lie, and on which noise stays small."""
    values = np.concatenate([array.ravel() for array in arrays])
    values = np.append(values[np.isfinite(values)], ends)
    low, high = float(values.min()), float(values.max())
    if high - low < LEAST:
        middle = (low + high) / 2
        low, high = middle - LEAST / 2, middle + LEAST / 2
    room = 0.06 * (high - low)
    return low - room, high + room


def _vectors(arrays: dict[str, Array]) -> dict[str, Array]:
    change = output(arrays) - arrays["pooled"]
    return {"the network's own pooling": arrays["pooled"], f"change by the head{_strength(arrays)}": change}


def _strength(arrays: dict[str, Array]) -> str:
    return f", strength {arrays['strength'].item():+.3f}" if "strength" in arrays else ""
