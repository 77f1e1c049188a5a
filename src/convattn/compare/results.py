"""Everything that the report says, from the folders of the runs."""

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import convattn
from convattn.compare import changes, controls, leaks, stats, verdicts
from convattn.compare import folder as folders
from convattn.compare.options import Options
from convattn.compare.rounds import Looks
from convattn.compare.workers import RUNS
from convattn.data import Images, Split, split
from convattn.train import finished, run_name
from convattn.train.checkpoint import BASELINE

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
    options, asked = replace(options, seeds=looks.seeds[-1]), options
    runs = {name: _runs(folder, name, options.seeds) for name in options.names}
    results = {name: [finished(run) or {} for run in runs[name]] for name in options.names}
    right = rights(folder, options.names, options.seeds)
    parts = split(images, 0)
    labels = images.labels[parts.test]
    baseline = _common(BASELINE, results, starts, costs)
    baseline["per_class_accuracy"] = by_class(100.0 * right[BASELINE], labels, len(images.classes))
    groups = None if images.groups is None else images.groups[parts.test]
    said = {name: _cost(name, costs) for name in options.variants}
    tested = {name: right[name] for name in (BASELINE, *options.variants)}
    found = judged(tested, options.smallest_gain, looks, groups, said)
    names = controls.expanded(options.controls, options.variants)
    controlled = controls.compared(
        names, right, costs, smallest=options.smallest_gain, confidence=CONFIDENCE, groups=groups
    )
    variants = []
    for name, verdict in found.items():
        caution = controls.caution(name, controlled)
        timed = verdicts.sentence(
            name, verdict.gain, options.seeds, options.smallest_gain, said[name] + verdicts.times(costs[name]["latency"])
        )
        difference = 100.0 * (right[name].astype(float) - right[BASELINE])
        variants.append(
            {
                **_common(name, results, starts, costs),
                # with what it was made of, apart from what the same command gives again to the bit
                "latency": {**costs[name]["latency"], "sentence": caution + timed},
                **told(verdict, caution),
                "per_class_gain_points": by_class(difference, labels, len(images.classes)),
                "gates": _gates([result["gates"] for result in results[name]]),
            }
        )
    data = _data(options, images, parts, folder)
    leak = leaks.leak(data["duplicates"], len(parts.test))
    headline = verdicts.headline([(v["name"], v["verdict"]) for v in variants], options.smallest_gain)
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
    }
    content["changes"] = [
        *changes.of_verdicts(found, options.smallest_gain, grouped=groups is not None, most=looks.most),
        *changes.of_comparison(content),
    ]
    return rounded(content)  # type: ignore[no-any-return]


def rights(folder: Path, names: Sequence[str], seeds: int) -> dict[str, np.ndarray]:
    """Which test images each network got right, (seeds, images)."""
    return {name: np.stack([_right(run) for run in _runs(folder, name, seeds)]) for name in names}


def _runs(folder: Path, name: str, seeds: int) -> list[Path]:
    return [folder / RUNS / run_name(name, controls.seed_of(name, seed)) for seed in range(seeds)]


def judged(
    right: dict[str, np.ndarray],
    smallest: float,
    looks: Looks,
    groups: np.ndarray | None,
    costs: dict[str, str] | None = None,
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
    )


def _looks(looks: Looks, options: Options) -> dict[str, Any]:
    saved = 0 if looks.most is None else (looks.most - looks.seeds[-1]) * len(options.names)
    number = len(looks.seeds)
    said = f"This is look {number} at this comparison, with {looks.seeds[-1]} seeds."
    if looks.most is not None:
        said += f" It was planned to end at {looks.most} seeds at the latest, which saved {saved} runs."
    elif number > 1:
        said += f" It was looked at with {', '.join(map(str, looks.seeds[:-1]))} before, which its intervals allow for."
    return {"seeds": list(looks.seeds), "most_seeds": looks.most, "saved_runs": saved, "sentence": said}


def _data(options: Options, images: Images, parts: Split, folder: Path) -> dict[str, Any]:
    labels = images.labels[parts.test]
    return {
        "name": Path(options.data).name,
        "classes": list(images.classes),
        "train": len(parts.train),
        "validation": len(parts.validation),
        "test": len(parts.test),
        "test_per_class": np.bincount(labels, minlength=len(images.classes)).tolist(),
        "fingerprint": folders.plan(folder)["fingerprints"]["images"],
        "left_out": [{"path": one.path, "reason": one.reason} for one in images.left_out],
        **leaks.counts(images, parts),
        "duplicates": leaks.search(images, parts, folder),
    }


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
        "weight_decay": options.weight_decay,
        "flip": options.flip,
        "seeds": list(range(options.seeds)),
        "smallest_gain_points": options.smallest_gain,
        "confidence": CONFIDENCE,
        "threads": threads[0] if len(threads) == 1 else threads,
        "device": options.device,
    }


def _common(
    name: str, results: dict[str, list[dict[str, Any]]], starts: dict[str, float], costs: dict[str, Any]
) -> dict[str, Any]:
    runs = results[name]
    return {
        "name": name,
        "title": verdicts.title(name),
        "scores": [run["score"] for run in runs],
        "mean_score": fmean(run["score"] for run in runs),
        "start_accuracy": starts[name],
        "curves": [
            {
                "loss": [line["loss"] for line in run["history"]],
                "validation_accuracy": [line["validation_accuracy"] for line in run["history"]],
                "chosen_epoch": run["chosen_epoch"],
            }
            for run in runs
        ],
        **costs[name],
    }


def told(verdict: verdicts.Verdict, caution: str = "") -> dict[str, Any]:
    """What results tell of a verdict; the caution is put before its sentence."""
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
        "sentence": caution + verdict.sentence,
    }


def _cost(name: str, costs: dict[str, Any]) -> str:
    more = costs[name]["parameters"] / costs[BASELINE]["parameters"] - 1
    return f", for {100 * more:.1f} % more parameters"


def could_see(gains: list[stats.Gain]) -> float | None:
    """The smallest gain that a comparison would probably have seen, in the middle of its variants."""
    seen = [gain.detectable for gain in gains if gain.detectable is not None]
    return median(seen) if seen else None


def _right(folder: Path) -> np.ndarray:
    """Which test images a run got right."""
    with np.load(folder / "predictions.npz") as arrays:
        return arrays["test_probabilities"].argmax(axis=1) == arrays["test_labels"]  # type: ignore[no-any-return]


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
