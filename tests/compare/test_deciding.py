"""Adding seeds until it is decided, or as many as are proposed, must not mislead more often than one look."""

import math
from collections.abc import Mapping

import numpy as np
import pytest

from convattn.compare.rounds import Looks, over
from convattn.compare.stats import seeds_to_decide
from convattn.compare.verdicts import CANNOT_TELL, Verdict, verdict

REPEATS = 600
IMAGES, SMALLEST, MOST = 300, 0.5, 12
# how far seeds differ, seeds on one image, and a network on some kinds of image, in units of a latent score
MIXES = {"seeds": (0.3, 0.3, 0.0), "seeds by images": (0.02, 1.0, 0.0), "all": (0.1, 0.7, 0.3)}


def networks(random: np.random.Generator, mix: str, count: int, seeds: int) -> list[np.ndarray]:
    """Runs of networks none of which is better than another in the mean over all seeds and images."""
    by_seed, by_both, by_network = MIXES[mix]
    image = random.normal(1.0, 1.0, IMAGES)
    return [
        image
        + random.normal(0, by_network / math.sqrt(2), IMAGES)
        + random.normal(0, by_seed, (seeds, 1))
        + random.normal(0, by_both, (seeds, IMAGES))
        > 0
        for _ in range(count)
    ]


def look(
    runs: list[np.ndarray], looks: list[int], most: int | None, ended: Mapping[str, int] | None = None
) -> dict[str, Verdict]:
    baseline, *variants = (right[: looks[-1]] for right in runs)
    named = {str(number): right[: (ended or {}).get(str(number))] for number, right in enumerate(variants)}
    return verdict(baseline, named, smallest_gain=SMALLEST, looks=looks, most_seeds=most)


def misleads(found: dict[str, Verdict]) -> bool:
    return any(not one.gain.low <= 0 <= one.gain.high for one in found.values())


def until_decided(runs: list[np.ndarray]) -> tuple[bool, float]:
    """Whether any look misled, and the mean number of seeds of a variant; what is over gets no more."""
    wrong, looks, ended = False, [], {}
    for seeds in range(3, MOST + 1):
        looks.append(seeds)
        found = look(runs, looks, MOST, ended)
        wrong |= misleads(found)
        ended = {name: ended.get(name, seeds) for name in over(found, Looks(tuple(looks), MOST, ended), MOST, SMALLEST)}
        if len(ended) == len(found):
            break
    return wrong, float(np.mean(list(ended.values())))


def as_proposed(runs: list[np.ndarray], most_looks: int = 4) -> tuple[bool, int]:
    """Whether any look misled, and the number of looks, where as many seeds are added as an open verdict proposes."""
    wrong, looks = False, [3]
    while True:
        found = look(runs, looks, None)
        wrong |= misleads(found)
        needed = [
            seeds_to_decide(one.gain, SMALLEST, most=len(runs[0])) for one in found.values() if one.word == CANNOT_TELL
        ]
        more = max((seeds for seeds in needed if seeds is not None), default=None)
        if more is None or len(looks) == most_looks:
            return wrong, len(looks)
        looks.append(more)


# a family of five takes long, and `test_stats` has one
each_count = pytest.mark.parametrize("count", [1, pytest.param(5, marks=pytest.mark.slow)])


@pytest.mark.slow
@each_count
@pytest.mark.parametrize("mix", MIXES)
def test_seeds_until_it_is_decided(mix: str, count: int) -> None:
    random = np.random.default_rng(5)
    found = [until_decided(networks(random, mix, 1 + count, MOST)) for _ in range(REPEATS // count)]
    wrong, ended = np.mean(found, axis=0)
    assert wrong <= 0.065
    # and it saves runs
    assert 3 < ended < MOST


@pytest.mark.slow_unless(mix="seeds by images")
@each_count
@pytest.mark.parametrize("mix", MIXES)
def test_as_many_seeds_as_are_proposed(mix: str, count: int) -> None:
    random = np.random.default_rng(6)
    found = [as_proposed(networks(random, mix, 1 + count, 30)) for _ in range(REPEATS // count)]
    wrong, looks = np.mean(found, axis=0)
    assert wrong <= 0.065
    # it is looked at more than once
    assert looks > 1.2


@pytest.mark.slow
def test_the_same_looks_without_a_budget_mislead() -> None:
    """The simulation can tell."""
    random, wrong = np.random.default_rng(6), 0
    for _ in range(REPEATS):
        baseline, variant = networks(random, "seeds", 2, MOST)
        wrong += any(misleads(verdict(baseline[:seeds], {"one": variant[:seeds]})) for seeds in range(3, MOST + 1))
    assert wrong / REPEATS > 0.1
