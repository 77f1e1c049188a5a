"""What would change a verdict: more seeds or images, another smallest gain, and what the comparison did not ask.

Every sentence follows from numbers of the comparison, and holds if the gain stays what it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from convattn.compare.options import EPOCHS, FINE_TUNING_EPOCHS
from convattn.compare.stats import Gain, leaves, seeds_to_decide
from convattn.compare.verdicts import CANNOT_TELL, WORTH, Verdict, signed, word
from convattn.train.controls import ADAPTER, PLACEBO

# so many times the test images are the most that is proposed, in steps of a tenth
MOST_TIMES, STEP = 100, 1.1
# below so many test images, testing every image once is proposed
FEW_TESTS = 1000


def of_verdicts(
    found: Mapping[str, Verdict], smallest: float, *, grouped: bool = False, most: int | None = None, again: bool = True
) -> list[str]:
    """A line for each variant: what decides an open verdict, and at which smallest gain it is another.

    Args:
        found: the verdicts by variant.
        smallest: the smallest gain in points that is worth it.
        grouped: whether groups are the units of the interval.
        most: the number of seeds that the comparison was planned to end at, if it was planned.
        again: whether seeds can be added to the comparison.
    """
    if found and all(one.gain.spread is None for one in found.values()):
        return ["A single seed gives no interval: with 2 seeds there is one, with 5 a much narrower one."]
    lines = []
    for name, one in found.items():
        open_ones = [_deciding(one.gain, smallest, grouped, most, again)] if one.word == CANNOT_TELL else []
        lines.append(f"{name}: " + " ".join([*open_ones, _turning(one.gain, smallest)]))
    return lines


def of_comparison(results: Mapping[str, Any]) -> list[str]:
    """What is true of all variants: a leak, a control that is missing, few test images, a recipe that is one of many.

    Args:
        results: of a comparison, whose keys may be null where something is not known.
    """
    lines = []
    if results["leak"]:
        lines.append(
            f"Without the {results['leak']['test_images']:,} test images that are in the training images as well, "
            f"every gain may be another."
        )
    return [*lines, *_controls(results), *_images(results), *_recipe(results["setting"])]


def images_to_decide(found: Gain, smallest: float) -> int | None:
    """The number of test images, or of their groups, at which the interval would leave `smallest`, with the same seeds.

    What single seeds contribute is taken to stay as it is, so that it is rather too many than too few. None if more
    than a hundred times as many would be needed.
    """
    if found.spread is None:
        return None
    now = found.spread.df_images + 1
    for step in range(1, math.ceil(math.log(MOST_TIMES) / math.log(STEP)) + 1):
        count = _round_up(now * STEP**step)
        fewer = now / count
        later = replace(
            found.spread,
            images=found.spread.images * fewer,
            df_images=count - 1,
            third=found.spread.third * fewer**2,
        )
        if leaves(later, found, smallest):
            return count
    return None


def _deciding(found: Gain, smallest: float, grouped: bool, most: int | None, again: bool) -> str:
    if found.spread is None:
        return "a single seed decides nothing."
    ways = []
    seeds, needed = found.spread.df_seeds + 1, seeds_to_decide(found, smallest)
    if needed is not None:
        more = needed - seeds
        how = f" (--add-seeds {more})" if again and (most is None or needed <= most) else ""
        ways.append(f"about {more} more seed{'s' if more > 1 else ''}{how}")
    images = images_to_decide(found, smallest)
    if images is not None:
        unit = "groups of test images" if grouped else "test images"
        ways.append(f"about {images:,} {unit} in place of {found.spread.df_images + 1:,}")
    if not ways:
        return (
            f"neither more seeds nor more test images alone would soon decide it, since its gain of "
            f"{signed(found.points)} points is so near to {smallest:g}."
            if abs(found.points - smallest) < found.standard_error
            else "neither more seeds nor more test images alone would soon decide it; both together may."
        )
    return f"{' or '.join(ways)} would decide it, if its gain stays at {signed(found.points)} points."


def _turning(found: Gain, smallest: float) -> str:
    """The smallest gain at which the verdict is another; the interval holds for every one at once."""
    if found.low is None or found.high is None:
        return ""
    if word(found, smallest) == WORTH:
        return f"It stays worth it up to a smallest gain of {_below(found.low, smallest)} points."
    if found.low >= 0.01:
        enough = _below(found.low)
        return f"Were {enough} points enough for you (--smallest-gain {enough}), it would be worth it."
    if word(found, smallest) == CANNOT_TELL:
        needed = _above(found.high)
        return f"Did it take {needed} points for you (--smallest-gain {needed}), it would not be worth it."
    if found.high < 0:
        return "No smallest gain would make it worth it: it loses."
    return f"No smallest gain would make it worth it, since its interval begins at {signed(found.low)} points."


def _below(value: float, least: float = 0.0) -> str:
    """The greatest number of one decimal, or else of two, that a value reaches, not below the least."""
    one, two = (math.floor(value * scale + 1e-9) / scale for scale in (10, 100))
    return f"{one:g}" if one > 0 and one >= least else f"{max(two, least):g}"


def _above(value: float) -> str:
    """The least number of one decimal that is above a value."""
    return f"{(math.floor(value * 10 + 1e-9) + 1) / 10:g}"


def _round_up(value: float) -> int:
    """To two digits: 1,234.5 -> 1,300."""
    scale: int = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return math.ceil(value / scale) * scale


def _controls(results: Mapping[str, Any]) -> list[str]:
    plain = results["baseline"]["parameters"]
    sizes = [one["parameters"] for one in results["variants"]]
    # a module without parameters has no such control
    if plain is None or any(size is None or size <= plain for size in sizes):
        return []
    kinds = {control["kind"] for control in results["controls"]}
    missing = [kind for kind in (PLACEBO, ADAPTER) if kind not in kinds]
    if not missing:
        return []
    said = {
        PLACEBO: "No placebo was run, which is the same module fed a constant",
        ADAPTER: "No adapter was run, which is as many parameters without attention",
    }[missing[0]]
    if len(missing) == 2:
        said = "No placebo and no adapter was run, so that a gain may come from the added parameters alone"
    return [f"{said}: --controls {','.join(missing)} trains what a variant has to exceed, in another comparison."]


def _images(results: Mapping[str, Any]) -> list[str]:
    data, setting = results["data"], results["setting"]
    counts: Sequence[int | None] = [data[part] for part in ("train", "validation", "test")]
    known = [count for count in counts if count is not None]
    if len(known) < 3 or known[2] >= FEW_TESTS or setting.get("folds"):
        return []
    return [
        f"{known[2]:,} test images are few: with --folds 5, in another comparison, each of the {sum(known):,} images "
        f"is tested by networks that were not trained on it."
    ]


def _recipe(setting: Mapping[str, Any]) -> list[str]:
    if setting["epochs"] is None or setting["backbone"] is None:
        return []
    usual = EPOCHS if setting["weights"] == "none" else FINE_TUNING_EPOCHS
    epochs = f"{setting['epochs']} epoch{'' if setting['epochs'] == 1 else 's'}"
    short = f", where {usual} are usual (--epochs {usual})" if setting["epochs"] < usual else ""
    return [
        f"These verdicts are for {setting['backbone']} and this recipe, {epochs} of training{short}: another network, "
        f"a longer training or another learning rate may have another gain."
    ]
