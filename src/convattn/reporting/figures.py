"""The figures of the report: results in, SVG out."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from convattn.reporting.sheet import Sheet, colour
from convattn.reporting.text import ABSENT, MINUS, number, plain, shortened, signed

WIDE, NARROW = 760, 328
# a figure of bars is read row by row up to here; beyond it, the first and the last fifteen
MOST_CLASSES = 30


class Look(NamedTuple):
    """How a verdict is drawn: its shape says it without its colour."""

    marker: str
    colour: str
    size: float
    filled: bool


LOOKS = {
    "worth it": Look("D", "worth", 8, True),
    "not worth it": Look("X", "not-worth", 9, True),
    "cannot tell": Look("o", "unclear", 8, False),
}


class Bar(NamedTuple):
    """A row of a bar figure; without a value the note stands in its place."""

    label: str
    value: float | None
    note: str = ""


def draw_all(results: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure that these results allow, by name; small multiples as a list with one for each variant."""
    variants = results["variants"]
    figures: dict[str, Any] = {"gates": [_gates(place, variants) for place in range(len(variants))]}
    if not variants:
        return figures
    figures["gain"] = {"wide": gain(results, wide=True), "narrow": gain(results, wide=False)}
    if any(variant["latency"] for variant in variants):
        figures["cost"] = {"wide": cost(results, WIDE), "narrow": cost(results, NARROW)}
    for key in ("validation_accuracy", "loss"):
        figures[key] = [curves(results, place, key) for place in range(len(variants))]
    figures["classes"] = [classes(results, place) for place in range(len(variants))]
    return figures


def gain(results: Mapping[str, Any], *, wide: bool) -> str:
    """The gain of each variant with its interval, against the zero line and the smallest gain that matters."""
    variants, smallest = results["variants"], results["setting"]["smallest_gain_points"]
    width, row, left, right = (WIDE, 46, 176, 196) if wide else (NARROW, 58, 12, 12)
    top, bottom = 30, 42
    sheet = Sheet("gain-wide" if wide else "gain-narrow", width, top + row * len(variants) + bottom)
    axes = sheet.axes(left, top, right, bottom)
    low, high = _range([0.0, smallest, *_ends(variants)], margin=0.08)
    axes.set(xlim=(low, high), ylim=(len(variants) - 0.5, -0.5), yticks=[], xlabel="gain over the baseline, points")
    axes.axvspan(smallest, high, color=colour("zone"), linewidth=0)
    axes.axvline(0, color=colour("ink"), linewidth=1)
    axes.axvline(smallest, color=colour("worth"), linewidth=1.2, dashes=(4, 3))
    _signed_ticks(axes.xaxis, 7 if wide else 5)
    _line_labels(sheet, low, high, smallest, left, width - left - right)
    for place, variant in enumerate(variants):
        middle = top + row * (place + 0.5)
        y = place if wide else place + 0.16
        _interval(axes, variant["gain_points"], y, variant["interval95"], variant["verdict"])
        numbers = signed(variant["gain_points"])
        if variant["interval95"]:
            numbers += f"  ({signed(variant['interval95'][0])} to {signed(variant['interval95'][1])})"
        name = shortened(variant["name"], 22)
        if wide:
            sheet.text(0, middle - 8, name, size=13, weight="bold")
            sheet.text(0, middle + 9, shortened(variant["title"], 28), size=11, color=colour("muted"))
            sheet.text(width - right + 14, middle - 8, numbers, size=12)
            sheet.text(width - right + 14, middle + 9, variant["verdict"], size=11, color=_tone(variant))
        else:
            sheet.text(left, middle - 14, name, size=13, weight="bold")
            sheet.text(width - right, middle - 14, numbers, size=12, ha="right")
    told = "; ".join(f"{plain(variant['name'])} {signed(variant['gain_points'])}" for variant in variants)
    return sheet.svg(f"Gain over the baseline in percentage points, with intervals: {told}.")


def cost(results: Mapping[str, Any], width: float) -> str:
    """Gain against the time of a training step, both relative to the baseline."""
    measured = [variant for variant in results["variants"] if variant["latency"]]
    wide = width == WIDE
    sheet = Sheet("cost-wide" if wide else "cost-narrow", width, 340 if wide else 300)
    axes = sheet.axes(56, 12, 24, 44)
    ratios = [variant["latency"]["train_step_ratio"] for variant in measured]
    low, high = _range([1.0, *(ratio[end] for ratio in ratios for end in ("low", "median", "high"))], margin=0.06)
    # names stand to the right of their points
    high += (high - low) * (0.16 if wide else 0.3)
    bottom, top = _range([0.0, *_ends(measured)], margin=0.08)
    axes.set(xlim=(low, high), ylim=(bottom, top))
    axes.set(xlabel="time of a training step, times the baseline's", ylabel="gain, points")
    axes.grid(axis="both")
    axes.axhline(0, color=colour("ink"), linewidth=1)
    axes.axvline(1, color=colour("ink"), linewidth=1)
    _signed_ticks(axes.yaxis, 6)
    axes.xaxis.set_major_locator(_locator(6 if wide else 4))
    points = [(1.0, 0.0, "baseline")]
    axes.plot([1], [0], marker="s", color=colour("muted"), markersize=7, linestyle="none", clip_on=False)
    for variant, ratio in zip(measured, ratios, strict=True):
        x, y, look = ratio["median"], variant["gain_points"], LOOKS[variant["verdict"]]
        axes.hlines(y, ratio["low"], ratio["high"], color=colour(look.colour), linewidth=1.6)
        if variant["interval95"]:
            axes.vlines(x, *variant["interval95"], color=colour(look.colour), linewidth=1.6)
        _mark(axes, x, y, look)
        points.append((x, y, shortened(variant["name"], 18)))
    _name_points(axes, points, (top - bottom) / (sheet.height - 56) * 15)
    told = "; ".join(
        f"{plain(variant['name'])} {number(ratio['median'])} times, {signed(variant['gain_points'])} points"
        for variant, ratio in zip(measured, ratios, strict=True)
    )
    return sheet.svg(f"Cost of a training step against gain: {told}.")


def curves(results: Mapping[str, Any], place: int, key: str) -> str:
    """One variant beside the baseline, epoch by epoch: a thin line for each seed, a bold one for their mean."""
    variant, baseline = results["variants"][place], results["baseline"]
    everything = [run[key] for one in (baseline, *results["variants"]) for run in one["curves"]]
    epochs = max((len(line) for line in everything), default=0)
    sheet = Sheet(f"{key}-{place}", NARROW, 210)
    axes = sheet.axes(44, 30, 12, 40)
    low, high = _range([value for line in everything for value in line], margin=0.05)
    axes.set(xlim=(0.5, epochs + 0.5) if epochs < 3 else (1, epochs), ylim=(low, high), xlabel="epoch")
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(_locator(6, integer=True))
    axes.yaxis.set_major_locator(_locator(5))
    for one, tone, look in ((baseline, "muted", "--"), (variant, "accent", "-")):
        lines = [[math.nan if value is None else value for value in run[key]] for run in one["curves"]]
        marker = "o" if epochs == 1 else ""
        for line in lines:
            axes.plot(range(1, len(line) + 1), line, color=colour(tone), linewidth=0.8, alpha=0.5, marker=marker)
        mean = list(_mean(lines))
        axes.plot(range(1, len(mean) + 1), mean, look, color=colour(tone), linewidth=2.2, marker=marker)
        if key == "validation_accuracy":
            _chosen_epochs(axes, one["curves"], tone, hollow=one is baseline)
    sheet.text(0, 12, shortened(variant["name"], 36), size=13, weight="bold")
    what = "Validation accuracy" if key == "validation_accuracy" else "Training loss"
    return sheet.svg(f"{what} by epoch of {plain(variant['name'])} beside the baseline.")


def classes(results: Mapping[str, Any], place: int) -> str:
    """The gain of one variant on each class."""
    variant, names = results["variants"][place], results["data"]["classes"]
    rows = class_rows(names, variant["per_class_gain_points"])
    shown = [class_rows(names, one["per_class_gain_points"]) for one in results["variants"]]
    ends = _range([0.0, *(bar.value for bars in shown for bar in bars)], margin=0)
    return _bars(f"classes-{place}", plain(variant["name"]), rows, ends, "Gain per class in points", signed)


def class_rows(names: Sequence[str], gains: Sequence[float | None]) -> list[Bar]:
    """A bar for each class in the given order; of many classes the most gained and the most lost."""
    bars = [
        Bar(name, value, "" if _finite(value) else "no test images") for name, value in zip(names, gains, strict=True)
    ]
    if len(bars) <= MOST_CLASSES:
        return bars
    ranked = sorted((bar for bar in bars if _finite(bar.value)), key=lambda bar: -(bar.value or 0.0))
    half = MOST_CLASSES // 2
    if len(ranked) <= MOST_CLASSES:
        return ranked
    return [*ranked[:half], Bar(ELLIPSIS_ROW, None, f"{len(ranked) - 2 * half:,} classes between"), *ranked[-half:]]


ELLIPSIS_ROW = "⋮"


def _gates(place: int, variants: Sequence[Mapping[str, Any]]) -> str | None:
    """How far the gates of one variant are from letting everything pass; None where there is no gate."""
    gates = variants[place]["gates"]
    if not gates:
        return None
    rows = [Bar(gate["site"] + (" (head)" if gate["place"] == "pool" else ""), gate["departure"]) for gate in gates]
    ends = _range([0.0, *(gate["departure"] for variant in variants for gate in variant["gates"])], margin=0)
    title = plain(variants[place]["name"])
    return _bars(
        f"gates-{place}", title, rows, ends, "Mean departure of the gates from 1", lambda value: number(value, 3)
    )


def _bars(name: str, title: str, rows: Sequence[Bar], ends: tuple[float, float], what: str, shown: Any) -> str:
    """Horizontal bars from zero with their numbers; what lies below zero is drawn as an outline."""
    row, top = 19, 28
    left = min(140, 14 + 6.6 * max(len(bar.label) for bar in rows))
    sheet = Sheet(name, NARROW, top + row * len(rows) + 6)
    room = 44  # for a number beyond the longest bar
    axes = sheet.axes(left + (room if ends[0] < 0 else 0), top, room, 6)
    axes.set(xlim=ends, ylim=(len(rows) - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.vlines(0, -0.5, len(rows) - 0.5, color=colour("muted"), linewidth=1, clip_on=False)
    for place, bar in enumerate(rows):
        sheet.text(0, top + row * (place + 0.5), shortened(bar.label, 20), size=11, color=colour("ink"))
        value = bar.value if _finite(bar.value) else None
        low = value is not None and value < 0
        if value is not None:
            fill = "none" if low else colour("accent")
            axes.barh(place, value, 0.6, facecolor=fill, edgecolor=colour("accent"), linewidth=1, clip_on=False)
        look = {"size": 11, "va": "center", "color": colour("muted" if value is None else "ink")}
        offset = (-5 if low else 5, 0)
        words = shown(value) if value is not None else bar.note or ABSENT
        axes.annotate(
            words, (value or 0, place), offset, textcoords="offset points", ha="right" if low else "left", **look
        )
    sheet.text(0, 11, shortened(title, 36), size=13, weight="bold")
    return sheet.svg(f"{what}, {title}: {_extremes(rows, shown)}.")


def _extremes(rows: Sequence[Bar], shown: Any) -> str:
    known = [bar for bar in rows if _finite(bar.value)]
    if not known:
        return "nothing measured"
    most, least = (pick(known, key=lambda bar: bar.value or 0.0) for pick in (max, min))
    return f"highest {plain(most.label)} {shown(most.value)}, lowest {plain(least.label)} {shown(least.value)}"


def _interval(axes: Any, x: float, y: float, ends: Sequence[float] | None, verdict: str) -> None:
    look = LOOKS[verdict]
    if ends is not None:
        axes.plot(ends, [y, y], color=colour(look.colour), linewidth=2, marker="|", markersize=9, clip_on=False)
    _mark(axes, x, y, look)


def _mark(axes: Any, x: float, y: float, look: Look) -> None:
    tone = colour(look.colour)
    face = tone if look.filled else colour("page")
    # a cross with an outline of its own colour would close its notches
    edge = colour("page") if look.marker == "X" else tone
    axes.plot(
        [x], [y], marker=look.marker, markersize=look.size + (2 if look.marker == "X" else 0), markerfacecolor=face,
        markeredgecolor=edge, markeredgewidth=1 if look.marker == "X" else 1.8, linestyle="none", clip_on=False, zorder=5,
    )  # fmt: skip


def _line_labels(sheet: Sheet, low: float, high: float, smallest: float, left: float, width: float) -> None:
    """Say what the two upright lines are; their labels grow away from each other and stay on the sheet."""
    zero, goal = (left + width * (value - low) / (high - low) for value in (0.0, smallest))
    sheet.text(max(zero - 4, 54), 16, "baseline", size=11, ha="right", color=colour("muted"))
    words = f"worth it from {signed(smallest, 2).rstrip('0').rstrip('.')}"
    sheet.text(min(goal + 4, sheet.width - 104), 16, words, size=11, color=colour("worth"))


def _name_points(axes: Any, points: Sequence[tuple[float, float, str]], line: float) -> None:
    """Names beside points, moved apart where they would lie on each other."""
    heights = _apart([y for _, y, _ in points], line)
    for (x, y, name), height in zip(points, heights, strict=True):
        moved = abs(height - y) > line / 3
        arrow = {"arrowstyle": "-", "color": colour("muted"), "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}
        axes.annotate(
            name, (x, y), (12, 0), textcoords=_beside(axes, height), va="center", size=12,
            arrowprops=arrow if moved else None,
        )  # fmt: skip


def _apart(heights: Sequence[float], line: float) -> list[float]:
    raise NotImplementedError


def _beside(axes: Any, height: float) -> Any:
    raise NotImplementedError


def _chosen_epochs(axes: Any, runs: Iterable[Mapping[str, Any]], tone: str, *, hollow: bool) -> None:
    for run in runs:
        epoch, line = run["chosen_epoch"], run["validation_accuracy"]
        if epoch is not None and 1 <= epoch <= len(line) and _finite(line[epoch - 1]):
            axes.plot(
                [epoch], [line[epoch - 1]], marker="s" if hollow else "o", markersize=4.5, linestyle="none",
                markerfacecolor=colour("page") if hollow else colour(tone), markeredgecolor=colour(tone), clip_on=False,
                zorder=4,
            )  # fmt: skip


def _mean(lines: Sequence[Sequence[float]]) -> Iterator[float]:
    for values in zip_longest(*lines, fillvalue=math.nan):
        finite = [value for value in values if math.isfinite(value)]
        yield sum(finite) / len(finite) if finite else math.nan


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
