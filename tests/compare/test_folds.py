"""Comparisons in which every image is tested once for each seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convattn.compare
from convattn import reporting
from convattn.compare import timing
from convattn.compare.stats import detectable, gain
from convattn.errors import DataError, InvalidOption
from small_runs import write_images, write_network


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(reporting, "write", lambda results, folder: folder / "report.html")
    write_images(tmp_path / "data", count=12)
    backbone = f"{write_network(tmp_path)}:network"
    settings = {"backbone": backbone, "variants": "se", "seeds": 2, "epochs": 1, "batch_size": 8, "folds": 3}
    return {"data": tmp_path / "data", **settings, "out": tmp_path / "out", "quiet": True}


def test_every_image_is_tested_once_for_each_seed(options: dict[str, Any]) -> None:
    results = convattn.compare.run(**options)
    folder = options["out"] / "runs"
    names = [f"{name}-seed{seed}-fold{fold}" for name in ("baseline", "se") for seed in (0, 1) for fold in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for seed in range(2):
        tested: list[str] = []
        right = {"baseline": 0, "se": 0}
        for fold in range(3):
            for name in right:
                with np.load(folder / f"{name}-seed{seed}-fold{fold}" / "predictions.npz") as arrays:
                    paths = arrays["test_paths"].tolist()
                    assert not set(paths) & set(arrays["validation_paths"].tolist())
                    right[name] += int((arrays["test_probabilities"].argmax(axis=1) == arrays["test_labels"]).sum())
            tested += paths
        assert len(tested) == len(set(tested)) == 36
        assert results["baseline"]["scores"][seed] == pytest.approx(100 * right["baseline"] / 36)
        assert results["variants"][0]["scores"][seed] == pytest.approx(100 * right["se"] / 36)
    assert results["data"]["test"] == 36
    assert results["setting"]["folds"] == 3
    assert "--folds 3" in results["command"]


def test_each_image_has_the_answer_of_the_network_that_did_not_see_it(options: dict[str, Any]) -> None:
    from convattn.compare.options import parse
    from convattn.compare.results import probabilities
    from convattn.data import Images

    convattn.compare.run(**options)
    images = Images.load(options["out"])
    given = {name: options[name] for name in ("data", "backbone", "variants", "seeds", "epochs", "batch_size", "folds")}
    others = ("weights", "controls", "start", "image_size", "learning_rate", "flip", "smallest_gain")
    parsed = parse(**given, **dict.fromkeys(others), weight_decay=0.0, device="cpu", jobs=1)
    for seed, found in enumerate(probabilities(options["out"], "se", parsed, images)):
        for fold in range(3):
            with np.load(options["out"] / "runs" / f"se-seed{seed}-fold{fold}" / "predictions.npz") as arrays:
                for path, expected in zip(arrays["test_paths"].tolist(), arrays["test_probabilities"], strict=True):
                    assert np.array_equal(found[images.paths.index(path)], expected)


def test_they_are_proposed_for_few_test_images(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    asked = {**options, "folds": None, "quiet": False}
    convattn.compare.run(**asked)
    assert "with --folds 5, each of 36 images is tested" in capsys.readouterr().out
    convattn.compare.run(**{**options, "quiet": False, "out": options["out"].with_name("other")})
    assert "--folds 5" not in capsys.readouterr().out


@pytest.mark.parametrize("folds", [1, 0, 2.5])
def test_wrong_numbers_of_folds(options: dict[str, Any], folds: float) -> None:
    with pytest.raises(InvalidOption, match="folds must be 2 or more"):
        convattn.compare.run(**{**options, "folds": folds})


def test_more_folds_than_images_of_a_class(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"The class 'blue' has too few images for 13 folds: 12; take fewer folds"):
        convattn.compare.run(**{**options, "folds": 13})
    assert not options["out"].exists()


def test_the_interval_allows_for_training_sets_that_overlap() -> None:
    random = np.random.default_rng(0)
    baseline, variant = (random.random((4, 500)) < share for share in (0.7, 0.72))
    alone, corrected = gain(baseline, variant), gain(baseline, variant, folds=5)
    means = 100 * (variant.astype(float) - baseline).mean(axis=0)
    added = means.var(ddof=1) / 500 * 5 / 4
    assert corrected.standard_error**2 == pytest.approx(alone.standard_error**2 + added)
    assert corrected.standard_error_seeds == alone.standard_error_seeds
    assert corrected.high - corrected.low > alone.high - alone.low
    assert detectable(5, 1000) < detectable(5, 1000, folds=5) < detectable(5, 200)
    with pytest.raises(InvalidOption, match="at least 2 folds"):
        gain(baseline, variant, folds=1)
