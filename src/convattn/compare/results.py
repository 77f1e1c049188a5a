"""Everything that the report says, from the folders of the runs."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import convattn
from convattn.compare import (
    audit,
    changes,
    controls,
    diverging,
    identity,
    leaks,
    scores,
    stats,
    timing,
    tuning,
    verdicts,
)
from convattn.compare import folder as folders
from convattn.compare.options import Options
from convattn.compare.rounds import Looks
from convattn.data import Images, Split, fold_of, overview
from convattn.train import finished, functions, run_name
from convattn.train.checkpoint import BASELINE
from convattn.train.store import RUNS

SCHEMA = 2
CONFIDENCE = 0.95
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "pillow")


def assemble(
    options: Options,
    images: Images,
    folder: Path,
    starts: dict[str, float],
    costs: dict[str, Any],
    looks: Looks,
) -> dict[str, Any]:
    """The results of a comparison whose runs are all done, at the last of the looks."""
    options, asked = replace(options, seeds=looks.seeds[-1], ended=looks.ended), options
    results = {name: [finished(run) or {} for run in runs_of(folder, name, options)] for name in options.names}
    right = rights(folder, options.names, options, images)
    parts = overview(images, options.folds)
    labels = images.labels[parts.test]
    baseline = _common(BASELINE, results, right, starts, costs)
    # with what was measured, apart from what the same command gives again to the bit
    baseline["latency"] = {**baseline["latency"], "note": timing.note(costs)}
    baseline["per_class_accuracy"] = by_class(100.0 * right[BASELINE], labels, len(images.classes))
    groups = leaks.units(images, options.folds, leaks.search(images, options.folds, folder))
    said = {name: _cost(name, costs) for name in options.variants}
    tested = {name: right[name] for name in (BASELINE, *options.variants)}
    found = judged(tested, options.smallest_gain, looks, groups, said, folds=options.folds)
    within: dict[str, Any] = {"groups": groups, "confidence": CONFIDENCE, "folds": options.folds}
    controlled = _controlled(options, results, right, costs, within)
    scored = {name: scores.over_seeds(probabilities(folder, name, options, images), labels) for name in tested}
    variants = []
    for name, verdict in found.items():
        caution, moved = controls.caution(name, controlled), _hardly_moved(name, results[name], options)
        timed = said[name] + verdicts.times(costs[name]["latency"])
        seeds = options.seeds_of(name)
        sentence = verdicts.sentence(name, verdict.gain, seeds, options.smallest_gain, timed)
        variants.append(
            {
                **_common(name, results, right, starts, costs),
                **told(verdict, caution, moved),
                # with what it was made of, apart from what the same command gives again to the bit
                "latency": {**costs[name]["latency"], "sentence": _joined(caution, sentence, moved)},
                **per_class(right[BASELINE][:seeds], right[name], labels, len(images.classes), within),
                "other_scores": scores.rows(scores.first(scored[BASELINE], seeds), scored[name], labels, **within),
                "gates": _gates([result["gates"] for result in results[name]]),
                "hardly_moved": moved,
            }
        )
    data = _data(options, images, parts, folder)
    leak = leaks.leak(data["duplicates"], len(parts.test))
    headline = verdicts.headline([(v["name"], v["verdict"]) for v in variants], options.smallest_gain)
    headline += identity.headline(variants)
    diverged = [line for name in options.names if (line := diverging.sentence(name, results, options))]
    headline = " ".join([headline, *diverged])
    for variant in variants if leak else []:
        for place in (variant, variant["latency"]):
            place["sentence"] = f"Were all test images new: {place['sentence']}"
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "convattn": convattn.__version__,
        "headline": leaks.warning(leak) if leak else headline,
        "leak": leak,
        "data": data,
        "setting": _setting(options, images, parts, results),
        "looks": _looks(looks, options),
        "command": asked.command(looks.seeds, folder),
        "versions": versions(),
        "could_see_points": could_see([verdict.gain for verdict in found.values()]),
        "baseline": baseline,
        "variants": variants,
        "controls": controlled,
        "tuning": tuning.chosen(options.names, options.learning_rate, folder) if options.tune else None,
        "audit": _audit(options, images, results) if options.audit_selection else None,
    }
    content["changes"] = [
        *changes.of_verdicts(found, options.smallest_gain, grouped=groups is not None, most=looks.most),
        *changes.of_comparison(content),
    ]
    return rounded(content)  # type: ignore[no-any-return]


def rights(folder: Path, names: Sequence[str], options: Options, images: Images) -> dict[str, np.ndarray]:
    """Which test images each network got right, (seeds, images)."""
    labels = images.labels[overview(images, options.folds).test]
    return {
        name: np.stack([one.argmax(axis=1) == labels for one in probabilities(folder, name, options, images)])
        for name in names
    }


def probabilities(folder: Path, name: str, options: Options, images: Images) -> Iterator[np.ndarray]:
    """The class probabilities of the test images by one network, seed after seed: (images, classes).

    With folds they are those of all images, each by the network that did not see it.
    """
    runs = runs_of(folder, name, options)
    if options.folds is None:
        yield from map(_test_probabilities, runs)
        return
    order = np.argsort(fold_of(images, options.folds), kind="stable")
    for first in range(0, len(runs), options.folds):
        found = np.concatenate([_test_probabilities(run) for run in runs[first : first + options.folds]])
        yield found[np.argsort(order)]


def runs_of(folder: Path, name: str, options: Options) -> list[Path]:
    """The folders of the runs of a network, seed after seed and in each fold after fold."""
    return [folder / RUNS / run_name(name, controls.seed_of(name, seed), fold) for seed, fold in options.parts_of(name)]


def judged(
    right: dict[str, np.ndarray],
    smallest: float,
    looks: Looks,
    groups: np.ndarray | None,
    costs: dict[str, str] | None = None,
    folds: int | None = None,
) -> dict[str, verdicts.Verdict]:
    """The verdicts at the last of the looks; `groups` are those of the test images."""
    return verdicts.verdict(
        right[BASELINE],
        {name: one for name, one in right.items() if name != BASELINE},
        smallest_gain=smallest,
        groups=groups,
        confidence=CONFIDENCE,
        # of a single seed there is no interval
        looks=[seeds for seeds in looks.seeds if seeds > 1] or None,
        most_seeds=looks.most,
        costs=costs,
        folds=folds,
    )


def _looks(looks: Looks, options: Options) -> dict[str, Any]:
    most = 0 if looks.most is None else looks.most
    saved = sum(max(0, most - options.seeds_of(name)) for name in options.names) * (options.folds or 1)
    number = len(looks.seeds)
    said = f"This is look {number} at this comparison, with {looks.seeds[-1]} seeds."
    if looks.most is not None:
        said += f" It was planned to end at {looks.most} seeds at the latest; ending early saved {saved} runs."
        early = [f"{name} with {seeds}" for name, seeds in looks.ended.items()]
        said += (
            f" Before that ended {', '.join(early)}, since more seeds would hardly change a verdict." if early else ""
        )
    elif number > 1:
        said += f" It was looked at with {', '.join(map(str, looks.seeds[:-1]))} before, which its intervals allow for."
    return {
        "seeds": list(looks.seeds),
        "most_seeds": looks.most,
        "ended": dict(looks.ended),
        "saved_runs": saved,
        "sentence": said,
    }


def _data(options: Options, images: Images, parts: Split, folder: Path) -> dict[str, Any]:
    labels = images.labels[parts.test]
    return {
        "name": Path(options.data).name,
        "classes": list(images.classes),
        "train": len(parts.train),
        "validation": len(parts.validation),
        "test": len(parts.test),
        "test_per_class": np.bincount(labels, minlength=len(images.classes)).tolist(),
        "fingerprint": folders.read_plan(folder)["fingerprints"]["images"],
        "left_out": [{"path": one.path, "reason": one.reason} for one in images.left_out],
        "notes": images.findings.sentences(len(images.labels)),
        **leaks.counts(images, parts),
        "duplicates": _duplicates(leaks.search(images, options.folds, folder), images),
    }


def _duplicates(duplicates: dict[str, Any], images: Images) -> dict[str, Any]:
    """What was found of duplicates, the clusters within the test images by their paths."""
    within = duplicates["within"]
    clusters = [[images.paths[index] for index in cluster] for cluster in within["clusters"]]
    return {**duplicates, "within": {**within, "clusters": clusters}}


def _setting(
    options: Options, images: Images, parts: Split, results: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    threads = sorted({result["threads"] for runs in results.values() for result in runs})
    return {
        "backbone": options.backbone,
        "weights": options.weights or "none",
        "start": options.start,
        "epochs": options.epochs,
        "image_size": images.size,
        "batch_size": options.batch_size,
        "latency_batch_size": min(options.batch_size, len(parts.train)),
        "learning_rate": options.learning_rate,
        "learning_rates": {name: options.recipe(name).learning_rate for name in options.names},
        "gate_learning_rate": options.gate_learning_rate,
        "weight_decay": options.weight_decay,
        "flip": options.flip,
        "seeds": list(range(options.seeds)),
        "folds": options.folds,
        "train": None if options.train is None else functions.label(options.train),
        "smallest_gain_points": options.smallest_gain,
        "confidence": CONFIDENCE,
        "threads": threads[0] if len(threads) == 1 else threads,
        "device": options.device,
    }


def _common(
    name: str,
    results: dict[str, list[dict[str, Any]]],
    right: dict[str, np.ndarray],
    starts: dict[str, float],
    costs: dict[str, Any],
) -> dict[str, Any]:
    runs, scores = results[name], [float(score) for score in 100 * right[name].mean(axis=1)]
    return {
        "name": name,
        "title": verdicts.title(name),
        "seeds": len(scores),
        "scores": scores,
        "mean_score": fmean(scores),
        "start_accuracy": starts[name],
        "diverged": diverging.listed(runs),
        # a training function of the user's own tells none
        "curves": None
        if any(not run["history"] and not run["diverged"] for run in runs)
        else [
            {
                "loss": [line["loss"] for line in run["history"]],
                "validation_accuracy": [line["validation_accuracy"] for line in run["history"]],
                "chosen_epoch": run["chosen_epoch"],
            }
            for run in runs
        ],
        **costs[name],
    }


def told(verdict: verdicts.Verdict, caution: str = "", moved: str | None = None) -> dict[str, Any]:
    """What results tell of a verdict; the caution is put before its sentence, and whether gates moved behind it."""
    gain = verdict.gain
    return {
        "gain_points": gain.points,
        "interval95": None if gain.low is None else [gain.low, gain.high],
        "p_value": gain.p_value,
        "standard_error_points": gain.standard_error,
        "standard_error_seeds_points": None if gain.spread is None else gain.standard_error_seeds,
        "standard_error_images_points": gain.standard_error_images,
        "detectable_points": gain.detectable,
        "level": gain.level,
        "verdict": verdict.word,
        "sentence": _joined(caution, verdict.sentence, moved),
    }


def _joined(caution: str, sentence: str, moved: str | None) -> str:
    return caution + sentence + (f" {moved}" if moved else "")


def _controlled(
    options: Options,
    results: Mapping[str, list[dict[str, Any]]],
    right: Mapping[str, np.ndarray],
    costs: Mapping[str, Any],
    within: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """What there is to say of the controls."""
    names = controls.expanded(options.controls, options.variants)
    found = controls.compared(names, right, costs, smallest=options.smallest_gain, **within)
    for control in found:
        control["hardly_moved"] = _hardly_moved(control["name"], results[control["name"]], options)
        control["sentence"] = _joined("", control["sentence"], control["hardly_moved"])
    return found


def _cost(name: str, costs: dict[str, Any]) -> str:
    more = costs[name]["parameters"] / costs[BASELINE]["parameters"] - 1
    return f", for {100 * more:.1f} % more parameters"


def could_see(gains: list[stats.Gain]) -> float | None:
    """The smallest gain that a comparison would probably have seen, in the middle of its variants."""
    seen = [gain.detectable for gain in gains if gain.detectable is not None]
    return median(seen) if seen else None


def _test_probabilities(folder: Path) -> np.ndarray:
    with np.load(folder / "predictions.npz") as arrays:
        return arrays["test_probabilities"]  # type: ignore[no-any-return]


def per_class(
    baseline: np.ndarray, variant: np.ndarray, labels: np.ndarray, classes: int, within: Mapping[str, Any]
) -> dict[str, Any]:
    """The gain on each class with its interval, None where there is none."""
    gains = scores.class_gains(baseline, variant, labels, classes, **within)
    return {
        "per_class_gain_points": by_class(100.0 * (variant.astype(float) - baseline), labels, classes),
        "per_class_interval95_points": [
            None if one is None or one.low is None or one.high is None else [one.low, one.high] for one in gains
        ],
    }


def by_class(values: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    """The mean over seeds and the images of each class; None for a class without test images."""
    return [float(values[:, labels == label].mean()) if (labels == label).any() else None for label in range(classes)]


def _gates(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The sites of a variant, their numbers averaged over seeds."""
    return [
        {
            **sites[0],
            "departure": fmean(site["departure"] for site in sites),
            "strength": None if sites[0]["strength"] is None else fmean(site["strength"] for site in sites),
        }
        for sites in zip(*runs, strict=True)
    ]


def _hardly_moved(name: str, runs: Sequence[dict[str, Any]], options: Options) -> str | None:
    recipe = options.recipe(name)
    rate = recipe.learning_rate if recipe.gate_learning_rate is None else recipe.gate_learning_rate
    return identity.hardly_moved(name, _gates([result["gates"] for result in runs]), rate)


def _audit(options: Options, images: Images, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    # a fold may have an image more or less than another
    tested = [1] if options.folds is None else np.bincount(fold_of(images, options.folds)).tolist()
    shown = {name: results[name] for name in (BASELINE, *options.variants)}
    found = audit.audited(shown, tested * options.seeds)
    return {"networks": found, "sentence": audit.summary(found)}


def versions() -> dict[str, str]:
    """The versions of everything that a result may depend on."""
    found = {"python": platform.python_version(), "convattn": convattn.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def rounded(value: Any) -> Any:
    """Floats to six decimals, so that results are as readable as they are exact."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value
