"""The learning rate of each network, chosen on validation images with the same small budget for each.

Every network is trained at the same few rates, for as many epochs as it is compared with (a shorter training would
choose for another schedule), with seeds that no comparison has. The best rate is that of the highest mean validation
accuracy; of several, that of the lowest loss. These runs are trials, which have no test images (`train.RunSpec`). The
noise is the baseline with other seeds, and takes its rate.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from convattn.train import RunSpec, finished, trial_name
from convattn.train.checkpoint import BASELINE
from convattn.train.controls import NOISE
from convattn.train.store import RUNS

TUNE = ("lr",)
# a decade to both sides, evenly on a logarithmic scale, as Bengio (2012, arXiv:1206.5533) advises
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
# beyond those of runs and of the noise; more than one, since all that are compared share the luck of the choice
SEEDS = (2_000_000, 2_000_001)


def grid(rate: float) -> list[float]:
    """The learning rates that are tried, the asked one in the middle."""
    return [rate if factor == 1 else float(f"{factor * rate:.4g}") for factor in FACTORS]


def trials(firsts: Sequence[RunSpec]) -> list[RunSpec]:
    """All runs of the tuning, from one run of each network."""
    return [
        replace(
            spec,
            seed=seed,
            audit=False,
            trial=True,
            recipe=replace(spec.recipe, learning_rate=rate),
        )
        for seed in SEEDS
        for spec in firsts
        for rate in grid(spec.recipe.learning_rate)
        if spec.variant != NOISE
    ]


def are_done(names: Sequence[str], rate: float, folder: Path) -> bool:
    """Whether all trials of the networks have their results."""
    each = [_results(name, one, folder) for name in names if name != NOISE for one in grid(rate)]
    return all(result is not None for results in each for result in results)


def chosen(names: Sequence[str], rate: float, folder: Path) -> dict[str, Any]:
    """What the trials found, once all of them are done.

    Args:
        names: of the networks.
        rate: the learning rate in the middle of the grid.
        folder: of the comparison.

    Returns:
        `grid`; `seeds`; of the `networks` each its `name`, `learning_rate`, mean `validation_accuracy` in percent and
        `validation_loss` at each rate of the grid (None where the training diverged), and whether the rate is `at_edge`
        of the grid; `warnings`; and a `sentence`.
    """
    tried = grid(rate)
    networks = [
        _network(name, tried, [[one or {} for one in _results(name, at, folder)] for at in tried])
        for name in names
        if name != NOISE
    ]
    said = ", ".join(f"{one['name']} {one['learning_rate']:g}" for one in networks)
    return {
        "grid": tried,
        "seeds": list(SEEDS),
        "networks": networks,
        "warnings": list(_warnings(networks, tried)),
        "sentence": (
            f"Each network chose its learning rate on validation images, from the same {len(tried)} and with as many "
            f"trainings ({len(tried) * len(SEEDS)}) of seeds that are not compared: {said}."
        ),
    }


def rates(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The learning rate of every network, from what `chosen` returned."""
    known = {one["name"]: one["learning_rate"] for one in found["networks"]}
    return {name: known[BASELINE if name == NOISE else name] for name in names}


def _results(name: str, rate: float, folder: Path) -> list[dict[str, Any] | None]:
    return [finished(folder / RUNS / trial_name(name, seed, rate)) for seed in SEEDS]


def _network(name: str, tried: Sequence[float], found: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What is known of a network from its results at every rate."""
    accuracies, losses = (_means(found, key) for key in ("validation_accuracy", "validation_loss"))
    ranks = [
        (-math.inf, -math.inf) if accuracy is None or loss is None else (accuracy, -loss)
        for accuracy, loss in zip(accuracies, losses, strict=True)
    ]
    best = max(range(len(tried)), key=ranks.__getitem__)
    if accuracies[best] is None:
        # its runs diverge as well, most likely, and are counted as such
        best = 0
    return {
        "name": name,
        "learning_rate": tried[best],
        "validation_accuracy": accuracies,
        "validation_loss": losses,
        "at_edge": best in (0, len(tried) - 1),
    }


def _means(found: Sequence[Sequence[Mapping[str, Any]]], key: str) -> list[float | None]:
    """The mean over seeds at every rate; None where the training of one of them diverged."""
    return [None if any(one[key] is None for one in seeds) else fmean(one[key] for one in seeds) for seeds in found]


def _warnings(networks: Sequence[Mapping[str, Any]], tried: Sequence[float]) -> Iterator[str]:
    lost = [network["name"] for network in networks if set(network["validation_accuracy"]) == {None}]
    if lost:
        yield (
            f"The training of {', '.join(lost)} diverged at every learning rate from {tried[0]:g} to {tried[-1]:g}, "
            f"and the lowest is taken: lower --learning-rate, which is in their middle."
        )
    networks = [network for network in networks if network["name"] not in lost]
    for edge, which in ((tried[0], "lower"), (tried[-1], "higher")):
        here = [one["name"] for one in networks if one["learning_rate"] == edge]
        if here:
            yield (
                f"The best learning rate of {', '.join(here)}, {edge:g}, is at the edge of those that were tried, so "
                f"that a {which} one may be better: compare anew with --learning-rate {edge:g}, which is then in the "
                f"middle."
            )
