"""Where a comparison stands, told from its folder by any process, while another one works in it or none does."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convattn import checks, files, reporting
from convattn.compare import folder as folders
from convattn.compare.controls import expanded
from convattn.compare.display import duration
from convattn.compare.rounds import LOOKS
from convattn.data import listing
from convattn.errors import ComparisonError
from convattn.train import run_name
from convattn.train.checkpoint import BASELINE
from convattn.train.store import ERROR, LOG, PLAN, RESULT, RUNS, TRIAL


def status(folder: str | Path) -> list[str]:
    """Lines on where a comparison stands: who works there, how many runs are done, and where the others are.

    Raises:
        ComparisonError: the folder holds no comparison.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ComparisonError(f"{checks.shown(folder)} is no folder: give that of a comparison.")
    about = folders.activity(folder)
    if about is None and not (folder / listing.PLAN).exists():
        raise ComparisonError(f"{checks.shown(folder)} holds no comparison: give the folder of one.")
    lines = [_at_work(about, complete=_is_complete(folder))]
    if not (folder / listing.PLAN).exists():
        return [*lines, "The images are being decoded; no run has begun."]
    options = folders.read_plan(folder)["options"]
    return [*lines, *_runs(folder, options, about or {}), *_looks(folder)]


def _is_complete(folder: Path) -> bool:
    """Whether there are results, and no run that was begun lacks its own."""
    runs = [path.parent for path in (folder / RUNS).glob(f"*/{PLAN}")]
    return bool(runs) and (folder / reporting.RESULTS).exists() and all((run / RESULT).exists() for run in runs)


def _at_work(about: dict[str, Any] | None, *, complete: bool) -> str:
    if about is None:
        return "Done." if complete else "No process works here: the command that began it goes on where it was."
    where = f"process {about.get('pid', '?')} on {about.get('host', '?')}"
    return f"At work: {where}, since {about.get('since', '?')} ({checks.shown(about.get('command', '?'))})."


def _runs(folder: Path, options: dict[str, Any], about: dict[str, Any]) -> Iterator[str]:
    """The number of runs that are done, and a line for each that is under way or broke."""
    names = [BASELINE, *options["variants"], *expanded(options["controls"], options["variants"])]
    everything = {path.parent.name for path in (folder / RUNS).glob(f"*/{RESULT}")}
    trials = {name for name in everything if name.startswith(TRIAL)}
    finished = everything - trials
    if trials:
        yield f"{len(trials)} trials of learning rates are done."
    begun = sorted(path.parent for path in (folder / RUNS).glob(f"*/{PLAN}"))
    waiting = [path for path in begun if path.name not in everything]
    each = ", ".join(f"{name} {sum(_is_of(run, name) for run in finished)}" for name in names)
    yield f"{len(finished)} run{' is' if len(finished) == 1 else 's are'} done: {each}."
    if about.get("runs"):
        yield _left(about, len(trials) if len(finished) == 0 and trials else len(finished))
    for path in waiting:
        broken = " (it broke: see its error.txt)" if (path / ERROR).exists() else ""
        yield f"  {path.name:<24} {_progress(path, options['epochs'])}{broken}"


def _left(about: dict[str, Any], done: int) -> str:
    """How many runs the process that works here has left, and about how long they take."""
    fresh, left = done - about["already"], about["runs"] - done
    seconds = (time.time() - about["training_since"]) / fresh * left if fresh > 0 else math.nan
    how_long = "" if math.isnan(seconds) else f", about {duration(seconds)}"
    return f"{left} of {about['runs']} runs are left{how_long}."


def _is_of(run: str, name: str) -> bool:
    return run.rpartition("-seed")[0] == run_name(name, 0).rpartition("-seed")[0]


def _progress(folder: Path, epochs: int) -> str:
    """How far an unfinished run is, and when that was written."""
    try:
        lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
        last, when = lines[-1], (folder / LOG).stat().st_mtime
        ago = time.time() - when
        return (
            f"epoch {last['epoch']:>3} of {epochs}  loss {last['loss']:.3f}  validation "
            f"{last['validation_accuracy']:.2f} %  {ago:,.0f} s ago"
        )
    except (OSError, ValueError, LookupError, TypeError):
        return "in its first epoch"


def _looks(folder: Path) -> Iterator[str]:
    looks = files.read_intact(folder / LOOKS)
    if looks is not None:
        yield f"Looks so far: with {', '.join(map(str, looks['seeds']))} seeds."
    results = files.read_intact(folder / reporting.RESULTS)
    if results is not None:
        yield results["headline"]
        yield f"The report: {folder / reporting.NAME}"
