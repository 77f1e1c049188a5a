"""The report as a file and as a page."""

import copy
import itertools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reporting_results import results

import convattn.reporting
from convattn.errors import ComparisonError, MissingExtra
from convattn.reporting.page import render
from convattn.reporting.text import interval, signed

VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """A page taken apart: elements in order, and the text of each section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.headings and any(re.fullmatch("h[1-6]", tag) for tag in self.open):
            level, words = self.headings[-1]
            self.headings[-1] = (level, words + data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]


def test_everything_is_there_in_its_order() -> None:
    page = Page(render(results()))
    assert [words for level, words in page.headings if level < 3] == [
        "Is attention worth it on digits?",
        "What would change the answer",
        "Gain over the baseline",
        "The numbers",
        "Other scores",
        "Learning curves",
        "Cost against gain",
        "Gain per class",
        "How far the gates have left identity",
        "The images",
        "Images left out",
        "Setting and versions",
        "How to repeat it",
    ]


def test_the_verdicts_come_first() -> None:
    given = results()
    text = Page(render(given)).text
    beginning = text[: text.index("Gain over the baseline")]
    assert given["headline"] in beginning
    for variant in given["variants"]:
        # the sentence with the times in it
        assert variant["latency"]["sentence"] in beginning
        # which, how much, how sure, at what cost, against which control
        more = 100 * (variant["parameters"] / given["baseline"]["parameters"] - 1)
        slower = variant["latency"]["train_step_ratio"]["median"]
        assert (
            f"{variant['name']} {variant['title']} {variant['verdict']} {signed(variant['gain_points'])} "
            f"{interval(variant['interval95'])} {signed(more, 1)} % parameters, training step × {slower:.2f}"
        ) in beginning
    assert beginning.count("none was run") == len(given["variants"])
    assert all(change in beginning for change in given["changes"])
    assert "resnet20 from random weights" in beginning
    assert "gains of about 1.9 points or more, with 3 seeds and 360 test images" in beginning
    assert "would most likely stay hidden" in beginning


def test_what_the_comparison_could_see_is_said_honestly() -> None:
    given = results(["se"])
    given["could_see_points"] = 0.3
    assert "fine enough for the 0.5 points" in Page(render(given)).text
    given["could_see_points"] = 256.0
    assert "could see no gain, however large: with 3 seeds" in Page(render(given)).text
    given["could_see_points"] = None
    assert "is not known: that takes at least two seeds" in Page(render(given)).text


def test_the_numbers_are_there() -> None:
    given = results()
    given["baseline"]["scores"], given["variants"][0]["scores"] = [98.0, 98.5, 99.0], [98.25, 98.5, 98.0]
    text = Page(render(given)).text
    assert "se 98.20 −0.10 −1.40 to +1.20 0.710 cannot tell" in text
    assert "se 10.20 98.25 (+0.25) 98.50 (0.00) 98.00 (−1.00)" in text
    assert "274,490 (+2,016) 2.60 M" in text
    assert "1.11 MB × 1.01 121 MB × 1.23 26.0 ms (25.2–27.3) × 1.22 (1.18–1.28)" in text
    assert "1,664 (1,614–1,747) × 0.820 (0.795–0.861)" in text
    assert "the machine that measured them (cpu, 2 threads)" in text
    assert "Fingerprint of the data 9f2c41d07ab8e6335c1d" in text
    assert "torch 2.9.0" in text
    assert given["command"] in text


def test_other_scores_tell_which_way_is_better() -> None:
    given = results(["se", "cbam"])
    text = Page(render(given)).text
    assert "se macro-F1, points higher 98.00 97.90 −0.10 −1.20 to +1.00 0.030 unclear" in text
    assert "cbam macro-F1, points higher 98.00 99.60 +1.60 +0.50 to +2.70 0.030 better" in text
    # lower is better: a gain below zero is one, and says so
    assert "cbam log loss, nats lower 0.0721 0.0561 −0.0160 −0.0283 to −0.0037 0.030 better" in text
    assert "each interval is for its row alone" in text
    # not known: of a single class there is no AUROC
    given["variants"][0]["other_scores"][0] |= dict.fromkeys(
        ("baseline", "variant", "gain", "interval95", "p_value", "change")
    )
    assert "se macro-F1, points higher – – – – – –" in Page(render(given)).text


def test_classes_have_intervals_in_the_table() -> None:
    given = results(["se"], classes=["cat", "dog"])
    given["variants"][0]["per_class_gain_points"] = [1.5, -0.5]
    given["variants"][0]["per_class_interval95_points"] = [[-4.0, 7.0], None]
    given["baseline"]["per_class_accuracy"] = [90.0, 80.0]
    text = Page(render(given)).text
    assert "cat 90.00 +1.50 (−4.00 to +7.00) dog 80.00 −0.50" in text
    assert "those of a variant hold for all classes at once" in text


def test_controls_are_told_where_there_are_some() -> None:
    given = results(["cbam"])
    assert (2, "Controls") not in Page(render(given)).headings
    numbers = {"gain_points": 0.5, "interval95": [-0.25, 1.25], "mean_score": 98.6, "added_parameters": 3336}
    none = {"excess_points": None, "excess_interval95": None}
    adapter = {"name": "adapter:cbam", "sentence": "CBAM gains +0.4 points, an adapter of its size gains +0.5."}
    adapter |= {"kind": "adapter", "of": "cbam", "exceeded": False}
    noise = {"name": "noise", "sentence": "Noise alone is called worth it here."}
    noise |= {"kind": "noise", "of": None, "exceeded": None}
    given["controls"] = [
        {**numbers, **adapter, "excess_points": -0.1, "excess_interval95": [-0.75, 0.5], "alarming": False},
        {**numbers, **none, **noise, "alarming": False},
    ]
    page = Page(render(given))
    assert (2, "Controls") in page.headings and "#controls" in page.all("href")
    assert "adapter:cbam 3,336 98.60 +0.50 −0.25 to +1.25 −0.10 −0.75 to +0.50 noise" in page.text
    beginning = page.text[: page.text.index("Gain over the baseline")]
    assert adapter["sentence"] in page.text and adapter["sentence"] not in beginning
    assert "does not exceed adapter (+0.50)" in beginning
    assert noise["sentence"] not in beginning
    # a comparison that takes noise for a gain says so before anything else
    given["controls"][1]["alarming"] = True
    text = Page(render(given)).text
    assert noise["sentence"] in text[: text.index("Gain over the baseline")]


def test_a_setting_without_a_name_of_its_own_appears_too() -> None:
    given = results(["se"])
    given["setting"] |= {"label_smoothing": 0.1, "mixed_precision": None}
    text = Page(render(given)).text
    assert "Label smoothing 0.1" in text and "Mixed precision" not in text


def test_images_left_out_are_named_on_the_first_screen_and_listed() -> None:
    given = results(["se"])
    assert "were left out" not in Page(render(given)).text
    given["data"]["left_out"] = [{"path": f"train/cat/{place}.jpg", "reason": "truncated"} for place in range(600)]
    page = Page(render(given))
    assert "600 images were left out: which, and why ." in page.text
    assert "train/cat/499.jpg truncated" in page.text and "train/cat/500.jpg" not in page.text
    assert "the first 500" in page.text


def duplicates(exact: int, near: int, name: str = "cat.png") -> dict[str, Any]:
    pair = {"test": f"test/{name}", "train": f"train/{name}", "test_class": "cat", "train_class": "dog"}
    examples = [{**pair, "exact": place < exact, "similarity": 0.9} for place in range(min(exact + near, 20))]
    for one in examples[:6]:
        one["pictures"] = ["iVBORw0KGgo=", "iVBORw0KGgp="]
    return {"exact": exact, "near": near, "other_class": exact + near, "examples": examples}


def test_a_leak_is_on_the_first_screen_and_shown_in_pairs() -> None:
    given = results(["se"])
    given["data"]["duplicates"] = duplicates(40, 10)
    given["leak"] = {"test_images": 50, "of": 360, "exact": 40, "near": 10, "pairs": []}
    given["headline"] = "Warning: 50 of 360 test images are in the training images as well."
    page = Page(render(given))
    beginning = page.text[: page.text.index("Gain over the baseline")]
    assert given["headline"] in beginning
    assert "50 test images are in the training images as well: which" in beginning
    assert "40 pixel for pixel and 10 nearly so. A network may know the right answers by heart" in page.text
    assert "50 of them have another class there" in page.text
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [one["alt"] for one in pictures] == ["Test image test/cat.png", "Training image train/cat.png"] * 6
    assert {one["src"] for one in pictures} == {f"data:image/png;base64,iVBORw0KGg{end}=" for end in "op"}
    assert page.text.count("the same pixels, of the classes cat and dog") == 6
    assert "These are the first 6" in page.text


def test_few_duplicates_are_no_leak() -> None:
    given = results(["se"])
    given["data"]["duplicates"] = duplicates(0, 1, '"><script>alert(1)</script>')
    html = render(given)
    text = Page(html).text
    assert "1 test image is in the training images as well" in text
    assert "That is too few to move a gain by more than 0.28 points." in text
    assert "<script" not in html


def test_classes_that_a_part_lacks_are_on_the_first_screen() -> None:
    given = results(["se"], classes=["cat", "dog", "<b>"])
    given["data"] |= {"missing_classes": {"test": ["dog", "<b>"]}, "one_class": ["test"]}
    given["data"]["per_class"]["test"] = [36, 0, 0]
    text = Page(render(given)).text
    beginning = text[: text.index("Gain over the baseline")]
    assert "2 classes have no test image: dog, <b> ." in beginning
    assert "The test images are all of one class." in beginning
    assert "dog 36 36 0" in text


def test_hostile_names_stay_text() -> None:
    hostile = ["<script>alert(1)</script>", '"><img onerror=x>', "$5 and $10", "{{ 7*7 }}", "]]><!--", "猫\x00\udcff"]
    given = results(["se"], classes=hostile)
    given["data"]["name"] = hostile[0]
    given["data"]["left_out"] = [{"path": hostile[1], "reason": hostile[0]}]
    given["command"] = "convattn compare '</pre><script>'"
    given["variants"][0]["name"] = given["variants"][0]["sentence"] = hostile[1]
    html = render(given)
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert "<script" not in html and "<img" not in html
    for name in hostile[:5]:
        assert name in page.text
    assert "\x00" not in html
    html.encode("utf-8")


def test_nothing_is_loaded_from_anywhere() -> None:
    html = render(results(["cbam+dual"]))
    assert "http" not in html and "src=" not in html and "@import" not in html and "url(" not in html
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    links = page.all("href")
    assert links.count("data:,") == 1
    assert all(link.startswith("#") for link in links if link != "data:,")


def test_the_page_can_be_read_without_sight_and_without_a_mouse() -> None:
    given = results(start="identity")
    given["data"]["left_out"] = [{"path": "a.jpg", "reason": "truncated"}]
    page = Page(render(given))
    assert page.open == []
    assert ("html", {"lang": "en"}) in page.elements
    assert {"header", "main", "nav", "footer"} <= {tag for tag, _ in page.elements}
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    identifiers = page.all("id")
    assert len(identifiers) == len(set(identifiers))
    referred = [name.removeprefix("#") for name in page.all("href") if name.startswith("#")]
    assert {*referred, *page.all("aria-labelledby")} <= set(identifiers)
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
        if "scroll" in (attributes.get("class") or "").split() or tag == "pre":
            assert attributes["tabindex"] == "0" and attributes["role"] == "region"
    landmarks = [
        attributes.get("aria-label") or attributes.get("aria-labelledby")
        for tag, attributes in page.elements
        if tag in ("section", "nav") or attributes.get("role") == "region"
    ]
    assert None not in landmarks and len(landmarks) == len(set(landmarks))
    heads = [attributes.get("scope") for tag, attributes in page.elements if tag == "th"]
    assert heads and set(heads) == {"col", "row"}


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb: WCAG 2.2."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_all_words_have_contrast(scheme: int) -> None:
    """4.5 to 1 on the page and on the zone of a figure, in light and in dark: WCAG 2.2, 1.4.3."""
    blocks = re.findall(r":root\s*{([^}]*--page[^}]*)}", render(results(["se"])))
    assert len(blocks) == 3  # the last one is for print
    colors = dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6})", blocks[scheme]))
    for ink, paper in itertools.product(("ink", "muted", "accent", "worth", "not-worth", "unclear"), ("page", "zone")):
        low, high = sorted(luminance(colors[name]) for name in (ink, paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    given = results(["se", "cbam"])
    before = copy.deepcopy(given)
    first = convattn.reporting.write(given, tmp_path / "first").read_bytes()
    second = convattn.reporting.write(results(["se", "cbam"]), tmp_path / "second").read_bytes()
    assert first == second
    assert given == before


def test_one_seed_has_no_interval() -> None:
    text = Page(render(results(["se", "cbam"], seeds=1))).text
    assert "a single seed gives none" in text
    assert "1 seed, on digits" in text


def test_times_that_were_not_measured_are_not_drawn() -> None:
    text = Page(render(results(["se"], measured=False))).text
    assert "Times were not measured" in text
    assert " ms " not in text


def test_a_hundred_classes_show_the_ends_and_a_table_of_all() -> None:
    page = Page(render(results(["se"], classes=[f"class {place}" for place in range(100)])))
    assert "Of 100 classes, only the 15 most gained and the 15 most lost" in page.text
    assert "70 classes between" in page.text
    assert all(f"class {place}" in page.text for place in range(100))


def test_a_class_without_test_images_has_no_gain() -> None:
    given = results(["se"], classes=["cat", "dog"])
    given["variants"][0]["per_class_gain_points"][1] = None
    given["variants"][0]["per_class_interval95_points"][1] = None
    given["baseline"]["per_class_accuracy"][1] = None
    text = Page(render(given)).text
    assert "no test image" in text
    assert "dog – –" in text


@pytest.mark.slow_unless(epochs=1)
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_few_epochs(epochs: int) -> None:
    assert "Learning curves" in render(results(["se"], epochs=epochs))


def test_a_run_that_diverged() -> None:
    given = results(["se"])
    given["variants"][0]["curves"][0]["loss"][3:] = [float("inf"), float("nan"), None, None, None]
    html = render(given)
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)


@pytest.mark.parametrize(("start", "expected"), [("paper", "near 0.5"), ("identity", "began at exactly 1")])
def test_the_start_of_the_gates_is_told(start: str, expected: str) -> None:
    html = render(results(["se"], start=start))
    assert expected in html
    assert (">Strength<" in html) == (start == "identity")


@pytest.mark.slow
def test_five_variants_stay_below_a_megabyte(tmp_path: Path) -> None:
    names = ["se", "cbam", "dual", "cbam+dual", "eca"]
    given = results(names, classes=[f"class {place}" for place in range(100)], seeds=5, epochs=100, sites=33)
    assert convattn.reporting.write(given, tmp_path).stat().st_size < 1_000_000


def test_write_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    path = convattn.reporting.write(results(["se"]), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["report.html", "results.csv", "results.md"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def no_space(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        convattn.reporting.write(results(["se"]), tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"expected results of schema 2, got schema 1; give the command"):
        convattn.reporting.write({"schema": 1}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"the report needs the package jinja2"):
        convattn.reporting.write(results(["se"]), tmp_path)
