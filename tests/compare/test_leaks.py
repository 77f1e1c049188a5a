"""Test images among the training images turn the verdict into a warning; whatever else is wrong with data is named."""

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import convattn.compare
from convattn.compare import leaks, timing
from convattn.compare.verdicts import CANNOT_TELL
from convattn.data import Images, split
from convattn.errors import DataError
from small_runs import CLASSES, decoded, pixels, write_images, write_network


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 3)


def compared(data: Path, **options: Any) -> dict[str, Any]:
    """A comparison of one epoch in a folder beside the data."""
    folder = data.parent
    backbone = f"{write_network(folder)}:network"
    settings = {"variants": "se", "seeds": 1, "epochs": 1, "batch_size": 16, "out": folder / "out"}
    return convattn.compare.run(data, backbone=backbone, **{**settings, **options})


def leaking(root: Path, *, exact: int, near: int = 0, tests: int = 201, other_class: bool = False) -> Path:
    """Class folders with test images of which some are among the training images, exactly or at JPEG quality 60."""
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", tests // 3)):
        write_images(root / part, count=count, seed=len(part))
    for index in range(exact + near):
        label = index % 3
        image = Image.fromarray(pixels(label, random))
        image.save(root / "test" / CLASSES[label] / f"{index // 3:03d}.png")
        there = root / "train" / CLASSES[(label + other_class) % 3]
        if index < exact:
            image.save(there / f"again {index}.png")
        else:
            image.save(there / f"again {index}.jpg", quality=60)
    return root


def test_a_planted_leak_is_a_warning_and_no_verdict(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = leaking(tmp_path / "data", exact=40, near=10)
    results = compared(data)
    warning = "Warning: 50 of 201 test images are in the training images as well (40 exactly, 10 nearly)"
    assert results["headline"].startswith(warning)
    leak, duplicates = results["leak"], results["data"]["duplicates"]
    assert {key: leak[key] for key in ("test_images", "of", "exact", "near")} == {
        "test_images": 50,
        "of": 201,
        "exact": 40,
        "near": 10,
    }
    assert (duplicates["exact"], duplicates["near"], duplicates["other_class"]) == (40, 10, 0)
    assert len(leak["pairs"]) == len(duplicates["examples"]) == 20
    for test, train in leak["pairs"]:
        assert (data / test).read_bytes() == (data / train).read_bytes()
        assert test.startswith("test/") and train.startswith("train/")
    assert results["variants"][0]["sentence"].startswith("Were all test images new: ")
    said = capsys.readouterr()
    assert warning in said.out
    # before the training as well, which may take hours
    assert said.err.startswith(f"convattn: {warning}") and said.err.count("\n") == 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert warning in page
    assert page.count('src="data:image/png;base64,') == 12
    assert f'alt="Test image {leak["pairs"][0][0]}"' in page and leak["pairs"][5][1] in page


def test_the_pictures_are_those_of_the_files(tmp_path: Path) -> None:
    data = leaking(tmp_path / "data", exact=3, near=9)
    images = decoded(data, tmp_path / "out")
    found = leaks.search(images, None, tmp_path / "out")
    assert [one["exact"] for one in found["examples"]] == [True] * 3 + [False] * 9
    assert ["pictures" in one for one in found["examples"]] == [True] * 6 + [False] * 6
    for one in found["examples"][:6]:
        for key, picture in zip(("test", "train"), one["pictures"], strict=True):
            with Image.open(io.BytesIO(base64.b64decode(picture))) as shown, Image.open(data / one[key]) as there:
                assert np.array_equal(np.asarray(shown), np.asarray(there))


def test_they_are_sought_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = decoded(leaking(tmp_path / "data", exact=3), tmp_path / "out")
    found = leaks.search(images, None, tmp_path / "out")
    monkeypatch.setattr(leaks, "find_duplicates", None)
    # with another seed, and without the pixels, which are gone once everything is done
    (tmp_path / "out" / "images.npy").unlink()
    again = Images.load(tmp_path / "out")
    assert leaks.search(again, None, tmp_path / "out") == found


def test_duplicates_of_another_class_are_named(tmp_path: Path) -> None:
    images = decoded(leaking(tmp_path / "data", exact=3, other_class=True), tmp_path / "out")
    found = leaks.search(images, None, tmp_path / "out")
    assert found["other_class"] == 3
    lines = leaks.warnings(leaks.counts(images, split(images, 0)), found, 201)
    assert lines[1].startswith(
        "3 of them have another class there. For example test/blue/000.png and train/green/again"
    )


NONE_WITHIN = {"images": 0, "clusters": [], "examples": []}


def duplicates(exact: int = 0, near: int = 0) -> dict[str, Any]:
    example = {"test": "a.png", "train": "b.png", "test_class": "x", "train_class": "x"}
    return {
        "exact": exact,
        "near": near,
        "other_class": 0,
        "examples": [example] * min(20, exact + near),
        "within": NONE_WITHIN,
    }


@pytest.mark.parametrize(
    ("exact", "near", "tests", "expected"),
    [
        (0, 0, 10, False),
        (1, 0, 500, True),
        (0, 1, 500, True),
        (1, 0, 501, False),
        (3, 16, 10_000, False),
        (3, 17, 10_000, True),
    ],
)
def test_a_leak_begins_with_one_of_five_hundred(exact: int, near: int, tests: int, expected: bool) -> None:
    found = leaks.leak(duplicates(exact, near), tests)
    assert (found is not None) == expected
    lines = leaks.warnings({"missing_classes": {}, "one_class": []}, duplicates(exact, near), tests)
    # fewer are told, and are no warning
    assert len(lines) == (exact + near > 0)
    assert not lines or lines[0].startswith("Warning: " if expected else f"{exact + near} of {tests:,} test images are")


def test_clean_data_have_no_leak(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    results = compared(write_images(tmp_path / "data"))
    assert capsys.readouterr().err == ""
    assert results["leak"] is None
    assert results["data"]["duplicates"] == {
        "exact": 0,
        "near": 0,
        "other_class": 0,
        "examples": [],
        "within": NONE_WITHIN,
    }
    assert results["variants"][0]["verdict"] == CANNOT_TELL
    assert results["headline"].startswith("Cannot tell yet")
    assert "No test image was found among" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_missing_classes_and_counts_are_named(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for part, count in (("train", 9), ("val", 4), ("test", 5)):
        write_images(data / part, count=count, seed=len(part))
    for path in [
        *(data / "test" / "red").iterdir(),
        *(data / "val" / "red").iterdir(),
        *(data / "val" / "blue").iterdir(),
    ]:
        path.unlink()
    results = compared(data)
    assert results["data"]["per_class"] == {"train": [9, 9, 9], "validation": [0, 4, 0], "test": [5, 5, 0]}
    assert results["data"]["missing_classes"] == {"validation": ["blue", "red"], "test": ["red"]}
    assert results["data"]["one_class"] == ["validation"]
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "convattn: No validation image of the classes blue, red.",
        "convattn: No test image of the class red.",
        "convattn: The validation images are all of one class.",
    ]
    assert "  class  training  validation  test\n  blue          9           0     5\n" in said.out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "no validation image: <bdi>blue, red</bdi>" in page
    assert "1 class has no test image: <bdi>red</bdi>" in page
    assert "The validation images are all of one class." in page


def test_of_many_classes_the_smallest_and_the_largest_are_told() -> None:
    names = tuple(f"class {place}" for place in range(40))
    rows = leaks.table(names, {"train": [*range(40)], "test": [1000] * 40})
    assert [row[0] for row in rows] == [
        "smallest and largest of 40 classes",
        *[f"class {place}" for place in (0, 1, 2, 37, 38, 39)],
    ]
    assert rows[-1] == ["class 39", "39", "1,000"]


def test_a_table_with_groups(tmp_path: Path, quick: None) -> None:
    photos = write_images(tmp_path / "photos")
    lines = [f"photos/{name}/{index:03d}.png,{name},{index // 3}" for name in CLASSES for index in range(30)]
    (tmp_path / "data.csv").write_text("\n".join(["path,label,group", *lines]))
    results = compared(tmp_path / "data.csv")
    assert results["data"]["name"] == "data.csv"
    assert results["data"]["per_class"] == {"train": [21] * 3, "validation": [3] * 3, "test": [6] * 3}
    index = json.loads((tmp_path / "out" / "images.json").read_text())
    groups = np.array(index["groups"])
    with np.load(tmp_path / "out" / "runs" / "se-seed0" / "predictions.npz") as arrays:
        parts = [np.isin(index["paths"], arrays[f"{part}_paths"]) for part in ("validation", "test")]
    inside = [set(groups[part]) for part in (*parts, ~(parts[0] | parts[1]))]
    assert sum(map(len, inside)) == len(set.union(*inside)) == 10
    # changed files are noticed through the table
    (photos / "red" / "000.png").write_bytes((photos / "red" / "001.png").read_bytes())
    with pytest.raises(convattn.errors.ComparisonError, match="The images changed"):
        compared(tmp_path / "data.csv")


# clusters within the test images


def clustered(root: Path, *, named: bool) -> Path:
    """A table whose test images have clusters of 4: one picture brighter and re-encoded; named as groups, or not."""
    random = np.random.default_rng(1)
    lines = ["path,label,split" + (",group" if named else "")]
    root.mkdir(parents=True)

    def add(name: str, image: np.ndarray, label: int, part: str, group: str) -> None:
        Image.fromarray(image).save(root / name)
        lines.append(f"{name},{CLASSES[label]},{part}" + (f",{group}" if named else ""))

    for index in range(90):
        # validation too, as it would be cut otherwise where groups are named
        part = "train" if index < 72 else "val"
        add(f"train{index}.png", pixels(index % 3, random), index % 3, part, f"train{index}")
    for index in range(30):
        picture = pixels(index % 3, random)
        for copy in range(4 if index < 12 else 1):
            brighter = (picture * (1 - 0.1 * copy)).astype(np.uint8)
            add(f"test{index}-{copy}.png", brighter, index % 3, "test", f"test{index}")
    (root / "table.csv").write_text("\n".join(lines))
    return root / "table.csv"


def test_clusters_within_the_test_images_count_as_groups(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(clustered(tmp_path / "found", named=False), seeds=2, out=tmp_path / "a")
    warning = (
        "48 of 66 test images show the same as another of them (frames of a video, crops of a picture): they are 12 "
        "groups, the largest of 4, and each group counts as one image in the intervals. For example "
    )
    assert warning in capsys.readouterr().err
    within = found["data"]["duplicates"]["within"]
    expected = {frozenset(f"test{index}-{copy}.png" for copy in range(4)) for index in range(12)}
    assert {frozenset(cluster) for cluster in within["clusters"]} == expected and within["images"] == 48
    assert len(within["examples"][0]["pictures"]) == 2
    report = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "48 test images show the same as another of them" in report
    named = compared(clustered(tmp_path / "named", named=True), seeds=2, out=tmp_path / "b")
    assert named["data"]["duplicates"]["within"] == NONE_WITHIN
    for key in ("gain_points", "interval95", "p_value", "per_class_interval95_points", "other_scores"):
        assert found["variants"][0][key] == named["variants"][0][key]


def test_units_join_groups_of_the_data_and_clusters(tmp_path: Path) -> None:
    images = decoded(write_images(tmp_path / "data", count=10), tmp_path / "out")
    tests = split(images, 0).test
    assert leaks.units(images, None, {"within": NONE_WITHIN}) is None
    clusters = {"within": {"clusters": [tests[[0, 2]].tolist()]}}
    assert leaks.units(images, None, clusters).tolist() == [0, 1, 0, 2, 3, 4]
    # given parts are kept, so that groups do not move the test images
    parts = tuple("test" if index in tests else "train" for index in range(len(images.labels)))
    numbers = np.arange(len(images.labels))
    numbers[tests[4]] = numbers[tests[2]]
    grouped = dataclasses.replace(images, parts=parts, groups=numbers)
    assert leaks.units(grouped, None, {"within": NONE_WITHIN}).tolist() == numbers[tests].tolist()
    joined = leaks.units(grouped, None, clusters)
    assert joined[0] == joined[2] == joined[4] and len(set(joined)) == 4


def test_images_that_are_all_the_same_are_refused_before_any_training(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", count=20)
    for path in data.rglob("*.png"):
        Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(DataError, match="All 12 test images show the same: two that differ are needed"):
        compared(data)
    said = capsys.readouterr().err
    assert "60 of 60 images are of a single colour: blue/000.png, blue/001.png, blue/002.png and 57 more." in said
    assert "All images of 3 classes blue, green, red are equal." in said
    assert not (tmp_path / "out").exists()
