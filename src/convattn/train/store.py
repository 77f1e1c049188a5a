"""The folder of a run: its files, whether a run is done, and what is damaged in it.

plan.json            what the run is
log.jsonl            a line for every epoch
checkpoint.pt        where it stands, with the weights of the best epoch so far; gone when it is done
previous.pt          the checkpoint before that one, for where that one is damaged; gone when it is done
weights.safetensors  the chosen network, for `convattn show`
predictions.npz      class probabilities of validation and test images, by path
result.json          scores, and the digests of the two files before; written last
error.txt            why the run broke, until it goes on
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convattn import files
from convattn.errors import DamagedFile

# where the folders of the runs are in that of a comparison
RUNS = "runs"
# what the names of trials of a learning rate begin with
TRIAL = "trial-"
PLAN, LOG, RESULT = "plan.json", "log.jsonl", "result.json"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "previous.pt"
WEIGHTS, PREDICTIONS = "weights.safetensors", "predictions.npz"
# bytes of the name of a variant in that of a folder, which file systems let have about 255, and letters of a longer one
LONGEST_NAME, SHORTENED = 150, 32
ERROR = "error.txt"


def run_name(variant: str, seed: int, fold: int | None = None) -> str:
    """The name of the folder of a run."""
    # no colon: Windows takes none in a file's name; and no path, in which a module of one's own may be
    plain = re.sub(r"[:/\\]", "-", variant)
    if len(plain.encode()) > LONGEST_NAME:
        plain = f"{plain[:SHORTENED]}-{hashlib.blake2b(plain.encode(), digest_size=8).hexdigest()}"
    return f"{plain}-seed{seed}" + ("" if fold is None else f"-fold{fold}")


def trial_name(variant: str, seed: int, rate: float) -> str:
    """The name of the folder of a trial of a learning rate."""
    return f"{TRIAL}{run_name(variant, seed)}-rate{rate:g}"


def describe(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write down what a run is, where that is missing or damaged."""
    if files.read_intact(folder / PLAN) is None:
        files.write_json(folder / PLAN, plan)


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a run that is done, else None.

    Raises:
        DamagedFile: the result is not what was written; see `repair`.
    """
    return files.read_json(folder / RESULT)


def verified(folder: Path) -> dict[str, Any] | None:
    """The result of a run that is done, else None, once what belongs to it was read and found to be what was written.

    Raises:
        DamagedFile: the result, its predictions or its weights are not; or the predictions are missing.
    """
    result = finished(folder)
    for name, digest in (result or {}).get("files", {}).items():
        path = folder / name
        if not path.exists() and name == PREDICTIONS:
            raise DamagedFile(f"{path} is missing.")
        if path.exists() and files.digest(path) != digest:
            raise DamagedFile(f"{path} is damaged (its checksum is wrong).")
    return result


def repair(folder: Path) -> list[str]:
    """Remove what is damaged in the folder of a run, so that it is made again, and what a killed process left.

    A result that is damaged, or that lacks its predictions, is a run to train anew; weights may have been removed to
    make room. What follows from the result is written again where it is something else.

    Returns:
        A sentence about each damaged file.
    """
    if not folder.is_dir():
        return []
    files.remove_partial(folder)
    try:
        result = verified(folder)
    except DamagedFile as error:
        for name in (RESULT, WEIGHTS, PREDICTIONS, LOG):
            (folder / name).unlink(missing_ok=True)
        return [f"{error} The run is trained again."]
    if result is None:
        return _remove_damaged_checkpoints(folder)
    clean_up(folder)
    if result["history"] and _text(folder / LOG) != log_lines(result["history"]):
        files.write(folder / LOG, log_lines(result["history"]))
    return []


def log_lines(history: list[dict[str, float]]) -> str:
    """The log of a run: an object in JSON on a line for each epoch."""
    return "".join(json.dumps(line) + "\n" for line in history)


def _remove_damaged_checkpoints(folder: Path) -> list[str]:
    """Remove the checkpoints that are not what was written; a sentence about each."""
    damaged: dict[str, DamagedFile] = {}
    for name in (CHECKPOINT, PREVIOUS):
        try:
            files.read_sealed(folder / name)
        except DamagedFile as error:
            damaged[name] = error
            (folder / name).unlink()
    left = [name for name in (CHECKPOINT, PREVIOUS) if (folder / name).exists()]
    then = f"goes on from {left[0]}" if left else "begins anew"
    return [f"{error} The run {then}." for error in damaged.values()]


def clean_up(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    for name in (CHECKPOINT, PREVIOUS, ERROR):
        (folder / name).unlink(missing_ok=True)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
