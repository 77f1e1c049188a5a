"""Numbers and names as a reader meets them: a true minus sign, units, nothing longer than its place."""

import math
from collections.abc import Sequence
from typing import TypeGuard
from unicodedata import category

ABSENT = "–"
# Unicode categories: control, surrogate, unassigned, line and paragraph separators
UNSHOWN = {"Cc", "Cs", "Cn", "Zl", "Zp"}
MINUS = "\N{MINUS SIGN}"


def known(value: float | None) -> TypeGuard[float]:
    """Whether there is a number to show: measured and finite."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 2) -> str:
    """`1234.5` -> `1,234.50`; what was not measured is a dash."""
    if not known(value):
        return ABSENT
    shown = f"{value:,.{digits}f}"
    # -0.001 at two digits is zero, and zero bears no sign
    return shown.replace("-", MINUS) if shown.strip("-0.") else shown.lstrip("-")


def signed(value: float | None, digits: int = 2) -> str:
    """A difference, always with its sign: `+0.12`, `−0.12`, `0.00`."""
    shown = number(value, digits)
    return f"+{shown}" if known(value) and value > 0 and shown.strip("0.") else shown


def short(value: float | None) -> str:
    """As few digits as the number needs: `0.0005`, `0.5`, `8`."""
    return f"{value:.6g}".replace("-", MINUS) if known(value) else ABSENT


def interval(ends: Sequence[float] | None, digits: int = 2) -> str:
    """`−0.80 to +0.60`."""
    return ABSENT if ends is None else f"{signed(ends[0], digits)} to {signed(ends[1], digits)}"


def p_value(value: float | None) -> str:
    """Three digits, and never a p-value of zero."""
    if not known(value):
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def magnitude(value: float | None) -> str:
    """`41600000` -> `41.6 M`."""
    if not known(value):
        return ABSENT
    # the next unit begins where three digits would round up to it
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:,.{_decimals(value / size)}f} {unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """`1090000` -> `1.09 MB`."""
    shown = magnitude(value)
    return shown if shown == ABSENT else f"{shown}B" if " " in shown else f"{shown} B"


def three_digits(value: float | None) -> str:
    """`0.0613`, `6.13`, `61.3`, `613`: a duration, as precise as it was measured."""
    return f"{value:,.{_decimals(value)}f}" if known(value) else ABSENT


def _decimals(value: float) -> int:
    if value <= 0:
        return 0
    # 9.996 has three digits as 10.0, not as 10.00
    rounded = float(f"{value:.2e}")
    return min(max(2 - math.floor(math.log10(rounded)), 0), 6)


def plain(words: object) -> str:
    """A name without what no page can show: control characters, undecodable bytes of a path."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(letter) in UNSHOWN else letter for letter in str(words))


def shortened(words: object, limit: int) -> str:
    """A name that fits its place; the middle is left out, as names differ at both ends."""
    shown = plain(words)
    if len(shown) <= limit:
        return shown
    head = limit // 2
    return f"{shown[:head]}…{shown[len(shown) - (limit - head - 1) :]}"
