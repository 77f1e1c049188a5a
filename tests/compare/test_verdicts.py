"""The three words at their boundaries, and every sentence."""

import itertools

import pytest
from scipy import stats as scipy_stats

from convattn import registry
from convattn.compare.stats import Gain
from convattn.compare.verdicts import CANNOT_TELL, NOT_WORTH, WORTH, headline, sentence, signed, title, word

COST = ", at 1.10 times the time of a training step and 2.0 % more parameters"


def found(low: float, high: float, *, images_error: float = 0.0) -> Gain:
    """A gain over five seeds with this interval."""
    error = (high - low) / 2 / scipy_stats.t.ppf(0.975, 4)
    return Gain((low + high) / 2, low, high, 0.5, error, error, images_error)


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
        "time of a training step and 2.0 % more parameters."
    )


def test_worse() -> None:
    said = sentence("cbam", found(-2.0, -1.0), 5, 0.5, COST)
    assert said.startswith("CBAM is not worth it: a gain of −1.5 points (95 % interval −2.0 to −1.0) stays below 0.5")
    assert said.endswith(" It makes the network worse.")


def test_cannot_tell_and_what_would_settle_it() -> None:
    # half the width of 0.4 shrinks to the distance of 0.3: with 7 seeds
    assert sentence("dual", found(0.4, 1.2), 5, 0.5, "") == (
        "Dual pooling: cannot tell. The gain is +0.8 points (95 % interval +0.4 to +1.2). It helps, but whether by 0.5 "
        "points is open. About 2 more seeds would settle it if the gain stays as it is."
    )


def test_cannot_tell_and_more_seeds_would_not_help() -> None:
    said = sentence("dual", found(-1.0, 1.6, images_error=0.6), 5, 0.5, COST)
    assert said == (
        f"Dual pooling: cannot tell. The gain is +0.3 points (95 % interval −1.0 to +1.6){COST}. "
        f"More seeds alone would not settle it soon: more test images would."
    )


def test_one_more_seed_is_one_seed() -> None:
    # just open: a single seed more narrows the interval enough
    said = sentence("se", found(0.48, 1.0), 5, 0.5, "")
    assert "1 more seed would settle it" in said


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
            assert word(gain, 0.5) == (
                CANNOT_TELL
                if "cannot tell" in said
                else NOT_WORTH
                if negated
                else WORTH
                if "is worth it" in said
                else ""
            )


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
