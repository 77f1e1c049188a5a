"""Results of predictions that were made elsewhere: those of a comparison, in which what is not known is null."""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import convattn
from convattn import checks, files, reporting
from convattn.compare import changes, verdicts
from convattn.compare import results as made
from convattn.compare.predictions import Predictions, read
from convattn.data.listing import PLAN
from convattn.errors import ComparisonError
from convattn.train.checkpoint import BASELINE

# what predictions do not tell of a network, and of how it was trained
UNKNOWN = ("diverged", "start_accuracy", "curves", "parameters", "multiply_adds", "file_bytes", "peak_bytes", "latency")
UNKNOWN_SETTING = (
    "backbone",
    "weights",
    "start",
    "epochs",
    "image_size",
    "batch_size",
    "latency_batch_size",
    "learning_rate",
    "weight_decay",
    "flip",
    "threads",
    "device",
    "folds",
    "train",
    "learning_rates",
    "gate_learning_rate",
)


def results(baseline: str | Path, variants: Sequence[str | Path], *, smallest_gain: float = 0.5) -> dict[str, Any]:
    """The verdicts of `predictions.judge` as the content of a `results.json`.

    Args:
        baseline: the file of the plain network.
        variants: the files of the others.
        smallest_gain: the smallest gain in percentage points that is worth it.

    Raises:
        DataError: a file that is none, or of other images.
        InvalidOption: two files of one name.
    """
    checks.between("verdict", "smallest_gain", smallest_gain, 0, 100)
    given = read(baseline, variants)
    found = verdicts.verdict(given.baseline, given.variants, smallest_gain=smallest_gain, groups=given.groups)
    files = [Path(baseline), *map(Path, variants)]
    seeds = len(given.baseline)
    command = ["convattn", "verdict", *map(str, files), "--smallest-gain", repr(smallest_gain)]
    content: dict[str, Any] = {
        "schema": made.SCHEMA,
        "convattn": convattn.__version__,
        "headline": verdicts.headline([(name, one.word) for name, one in found.items()], smallest_gain),
        "leak": None,
        "data": _data(given, files),
        "setting": {
            **dict.fromkeys(UNKNOWN_SETTING),
            "seeds": list(range(seeds)),
            "smallest_gain_points": smallest_gain,
            "confidence": made.CONFIDENCE,
        },
        "looks": {"seeds": [seeds], "most_seeds": seeds, "ended": {}, "saved_runs": 0, "sentence": _look(seeds)},
        "command": shlex.join(command),
        "versions": made.versions(),
        "could_see_points": made.could_see([one.gain for one in found.values()]),
        "baseline": {
            **_network(BASELINE, given.baseline),
            "per_class_accuracy": _by_class(100.0 * given.baseline, given),
        },
        "variants": [_variant(name, one, given) for name, one in found.items()],
        "controls": [],
        "tuning": None,
        "audit": None,
    }
    content["changes"] = [
        *changes.of_verdicts(found, smallest_gain, grouped=given.groups is not None, again=False),
        *changes.of_comparison(content),
    ]
    return made.rounded(content)  # type: ignore[no-any-return]


def write(content: dict[str, Any], folder: str | Path) -> Path:
    """Write results to a folder, with the report beside them, and return the path of the report.

    Raises:
        ComparisonError: the folder is that of a comparison, or a file.
    """
    folder = Path(folder)
    blocking = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if blocking is not None:
        raise ComparisonError(f"{folder} cannot be a folder, since {blocking} is a file: give another --out.")
    if (folder / PLAN).exists():
        raise ComparisonError(f"{folder} holds a comparison, which has results of its own: give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / reporting.RESULTS, content)
    return reporting.write(content, folder)


def _data(given: Predictions, files: Sequence[Path]) -> dict[str, Any]:
    classes = _classes(given)
    counts = np.bincount(given.labels, minlength=classes).tolist() if given.labels is not None and classes else None
    return {
        "name": None,
        "classes": [str(label) for label in range(classes)],
        "train": None,
        "validation": None,
        "test": given.baseline.shape[1],
        "test_per_class": counts,
        "fingerprint": hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest(),
        "left_out": None,
        "notes": [],
        "per_class": None,
        "missing_classes": {},
        "one_class": [],
        "duplicates": None,
    }


def _look(seeds: int) -> str:
    return (
        f"The intervals are for one look, at {seeds} seed{'' if seeds == 1 else 's'}: if it is because of what they "
        f"say that seeds are added and judged again, they miss the truth more often than they say."
    )


def _variant(name: str, found: verdicts.Verdict, given: Predictions) -> dict[str, Any]:
    right, classes = given.variants[name], _classes(given)
    by_class: dict[str, Any] = dict.fromkeys(("per_class_gain_points", "per_class_interval95_points"))
    if given.labels is not None and classes:
        within = {"groups": given.groups, "confidence": made.CONFIDENCE}
        by_class = made.per_class(given.baseline, right, given.labels, classes, within)
    return {
        **_network(name, right),
        **made.told(found),
        **by_class,
        "other_scores": given.other_scores(name),
        "gates": [],
        "hardly_moved": None,
    }


def _network(name: str, right: np.ndarray) -> dict[str, Any]:
    scores = [float(score) for score in 100 * right.mean(axis=1)]
    known = {"name": name, "title": verdicts.title(name), "seeds": len(scores), "scores": scores}
    known["mean_score"] = fmean(scores)
    return {**known, **dict.fromkeys(UNKNOWN)}


def _by_class(values: np.ndarray, given: Predictions) -> list[float | None] | None:
    classes = _classes(given)
    return made.by_class(values, given.labels, classes) if given.labels is not None and classes else None


def _classes(given: Predictions) -> int:
    """The number of classes; 0 where labels are unknown, or no numbers from 0 on, one for each image."""
    labels = given.labels
    if labels is None or labels.shape != given.baseline.shape[1:] or labels.dtype.kind not in "iu":
        return 0
    # identifiers that are no classes go far beyond the number of images
    return int(labels.max()) + 1 if labels.min() >= 0 and labels.max() < len(labels) else 0
