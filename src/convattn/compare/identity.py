"""Modules that began at identity and hardly left it: what a comparison with them does not say."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from convattn import registry
from convattn.compare.verdicts import title
from convattn.nn import Gate
from convattn.train.controls import parts

# of the mean of |gate - 1| over sites, or of the change of a map relative to that map: what lets more than 99 % pass
# hardly differs from nothing at all
HARDLY = 0.01
# a decade, the step in which learning rates are searched first
FASTER = 10


def hardly_moved(name: str, sites: Sequence[Mapping[str, Any]], rate: float) -> str | None:
    """A sentence where what stands at the sites of a network hardly left identity, with a rate to try; or None.

    Only what began at identity is asked, which has a `strength`, and only what stands on maps: of a small change in the
    vector that a head pools, the classifier may make much.

    Args:
        name: of a variant or a control.
        sites: of each its `place`, `departure` and `strength`, see `convattn.train.gates.departures`.
        rate: the learning rate that they had.
    """
    moved = [site["departure"] for site in sites if site["place"] != "pool" and site["strength"] is not None]
    mean = fmean(moved) if moved else math.nan
    # nothing is said of numbers that are none
    if not mean < HARDLY:
        return None
    kind, variant = parts(name)
    of, are_gates = _on_maps(variant)
    much = f"{mean:.4f}" if mean >= 0.0001 else "below 0.0001"
    what = f"Its gates hardly moved (mean |gate − 1| {much})"
    if kind is not None or not are_gates:
        what = f"It hardly changes the maps (by {much} of their length)"
    nothing = f"says nothing about {of} itself" if kind is None else "has no such control"
    return (
        f"{what}, so this comparison {nothing}: try --gate-learning-rate {FASTER * rate:.3g}, {FASTER} times the "
        f"present rate."
    )


def headline(variants: Sequence[Mapping[str, Any]]) -> str:
    """What the headline ends with where variants hardly moved, if any did."""
    names = ", ".join(one["name"] for one in variants if one["hardly_moved"])
    return f" Nothing is said about {names}, which hardly moved." if names else ""


def _on_maps(variant: str) -> tuple[str, bool]:
    """The title of what a variant has on maps, heads left out, and whether all of that are gates."""
    entries = [registry.entry(name) for name in variant.split("+") if registry.is_known(name)]
    here = [one for one in entries if one.kind != "head"]
    are_gates = all(issubclass(one.module, Gate) for one in here)
    return title("+".join(one.name for one in here) or variant), bool(here) and are_gates
