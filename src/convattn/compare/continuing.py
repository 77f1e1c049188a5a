"""Go on with the comparison of a folder: with more seeds, or with its times measured again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convattn import checks, files, own_code, registry, reporting
from convattn.compare import folder as folders
from convattn.compare import leaks, rounds, timing
from convattn.compare.display import Display
from convattn.compare.options import OF_OUR_TRAINING, Options, parse
from convattn.compare.results import assemble, runs_of
from convattn.compare.specs import specs
from convattn.data import Images
from convattn.data.listing import PLAN
from convattn.errors import ComparisonError, DamagedFile, InvalidOption
from convattn.train import verified
from convattn.train.checkpoint import BASELINE
from convattn.train.controls import NOISE
from convattn.train.store import RUNS, TRIAL

RESULTS = reporting.RESULTS
# options that no folder keeps
FUNCTIONS = ("backbone", "variants", "train")
# options that are false where they are not given
SWITCHES = ("audit_selection", "val_as_test")


def refuse_other_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse options that a comparison which goes on cannot follow, as they were set when it began."""
    for name, value in options.items():
        # functions are given again where there are any
        if name not in FUNCTIONS and value is not None and not (value is False and name in SWITCHES):
            _refuse(folder, name)


def _refuse(folder: Path, name: str) -> None:
    raise InvalidOption(
        f"compare: {name} cannot be given with add_seeds: {folder} goes on as it was begun. Leave it out, or begin "
        f"another comparison."
    )


def continued(
    folder: Path, more: int, call: Mapping[str, Any], trust: own_code.Trust, smallest_gain: float | None
) -> tuple[str, dict[str, Any], float]:
    """The data, the options and the smallest gain of a folder's comparison with more seeds, its functions as given."""
    checks.positive("compare", "add_seeds", more)
    plan = folders.read_plan(folder)
    options = {**plan["options"], "threads": plan["threads"]}
    functions_now = _functions(
        folder, options.pop("builds", {}), options.pop("train", None), options.pop("own", {}), call
    )
    named = {name: value for name, value in options.items() if name not in functions_now}
    own_code.check(named_code(named), folder / PLAN, trust)
    if "train" in functions_now:
        # they could not be given with a training function
        options = {name: value for name, value in options.items() if name not in OF_OUR_TRAINING}
    taken = rounds.looks(folder, None)
    if not taken.seeds:
        raise ComparisonError(f"{folder} is not done yet: give the command that began it once more.")
    if smallest_gain is None:
        results = files.read_intact(folder / RESULTS)
        if results is None:
            raise ComparisonError(
                f"{folder / RESULTS} is missing or damaged: give the command that began the comparison once more, or "
                f"--smallest-gain."
            )
        smallest_gain = results["setting"]["smallest_gain_points"]
    return options.pop("data"), {**options, **functions_now, "seeds": taken.seeds[-1] + more}, smallest_gain


def measure_again(folder: str | Path, *, trust: own_code.Trust = (), quiet: bool = False) -> Path:
    """Measure what each variant of a comparison costs once more, and draw its report anew; nothing is trained.

    Neither images nor weights are needed. Returns the path of the report.

    Args:
        folder: of a comparison that is done.
        trust: code of the form `FILE.py:NAME` that may be run where the folder names it; no other is.
        quiet: print nothing.

    Raises:
        ComparisonError: it is not done, or was begun with functions from Python.
        UntrustedCode: the folder names code that is not trusted; nothing was run.
    """
    folder, display = Path(folder), Display(quiet=quiet)
    plan = folders.read_plan(folder)
    planned = {**plan["options"], "threads": plan["threads"], "weights": None}
    if planned.pop("builds", {}) or planned.pop("train", None) or planned.pop("own", {}):
        raise ComparisonError(
            f"{folder} was begun from Python with functions of its own: remove its {timing.COST}, and give the call "
            f"that began it once more."
        )
    own_code.check(named_code(planned), folder / PLAN, trust)
    before = files.read_intact(folder / RESULTS)
    taken = rounds.looks(folder, None)
    if before is None or not taken.seeds:
        raise ComparisonError(f"{folder} is not done yet: give the command that began it once more.")
    options = parse(planned.pop("data"), **planned, seeds=taken.seeds[-1])
    options = replace(
        options, smallest_gain=before["setting"]["smallest_gain_points"], weights=plan["options"]["weights"]
    )
    with registry.also(options.own), folders.locked(folder, wait=False, say=display.warn):
        images = _check_done(folder, replace(options, ended=taken.ended))
        # the weights change no time
        firsts = specs(replace(options, seeds=1, weights=None), None)[: len(options.names)]
        (folder / timing.COST).unlink(missing_ok=True)
        display.say("Measuring what each variant costs ...")
        costs = timing.measure(options, [spec for spec in firsts if spec.variant != NOISE], images, folder)
        starts = {network["name"]: network["start_accuracy"] for network in (before["baseline"], *before["variants"])}
        starts = dict.fromkeys(options.names) | starts
        results = assemble(options, images, folder, starts, costs, taken) | {"command": before["command"]}
        files.write_json(folder / RESULTS, results)
        return reporting.write(results, folder)


def _check_done(folder: Path, options: Options) -> Images:
    """The images of a comparison whose runs are all done and undamaged, without their pixels.

    Raises:
        ComparisonError: something is missing or damaged, which the command that began the comparison makes again.
    """
    again = "Give the command that began the comparison once more."
    try:
        images = Images.load(folder)
        runs = [run for name in options.names for run in runs_of(folder, name, options)]
        if options.tune:
            runs += list((folder / RUNS).glob(f"{TRIAL}*"))
        missing = [run for run in runs if verified(run) is None]
    except DamagedFile as error:
        raise ComparisonError(f"{error} {again}") from error
    if missing or files.read_intact(folder / leaks.LEAKS) is None:
        raise ComparisonError(f"{missing[0] if missing else folder / leaks.LEAKS} is missing or damaged. {again}")
    return images


def named_code(options: Mapping[str, Any]) -> list[str]:
    """What may be code in the options of a plan: the backbone, and the parts of the variants, where they are there."""
    parts = [name for variant in options.get("variants", []) for name in variant.split("+")]
    return [options.get("backbone", ""), *parts]


def _functions(
    folder: Path, builds: Mapping[str, str], train: str | None, own: Mapping[str, str], call: Mapping[str, Any]
) -> dict[str, Any]:
    """The functions and classes that a comparison was begun with, as they are given again.

    That they are the same is checked with all other options.
    """
    variants = bool(set(builds) - {BASELINE}) or not all(map(registry.is_known, own))
    needed = {"backbone": BASELINE in builds, "variants": variants, "train": train is not None}
    for name in FUNCTIONS:
        if call[name] is not None and not needed[name]:
            _refuse(folder, name)
    functions_now = {name: call[name] for name in FUNCTIONS if needed[name]}
    for name, value in functions_now.items():
        listed = isinstance(value, Sequence) and not isinstance(value, str) and any(map(callable, value))
        if not callable(value) and not (name == "variants" and (listed or isinstance(value, Mapping))):
            raise ComparisonError(
                f"{folder} was begun from Python with functions of its own, or classes: call convattn.compare.run "
                f"there with add_seeds and the same {', '.join(functions_now)}."
            )
    return functions_now
