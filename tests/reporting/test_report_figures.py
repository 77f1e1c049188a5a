"""The figures, as SVG elements: what they show, and that they belong to the page."""

import math
import re
from xml.etree import ElementTree

import pytest
from reporting_results import results

from convattn.reporting import bars, figures, sheet


def words(svg: str) -> list[str]:
    """Everything that a figure says, label by label."""
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def test_gain_shows_every_variant_with_its_interval_and_verdict() -> None:
    with sheet.style():
        wide = words(figures.gain(results(), wide=True))
        narrow = words(figures.gain(results(), wide=False))
    for shown in (wide, narrow):
        assert {"se", "cbam", "dual", "cbam+dual", "baseline", "worth it from +0.5"} <= set(shown)
        assert "+1.60 (+0.80 to +2.40)" in shown
    assert {"worth it", "not worth it", "cannot tell"} <= set(wide)


def test_every_verdict_has_a_shape_of_its_own() -> None:
    assert len({look.marker for look in figures.LOOKS.values()}) == len(figures.LOOKS) == 3


def test_gain_without_an_interval_is_a_point_alone() -> None:
    given = results(["se", "cbam"])
    # the axis stays the same
    given["variants"][1]["interval95"] = [-3.0, 3.0]
    with sheet.style():
        with_interval = figures.gain(given, wide=True)
        given["variants"][0]["interval95"] = None
        without = figures.gain(given, wide=True)
    assert "−0.10" in words(without) and "−0.10 (−1.40 to +1.20)" in words(with_interval)
    assert without.count("<use") == with_interval.count("<use") - 2


def test_cost_names_every_measured_variant() -> None:
    given = results()
    given["variants"][1]["latency"] = None
    with sheet.style():
        shown = words(figures.cost(given, wide=False))
    assert {"baseline", "se", "dual", "cbam+dual"} <= set(shown)
    assert "cbam" not in shown


def test_names_of_points_are_moved_apart_only_where_they_would_meet() -> None:
    near, far = (0.0, 10.0, 50.0), (200.0, 10.0, 50.0)
    heights = figures._apart([near, (5.0, 12.0, 50.0), far], 15)
    assert heights[2] == 10.0
    assert heights[1] - heights[0] == pytest.approx(15)


def test_a_curve_is_cut_where_it_leaves_the_axes() -> None:
    epochs, values = figures._within([0.0, 80.0, 90.0, 40.0, 40.0], 60.0, 100.0)
    shown = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if not math.isnan(value)]
    assert shown == [(1.75, 60.0), (2, 80.0), (3, 90.0), (pytest.approx(3.6), 60.0)]


def test_a_curve_has_a_gap_where_there_is_no_number() -> None:
    _, values = figures._within([70.0, math.nan, 80.0], 60.0, 100.0)
    assert values[0] == 70.0 and values[-1] == 80.0
    assert any(math.isnan(value) for value in values)


def test_the_mean_curve_leaves_out_missing_numbers() -> None:
    assert list(figures._mean([[1.0, math.nan], [3.0, 5.0]])) == [2.0, 5.0]
    assert math.isnan(next(figures._mean([[math.nan]])))


def test_few_classes_keep_their_order() -> None:
    rows = bars.class_rows(["b", "a", "c"], [1.0, None, -1.0])
    assert [row.label for row in rows] == ["b", "a", "c"]
    assert rows[1].note == "no test image"


def test_names_are_drawn_letter_by_letter() -> None:
    names = ["$5 and $10", "a_b^2", "<b>&", "猫"]
    with sheet.style():
        drawn = words(bars.class_gain(results(["se"], classes=names), 0))
    assert [word for word in drawn if word in names] == names


def test_of_many_classes_the_most_gained_and_the_most_lost() -> None:
    names = [f"class {place}" for place in range(100)]
    rows = bars.class_rows(names, [None if place == 50 else float(place - 50) for place in range(100)])
    assert [row.label for row in rows[:2]] == ["class 99", "class 98"]
    assert [row.label for row in rows[-2:]] == ["class 1", "class 0"]
    assert len(rows) == 31
    assert rows[15].note == "69 classes between"


def test_a_pooling_head_is_a_number_beside_the_gates() -> None:
    variants = results(["dual"])["variants"]
    with sheet.style():
        drawn = bars.gate_departure(variants, 0)
    assert drawn is not None
    departure = f"{variants[0]['gates'][-1]['departure']:.3f}"
    assert {"pool (head)", departure} <= set(words(drawn))
    # however large it is, the bars of the gates stay as they are
    variants[0]["gates"][-1]["departure"] = 1000.0
    with sheet.style():
        assert bars.gate_departure(variants, 0) == drawn.replace(f">{departure}<", ">1,000.000<")
    variants[0]["gates"] = []
    assert bars.gate_departure(variants, 0) is None


def test_an_svg_takes_colours_and_fonts_from_the_page() -> None:
    with sheet.style():
        drawing = sheet.Sheet("figure", 100, 50)
        axes = drawing.axes(10, 10, 10, 10)
        axes.plot([0, 1], [0, 1], marker="o", color=sheet.colour("accent"), clip_on=False)
        svg = drawing.svg('said "aloud" <b>')
    assert "var(--accent)" in svg and "#fe01" not in svg
    assert "font-family" not in svg and "<style" not in svg and "<metadata" not in svg
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.attrib == {"role": "img", "aria-label": 'said "aloud" <b>', "viewBox": "0 0 100 50"}
    assert all(element.attrib["id"].startswith("figure-") for element in root.iter() if "id" in element.attrib)
    targets = {f"#{element.attrib['id']}" for element in root.iter() if "id" in element.attrib}
    assert {element.attrib["href"] for element in root.iter("use")} <= targets
    assert not re.search(r"\d\.\d{3}", svg)


def test_every_colour_of_a_figure_is_one_of_the_page() -> None:
    drawn = figures.draw_all(results())
    flat = [*drawn["gain"].values(), *drawn["cost"].values()]
    flat += [svg for key in ("accuracy", "loss", "classes", "gates") for svg in drawn[key]]
    assert len(flat) == 20
    for svg in flat:
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {
            "none",
            *(f"var(--{name})" for name in sheet.COLOURS),
        }


def test_settings_of_the_user_neither_matter_nor_change() -> None:
    import matplotlib

    plain = figures.draw_all(results(["se"]))
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        assert figures.draw_all(results(["se"])) == plain
        assert matplotlib.rcParams["font.size"] == 30
