"""The three words at their boundaries, and every sentence."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from convattn import registry
from convattn.compare.stats import Gain, Spread, gain
from convattn.compare.verdicts import (
    CANNOT_TELL,
    NOT_WORTH,
    WORTH,
    headline,
    sentence,
    signed,
    title,
    verdict,
    word,
)

COST = ", at 1.10 times the time of a training step and 2.0 % more parameters"


def found(low: float, high: float, *, images_error: float = 0.0) -> Gain:
    """A gain over five seeds with this interval."""
    half = (high - low) / 2
    error = half / scipy_stats.t.ppf(0.975, 4) if not images_error else 1e-6
    spread = Spread(error**2, images_error**2, 4, 1000)
    return Gain((low + high) / 2, low, high, 0.5, spread.standard_error, error, images_error, 0.05, spread)


SINGLE = Gain(0.7, None, None, None, 1.0, float("nan"), 1.0)


@pytest.mark.parametrize(
    ("low", "high", "smallest", "expected"),
    [
        (0.5, 2.0, 0.5, WORTH),
        (0.6, 2.0, 0.5, WORTH),
        (0.499, 2.0, 0.5, CANNOT_TELL),
        (-1.0, 0.5, 0.5, CANNOT_TELL),
        (-1.0, 0.499, 0.5, NOT_WORTH),
        (-3.0, -1.0, 0.5, NOT_WORTH),
        (0.1, 0.4, 0.5, NOT_WORTH),
        (-1.0, 1.0, 0.5, CANNOT_TELL),
        (0.0, 1.0, 0.0, WORTH),
        (-1.0, 0.0, 0.0, CANNOT_TELL),
        (-1.0, -0.1, 0.0, NOT_WORTH),
    ],
)
def test_word(low: float, high: float, smallest: float, expected: str) -> None:
    assert word(found(low, high), smallest) == expected


def test_the_words() -> None:
    assert (WORTH, NOT_WORTH, CANNOT_TELL) == ("worth it", "not worth it", "cannot tell")
    assert word(SINGLE, 0.5) == CANNOT_TELL


def test_worth_it() -> None:
    assert sentence("se", found(0.6, 1.8), 5, 0.5, COST) == (
        "Squeeze-and-excitation is worth it: it gains +1.2 points (95 % interval +0.6 to +1.8), at 1.10 times the time "
        "of a training step and 2.0 % more parameters."
    )


def test_not_worth_it() -> None:
    assert sentence("cbam", found(-0.3, 0.2), 5, 0.5, COST) == (
        "CBAM is not worth it: a gain of −0.05 points (95 % interval −0.3 to +0.2) stays below 0.5, at 1.10 times the "
        "time of a training step and 2.0 % more parameters. The smallest gain that it would probably have seen is 0.3 "
        "points."
    )


def test_worse() -> None:
    said = sentence("cbam", found(-2.0, -1.0), 5, 0.5, COST)
    assert said.startswith("CBAM is not worth it: a gain of −1.5 points (95 % interval −2.0 to −1.0) stays below 0.5")
    assert " It makes the network worse. " in said


def test_help_that_is_too_little() -> None:
    said = sentence("cbam", found(0.1, 0.4), 5, 0.5, COST)
    assert said.startswith("CBAM is not worth it: a gain of +0.2 points (95 % interval +0.1 to +0.4) stays below 0.5")
    assert " It helps, by 0.1 to 0.4 points, which is less. " in said


def test_cannot_tell_and_what_would_settle_it() -> None:
    # half the width of 0.4 shrinks to the distance of 0.3: with 7 seeds
    assert sentence("dual", found(0.4, 1.2), 5, 0.5, COST) == (
        f"Dual pooling helps, by 0.4 to 1.2 points (95 % interval around +0.8){COST}; whether by 0.5 cannot be told "
        f"yet: that takes about 2 more seeds if the gain stays as it is. "
        f"The smallest gain that it would probably have seen is 0.5 points."
    )


def test_cannot_tell_and_more_seeds_would_not_help() -> None:
    said = sentence("dual", found(-1.0, 1.6, images_error=0.663), 5, 0.5, COST)
    assert said == (
        f"Dual pooling: cannot tell. The gain is +0.3 points (95 % interval −1.0 to +1.6){COST}; to settle it takes "
        f"more test images, since more seeds alone would not do soon. "
        f"The smallest gain that it would probably have seen is 1.9 points."
    )


def test_one_more_seed_is_one_seed() -> None:
    # just open: a single seed more narrows the interval enough
    assert "about 1 more seed if" in sentence("se", found(0.48, 1.0), 5, 0.5, "")


def test_a_single_seed() -> None:
    assert sentence("se", SINGLE, 1, 0.5, COST) == (
        f"Squeeze-and-excitation: cannot tell from a single seed, which gave +0.7 points{COST}. At least 2 seeds are "
        f"needed, 5 are better."
    )


def test_the_word_is_in_the_sentence() -> None:
    for low, high in itertools.product((-2.0, -0.2, 0.2, 0.5, 0.8), (-0.1, 0.3, 0.5, 0.9, 3.0)):
        if low < high:
            gain = found(low, high)
            said = sentence("se", gain, 5, 0.5, COST)
            negated = "not worth it" in said
            unclear = "cannot tell" in said or "cannot be told" in said
            expected = CANNOT_TELL if unclear else NOT_WORTH if negated else WORTH if "is worth it" in said else ""
            assert word(gain, 0.5) == expected


def runs(seed: int, points: float, *, seeds: int = 5, images: int = 2000) -> np.ndarray:
    random = np.random.default_rng(seed)
    shares = 0.7 + points / 100 + random.normal(0, 0.002, seeds)
    return random.random((seeds, images)) < shares[:, None]


def test_a_verdict_on_arrays() -> None:
    variants = {"se": runs(1, 10.0), "cbam": runs(2, -10.0), "dual": runs(3, 0.5)}
    found = verdict(runs(0, 0.0), variants, costs={"se": COST})
    assert {name: one.word for name, one in found.items()} == {"se": WORTH, "cbam": NOT_WORTH, "dual": CANNOT_TELL}
    assert COST in found["se"].sentence and "points" in found["dual"].sentence
    alone = gain(runs(0, 0.0), variants["se"])
    assert found["se"].gain.points == alone.points and found["se"].gain.low < alone.low
    # of one variant and one look it is the interval itself
    (only,) = verdict(runs(0, 0.0), {"se": variants["se"]}).values()
    assert (only.gain.low, only.gain.high, only.gain.p_value) == pytest.approx((alone.low, alone.high, alone.p_value))


def test_looks_widen_the_interval() -> None:
    baseline, variants = runs(0, 0.0, seeds=8), {"se": runs(1, 1.0, seeds=8)}
    widths = []
    for looks in (None, [8], [5, 8], [3, 5, 8]):
        (one,) = verdict(baseline, variants, looks=looks).values()
        assert (one.gain.p_value < 0.05) == (not one.gain.low <= 0 <= one.gain.high)
        widths.append(one.gain.high - one.gain.low)
    assert widths == sorted(widths) and len(set(widths)) == 4


def test_titles() -> None:
    assert title("se") == "squeeze-and-excitation"
    assert title("cbam+dual") == "CBAM with dual pooling"
    assert title("unheard") == "unheard"
    assert all(title(name) != name for name in registry.names())


HEADLINES = {
    (WORTH,): "Worth it here: a.",
    (NOT_WORTH,): "a is not worth it here: it gains less than 0.5 points.",
    (CANNOT_TELL,): "Cannot tell yet whether a gains 0.5 points.",
    (WORTH, WORTH): "Worth it here: a, b.",
    (WORTH, NOT_WORTH): "Worth it here: a. Not worth it: b.",
    (WORTH, CANNOT_TELL): "Worth it here: a. Cannot tell yet: b.",
    (NOT_WORTH, NOT_WORTH): "None of them is worth it here: each gains less than 0.5 points.",
    (CANNOT_TELL, CANNOT_TELL): "Cannot tell yet whether any of them gains 0.5 points.",
    (NOT_WORTH, CANNOT_TELL): "Nothing is shown to be worth it here. Cannot tell yet: b. Not worth it: a.",
    (CANNOT_TELL, NOT_WORTH): "Nothing is shown to be worth it here. Cannot tell yet: a. Not worth it: b.",
    (WORTH, CANNOT_TELL, NOT_WORTH): "Worth it here: a. Cannot tell yet: b. Not worth it: c.",
    (NOT_WORTH, WORTH, CANNOT_TELL): "Worth it here: b. Cannot tell yet: c. Not worth it: a.",
}


@pytest.mark.parametrize("words", HEADLINES)
def test_headline(words: tuple[str, ...]) -> None:
    assert headline(list(zip("abc", words, strict=False)), 0.5) == HEADLINES[words]


def test_every_variant_is_named_once_or_none_is() -> None:
    for words in itertools.product((WORTH, NOT_WORTH, CANNOT_TELL), repeat=3):
        names = ("first", "second", "third")
        said = headline(list(zip(names, words, strict=True)), 0.5)
        counts = {said.count(name) for name in names}
        assert counts == ({0} if set(words) in ({CANNOT_TELL}, {NOT_WORTH}) else {1})


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (0.44, "+0.4"),
        (-1.25, "−1.2"),
        (0.0, "0.0"),
        (0.004, "0.0"),
        (-0.004, "0.0"),
        (0.05, "+0.05"),
        (-0.05, "−0.05"),
        (0.1, "+0.1"),
        (12.345, "+12.3"),
        (-100.0, "−100.0"),
    ],
)
def test_signed(points: float, expected: str) -> None:
    assert signed(points) == expected


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-1.0, 0.47, "is not worth it: a gain of −0.27 points (95 % interval −1.00 to +0.47) stays below 0.5"),
        (0.54, 1.0, "is worth it: it gains +0.8 points (95 % interval +0.5 to +1.0)"),
        (0.46, 1.0, "helps, by 0.46 to 1.00 points (95 % interval around +0.73)"),
        (0.46, 0.49, "It helps, by 0.46 to 0.49 points, which is less."),
    ],
)
def test_an_end_just_short_of_the_smallest_gain_is_not_rounded_to_it(low: float, high: float, words: str) -> None:
    assert words in sentence("se", found(low, high), 5, 0.5, "")
