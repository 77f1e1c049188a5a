"""Numbers and names as the report writes them."""

import math

import pytest

from convattn.reporting import text


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1234.5, "1,234.50"), (-0.8, "−0.80"), (-0.001, "0.00"), (0.0, "0.00"), (None, "–"), (math.nan, "–")],
)
def test_number(value: float | None, expected: str) -> None:
    assert text.number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.12, "+0.12"), (-0.12, "−0.12"), (0.001, "0.00"), (-0.001, "0.00"), (None, "–"), (math.inf, "–")],
)
def test_signed(value: float | None, expected: str) -> None:
    assert text.signed(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.0005, "0.0005"), (0.5, "0.5"), (8, "8"), (-1.9, "−1.9")])
def test_short(value: float, expected: str) -> None:
    assert text.short(value) == expected


def test_interval() -> None:
    assert text.interval([-0.8, 0.6]) == "−0.80 to +0.60"
    assert text.interval([-0.0283, 0.00371], 4) == "−0.0283 to +0.0037"
    assert text.interval(None) == "–"


@pytest.mark.parametrize(("value", "expected"), [(0.71, "0.710"), (0.0009, "< 0.001"), (0.0, "< 0.001"), (None, "–")])
def test_p_value(value: float | None, expected: str) -> None:
    assert text.p_value(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (640, "640"), (2_600_000, "2.60 M"), (41_604_000, "41.6 M"), (999_900, "1.00 M"), (4.1e12, "4,100 G")],
)
def test_magnitude(value: float, expected: str) -> None:
    assert text.magnitude(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.06134, "0.0613"), (6.134, "6.13"), (61.34, "61.3"), (6134.0, "6,134"), (9.996, "10.0"), (0.0, "0")],
)
def test_three_digits(value: float, expected: str) -> None:
    assert text.three_digits(value) == expected


def test_plain_replaces_what_no_page_can_show() -> None:
    assert text.plain("a\x00b\udcff\n") == "a\ufffdb\ufffd\ufffd"
    assert text.plain("猫 café\u200dé") == "猫 café\u200dé"


@pytest.mark.parametrize("limit", [5, 6, 7])
def test_shortened_keeps_both_ends(limit: int) -> None:
    shown = text.shortened("abcdefgh", limit)
    assert len(shown) == limit
    assert shown.startswith("ab") and shown.endswith("gh")
    assert text.shortened("abcd", limit) == "abcd"


@pytest.mark.parametrize(
    ("value", "expected"), [(512, "512 B"), (1_102_416, "1.10 MB"), (98_576_968, "98.6 MB"), (None, "–")]
)
def test_size(value: float | None, expected: str) -> None:
    assert text.size(value) == expected
