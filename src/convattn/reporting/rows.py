"""The results as a table, for a spreadsheet (CSV) and for an issue or a wiki (Markdown)."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from convattn.reporting import text

# of the ratio to the baseline, measured in turn with it
TIMES = ("train_step_ratio", "inference_ratio", "inference_batch_ratio", "throughput_ratio")
NUMBERS = ("mean_score", "gain_points", "p_value", "parameters", "multiply_adds", "file_bytes", "peak_bytes")
COLUMNS = (
    "name",
    "kind",
    "of",
    "verdict",
    "mean_score",
    "gain_points",
    "low_points",
    "high_points",
    "p_value",
    "parameters",
    "added_parameters",
    "multiply_adds",
    "file_bytes",
    "peak_bytes",
    *TIMES,
)


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for the baseline, every variant and every control; None where something is not known.

    Times are medians, as multiples of the baseline's.
    """
    plain = results["baseline"]["parameters"]
    found = [_row(results["baseline"], "baseline", plain)]
    found += [_row(variant, "variant", plain) for variant in results["variants"]]
    return found + [_row(control, control["kind"], plain) for control in results["controls"]]


def as_csv(results: Mapping[str, Any]) -> str:
    """The rows under the names of their columns; what is not known is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(results))
    return file.getvalue()


def as_markdown(results: Mapping[str, Any]) -> str:
    """The headline, a table, the verdicts in words, and what would change them."""
    confidence = f"{100 * results['setting']['confidence']:g} %"
    said = [(variant["latency"] or variant)["sentence"] for variant in results["variants"]]
    said += [control["sentence"] for control in results["controls"]]
    heads = [
        "Variant",
        "Verdict",
        "Score, %",
        "Gain, points",
        f"{confidence} interval",
        "p",
        "Parameters",
        "Step",
        "Image",
    ]
    table = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *map(_cells, rows(results))]
    parts = [
        f"# {_escaped(results['headline'])}",
        "\n".join(f"| {' | '.join(cells)} |" for cells in table),
        "Step and Image: time of a training step and of the inference of one image, as multiples of the baseline's.",
        _listed(said),
        "## What would change the answer",
        _listed(results["changes"]),
        "## How to repeat it",
        f"    {text.plain(results['command'])}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(one: Mapping[str, Any], kind: str, plain: int | None) -> dict[str, Any]:
    latency, ends = one.get("latency") or {}, one.get("interval95") or (None, None)
    own = one.get("parameters")
    added = own - plain if own is not None and plain is not None else one.get("added_parameters")
    return {
        "name": one["name"],
        "kind": kind,
        "of": one.get("of"),
        "verdict": one.get("verdict"),
        **{key: one.get(key) for key in NUMBERS},
        "low_points": ends[0],
        "high_points": ends[1],
        "added_parameters": added,
        **{key: latency[key]["median"] if key in latency else None for key in TIMES},
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    added, ends = row["added_parameters"], (row["low_points"], row["high_points"])
    own = row["parameters"]
    size = text.ABSENT if own is None and added is None else f"{own:,}" if row["kind"] == "baseline" else f"{added:+,}"
    times = [text.ABSENT if row[key] is None else f"× {text.number(row[key])}" for key in TIMES[:2]]
    return [
        _escaped(row["name"]),
        row["verdict"] or text.ABSENT,
        text.number(row["mean_score"]),
        text.signed(row["gain_points"]),
        text.ABSENT if None in ends else text.interval(ends),
        text.p_value(row["p_value"]),
        size,
        *times,
    ]


def _listed(sentences: list[str]) -> str:
    return "\n".join(f"- {_escaped(sentence)}" for sentence in sentences)


def _escaped(words: str) -> str:
    """Words that Markdown shows as they are."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in text.plain(words))
