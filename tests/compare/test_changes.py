"""What would change a verdict: every sentence follows from the numbers."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from convattn.compare import changes
from convattn.compare.stats import Gain, Spread, seeds_to_decide
from convattn.compare.verdicts import Verdict, verdict, word


def judged(
    points: float, by_seeds: float = 0.2, by_images: float = 0.1, *, seeds: int = 5, images: int = 2000
) -> Verdict:
    """A verdict on a gain of so many points, with its standard errors from seeds and from images."""
    spread = Spread(by_seeds**2, by_images**2, seeds - 1, images - 1)
    low, high = spread.ends(points, 0.05)
    error = spread.standard_error
    found = Gain(points, low, high, spread.p_value(points), error, by_seeds, by_images, 0.05, spread)
    return Verdict(word(found, 0.5), found, "")


def line(found: Verdict, **options: Any) -> str:
    (only,) = changes.of_verdicts({"mine": found}, 0.5, **options)
    return only


def test_a_verdict_of_worth_it_turns_where_its_interval_begins() -> None:
    found = judged(5.0)
    assert found.word == "worth it"
    limit = float(re.fullmatch(r"mine: It stays worth it up to a smallest gain of ([\d.]+) points\.", line(found))[1])
    assert limit <= found.gain.low < limit + 0.1


def test_an_open_verdict_tells_seeds_and_images_that_decide_it() -> None:
    found = judged(1.2, 0.2, 0.3)
    assert found.word == "cannot tell"
    needed = seeds_to_decide(found.gain, 0.5)
    said = line(found)
    assert needed > 6 and f"about {needed - 5} more seeds (--add-seeds {needed - 5})" in said
    assert "about 1 more seed (--add-seeds 1)" in line(judged(1.05, 0.2, 0.05))
    images = int(re.search(r"about ([\d,]+) test images in place of 2,000", said)[1].replace(",", ""))
    assert images == changes.images_to_decide(found.gain, 0.5) > 2000
    # as many would do, and a tenth fewer would not
    for count, decides in ((images, True), (images * 0.88, False)):
        times = 2000 / count
        spread = replace(found.gain.spread, images=found.gain.spread.images * times, df_images=round(count) - 1)
        low, high = replace(spread, third=spread.third * times**2).ends(found.gain.points, found.gain.level)
        assert (not low <= 0.5 <= high) == decides
    assert "test images" not in line(found, grouped=True).replace("groups of test images", "")


def test_no_seeds_are_proposed_that_cannot_be_added() -> None:
    found = judged(1.2, 0.25, 0.2)
    assert "--add-seeds" not in line(found, again=False)
    assert "--add-seeds" not in line(found, most=5)
    assert "--add-seeds" in line(found, most=50)


def test_a_gain_at_the_smallest_is_decided_by_nothing() -> None:
    said = "mine: neither more seeds nor more test images alone would soon decide it, since its gain of +0.5 points"
    assert line(judged(0.5)).startswith(said)


def test_where_seeds_agree_images_alone_decide() -> None:
    said = line(judged(2.0, 0.2, 1.5, seeds=50))
    assert re.match(
        r"mine: about [\d,]+ test images in place of 2,000 would decide it, if its gain stays at \+2\.0", said
    )


@pytest.mark.parametrize("points", [-4.0, -0.3])
def test_no_smallest_gain_makes_a_loss_worth_it(points: float) -> None:
    found = judged(points)
    assert found.word == "not worth it"
    if found.gain.high < 0:
        assert line(found) == "mine: No smallest gain would make it worth it: it loses."
    else:
        assert "No smallest gain would make it worth it, since its interval begins at −" in line(found)


def test_a_gain_that_is_too_small_is_enough_for_others() -> None:
    found = judged(0.3, 0.05, 0.02)
    assert found.word == "not worth it" and found.gain.low > 0.01
    enough = float(re.search(r"Were ([\d.]+) points enough for you \(--smallest-gain \1\), it would", line(found))[1])
    assert 0 < enough <= found.gain.low


def test_a_single_seed_decides_nothing() -> None:
    right = np.random.default_rng(0).random((1, 100)) < 0.8
    found = verdict(right, {"mine": right})["mine"]
    assert changes.of_verdicts({"a": found, "b": found}, 0.5) == [
        "A single seed gives no interval: with 2 seeds there is one, with 5 a much narrower one."
    ]


# what is true of all variants


def results(**changed: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "leak": None,
        "baseline": {"parameters": 1000},
        "variants": [{"parameters": 1100}],
        "controls": [{"kind": "placebo"}, {"kind": "adapter"}],
        "data": {"train": 8000, "validation": 1000, "test": 2000},
        "setting": {"epochs": 30, "backbone": "resnet20", "weights": "none", "folds": None},
    }
    return {**usual, **changed}


def test_nothing_is_missing() -> None:
    (only,) = changes.of_comparison(results())
    assert only.startswith("These verdicts are for resnet20 and this recipe, 30 epochs of training")


def test_missing_controls_are_proposed() -> None:
    both = changes.of_comparison(results(controls=[]))[0]
    assert "No placebo and no adapter was run" in both and "--controls placebo,adapter" in both
    one = changes.of_comparison(results(controls=[{"kind": "adapter"}, {"kind": "noise"}]))[0]
    assert "No placebo was run" in one and "--controls placebo trains" in one
    # nothing was added that a control could have as well
    assert len(changes.of_comparison(results(controls=[], variants=[{"parameters": 1000}]))) == 1
    assert len(changes.of_comparison(results(controls=[], variants=[{"parameters": None}]))) == 1


def test_few_test_images_propose_folds() -> None:
    few = {"train": 500, "validation": 100, "test": 150}
    said = changes.of_comparison(results(data=few))[0]
    assert "150 test images are few: with --folds 5" in said and "each of the 750 images" in said
    folds = {"epochs": 30, "backbone": "resnet20", "weights": "none", "folds": 5}
    assert len(changes.of_comparison(results(data=few, setting=folds))) == 1


def test_a_leak_comes_first_and_a_short_training_is_told() -> None:
    short = {"epochs": 1, "backbone": "resnet20", "weights": "none", "folds": None}
    first, last = changes.of_comparison(results(leak={"test_images": 50}, setting=short))
    assert first.startswith("Without the 50 test images that are in the training images as well")
    assert "1 epoch of training, where 30 are usual (--epochs 30)" in last


def test_of_predictions_the_recipe_is_not_known() -> None:
    data = {"train": None, "validation": None, "test": 100}
    setting = {"epochs": None, "backbone": None, "weights": None}
    unknown = results(baseline={"parameters": None}, variants=[{"parameters": None}], data=data, setting=setting)
    assert changes.of_comparison(unknown) == []
