"""Runs whose training diverged: they are counted as what they are, and the option that mends it is named."""

from collections.abc import Mapping, Sequence
from typing import Any

from convattn.compare.options import Options
from convattn.train.checkpoint import BASELINE


def listed(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the runs of a network those that diverged: `seed`, `epoch`, `reason`, and `scored_epoch`, null for chance."""
    diverged = [run for run in runs if run["diverged"]]
    return [{"seed": run["seed"], **run["diverged"], "scored_epoch": run["chosen_epoch"]} for run in diverged]


def sentence(name: str, results: Mapping[str, Sequence[Mapping[str, Any]]], options: Options) -> str | None:
    """What is to be said of a network some of whose runs diverged, with what mends it; None where none did."""
    diverged = listed(results[name])
    if not diverged:
        return None
    chance = sum(run["scored_epoch"] is None for run in diverged)
    ways = [f"{len(diverged) - chance} by the best epoch before"] if chance < len(diverged) else []
    ways += [f"{chance} by chance, as no epoch was complete"] if chance else []
    return (
        f"{len(diverged)} of {len(results[name])} runs of {name} diverged and are scored as such, "
        f"{' and '.join(ways)}: lower {option(name, results, options)}."
    )


def option(name: str, results: Mapping[str, Sequence[Mapping[str, Any]]], options: Options) -> str:
    """The option that made a network diverge: that of the gates where the baseline, which has none, did not."""
    gates = options.gate_learning_rate
    rate = options.recipe(name).learning_rate
    if name != BASELINE and gates is not None and gates > rate and not listed(results[BASELINE]):
        return f"--gate-learning-rate (it was {gates:g})"
    return f"--learning-rate (it was {rate:g})"
