"""Results of comparisons that never ran, with everything that a report has to cope with."""

import random
from collections.abc import Sequence
from typing import Any

TITLES = {
    "se": "squeeze-and-excitation",
    "cbam": "channel and spatial attention",
    "dual": "mean and max pooling head",
    "cbam+dual": "CBAM and dual pooling head",
    "eca": "efficient channel attention",
}
VERDICTS = {"se": "cannot tell", "cbam": "worth it", "dual": "not worth it", "cbam+dual": "cannot tell"}
SCORES = (
    ("macro_f1", "macro-F1", "points", True, 98.0),
    ("log_loss", "log loss", "nats", False, 0.0721),
    ("calibration_error", "calibration error (ECE, 15 bins)", "points", False, 3.4),
)
GAINS = {"se": -0.1, "cbam": 1.6, "dual": -0.9, "cbam+dual": 0.7}


WITHIN = {"images": 0, "clusters": [], "examples": []}


def results(
    names: Sequence[str] = ("se", "cbam", "dual", "cbam+dual"),
    *,
    classes: Sequence[str] = tuple("0123456789"),
    seeds: int = 3,
    epochs: int = 8,
    measured: bool = True,
    start: str = "paper",
    sites: int = 9,
) -> dict[str, Any]:
    """Results of schema 2; the same arguments give the same results."""
    draw = random.Random(7)
    return {
        "schema": 2,
        "convattn": "0.1.0",
        "data": {
            "name": "digits",
            "classes": list(classes),
            "train": 1150,
            "validation": 287,
            "test": 360,
            "test_per_class": [36 for _ in classes],
            "left_out": [],
            "notes": [],
            "per_class": {part: [36 for _ in classes] for part in ("train", "validation", "test")},
            "missing_classes": {},
            "one_class": [],
            "duplicates": {"exact": 0, "near": 0, "other_class": 0, "examples": [], "within": WITHIN},
            "fingerprint": "9f2c41d07ab8e6335c1d",
        },
        "setting": {
            "backbone": "resnet20",
            "weights": "none",
            "start": start,
            "epochs": epochs,
            "image_size": 8,
            "batch_size": 128,
            "latency_batch_size": 128,
            "learning_rate": 0.1,
            "weight_decay": 0.0005,
            "flip": False,
            "seeds": list(range(seeds)),
            "smallest_gain_points": 0.5,
            "confidence": 0.95,
            "threads": 2,
            "device": "cpu",
            "folds": None,
            "train": None,
            "learning_rates": {"baseline": 0.1, **dict.fromkeys(names, 0.1)},
            "gate_learning_rate": None,
        },
        "command": f"convattn compare digits --backbone resnet20 --variants {','.join(names)} --seeds {seeds}",
        "versions": {"python": "3.11.7", "torch": "2.9.0", "timm": "1.0.20", "numpy": "2.3.1"},
        "could_see_points": 1.9 if seeds > 1 else None,
        "headline": "CBAM is worth it here. For the others this comparison is too small, or they gain nothing.",
        "leak": None,
        "baseline": {
            "name": "baseline",
            "seeds": seeds,
            "scores": [98.1 + 0.2 * seed for seed in range(seeds)],
            "mean_score": 98.1 + 0.1 * (seeds - 1),
            "start_accuracy": 10.2,
            "parameters": 272474,
            "multiply_adds": 2600000,
            "file_bytes": 1102416,
            "peak_bytes": 98576968,
            "per_class_accuracy": [round(draw.uniform(90, 100), 2) for _ in classes],
            "diverged": [],
            "curves": [_curve(draw, epochs) for _ in range(seeds)],
            "latency": _latency(1.0) if measured else None,
        },
        "changes": [f"{name}: about 4 more seeds would decide it." for name in names],
        "looks": {
            "seeds": [seeds],
            "most_seeds": None,
            "ended": {},
            "saved_runs": 0,
            "sentence": "This is look 1, of 3 seeds.",
        },
        "controls": [],
        "tuning": None,
        "audit": None,
        "variants": [_variant(draw, name, classes, seeds, epochs, measured, start, sites) for name in names],
    }


def _variant(
    draw: random.Random,
    name: str,
    classes: Sequence[str],
    seeds: int,
    epochs: int,
    measured: bool,
    start: str,
    sites: int,
) -> dict[str, Any]:
    gain, verdict = GAINS.get(name, 0.2), VERDICTS.get(name, "cannot tell")
    width = 1.3 if verdict == "cannot tell" else 0.8
    ends = f"{gain - width:+.2f} to {gain + width:+.2f}"
    return {
        "name": name,
        "title": TITLES.get(name, "an attention module"),
        "gain_points": gain,
        "interval95": [gain - width, gain + width] if seeds > 1 else None,
        "p_value": 0.0004 if verdict == "worth it" else 0.71 if seeds > 1 else None,
        "verdict": verdict if seeds > 1 else "cannot tell",
        "sentence": f"{name}: {verdict}: {gain:+.2f} points, somewhere from {ends}. About 14 seeds would settle it.",
        "seeds": seeds,
        "scores": [98.1 + gain + draw.uniform(-0.4, 0.4) for _ in range(seeds)],
        "mean_score": 98.3 + gain,
        "start_accuracy": 10.2,
        "parameters": 274490,
        "multiply_adds": 2604000,
        "file_bytes": 1110480,
        "peak_bytes": 121056968,
        "per_class_gain_points": [round(draw.gauss(gain, 1.5), 2) for _ in classes],
        "per_class_interval95_points": [[gain - 6.5, gain + 6.5] if seeds > 1 else None for _ in classes],
        "other_scores": [_score(*score, gain, seeds) for score in SCORES],
        "diverged": [],
        "curves": [_curve(draw, epochs, gain) for _ in range(seeds)],
        "gates": [_gate(draw, place, sites, start, name) for place in range(sites)],
        "hardly_moved": None,
        "latency": _latency(1.0 + 0.11 * len(name)) if measured else None,
    }


def _score(name: str, title: str, unit: str, higher: bool, value: float, gain: float, seeds: int) -> dict[str, Any]:
    gain, width = (gain, 1.1) if unit == "points" else (gain / 100, 0.0123)
    gain = gain if higher else -gain
    ends = [gain - width, gain + width] if seeds > 1 else None
    return {
        "name": name,
        "title": title,
        "unit": unit,
        "higher_is_better": higher,
        "baseline": value,
        "variant": value + gain,
        "gain": gain,
        "interval95": ends,
        "p_value": 0.03 if ends else None,
        "change": None
        if ends is None
        else "unclear"
        if abs(gain) < width
        else "better"
        if higher == (gain > 0)
        else "worse",
    }


def _gate(draw: random.Random, place: int, sites: int, start: str, name: str) -> dict[str, Any]:
    last = place == sites - 1 and "dual" in name
    return {
        "site": "pool" if last else f"layer{1 + 3 * place // sites}.{place % 3}.bn2",
        "place": "pool" if last else "residual",
        "departure": draw.uniform(0.02, 0.6),
        "strength": None if start == "paper" else draw.uniform(-0.05, 0.2),
    }


def _curve(draw: random.Random, epochs: int, gain: float = 0.0) -> dict[str, Any]:
    accuracy = [97.5 + gain - 60 * 0.5**epoch + draw.uniform(-1, 1) for epoch in range(epochs)]
    return {
        "loss": [2.3 * 0.7**epoch + draw.uniform(0, 0.1) for epoch in range(epochs)],
        "validation_accuracy": accuracy,
        "chosen_epoch": accuracy.index(max(accuracy)) + 1,
    }


def _latency(ratio: float) -> dict[str, Any]:
    def around(middle: float) -> dict[str, float]:
        return {"median": middle, "low": 0.97 * middle, "high": 1.05 * middle}

    times = {"train_step_ms": 21.3, "inference_ms": 1.42, "inference_batch_ms": 63.0}
    ratios = {key.replace("_ms", "_ratio"): around(ratio) for key in times}
    said = {"sentence": f"A training step takes {ratio:.2f} times as long."}
    throughput = {"throughput_images_per_second": around(2030 / ratio), "throughput_ratio": around(1 / ratio)}
    return {key: around(time * ratio) for key, time in times.items()} | ratios | throughput | said | {"threads": 2}
