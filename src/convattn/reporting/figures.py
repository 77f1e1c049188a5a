"""The figures of the report: results in, SVG out."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, zip_longest
from typing import Any, NamedTuple

from convattn.reporting.bars import class_gain, gate_departure
from convattn.reporting.sheet import NARROW, WIDE, Sheet, colour, span, style, ticks
from convattn.reporting.text import interval, known, number, plain, short, shortened, signed


class Look(NamedTuple):
    """How a verdict is drawn: its shape says it without its colour."""

    tone: str
    marker: str
    size: float
    filled: bool


LOOKS = {
    "worth it": Look("worth", "D", 8, True),
    "not worth it": Look("not-worth", "s", 8, True),
    "cannot tell": Look("unclear", "o", 9, False),
}


def draw_all(results: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure that these results allow, by name: wide and narrow ones, or one for each variant."""
    variants, baseline = results["variants"], results["baseline"]
    places = range(len(variants))
    # what was trained elsewhere may have neither
    trained = places if all(one["curves"] for one in (baseline, *variants)) else ()
    classed = places if all(one["per_class_gain_points"] for one in variants) else ()
    with style():
        figures: dict[str, Any] = {
            "gain": {"wide": gain(results, wide=True), "narrow": gain(results, wide=False)},
            "accuracy": [curves(results, place, "validation_accuracy") for place in trained],
            "loss": [curves(results, place, "loss") for place in trained],
            "classes": [class_gain(results, place) for place in classed],
            "gates": [figure for place in places if (figure := gate_departure(variants, place))],
        }
        if any(_timed(variant) for variant in variants):
            figures["cost"] = {"wide": cost(results, wide=True), "narrow": cost(results, wide=False)}
    return figures


def gain(results: Mapping[str, Any], *, wide: bool) -> str:
    """The gain of each variant with its interval, against the zero line and the smallest gain that matters."""
    variants, smallest = results["variants"], results["setting"]["smallest_gain_points"]
    width, row, left, right = (WIDE, 48, 196, 204) if wide else (NARROW, 58, 12, 12)
    top, bottom = 32, 42
    sheet = Sheet("gain-wide" if wide else "gain-narrow", width, top + row * len(variants) + bottom)
    axes = sheet.axes(left, top, right, bottom)
    low, high = span([0.0, smallest, *_ends(variants)], margin=0.08)
    axes.set(xlim=(low, high), ylim=(len(variants) - 0.5, -0.5), yticks=[], xlabel="gain over the baseline, points")
    axes.axvspan(smallest, high, color=colour("zone"), linewidth=0, clip_on=False)
    # on a narrow sheet the numbers stand above each interval, and the lines must not run through them
    spans = [(-0.5, len(variants) - 0.5)] if wide else [(place - 0.08, place + 0.5) for place in range(len(variants))]
    for reach in spans:
        axes.plot([0, 0], reach, color=colour("ink"), linewidth=1, clip_on=False)
        axes.plot([smallest] * 2, reach, color=colour("worth"), linewidth=1.4, dashes=(4, 3), clip_on=False)
    ticks(axes.xaxis, 7 if wide else 5, sign=True)
    zero, goal = (left + (width - left - right) * (value - low) / (high - low) for value in (0.0, smallest))
    # the labels of the two lines grow away from each other and stay on the sheet; where it is narrow, on two lines
    above, below = (18, 18) if wide else (8, 23)
    sheet.text(max(zero - 4, 54), above, "baseline", size=11, ha="right", color=colour("muted"))
    sheet.text(min(goal + 4, width - 112), below, f"worth it from +{short(smallest)}", size=11, color=colour("worth"))
    for place, variant in enumerate(variants):
        _interval(axes, variant, place if wide else place + 0.16)
        (_gain_row_wide if wide else _gain_row_narrow)(sheet, variant, top + row * (place + 0.5))
    told = "; ".join(f"{plain(variant['name'])} {_gain_words(variant)}, {variant['verdict']}" for variant in variants)
    return sheet.svg(f"Gain over the baseline in percentage points, with intervals: {told}.")


def _gain_words(variant: Mapping[str, Any]) -> str:
    ends = variant["interval95"]
    return signed(variant["gain_points"]) + (f" ({interval(ends)})" if ends else "")


def _gain_row_wide(sheet: Sheet, variant: Mapping[str, Any], middle: float) -> None:
    numbers = sheet.width - 192
    sheet.text(0, middle - 9, shortened(variant["name"], 20), size=13, weight="bold")
    sheet.text(0, middle + 9, shortened(variant["title"], 29), size=11, color=colour("muted"))
    sheet.text(numbers, middle - 9, _gain_words(variant), size=12)
    sheet.text(numbers, middle + 9, variant["verdict"], size=12, color=colour(LOOKS[variant["verdict"]].tone))


def _gain_row_narrow(sheet: Sheet, variant: Mapping[str, Any], middle: float) -> None:
    sheet.text(0, middle - 15, shortened(variant["name"], 18), size=13, weight="bold")
    sheet.text(sheet.width, middle - 15, _gain_words(variant), size=12, ha="right")


def cost(results: Mapping[str, Any], *, wide: bool) -> str:
    """Gain against the time of a training step, beside the baseline at no gain for no cost."""
    measured = [variant for variant in results["variants"] if _timed(variant)]
    ratios = [variant["latency"]["train_step_ratio"] for variant in measured]
    left, top, right, bottom = 52, 12, 12, 44
    sheet = Sheet("cost-wide" if wide else "cost-narrow", WIDE if wide else NARROW, 360 if wide else 320)
    axes = sheet.axes(left, top, right, bottom)
    slowest, fastest = (pick([1.0, *(ratio[end] for ratio in ratios)]) for pick, end in ((max, "high"), (min, "low")))
    # room on the right for the names of the rightmost points
    low, high = span([fastest, slowest + (slowest - fastest) * (0.12 if wide else 0.25)], margin=0.05)
    bottom_end, top_end = span([0.0, *_ends(measured)], margin=0.08)
    axes.set(xlim=(low, high), ylim=(bottom_end, top_end))
    axes.set(xlabel="time of a training step, times the baseline's", ylabel="gain over the baseline, points")
    axes.grid(clip_on=False)
    axes.axhline(0, color=colour("muted"), linewidth=1, clip_on=False)
    axes.axvline(1, color=colour("muted"), linewidth=1, clip_on=False)
    ticks(axes.xaxis, 7 if wide else 4)
    ticks(axes.yaxis, 6, sign=True)
    _mark(axes, 1.0, 0.0, Look("muted", "+", 11, True))
    points = [(1.0, 0.0, "baseline")]
    for variant, ratio in zip(measured, ratios, strict=True):
        x, y, look = ratio["median"], variant["gain_points"], LOOKS[variant["verdict"]]
        axes.plot((ratio["low"], ratio["high"]), (y, y), color=colour(look.tone), linewidth=1.6, clip_on=False)
        if variant["interval95"]:
            axes.plot((x, x), variant["interval95"], color=colour(look.tone), linewidth=1.6, clip_on=False)
        _mark(axes, x, y, look)
        points.append((x, y, shortened(variant["name"], 16)))
    per_pixel = (high - low) / (sheet.width - left - right), (top_end - bottom_end) / (sheet.height - top - bottom)
    _name_points(axes, points, *per_pixel)
    told = "; ".join(
        f"{plain(variant['name'])} {number(ratio['median'])} times, {signed(variant['gain_points'])} points"
        for variant, ratio in zip(measured, ratios, strict=True)
    )
    return sheet.svg(f"Time of a training step against gain: {told}.")


def _timed(variant: Mapping[str, Any]) -> bool:
    return "train_step_ratio" in (variant["latency"] or {})


def _name_points(axes: Any, points: Sequence[tuple[float, float, str]], across: float, up: float) -> None:
    """Names beside their points, a little higher than their own bars, moved apart where they would meet.

    `across` and `up` are the lengths of a pixel on the two axes.
    """
    edge = axes.get_xlim()[1] / across
    boxes, sides = [], []
    for x, y, name in points:
        width = 14.0 + 8 * len(name)
        sides.append(1 if x / across + width <= edge else -1)
        boxes.append((x / across - (width if sides[-1] < 0 else 0.0), y / up + 9, width))
    for (x, y, name), side, box, height in zip(points, sides, boxes, _apart(boxes, 15), strict=True):
        end = x + 10 * side * across
        if abs(height - box[1]) > 4:
            axes.plot((x, end), (y, height * up), color=colour("muted"), linewidth=0.7, clip_on=False)
        axes.text(end, height * up, name, size=12, va="center", ha="left" if side > 0 else "right")


def _apart(boxes: Sequence[tuple[float, float, float]], line: float) -> list[float]:
    """Heights for boxes (left, height, width) of one line each, such that none lies on another."""
    heights = [height for _, height, _ in boxes]
    order = sorted(range(len(boxes)), key=lambda place: (heights[place], place))
    # a handful of labels comes to rest in far fewer rounds
    for _ in range(100):
        for below, above in combinations(order, 2):
            (left, _, width), (other, _, other_width) = boxes[below], boxes[above]
            overlap = line - abs(heights[above] - heights[below])
            if overlap > 0 and left < other + other_width and other < left + width:
                heights[below] -= overlap / 2
                heights[above] += overlap / 2
    return heights


def curves(results: Mapping[str, Any], place: int, key: str) -> str:
    """One variant beside the baseline, epoch by epoch: a thin line for each seed, a bold one for their mean."""
    variant, baseline = results["variants"][place], results["baseline"]
    everything = [run[key] for one in (baseline, *results["variants"]) for run in one["curves"]]
    epochs = max((len(line) for line in everything), default=0)
    # at the start every network is far off; what tells two of them apart comes later
    low, high = span([value for line in everything for value in line[epochs // 4 :]], margin=0.05)
    sheet = Sheet(f"{key.replace('_', '-')}-{place}", NARROW, 210)
    axes = sheet.axes(40, 34, 8, 40)
    axes.set(xlim=(1, epochs) if epochs > 1 else (0.5, 1.5), xlabel="epoch")
    axes.set_ylim(low, high)
    axes.grid(axis="y", clip_on=False)
    ticks(axes.xaxis, 6, whole=True)
    ticks(axes.yaxis, 5)
    for one, tone, dashes in ((baseline, "muted", (3, 1.5)), (variant, "accent", (None, None))):
        lines = [[value if known(value) else math.nan for value in run[key]] for run in one["curves"]]
        look: dict[str, Any] = {"color": colour(tone), "marker": "o" if epochs == 1 else "", "clip_on": False}
        for line in lines:
            axes.plot(*_within(line, low, high), linewidth=0.8, alpha=0.5, **look)
        axes.plot(*_within(list(_mean(lines)), low, high), linewidth=2.2, dashes=dashes, **look)
        if key == "validation_accuracy":
            _chosen_epochs(axes, one["curves"], tone, low, hollow=one is baseline)
    sheet.text(0, 12, shortened(variant["name"], 36), size=13, weight="bold")
    what = "validation accuracy" if key == "validation_accuracy" else "training loss"
    return sheet.svg(f"{plain(variant['name'])} beside the baseline, {what} by epoch.")


def _chosen_epochs(axes: Any, runs: Iterable[Mapping[str, Any]], tone: str, low: float, *, hollow: bool) -> None:
    for run in runs:
        epoch, line = run["chosen_epoch"], run["validation_accuracy"]
        if epoch is not None and 1 <= epoch <= len(line) and known(line[epoch - 1]) and line[epoch - 1] >= low:
            _mark(axes, epoch, line[epoch - 1], Look(tone, "s" if hollow else "o", 4.5, not hollow))


def _within(line: Sequence[float], low: float, high: float) -> Iterator[Sequence[float]]:
    """A curve as epochs and values, cut where it leaves the axes."""
    inside = [low <= value <= high for value in line]
    points: list[tuple[float, float]] = []
    for place, value in enumerate(line):
        points.append((place + 1, value if inside[place] else math.nan))
        if place + 1 < len(line) and inside[place] != inside[place + 1]:
            after = line[place + 1]
            end = low if min(value, after) < low else high
            points.append((place + 1 + (end - value) / (after - value), end))
    return zip(*points, strict=True)


def _mean(lines: Sequence[Sequence[float]]) -> Iterator[float]:
    for values in zip_longest(*lines, fillvalue=math.nan):
        finite = [value for value in values if math.isfinite(value)]
        yield sum(finite) / len(finite) if finite else math.nan


def _interval(axes: Any, variant: Mapping[str, Any], y: float) -> None:
    look, ends = LOOKS[variant["verdict"]], variant["interval95"]
    if ends is not None:
        axes.plot(ends, (y, y), color=colour(look.tone), linewidth=2, marker="|", markersize=9, clip_on=False)
    _mark(axes, variant["gain_points"], y, look)


def _mark(axes: Any, x: float, y: float, look: Look) -> None:
    tone = colour(look.tone)
    axes.plot(
        (x,),
        (y,),
        marker=look.marker,
        markersize=look.size,
        markeredgewidth=look.size / 5,
        markeredgecolor=tone,
        markerfacecolor=tone if look.filled else colour("page"),
        linestyle="none",
        clip_on=False,
        zorder=5,
    )


def _ends(variants: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    """Everything that an axis of gains has to show."""
    for variant in variants:
        yield variant["gain_points"]
        yield from variant["interval95"] or ()
