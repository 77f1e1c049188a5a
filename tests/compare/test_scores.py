"""Scores against scikit-learn, their values against leaving images out one by one, and intervals against the truth."""

import itertools

import numpy as np
import pytest
from sklearn import metrics

from convattn.compare import score_values, scores
from convattn.compare.stats import gain

REPEATS = 400
ORACLES = {
    "macro_f1": lambda p, y: 100 * metrics.f1_score(y, p.argmax(1), average="macro", zero_division=0),
    "balanced_accuracy": lambda p, y: 100 * metrics.balanced_accuracy_score(y, p.argmax(1)),
    "auroc": lambda p, y: 100 * (metrics.roc_auc_score(y, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr")),
    "log_loss": lambda p, y: metrics.log_loss(y, p, labels=range(p.shape[1])),
}


def predicted(
    random: np.random.Generator, images: int, classes: int, *, skill: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something of the labels, and these; all classes are there, the last one is rare."""
    labels = np.concatenate([np.arange(classes), random.integers(0, max(2, classes - 1), images - classes)])
    logits = random.normal(size=(images, classes)) + skill * np.eye(classes)[labels]
    rows = np.exp(logits)
    return rows / rows.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_scikit_learn(name: str, classes: int, seed: int) -> None:
    rows, labels = predicted(np.random.default_rng(seed), 90, classes)
    rows = rows.round(2) + 1e-9
    rows /= rows.sum(axis=1, keepdims=True)
    assert scores.influence(rows, labels)[name].mean() == pytest.approx(ORACLES[name](rows, labels))


def test_every_score_is_tested() -> None:
    assert {score.name for score in scores.SCORES} == {*ORACLES, "calibration_error"}


def test_the_calibration_error_is_that_of_its_definition() -> None:
    rows, labels = predicted(np.random.default_rng(0), 200, 3)
    confidence, right = rows.max(axis=1), rows.argmax(axis=1) == labels
    expected = 0.0
    for bin_ in range(15):
        inside = (confidence > bin_ / 15) & (confidence <= (bin_ + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert score_values.calibration_error(rows, labels).mean() == pytest.approx(100 * expected)


@pytest.mark.parametrize("name", ["macro_f1", "balanced_accuracy"])
@pytest.mark.parametrize("classes", [3, 4])
def test_values_are_those_of_leaving_images_out_one_by_one(name: str, classes: int) -> None:
    rows, labels = predicted(np.random.default_rng(1), 40, classes)
    score = {"macro_f1": metrics.f1_score, "balanced_accuracy": metrics.recall_score}[name]

    def of(kept: np.ndarray) -> float:
        # a class leaves with its last image
        present = np.unique(labels[kept])
        given = {"labels": present, "average": "macro", "zero_division": 0}
        return float(100 * score(labels[kept], rows[kept].argmax(1), **given))

    assert np.bincount(labels).min() == 1
    rest = np.array([of(np.delete(np.arange(40), image)) for image in range(40)])
    whole = of(np.arange(40))
    expected = whole + 39 * (rest.mean() - rest)
    assert getattr(score_values, name)(rows, labels) == pytest.approx(expected)


def test_the_variance_of_an_area_is_that_of_delong() -> None:
    random = np.random.default_rng(2)
    rows, labels = predicted(random, 60, 2)
    given = rows[:, 1].round(1)
    rows = np.stack([1 - given, given], axis=1)
    positive, negative = given[labels == 1], given[labels == 0]
    wins = np.array([[(a > b) + 0.5 * (a == b) for b in negative] for a in positive])
    expected = wins.mean(axis=1).var(ddof=1) / len(positive) + wins.mean(axis=0).var(ddof=1) / len(negative)
    values = score_values.auroc(rows, labels)
    assert values.mean() == pytest.approx(100 * wins.mean())
    assert values.var(ddof=1) / 60 == pytest.approx(1e4 * expected)


def over(
    random: np.random.Generator, seeds: int, images: int, classes: int, count: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Networks none of which is better, on new images: probabilities (seeds, images, classes) of each, and labels."""
    labels = random.integers(0, classes, images)
    image, found = random.normal(0, 1, (images, 1)), []
    for _ in range(count):
        skill = 1.5 + random.normal(0, 0.4, (seeds, 1, 1)) + image + random.normal(0, 0.5, (images, 1))
        logits = random.normal(0, 1, (seeds, images, classes)) + skill * np.eye(classes)[labels]
        rows = np.exp(logits)
        found.append(rows / rows.sum(axis=-1, keepdims=True))
    return found, labels


@pytest.mark.slow_unless(classes=2)
@pytest.mark.parametrize("classes", [2, 4])
def test_a_gain_that_is_not_there_is_seldom_found(classes: int) -> None:
    random = np.random.default_rng(classes)
    alarms = dict.fromkeys((score.name for score in scores.SCORES), 0)
    for _ in range(REPEATS):
        (baseline, variant), labels = over(random, 4, 200, classes, 2)
        found = scores.gains(scores.over_seeds(baseline, labels), scores.over_seeds(variant, labels), labels)
        for name, one in found.items():
            assert (one.p_value < 0.05) == (not one.low <= 0 <= one.high)
            alarms[name] += one.p_value < 0.05
    # 5 % of 400 are 20, with a standard deviation of 4.4
    assert max(alarms.values()) <= 33
    assert all(alarms[name] >= 4 for name in alarms if name != "calibration_error")


def test_accuracy_by_the_same_door() -> None:
    (baseline, variant), labels = over(np.random.default_rng(0), 4, 300, 3, 2)
    right = [one.argmax(axis=2) == labels for one in (baseline, variant)]
    found = scores.class_gains(*right, labels, 3)
    alone = [gain(right[0][:, labels == label], right[1][:, labels == label]) for label in range(3)]
    for one, expected in zip(found, alone, strict=True):
        assert one.points == pytest.approx(expected.points)
        # at once over three classes
        assert one.low < expected.low and one.high > expected.high


def test_a_class_without_test_images_is_left_out() -> None:
    (baseline, variant), labels = over(np.random.default_rng(0), 3, 100, 3, 2)
    keep = labels != 1
    baseline, variant, labels = baseline[:, keep], variant[:, keep], labels[keep]
    right = [one.argmax(axis=2) == labels for one in (baseline, variant)]
    assert [one is None for one in scores.class_gains(*right, labels, 3)] == [False, True, False]
    rows = scores.rows(scores.over_seeds(baseline, labels), scores.over_seeds(variant, labels), labels)
    assert all(np.isfinite(row["gain"]) for row in rows)


def test_a_single_class_has_no_area() -> None:
    (baseline, variant), labels = over(np.random.default_rng(0), 3, 50, 2, 2)
    labels = np.zeros_like(labels)
    rows = scores.rows(scores.over_seeds(baseline, labels), scores.over_seeds(variant, labels), labels)
    unknown = {row["name"] for row in rows if row["gain"] is None}
    assert unknown == {"auroc"}


@pytest.mark.parametrize("images", [12, 300])
def test_never_of_zero_width(images: int) -> None:
    labels = np.arange(images) % 3
    rows = np.eye(3)[labels] * 0.97 + 0.01
    same = scores.over_seeds([rows] * 3, labels)
    for row in scores.rows(same, same, labels):
        assert row["gain"] == 0
        assert row["interval95"][0] < 0 < row["interval95"][1]
        assert row["change"] == "unclear"


def test_a_single_seed_has_no_intervals() -> None:
    (baseline, variant), labels = over(np.random.default_rng(0), 1, 100, 3, 2)
    rows = scores.rows(scores.over_seeds(baseline, labels), scores.over_seeds(variant, labels), labels)
    assert {(row["interval95"] is None, row["p_value"], row["change"]) for row in rows} == {(True, None, None)}


def test_better_is_lower_for_losses() -> None:
    random = np.random.default_rng(0)
    (baseline, _), labels = over(random, 4, 400, 3, 2)
    better = baseline + 2 * np.eye(3)[labels]
    better /= better.sum(axis=-1, keepdims=True)
    rows = {
        row["name"]: row
        for row in scores.rows(scores.over_seeds(baseline, labels), scores.over_seeds(better, labels), labels)
    }
    assert rows["log_loss"]["gain"] < 0 and not rows["log_loss"]["higher_is_better"]
    assert rows["macro_f1"]["gain"] > 0 and rows["macro_f1"]["higher_is_better"]
    assert {rows[name]["change"] for name in ("log_loss", "macro_f1", "auroc", "balanced_accuracy")} == {"better"}


def test_folds_and_groups_widen_intervals() -> None:
    (baseline, variant), labels = over(np.random.default_rng(0), 4, 200, 2, 2)
    tables = [scores.over_seeds(one, labels) for one in (baseline, variant)]
    alone = scores.gains(*tables, labels)
    in_folds, in_groups = (
        scores.gains(*tables, labels, folds=5),
        scores.gains(*tables, labels, groups=np.arange(200) // 10),
    )
    for name, one in alone.items():
        assert in_folds[name].standard_error > one.standard_error
        assert in_groups[name].points == pytest.approx(one.points)


def test_a_thousand_classes() -> None:
    random = np.random.default_rng(0)
    rows, labels = predicted(random, 3000, 1000, skill=3.0)
    table = scores.over_seeds(itertools.repeat(rows, 2), labels)
    assert all(np.isfinite(values).all() for values in table.values())
