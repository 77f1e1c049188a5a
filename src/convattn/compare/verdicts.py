"""The verdict in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convattn.compare.looks import level_of_look
from convattn.compare.stats import Gain, gain, seeds_to_decide, simultaneous

WORTH, NOT_WORTH, CANNOT_TELL = "worth it", "not worth it", "cannot tell"
TITLES = {
    "se": "squeeze-and-excitation",
    "cbam": "CBAM",
    "channel": "CBAM's channel attention",
    "spatial": "CBAM's spatial attention",
    "dual": "dual pooling",
    "avg": "average pooling",
    "max": "max pooling",
    "avgmax": "average and max pooling",
    "concat": "concatenated pooling",
}


@dataclass(frozen=True)
class Verdict:
    """One of the three words on a variant, the gain with its simultaneous interval, and both in a sentence."""

    word: str
    gain: Gain
    sentence: str


def verdict(
    baseline: np.ndarray,
    variants: Mapping[str, np.ndarray],
    *,
    smallest_gain: float = 0.5,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    looks: Sequence[int] | None = None,
    most_seeds: int | None = None,
    costs: Mapping[str, str] | None = None,
    folds: int | None = None,
) -> dict[str, Verdict]:
    """Whether each variant is worth it: all intervals hold at once, and over all looks that were taken.

    Args:
        baseline: boolean (seeds, images), True where the prediction is right.
        variants: the same for each variant, by name. One that was decided at an earlier look has the first seeds only.
        smallest_gain: the smallest gain in percentage points that is worth it.
        groups: for each image its group, see `stats.gain`.
        confidence: with which all intervals hold.
        looks: the numbers of seeds at all looks at this comparison so far, the last one included; None for one look
            after which none will follow.
        most_seeds: the number of seeds at which the looks end, if it was planned.
        costs: for a variant what it costs in words, put behind the gain.
        folds: how many there were, where every image was tested, see `stats.gain`.

    Raises:
        InvalidOption: arrays of different or wrong shape.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> right = rng.random((5, 2000)) < 0.8
        >>> verdict(right, {"cbam": right | (rng.random((5, 2000)) < 0.2)})["cbam"].word
        'worth it'
    """
    level = 1 - confidence ** (1 / max(1, len(variants)))
    alone, shares = {}, {}
    for name, right in variants.items():
        seeds = len(right) if looks is not None and len(right) in looks else len(baseline)
        alone[name] = gain(baseline[:seeds], right, groups=groups, confidence=confidence, folds=folds)
        if looks is not None:
            own = [look for look in looks if look <= seeds]
            shares[name] = level_of_look(own, level=level, most=most_seeds) / level
    found = {}
    for name, one in simultaneous(alone, confidence=confidence, shares=shares).items():
        said = sentence(name, one, len(variants[name]), smallest_gain, (costs or {}).get(name, ""))
        found[name] = Verdict(word(one, smallest_gain), one, said)
    return found


def title(variant: str) -> str:
    """The name of a variant in words."""
    return " with ".join(TITLES.get(name, name) for name in variant.split("+"))


def word(found: Gain, smallest: float) -> str:
    """`worth it` if the interval's low end reaches the smallest gain that matters, `not worth it` if its high end stays
    below, else `cannot tell`."""
    if found.low is None or found.high is None:
        return CANNOT_TELL
    if found.low >= smallest:
        return WORTH
    return NOT_WORTH if found.high < smallest else CANNOT_TELL


def sentence(variant: str, found: Gain, seeds: int, smallest: float, cost: str) -> str:
    """The verdict of a variant as a sentence or a few; `cost` is put behind the gain."""
    name = title(variant)
    name = name[0].upper() + name[1:]
    if found.low is None or found.high is None:
        return (
            f"{name}: cannot tell from a single seed, which gave {signed(found.points)} points{cost}. "
            f"At least 2 seeds are needed, 5 are better."
        )
    return " ".join(part for part in (_said(name, found, seeds, smallest, cost), _could_see(found, smallest)) if part)


def _said(name: str, found: Gain, seeds: int, smallest: float, cost: str) -> str:
    """The word and the gain with its interval, and what would settle an open question."""
    low, high = found.low or 0.0, found.high or 0.0
    digits = _digits(low, high, smallest)
    ends = f"{signed(low, digits)} to {signed(high, digits)}"
    interval = f"{signed(found.points, digits)} points (95 % interval {ends})"
    found_word = word(found, smallest)
    if found_word == WORTH:
        return f"{name} is worth it: it gains {interval}{cost}."
    if found_word == NOT_WORTH:
        effect = "makes the network worse" if high < 0 else f"helps, by {_range(low, high, digits)}" if low > 0 else ""
        more = f" It {effect}{'' if high < 0 else ', which is less'}." if effect else ""
        return f"{name} is not worth it: a gain of {interval} stays below {smallest:g}{cost}.{more}"
    settle = _settles(found, seeds, smallest)
    if low > 0:
        return (
            f"{name} helps, by {_range(low, high, digits)} (95 % interval around "
            f"{signed(found.points, digits)}){cost}; whether by {smallest:g} cannot be told yet: that takes {settle}."
        )
    return f"{name}: cannot tell. The gain is {interval}{cost}; to settle it takes {settle}."


def _digits(low: float, high: float, smallest: float) -> int:
    """As many decimals as tell an end of the interval from the smallest gain that matters: 0.47 is not 0.5."""
    apart = all((round(end, 1) < smallest) == (end < smallest) for end in (low, high))
    return 1 if apart else 2


def _range(low: float, high: float, digits: int) -> str:
    return f"{signed(low, digits).lstrip('+')} to {signed(high, digits).lstrip('+')} points"


def _settles(found: Gain, seeds: int, smallest: float) -> str:
    needed = seeds_to_decide(found, smallest)
    if needed is None:
        return "more test images, since more seeds alone would not do soon"
    more = needed - seeds
    return f"about {more} more seed{'s' if more > 1 else ''} if the gain stays as it is"


def _could_see(found: Gain, smallest: float) -> str:
    """What was out of sight: said where it matters."""
    seen = found.detectable
    if seen is None or word(found, smallest) == WORTH:
        return ""
    return f"The smallest gain that it would probably have seen is {signed(seen).lstrip('+')} points."


def times(latency: Mapping[str, Any]) -> str:
    """What a variant costs in time, to be put behind the other costs in its sentence."""
    parts = []
    for kind, what in (("train_step", "the training step"), ("inference", "the inference of one image")):
        ratio = latency.get(f"{kind}_ratio")
        if ratio and kind in latency.get("unclear", ()):
            parts.append(f"{what} unclear ({ratio['low']:.2f} to {ratio['high']:.2f} times)")
        elif ratio:
            parts.append(f"{ratio['median']:.2f} times {what}")
    return f", {' and '.join(parts)}" if parts else ""


def headline(verdicts: Sequence[tuple[str, str]], smallest: float) -> str:
    """One sentence over all variants, from (variant, word) pairs."""
    groups = {word: [name for name, found in verdicts if found == word] for word in (WORTH, CANNOT_TELL, NOT_WORTH)}
    if groups[WORTH]:
        said = f"Worth it here: {', '.join(groups[WORTH])}."
    elif groups[CANNOT_TELL] and groups[NOT_WORTH]:
        said = "Nothing is shown to be worth it here."
    elif groups[CANNOT_TELL]:
        which = "any of them" if len(verdicts) > 1 else verdicts[0][0]
        said = f"Cannot tell yet whether {which} gains {smallest:g} points."
    elif len(verdicts) > 1:
        return f"None of them is worth it here: each gains less than {smallest:g} points."
    else:
        return f"{verdicts[0][0]} is not worth it here: it gains less than {smallest:g} points."
    if groups[CANNOT_TELL] and len(groups[CANNOT_TELL]) < len(verdicts):
        said += f" Cannot tell yet: {', '.join(groups[CANNOT_TELL])}."
    if groups[NOT_WORTH]:
        said += f" Not worth it: {', '.join(groups[NOT_WORTH])}."
    return said


def signed(points: float, digits: int = 1) -> str:
    """Points with a sign and one decimal: +0.4, −1.2, 0.0; two decimals below a tenth, or where asked for."""
    rounded = round(points, digits) if abs(points) >= 0.1 else round(points, 2)
    digits = digits if abs(points) >= 0.1 or rounded == 0 else 2
    text = f"{abs(rounded):.{digits}f}"
    return text if rounded == 0 else f"{'+' if rounded > 0 else '−'}{text}"
