"""Numbers and names as a reader meets them: typographic minus, units, nothing longer than its place."""

import math
from collections.abc import Sequence

ABSENT = "–"
MINUS = "\N{MINUS SIGN}"
ELLIPSIS = "…"


def number(value: float | None, digits: int = 2) -> str:
    """`1234.5` -> `1,234.50`; what was not measured is a dash."""
    if value is None or not math.isfinite(value):
        return ABSENT
    shown = f"{value:,.{digits}f}"
    # -0.001 at two digits is zero, and zero bears no sign
    return shown.replace("-", MINUS) if any(digit in shown for digit in "123456789") else shown.lstrip("-")


def short(value: float | None) -> str:
    """As few digits as the number needs: `0.0005`, `0.5`, `8`."""
    return ABSENT if value is None or not math.isfinite(value) else f"{value:.6g}".replace("-", MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """A difference, always with its sign: `+0.12`, `−0.12`, `0.00`."""
    shown = number(value, digits)
    return shown if shown.startswith((MINUS, ABSENT)) or not shown.strip("0.") else f"+{shown}"


def interval(ends: Sequence[float] | None) -> str:
    """`−0.80 to +0.60`."""
    return ABSENT if ends is None else f"{signed(ends[0])} to {signed(ends[1])}"


def p_value(value: float | None) -> str:
    """Three digits, and never a p-value of zero."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: int | None) -> str:
    """`272474` -> `272,474`."""
    return ABSENT if value is None else f"{value:,}"


def magnitude(value: float | None) -> str:
    """`41600000` -> `41.6 M`."""
    if value is None:
        return ABSENT
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value:g}"


def plain(words: object) -> str:
    """A name without characters that no page can show (control characters, undecodable bytes of a path)."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(words))


def shortened(words: object, limit: int) -> str:
    """A name that fits its place: the middle is left out, for both ends of a name tell names apart."""
    shown = plain(words)
    if len(shown) <= limit:
        return shown
    head = limit // 2
    return shown[:head] + ELLIPSIS + shown[len(shown) - (limit - head - 1) :]
