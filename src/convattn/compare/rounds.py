"""Rounds of seeds: which looks were taken at a comparison, and whether another round may still decide anything.

Every look at a comparison spends from one budget, see `looks`; so they are kept in its folder, in `looks.json`, and
once more in `results.json`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from convattn import files
from convattn.compare.looks import level_of_look
from convattn.compare.stats import chance_to_decide
from convattn.compare.verdicts import CANNOT_TELL, Verdict
from convattn.errors import ComparisonError
from convattn.reporting import RESULTS

LOOKS = "looks.json"
# a variant that will be decided in fewer than one of ten continuations is not worth the wait
HOPELESS = 0.1
UNTIL = ("decided",)


@dataclass(frozen=True)
class Looks:
    """The numbers of seeds at all looks at a comparison, and that at which it was planned to end, if it was planned.

    `ended` has the number of seeds of each variant that was over at an earlier look than the last one.
    """

    seeds: tuple[int, ...] = ()
    most: int | None = None
    ended: Mapping[str, int] = field(default_factory=dict)


def looks(folder: Path, most: int | None) -> Looks:
    """The looks so far; where there is none yet, it is planned to end at `most` seeds."""
    content = files.read_intact(folder / LOOKS)
    if content is None:
        # where there are no results yet, no look was shown to anybody
        shown = (files.read_intact(folder / RESULTS) or {}).get("looks")
        content = shown and {"seeds": shown["seeds"], "most": shown["most_seeds"], "ended": shown["ended"]}
    if content is None:
        return Looks((), most)
    return Looks(tuple(content["seeds"]), content["most"], content["ended"])


def record(folder: Path, before: Looks, seeds: int, ended: Mapping[str, int]) -> Looks:
    """Keep that the comparison was looked at with a number of seeds, and which variants had ended before."""
    taken = before.seeds if seeds in before.seeds else (*before.seeds, seeds)
    found = Looks(taken, before.most, dict(ended))
    if found != before:
        files.write_json(folder / LOOKS, asdict(found))
    return found


def check(folder: Path, seeds: int, most: int | None) -> None:
    """Raise `ComparisonError` where the folder was looked at with more seeds already, or was planned to end before.

    Args:
        folder: of the comparison.
        seeds: at the next look; where seeds are added until it is decided, the next look is after the last one.
        most: at the last look that may follow, if that is planned.
    """
    before = looks(folder, most)
    if before.seeds and most is None and seeds < before.seeds[-1]:
        raise ComparisonError(
            f"{folder} was looked at with {before.seeds[-1]} seeds already: give --seeds {before.seeds[-1]} or more, "
            f"or another --out. Nothing was changed."
        )
    if before.most is not None and max(seeds, most or 0) > before.most:
        raise ComparisonError(
            f"{folder} was planned to end at {before.most} seeds, and its intervals hold for no more: give "
            f"--max-seeds {before.most}, or another --out. Nothing was changed."
        )


def over(found: Mapping[str, Verdict], taken: Looks, most: int, smallest: float) -> set[str]:
    """The variants that are decided, or hopeless: more seeds will hardly decide them."""
    return {
        name
        for name, one in found.items()
        if name in taken.ended
        or one.word != CANNOT_TELL
        or taken.seeds[-1] >= most
        or chance(one, taken, most, smallest, len(found)) < HOPELESS
    }


def chance(found: Verdict, taken: Looks, most: int, smallest: float, variants: int) -> float:
    """The probability that the last planned look decides on a variant, were its gain what it seems to be."""
    alone = 1 - 0.95 ** (1 / variants)
    level = level_of_look((*taken.seeds, most), level=alone, most=taken.most)
    return chance_to_decide(found.gain, smallest, seeds=most, level=level)
