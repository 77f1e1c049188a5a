"""The verdict in words."""

from collections.abc import Sequence

from convattn.compare.stats import Gain, seeds_to_decide

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
    interval = f"{signed(found.points)} points (95 % interval {signed(found.low)} to {signed(found.high)})"
    verdict = word(found, smallest)
    if verdict == WORTH:
        return f"{name} is worth it: it gains {interval}{cost}."
    if verdict == NOT_WORTH:
        loses = " It makes the network worse." if found.high < 0 else ""
        return f"{name} is not worth it: a gain of {interval} stays below {smallest:g}{cost}.{loses}"
    needed = seeds_to_decide(found, seeds, smallest)
    more = (needed or 0) - seeds
    settle = (
        f"About {more} more seed{'s' if more > 1 else ''} would settle it if the gain stays as it is."
        if needed
        else "More seeds alone would not settle it soon: more test images would."
    )
    lead = f" It helps, but whether by {smallest:g} points is open." if found.low > 0 else ""
    return f"{name}: cannot tell. The gain is {interval}{cost}.{lead} {settle}"


def time_sentence(latency: dict[str, dict[str, float]]) -> str:
    """What a variant costs in time, as a sentence."""
    step, one = (latency[f"{kind}_ratio"]["median"] for kind in ("train_step", "inference"))
    return f"A training step takes {step:.2f} times as long, inference of one image {one:.2f} times."


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


def signed(points: float) -> str:
    """Points with a sign and one decimal: +0.4, −1.2, 0.0; two decimals below a tenth."""
    rounded = round(points, 1) if abs(points) >= 0.1 else round(points, 2)
    digits = 1 if abs(points) >= 0.1 or rounded == 0 else 2
    text = f"{abs(rounded):.{digits}f}"
    return text if rounded == 0 else f"{'+' if rounded > 0 else '−'}{text}"
