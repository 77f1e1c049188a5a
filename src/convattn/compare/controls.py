"""Controls in a comparison: which there are, which seeds they have, and what they say about a variant.

Their intervals are their own: they are not among the variants that are looked at together.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from convattn import checks
from convattn.compare import stats, verdicts
from convattn.errors import InvalidOption
from convattn.train.checkpoint import BASELINE
from convattn.train.controls import ADAPTER, KINDS, NOISE, PLACEBO, WIDER, parts

# added to a seed for the noise: beyond any number of seeds, so that none is the seed of another run
NOISE_SEEDS = 1_000_000
# a control is of a variant's size if what it adds is within this share of what the variant adds
SAME_SIZE = 0.1
THINGS = {
    PLACEBO: "the same module fed a constant",
    ADAPTER: "an adapter of its size",
    WIDER: "a wider network of its size",
}


def parse(controls: str | Sequence[str] | None, weights: str | None) -> tuple[str, ...]:
    """The kinds of controls that were asked for.

    Raises:
        InvalidOption: no such control, one twice, or one that loaded weights do not allow.
    """
    names = controls.split(",") if isinstance(controls, str) else list(controls or ())
    names = [name.strip() for name in names if name.strip() and name.strip() != "none"]
    for name in names:
        checks.choice("compare", "each of controls", name, KINDS)
        if names.count(name) > 1:
            raise InvalidOption(f"compare: controls names {name!r} twice.")
    if WIDER in names and weights is not None:
        raise InvalidOption(
            "compare: the control wider is for random weights, since loaded ones fit one width only; take adapter, "
            "which has the variant's number of parameters and works with loaded weights."
        )
    return tuple(names)


def expanded(kinds: Sequence[str], variants: Sequence[str]) -> tuple[str, ...]:
    """The names of the controls: one of each kind for each variant, and the noise once."""
    each = [f"{kind}:{variant}" for variant in variants for kind in kinds if kind != NOISE]
    return (*each, NOISE) if NOISE in kinds else tuple(each)


def seed_of(name: str, seed: int) -> int:
    """The seed of a run: for the noise one that no other run has."""
    return seed + NOISE_SEEDS if name == NOISE else seed


def compared(
    names: Sequence[str],
    right: Mapping[str, np.ndarray],
    costs: Mapping[str, Any],
    *,
    smallest: float,
    confidence: float,
    groups: np.ndarray | None = None,
    folds: int | None = None,
) -> list[dict[str, Any]]:
    """What each control gains over the baseline, and what its variant gains over it.

    Args:
        names: of the controls.
        right: boolean (seeds, images) for the baseline, every variant and every control.
        costs: with the parameters of all of them but the noise.
        smallest: the smallest gain in points that is worth it.
        confidence: of the intervals.
        groups: for each image its group, see `stats.gain`.
        folds: see `stats.gain`.
    """
    gain = partial(stats.gain, confidence=confidence, groups=groups, folds=folds)
    found = []
    for name in names:
        told = _noise(right, smallest, gain) if name == NOISE else _control(name, right, costs, gain)
        scores = [float(score) for score in 100 * right[name].mean(axis=1)]
        found.append({"name": name, **told, "scores": scores, "mean_score": fmean(scores)})
    return found


def caution(variant: str, controls: Sequence[Mapping[str, Any]]) -> str:
    """What a variant's sentence begins with, the controls that it is not shown to exceed, if any."""
    said = ""
    for exceeded, words in ((False, "does not exceed"), (None, "is not shown to exceed")):
        things = [
            f"{one['thing']} ({verdicts.signed(one['gain_points'])} points)"
            for one in controls
            if one["of"] == variant and one["exceeded"] is exceeded
        ]
        said += f"{_capital(variant)} {words} {_listed(things)}. " if things else ""
    return said


def _control(
    name: str, right: Mapping[str, np.ndarray], costs: Mapping[str, Any], gain_of: Callable[..., stats.Gain]
) -> dict[str, Any]:
    kind, variant = parts(name)
    baseline = right[BASELINE][: len(right[variant])]
    gain, own = gain_of(baseline, right[name]), gain_of(baseline, right[variant])
    excess = gain_of(right[name], right[variant])
    thing = _thing(str(kind), name, variant, costs)
    return {
        "kind": kind,
        "of": variant,
        **_told(gain),
        "excess_points": excess.points,
        "excess_interval95": _ends(excess),
        "added_parameters": costs[name]["parameters"] - costs[BASELINE]["parameters"],
        "sentence": (
            f"{_capital(variant)} gains {verdicts.signed(own.points)} points, "
            f"{thing} gains {verdicts.signed(gain.points)}{_interval(gain)}."
        ),
        "thing": thing,
        "exceeded": _exceeded(excess),
        "alarming": False,
        "verdict": None,
    }


def _exceeded(excess: stats.Gain) -> bool | None:
    """Whether a variant exceeds its control; None where that is open."""
    if excess.points <= 0:
        return False
    return True if excess.low is not None and excess.low > 0 else None


def _thing(kind: str, name: str, variant: str, costs: Mapping[str, Any]) -> str:
    added, own = (costs[one]["parameters"] - costs[BASELINE]["parameters"] for one in (name, variant))
    if abs(added - own) <= SAME_SIZE * own:
        return THINGS[kind]
    return f"{THINGS[kind].removesuffix(' of its size')} ({added:,} more parameters, where it has {own:,})"


def _noise(right: Mapping[str, np.ndarray], smallest: float, gain_of: Callable[..., stats.Gain]) -> dict[str, Any]:
    gain = gain_of(right[BASELINE], right[NOISE])
    word = verdicts.word(gain, smallest)
    said = f"the baseline with other seeds gains {verdicts.signed(gain.points)} points{_interval(gain)} over itself"
    alarming = word == verdicts.WORTH
    return {
        "kind": NOISE,
        "of": None,
        **_told(gain),
        "excess_points": None,
        "excess_interval95": None,
        "added_parameters": 0,
        "verdict": word,
        "sentence": (
            f"Noise alone is called worth it here: {said}. No verdict of this comparison can be trusted."
            if alarming
            else f"Noise: {said}: {word}, as it should be."
        ),
        "alarming": alarming,
        "thing": None,
        "exceeded": None,
    }


def _capital(variant: str) -> str:
    title = verdicts.title(variant)
    return title[0].upper() + title[1:]


def _listed(things: Sequence[str]) -> str:
    *first, last = things
    return f"{', '.join(first)} and {last}" if first else last


def _told(gain: stats.Gain) -> dict[str, Any]:
    return {"gain_points": gain.points, "interval95": _ends(gain), "p_value": gain.p_value}


def _ends(gain: stats.Gain) -> list[float] | None:
    return None if gain.low is None or gain.high is None else [gain.low, gain.high]


def _interval(gain: stats.Gain) -> str:
    if gain.low is None or gain.high is None:
        return ""
    return f" (95 % interval {verdicts.signed(gain.low)} to {verdicts.signed(gain.high)})"
