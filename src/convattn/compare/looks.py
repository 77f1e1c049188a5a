"""How much of the level of an interval each look at a comparison may spend.

Whoever looks, adds seeds and looks again has several chances to be misled. The level is therefore a budget.

Where the most seeds are planned, it is spent as Lan and DeMets have it (Biometrika 70, 1983): by s of m seeds up to the
share (s / m) ** 3 (Kim and DeMets, Biometrika 74, 1987), and a look's interval is as wide as keeps the probability
that any interval so far misses the truth within that share.

Where nothing is planned, how many seeds are added depends on what was seen, for which such widths do not allow: where
as many are added as an open verdict proposes, they miss the truth in up to 6 % of comparisons. So each look has a level
of its own, and their sum is the budget (Bonferroni): the first look spends 80 % of it, each later one 80 % of what is
left.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from scipy import special

from convattn.errors import InvalidOption

POWER = 3
FIRST = 0.8
PATHS = 200_000
# fewer paths than this tell no level: then it is the rate itself, which is on the safe side
FEWEST = 50


def level_of_look(looks: Sequence[int], *, level: float = 0.05, most: int | None = None) -> float:
    """The level of the interval at the last look, so that all looks together miss the truth at a rate of `level`.

    Args:
        looks: the numbers of seeds at all looks so far, the last one included.
        level: the budget of one variant.
        most: the number of seeds at which it ends, planned before the first look; None where nothing was planned.

    Raises:
        InvalidOption: fewer seeds than before, fewer than two, or more than planned.

    Example:
        >>> round(level_of_look([5]), 6)
        0.04
        >>> round(level_of_look([5, 8]), 6)
        0.008
    """
    if not looks or looks[0] < 2 or any(b < a for a, b in pairwise(looks)):
        raise InvalidOption(f"looks: expected numbers of seeds from 2 on, none below the one before, got {looks!r}.")
    if most is not None and looks[-1] > most:
        raise InvalidOption(f"looks: {looks[-1]} seeds are more than the {most} that were planned.")
    # a look at no more seeds shows the same again
    distinct = tuple(dict.fromkeys(looks))
    if most is None:
        return level * FIRST * (1 - FIRST) ** (len(distinct) - 1)
    return _levels(distinct, level, most)[-1]


def spent(seeds: int, most: int) -> float:
    """The share of the budget that is spent by a look at so many of the most seeds."""
    return float((seeds / most) ** POWER)


@cache
def _levels(looks: tuple[int, ...], level: float, most: int) -> tuple[float, ...]:
    """The level of every look, from paths of comparisons in which there is no gain and seeds alone differ.

    That is the hardest case: images, which all looks share, make them alike.
    """
    alive = np.ones(PATHS, dtype=bool)
    found: list[float] = []
    before = 0.0
    for number, (seeds, statistic) in enumerate(zip(looks, _paths(looks), strict=True), 1):
        now = level * spent(seeds, most)
        # of those that have not been misled yet as many as the share allows
        count = int((now - before) * PATHS)
        if number > 1 and count >= FEWEST:
            left = statistic[alive]
            limit = float(np.partition(left, -count - 1)[-count - 1])
            found.append(2 * float(special.stdtr(seeds - 1, -limit)))
        else:
            found.append(now - before)
            limit = -float(special.stdtrit(seeds - 1, found[-1] / 2))
        alive &= statistic <= limit
        before = now
    return tuple(found)


def _paths(looks: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Student's statistic without its sign at each look, over paths.

    Of normal values, the sum and the squares around the mean are independent: normal, and chi-square with one degree of
    freedom fewer than values. So a look takes two draws, however many seeds it adds.
    """
    random = np.random.default_rng(0)
    total, squares, done = np.zeros(PATHS), np.zeros(PATHS), 0
    for seeds in looks:
        new = seeds - done
        added = math.sqrt(new) * random.standard_normal(PATHS)
        total += added
        squares += added**2 / new
        if new > 1:
            squares += random.chisquare(new - 1, PATHS)
        done = seeds
        yield np.abs(total) / np.sqrt(seeds * (squares - total**2 / seeds) / (seeds - 1))
