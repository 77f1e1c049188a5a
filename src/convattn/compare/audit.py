"""What would have been reported, had the epoch been chosen on test images: for `--audit-selection` only.

The epoch of a run that is compared is chosen on validation images; nothing here has a part in it.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from convattn.compare.verdicts import signed, title
from convattn.train.checkpoint import BASELINE

# how an epoch may be chosen: ours, that of many papers and repositories, and none at all
VALIDATION, TEST, LAST = "validation", "test", "last"
RULES = (VALIDATION, TEST, LAST)


def audited(results: Mapping[str, Sequence[Mapping[str, Any]]], weights: Sequence[int]) -> list[dict[str, Any]]:
    """The mean score of each network by each rule, and what it gains over the baseline by that rule.

    Args:
        results: of every network, the baseline among them, those of all its runs, with `test_accuracy` at every epoch.
        weights: for each run of the baseline how many images it was tested on; they differ where there are folds.

    Returns:
        Of each network its `name`, `mean_scores` in percent and `gain_points`, both by `validation`, `test` and `last`
        (the gain is None of the baseline), and a `sentence` (None of the baseline).
    """
    found = []
    for name, runs in results.items():
        own = _means(runs, weights)
        # over the same runs
        plain = _means(results[BASELINE][: len(runs)], weights)
        gains = None if name == BASELINE else {rule: own[rule] - plain[rule] for rule in RULES}
        said = None if gains is None else _sentence(name, gains)
        found.append({"name": name, "mean_scores": own, "gain_points": gains, "sentence": said})
    return found


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """By how much the choice on test images raises all scores, in a sentence."""
    rises = [one["mean_scores"][TEST] - one["mean_scores"][VALIDATION] for one in found]
    return (
        f"With its epoch chosen on test images, a network would score {signed(fmean(rises)).lstrip('+')} points higher "
        f"on average, which no new images would confirm."
    )


def _means(runs: Sequence[Mapping[str, Any]], weights: Sequence[int]) -> dict[str, float]:
    """The mean score of a network by each rule."""
    return {
        rule: float(np.average([_score(run, rule) for run in runs], weights=weights[: len(runs)])) for rule in RULES
    }


def _score(run: Mapping[str, Any], rule: str) -> float:
    tested = [line["test_accuracy"] for line in run["history"]]
    if not tested:
        # it diverged in its first epoch, and is scored by chance
        return float(run["score"])
    place = {VALIDATION: run["chosen_epoch"] - 1, TEST: int(np.argmax(tested)), LAST: -1}[rule]
    return float(tested[place])


def _sentence(name: str, gains: Mapping[str, float]) -> str:
    return (
        f"Chosen on test, {title(name)} would have been reported with {signed(gains[TEST])} points; chosen on "
        f"validation it is {signed(gains[VALIDATION])}, after the last epoch {signed(gains[LAST])}."
    )
