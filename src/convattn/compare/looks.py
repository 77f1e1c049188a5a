"""How much of the level of an interval each look at a comparison may spend.

Whoever looks, adds seeds and looks again has several chances to be misled. The level is therefore a budget (Lan and
DeMets, Biometrika 70, 1983): by look k it is spent up to a share that the number of seeds tells, and a look's interval
is as wide as keeps the probability that any interval so far misses the truth within that share.

Where the most seeds are planned, the share by s of m seeds is (s / m) ** 1.5 (Kim and DeMets, Biometrika 74, 1987).
Where nothing is planned, the first look spends 80 % of the budget, and each later one 80 % of what is left.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from scipy import special

from convattn.errors import InvalidOption

POWER = 1.5
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
        >>> level_of_look([5])
        0.04
        >>> 0.008 < level_of_look([5, 8]) < 0.04
        True
    """
    if not looks or looks[0] < 2 or any(b < a for a, b in pairwise(looks)):
        raise InvalidOption(f"looks: expected numbers of seeds from 2 on, none below the one before, got {looks!r}.")
    if most is not None and looks[-1] > most:
        raise InvalidOption(f"looks: {looks[-1]} seeds are more than the {most} that were planned.")
    # a look at no more seeds shows the same again
    return _levels(tuple(dict.fromkeys(looks)), level, most)[-1]


def spent(looks: Sequence[int], most: int | None = None) -> float:
    """The share of the budget that is spent by the last look."""
    distinct = tuple(dict.fromkeys(looks))
    return 1 - (1 - FIRST) ** len(distinct) if most is None else float((distinct[-1] / most) ** POWER)


@cache
def _levels(looks: tuple[int, ...], level: float, most: int | None) -> tuple[float, ...]:
    """The level of every look, from paths of comparisons in which there is no gain and seeds alone differ.

    That is the hardest case: images, which all looks share, make them alike.
    """
    alive = np.ones(PATHS, dtype=bool)
    found: list[float] = []
    before = 0.0
    for number, (seeds, statistic) in enumerate(zip(looks, _paths(looks), strict=True), 1):
        now = level * spent(looks[:number], most)
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
