"""The figures: what varies over positions over an image, what varies over channels as bars, feature maps as a grid."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convattn.showing.canvas import LEAST, MARGIN, MUTED, RULE, Scale, Sheet, origin, predicted, scale, shortened
from convattn.showing.summary import UPDATE, gates_of, output
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
    """The gates of every site that vary over positions, in the mean over channels, laid over one image."""
    note = "Colours: 1st to 99th percentile of all sites and images, shaded by the image" + _unchanged(seen)
    planes = {label: plane[place] for label, plane in _gate_planes(seen).items()}
    return _over_image(seen, place, planes, colours, ("Spatial gates", note, "gate"))


def spatial_scale(seen: Seen) -> Scale | None:
    """One range of colours for what `spatial` draws of all sites and images; None where there is nothing."""
    planes = [*_gate_planes(seen).values()]
    return scale(planes, 1.0, LEAST) if planes else None


def update_map(seen: Seen, place: int, colours: Scale) -> Sheet:
    """What every site adds, its root mean square over channels at each position, laid over one image."""
    note = "Colours: root mean square of what is added over that of the map, shaded by the image"
    planes = {label: plane[place] for label, plane in _update_planes(seen).items()}
    return _over_image(seen, place, planes, colours, ("Updates", note, "added / map"))


def update_scale(seen: Seen) -> Scale | None:
    """One range of colours for what `update_map` draws of all sites and images; None where there is nothing."""
    planes = [*_update_planes(seen).values()]
    return scale(planes, 0.0, LEAST) if planes else None


def _gate_planes(seen: Seen) -> dict[str, Array]:
    """The gates that vary over positions (B, H, W), by site and by what they vary over, in the mean over channels."""
    return {
        site if kind == "spatial" else f"{site} {kind}": _plane(gate.mean(axis=1))
        for site, arrays in seen.sites.items()
        for kind, gate in gates_of(arrays).items()
        # a map of a single position has spatial gates too
        if math.prod(gate.shape[2:]) > 1 or kind == "spatial"
    }


def _update_planes(seen: Seen) -> dict[str, Array]:
    return {
        site: _plane(np.sqrt((arrays[UPDATE] ** 2).mean(axis=1)))
        for site, arrays in seen.sites.items()
        if UPDATE in arrays and math.prod(arrays[UPDATE].shape[2:]) > 1
    }


def _plane(values: Array) -> Array:
    """Values (B, *spatial) as (B, H, W): a row of what has one dimension, the mean over the first of three."""
    if values.ndim == 2:
        return values[:, None]
    return values.mean(axis=1) if values.ndim == 4 else values


def _over_image(seen: Seen, place: int, planes: dict[str, Array], colours: Scale, words: tuple[str, str, str]) -> Sheet:
    """A picture for each plane, laid over the image; `words` are the title, a note and the name of the unit."""
    title, note, unit = words
    cell, gap, label = 2.0, 0.2, 0.52
    # at least three, as wide as a title
    columns = max(3, min(5, len(planes) + 1))
    rows = math.ceil((len(planes) + 1) / columns)
    width = 2 * MARGIN + columns * (cell + gap) + 0.85
    sheet = Sheet(width, rows * (cell + label) + MARGIN, _title(seen, place, title), origin(seen), note)
    image = seen.images[place]
    for position, (site, plane) in enumerate([("", None), *planes.items()]):
        left = MARGIN + position % columns * (cell + gap)
        top = position // columns * (cell + label) + label - 0.1
        if plane is None:
            sheet.picture(image, left, top, cell, cell)
            sheet.text(left, top - 0.28, "the image as the network sees it", size=9)
            sheet.text(left, top - 0.11, f"{image.shape[1]} × {image.shape[0]} pixels", size=8, color=MUTED)
            continue
        sheet.picture(_overlay(image, plane, colours), left, top, cell, cell)
        sheet.text(left, top - 0.28, f"{shortened(site, 19)}  ({plane.shape[1]} × {plane.shape[0]})", size=9)
        sheet.text(left, top - 0.11, _described(plane), size=8, color=MUTED)
    height = min(rows * (cell + label) - label, 2 * cell + label)
    sheet.colour_bar(colours, width - 0.95, label - 0.1, height, unit)
    return sheet


def channel(seen: Seen) -> Sheet | None:
    """The gates of every site that vary over channels: the mean over the images, whiskers from least to largest."""
    gates = {
        (site, "" if kind == "channel" else f" {kind}"): _vector(gate)
        for site, arrays in seen.sites.items()
        for kind, gate in gates_of(arrays).items()
        # a map of a single channel has channel gates too
        if gate.shape[1] > 1 or kind == "channel"
    }
    note = BARS_NOTE + _unchanged(seen)
    return _in_bars(seen, gates, ("Channel gates", note), 1.0 if seen.blended else 0.0, seen.blended)


def update(seen: Seen) -> Sheet | None:
    """What every site adds where it varies over channels, in the mean over positions, drawn as `channel` does."""
    vectors = {
        (site, ""): _vector(arrays[UPDATE])
        for site, arrays in seen.sites.items()
        if UPDATE in arrays and arrays[UPDATE].shape[1] > 1
    }
    note = f"{BARS_NOTE}; 1 is the root mean square of the map"
    return _in_bars(seen, vectors, ("What is added to each channel", note), 0.0, True)


def _vector(values: Array) -> Array:
    """Values (B, C, *spatial) as (B, C), the mean over positions."""
    return np.asarray(values.reshape(*values.shape[:2], -1).mean(axis=2))


def _in_bars(
    seen: Seen, vectors: dict[tuple[str, str], Array], words: tuple[str, str], base: float, two_directions: bool
) -> Sheet | None:
    """Bars from `base` for each site and what is said of it; in two colours where values lie on both sides."""
    if not vectors:
        return None
    low, high = _reach([*vectors.values()], [base])
    columns, panel = (1, 8.0) if len(vectors) == 1 else (2, 5.6)
    height, label, tick = 1.25, 0.5, 0.55
    rows = math.ceil(len(vectors) / columns)
    width = 2 * MARGIN + columns * (panel + tick)
    title, note = words
    sheet = Sheet(width, rows * (height + label) + 0.45, _title(seen, None, title), origin(seen), note)
    for position, ((site, kind), vector) in enumerate(vectors.items()):
        # down the columns, in the order of the network
        left = MARGIN + tick + position // rows * (panel + tick)
        top = label - 0.15 + position % rows * (height + label)
        axes = sheet.axes(left, top, panel - 0.1, height)
        axes.set_ylim(low, high)
        _bars(axes, vector, base, above=AMPLIFIED if two_directions else DAMPED)
        sheet.text(left, top - 0.13, f"{shortened(site + kind, 30)}{_strength(seen.sites[site])}", size=9)
        sheet.text(left + panel - 0.1, top - 0.13, _described(vector.mean(axis=0)), size=8, color=MUTED, ha="right")
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
