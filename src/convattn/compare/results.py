"""Everything that the report says, from the folders of the runs."""

import platform
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import convattn
from convattn.compare import controls, stats, verdicts
from convattn.compare import folder as folders
from convattn.compare.options import Options
from convattn.compare.workers import RUNS
from convattn.data import Images, Split, split
from convattn.train import finished, run_name
from convattn.train.checkpoint import BASELINE

SCHEMA = 1
CONFIDENCE = 0.95
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "pillow")


def assemble(
    options: Options,
    images: Images,
    folder: Path,
    starts: dict[str, float],
    costs: dict[str, Any],
) -> dict[str, Any]:
    """The results of a comparison whose runs are all done."""
    runs = {
        name: [folder / RUNS / run_name(name, controls.seed_of(name, seed)) for seed in range(options.seeds)]
        for name in options.names
    }
    results = {name: [finished(run) or {} for run in runs[name]] for name in options.names}
    right = {name: np.stack([_right(run) for run in runs[name]]) for name in options.names}
    parts = split(images, 0)
    labels = images.labels[parts.test]
    baseline = _common(BASELINE, results, starts, costs)
    baseline["per_class_accuracy"] = _by_class(100.0 * right[BASELINE], labels, len(images.classes))
    gains = {name: stats.gain(right[BASELINE], right[name], confidence=CONFIDENCE) for name in options.variants}
    names = controls.expanded(options.controls, options.variants)
    controlled = controls.compared(names, right, costs, smallest=options.smallest_gain, confidence=CONFIDENCE)
    variants = []
    for name, gain in gains.items():
        difference = 100.0 * (right[name].astype(float) - right[BASELINE])
        variants.append(
            {
                **_common(name, results, starts, costs),
                **_verdict(name, gain, options, costs, controls.caution(name, controlled)),
                "per_class_gain_points": _by_class(difference, labels, len(images.classes)),
                "gates": _gates([result["gates"] for result in results[name]]),
            }
        )
    found: dict[str, Any] = _rounded(
        {
            "schema": SCHEMA,
            "convattn": convattn.__version__,
            "headline": verdicts.headline([(v["name"], v["verdict"]) for v in variants], options.smallest_gain),
            "data": _data(options, images, parts, folder),
            "setting": _setting(options, images, parts, results),
            "command": options.command(),
            "versions": _versions(),
            "could_see_points": _could_see(list(gains.values()), options.seeds),
            "baseline": baseline,
            "variants": variants,
            "controls": controlled,
        }
    )
    return found


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
        # with what it was made of, apart from what the same command gives again to the bit
        "latency": {**costs[name]["latency"], "sentence": verdicts.time_sentence(costs[name]["latency"])},
    }


def _verdict(name: str, gain: stats.Gain, options: Options, costs: dict[str, Any], caution: str) -> dict[str, Any]:
    more = costs[name]["parameters"] / costs[BASELINE]["parameters"] - 1
    return {
        "gain_points": gain.points,
        "interval95": None if gain.low is None else [gain.low, gain.high],
        "p_value": gain.p_value,
        "standard_error_points": gain.standard_error,
        "verdict": verdicts.word(gain, options.smallest_gain),
        "sentence": caution
        + verdicts.sentence(
            name, gain, options.seeds, options.smallest_gain, f", for {100 * more:.1f} % more parameters"
        ),
    }


def _could_see(gains: list[stats.Gain], seeds: int) -> float | None:
    if seeds < 2:
        return None
    return stats.detectable_with(median(gain.standard_error for gain in gains), seeds)


def _right(folder: Path) -> np.ndarray:
    """Which test images a run got right."""
    with np.load(folder / "predictions.npz") as arrays:
        return arrays["test_probabilities"].argmax(axis=1) == arrays["test_labels"]  # type: ignore[no-any-return]


def _by_class(values: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "convattn": convattn.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _rounded(value: Any) -> Any:
    """Floats to six decimals, so that results are as readable as they are exact."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
