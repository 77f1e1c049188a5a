"""Figures of horizontal bars, one for each variant: the gain on each class, the departure of each gate."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from convattn.reporting.sheet import NARROW, Sheet, colour, span
from convattn.reporting.text import ABSENT, known, number, plain, shortened, signed

# so many classes are read row by row; of more, the fifteen most gained and the fifteen most lost
MOST_CLASSES = 30


class Bar(NamedTuple):
    """A row of the figure; where there is no value, the note stands in its place."""

    label: str
    value: float | None
    note: str = ABSENT


def class_gain(results: Mapping[str, Any], place: int) -> str:
    """The gain of one variant on each class, on the scale that all variants share."""
    names, variants = results["data"]["classes"], results["variants"]
    shown = [class_rows(names, variant["per_class_gain_points"]) for variant in variants]
    ends = span([0.0, *(bar.value for rows in shown for bar in rows)], margin=0)
    title = plain(variants[place]["name"])
    return _bars(f"class-{place}", title, shown[place], ends, "gain per class in percentage points", signed)


def class_rows(names: Sequence[str], gains: Sequence[float | None]) -> list[Bar]:
    """A bar for each class, in their order; of many classes the most gained, then the most lost."""
    bars = [Bar(name, gain, "no test image") for name, gain in zip(names, gains, strict=True)]
    if len(bars) <= MOST_CLASSES:
        return bars
    ranked = sorted((bar for bar in bars if known(bar.value)), key=lambda bar: -(bar.value or 0.0))
    half = MOST_CLASSES // 2
    if len(ranked) <= MOST_CLASSES:
        return ranked
    return [*ranked[:half], Bar("⋮", None, f"{len(ranked) - 2 * half:,} classes between"), *ranked[-half:]]


def gate_departure(variants: Sequence[Mapping[str, Any]], place: int) -> str | None:
    """How far the gates of one variant are from letting everything pass; None where there is none."""
    if not variants[place]["gates"]:
        return None
    shown = [_gate_rows(variant["gates"] or ()) for variant in variants]
    ends = span([0.0, *(bar.value for rows in shown for bar in rows)], margin=0)
    title = plain(variants[place]["name"])
    return _bars(f"gates-{place}", title, shown[place], ends, "departure of the gates", _three_decimals)


def _gate_rows(gates: Sequence[Mapping[str, Any]]) -> list[Bar]:
    # what a head does to the pooled vector is no distance of a gate from 1: a number, but no bar beside theirs
    return [
        Bar(f"{gate['site']} (head)", None, _three_decimals(gate["departure"]))
        if gate["place"] == "pool"
        else Bar(gate["site"], gate["departure"])
        for gate in gates
    ]


def _three_decimals(value: float | None) -> str:
    return number(value, 3)


def _bars(
    name: str,
    title: str,
    rows: Sequence[Bar],
    ends: tuple[float, float],
    what: str,
    shown: Callable[[float | None], str],
) -> str:
    # room for a number beyond the longest bar on either side
    row, top, bottom, room = 19, 30, 4, 46
    left = min(132, 12 + 6.6 * max(len(plain(bar.label)) for bar in rows))
    sheet = Sheet(name, NARROW, top + row * len(rows) + bottom)
    axes = sheet.axes(left + (room if ends[0] < 0 else 0), top, room if ends[1] > 0 else 0, bottom)
    axes.set(xlim=ends, ylim=(len(rows) - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.vlines(0, -0.5, len(rows) - 0.5, color=colour("muted"), linewidth=1, clip_on=False)
    sheet.text(0, 12, shortened(title, 36), size=13, weight="bold")
    for place, bar in enumerate(rows):
        sheet.text(0, top + row * (place + 0.5), shortened(bar.label, 19), size=11)
        _bar(axes, place, bar, shown)
    return sheet.svg(f"{title}, {what}: {_extremes(rows, shown)}.")


def _bar(axes: Any, place: int, bar: Bar, shown: Callable[[float | None], str]) -> None:
    value = bar.value if known(bar.value) else 0.0
    # below zero an outline, so that the sign does not hang on the side alone
    below = value < 0
    if value:
        fill = "none" if below else colour("accent")
        axes.barh(place, value, 0.6, facecolor=fill, edgecolor=colour("accent"), linewidth=1, clip_on=False)
    axes.annotate(
        shown(bar.value) if known(bar.value) else bar.note,
        (value, place),
        (-5 if below else 5, -0.5),
        textcoords="offset points",
        ha="right" if below else "left",
        va="center",
        size=11,
        color=colour("ink" if known(bar.value) else "muted"),
    )


def _extremes(rows: Sequence[Bar], shown: Callable[[float | None], str]) -> str:
    ranked = sorted((bar for bar in rows if known(bar.value)), key=lambda bar: bar.value or 0.0)
    if not ranked:
        return "; ".join(f"{plain(bar.label)} {bar.note}" for bar in rows)
    least, most = ranked[0], ranked[-1]
    return f"highest {plain(most.label)} {shown(most.value)}, lowest {plain(least.label)} {shown(least.value)}"
