"""A comparison from beginning to end; its folder is the state, and the same call goes on where it was.

plan.json     what was asked for, with fingerprints of data and weights; written first
images.npy    all images decoded, with images.json; the array is gone when everything is done
leaks.json    the test images that are among the others as well
start.json    test accuracy of every variant before training
runs/         a folder for every run
cost.json     time, throughput, memory and sizes of every variant, measured after the last run
results.json  everything that the report says, see docs/results.md
report.html   the report, with results.csv and results.md beside it
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from convattn import checks, own_code, registry, reporting
from convattn.compare import changes, leaks, rounds, stats, timing, tuning
from convattn.compare import folder as folders
from convattn.compare.controls import seed_of
from convattn.compare.display import Display
from convattn.compare.options import (
    DEFAULT_VARIANTS,
    WEIGHT_DECAY,
    Options,
    Variants,
    backbone_of,
    check_networks,
    fingerprint_of,
    parse,
)
from convattn.compare.results import assemble, judged, rights, runs_of, tested_groups
from convattn.compare.verdicts import signed
from convattn.compare.workers import RUNS, run_all
from convattn.data import ARRAY, Images, Source, check_counts, decode, open_source, overview, split
from convattn.errors import ComparisonError, InvalidOption
from convattn.tables import aligned
from convattn.train import RunSpec, checkpoint, evaluation_shape, finished, functions, start_accuracy, write
from convattn.train.checkpoint import BASELINE
from convattn.train.controls import NOISE

START, RESULTS = "start.json", reporting.RESULTS


def run(
    data: str | Path,
    *,
    backbone: str | functions.Build = "resnet20",
    weights: str | Path | None = None,
    variants: Variants = DEFAULT_VARIANTS,
    train: functions.Train | None = None,
    controls: str | Sequence[str] = "none",
    start: str | None = None,
    seeds: int | None = None,
    until: str | None = None,
    max_seeds: int | None = None,
    add_seeds: int | None = None,
    folds: int | None = None,
    epochs: int | None = None,
    image_size: int | None = None,
    batch_size: int = 128,
    learning_rate: float | None = None,
    weight_decay: float = WEIGHT_DECAY,
    flip: bool | None = None,
    device: str = "auto",
    jobs: int = 1,
    smallest_gain: float | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
    gate_learning_rate: float | None = None,
    tune: str | None = None,
    audit_selection: bool = False,
    trust: own_code.Trust = (),
) -> dict[str, Any]:
    """Train baseline and variants on images over several seeds, and say what each variant gains and costs.

    Interrupt it anywhere and call it again: it goes on where it was. For each seed all variants share the initial
    weights of the backbone, the split into training and validation images, their order and augmentation. The epoch is
    chosen on validation images, the score is taken on test images, which are the same for all runs.

    Args:
        data: a folder of class folders, with or without `train`, `val` and `test` above them; an archive of one; a CSV
            file with the columns `path,label[,split][,group]`, where no group is torn between the splits; or
            `"digits"`.
        backbone: see `convattn.networks.create`; or a function of a seed that returns any module.
        weights: `"pretrained"`, None for random ones, or a file.
        variants: what stands in the network: names (registered, or `FILE.py:NAME`), joined with `+`, as a sequence or
            separated by commas; classes or factories of modules (from a number of channels), one or among the names of
            a sequence; or a dictionary from names of your own to classes, to factories whose first argument is called
            `channels`, `dim` or the like, or to functions of a seed that return any whole network, of as many classes
            as the data have. PyTorch's random numbers have that seed when such a function is called.
        train: in place of our training, a function of (model, split, seed) that trains the model and returns the class
            probabilities of the test images, (images, classes). `split.train`, `split.validation` and `split.test` are
            datasets of (x, label), see `convattn.data.Part`; the labels of the test images are hidden. It is called
            for the baseline and for every variant alike, and what it draws at random should follow from the seed.
        controls: networks without the idea of a variant, for each variant `"placebo"` (the same module fed a constant),
            `"adapter"` (an ungated bottleneck of its size) and `"wider"` (a wider network of its size, from random
            weights), and once `"noise"` (the baseline with other seeds); as a sequence or separated by commas.
        start: `"identity"` or `"paper"`; by default identity with loaded weights and paper with random ones.
        seeds: how many; by default 5, and 3 to begin with where it goes on until decided.
        until: `"decided"` adds a seed at a time until every variant is decided or will hardly be, see `max_seeds`.
        max_seeds: the most seeds then, 12 by default; every look in between spends from one budget.
        add_seeds: go on with the comparison in the folder `data` with so many seeds more; all else is as it was there,
            but for functions and classes, which have to be given again, and code of a file, see `trust`.
        folds: test every image once for each seed, by one of so many networks that did not see it; for data of few
            images. Parts that the data are given in then do not count.
        epochs: by default 30 from random weights and 10 from loaded ones.
        image_size: side in pixels; by default what the network was made for, or the images' own if that is less.
        batch_size: images in a training step.
        learning_rate: the highest; by default 0.05, with loaded weights 0.01, for batches of 128, else in proportion.
        weight_decay: for weights of two and more dimensions.
        flip: mirror training images at random; by default yes, but not the digits.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        jobs: runs at a time, each with its share of the processor's threads; above 1 they are processes of their own,
            so that a script has to call this below `if __name__ == "__main__"`.
        smallest_gain: the smallest gain in percentage points that is worth it, 0.5 by default.
        out: the folder; by default named after the data and a hash of the plan.
        quiet: print nothing.
        gate_learning_rate: that of what is attached, in variants and controls alike; by default that of the rest.
        tune: `"lr"` lets the baseline, every variant and every control choose a learning rate on validation images,
            from the same five around `learning_rate` and with trainings of seeds that are not compared.
        audit_selection: score the test images at every epoch as well, to show what others would have reported who
            choose the epoch on them; nothing else changes.
        trust: with `add_seeds`, code of the form `FILE.py:NAME` that may be run where the folder names it; no other is.

    Returns:
        The content of `results.json`, and `"folder"`, where it and `report.html` are.

    Raises:
        UntrustedCode: the folder `data` names code that is not trusted; nothing was run.
        ConvattnError: any other request that cannot be carried out; nothing was written.
        RunFailed: a run broke.
    """
    if add_seeds is not None:
        given = {"backbone": backbone, "variants": variants, "train": train}
        how = {"jobs": jobs, "device": device, "quiet": quiet}
        return _continued(data, add_seeds, given, trust, smallest_gain=smallest_gain, **how)
    options = parse(
        data,
        backbone=backbone,
        weights=weights,
        variants=variants,
        controls=controls,
        start=start,
        epochs=epochs,
        image_size=image_size,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        flip=flip,
        device=device,
        seeds=seeds,
        jobs=jobs,
        smallest_gain=smallest_gain,
        until=until,
        max_seeds=max_seeds,
        folds=folds,
        train=train,
        gate_learning_rate=gate_learning_rate,
        tune=tune,
        audit_selection=audit_selection,
    )
    with registry.also(options.own):
        return _run(options, out, Display(quiet=quiet))


def _run(options: Options, out: str | Path | None, display: Display) -> dict[str, Any]:
    for variant in options.variants:
        for name in variant.split("+") if variant not in options.builds else ():
            registry.entry(name)
    source = open_source(options.data)
    folder = Path(out) if out is not None else options.folder(source.name)
    threads = torch.get_num_threads()
    try:
        images = _prepared(options, source, folder, display)
        return _carried_out(options, images, folder, display, threads)
    finally:
        torch.set_num_threads(threads)


def _continued(
    folder: str | Path,
    more: int,
    given: dict[str, Any],
    trust: own_code.Trust,
    *,
    smallest_gain: float | None,
    **how: Any,
) -> dict[str, Any]:
    """The comparison of a folder with more seeds, its functions as given."""
    checks.positive("compare", "add_seeds", more)
    folder = Path(folder)
    asked = folders.options_of(folder)
    found = _functions(folder, asked.pop("builds", {}), asked.pop("train", None), asked.pop("own", {}), given)
    named = [] if "backbone" in found else [asked.get("backbone")]
    named += [] if "variants" in found else [name for one in asked.get("variants", []) for name in one.split("+")]
    own_code.check(named, folder / folders.PLAN, trust)
    asked |= found
    taken = rounds.looks(folder, None)
    if not taken.seeds:
        raise ComparisonError(f"{folder} is not done yet: give the command that began it once more.")
    known: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["setting"]
    smallest = known["smallest_gain_points"] if smallest_gain is None else smallest_gain
    # what it was trained on, it goes on with
    how["device"] = asked.pop("device")
    return run(**asked, seeds=taken.seeds[-1] + more, smallest_gain=smallest, out=folder, **how)


def _functions(
    folder: Path, builds: dict[str, str], train: str | None, own: dict[str, str], given: dict[str, Any]
) -> dict[str, Any]:
    """The functions and classes that a comparison was begun with, as they are given again.

    That they are the same is checked with all other options.
    """
    variants = bool(set(builds) - {BASELINE}) or not all(map(registry.is_known, own))
    wanted = {"backbone": BASELINE in builds, "variants": variants, "train": train is not None}
    found = {name: given[name] for name, there in wanted.items() if there}
    for name, one in found.items():
        listed = name == "variants" and not isinstance(one, str) and not callable(one) and any(map(callable, one))
        if not callable(one) and not listed and not (name == "variants" and isinstance(one, Mapping)):
            raise ComparisonError(
                f"{folder} was begun from Python with functions of its own, or classes: call convattn.compare.run "
                f"there with add_seeds and the same {', '.join(found)}."
            )
    return found


def _prepared(options: Options, source: Source, folder: Path, display: Display) -> Images:
    """The images of a comparison, in its folder; the folder is there only if everything in the request is right."""
    fingerprints = {
        "images": source.fingerprint(),
        "weights": fingerprint_of(options.weights),
        "network": fingerprint_of(options.backbone.rpartition(":")[0]),
        "functions": functions.fingerprint(options.callables),
    }
    files = [one.name.rpartition(":")[0] for one in options.own if own_code.is_named(one.name)]
    if files:
        fingerprints["modules"] = fingerprint_of(*files)
    known = folders.check(folder, options, fingerprints)
    rounds.check(folder, options.seeds, options.max_seeds)
    if known and ((folder / ARRAY).exists() or _is_complete(options, folder)):
        return Images.load(folder)
    with contextlib.nullcontext() if known else folders.preparing(folder, options, fingerprints):
        images = _decoded(options, source, folder, display)
    for one in images.left_out:
        display.warn(f"left out {one.path}: {one.reason}")
    return images


def _decoded(options: Options, source: Source, folder: Path, display: Display) -> Images:
    folders.clear(folder)
    try:
        listing = source.listing(folder / folders.UNPACKED)
        network = check_networks(options, len(listing.classes))
        display.say(f"Decoding {len(listing.found):,} images ...")
        wanted = getattr(network, "input_size", None)
        images = decode(listing, folder, image_size=options.image_size, wanted_size=wanted)
    finally:
        folders.clear(folder)
    if options.folds is None:
        check_counts(images)
    for seed, fold in [*options.parts, *((seed, None) for seed in tuning.SEEDS if options.tune)]:
        # groups may not fit, which should be known before the first run
        split(images, seed, fold=fold, folds=options.folds)
    _check_forward(network, images, options.backbone)
    for name, build in options.builds.items():
        if name != BASELINE:
            _check_forward(_built(build, network)(0), images, name)
    return images


def _is_complete(options: Options, folder: Path) -> bool:
    """Whether nothing is left to train or to measure, so that the images are not needed."""
    if options.until:
        # what is left shows only when it has been looked at
        return False
    runs = [run for name in options.names for run in runs_of(folder, name, options)]
    if options.tune and not tuning.are_done(options.names, options.learning_rate, folder):
        return False
    files = [folder / START, folder / timing.COST, folder / leaks.LEAKS]
    return all(finished(run) is not None for run in runs) and all(file.exists() for file in files)


def _check_forward(network: torch.nn.Module, images: Images, name: str) -> None:
    try:
        shape = evaluation_shape(network, images)
    except Exception as error:
        raise InvalidOption(
            f"{name} does not take images of {images.size} x {images.size} pixels "
            f"({checks.reason(error)}): try another --image-size."
        ) from error
    if shape != (2, len(images.classes)):
        raise InvalidOption(
            f"{name} gives an output of shape {shape} for 2 images, expected (2, {len(images.classes)}), a "
            f"score for each class of the data."
        )


def _carried_out(options: Options, images: Images, folder: Path, display: Display, threads: int) -> dict[str, Any]:
    like = backbone_of(options, len(images.classes)) if options.builds else None
    firsts = _specs(replace(options, seeds=1), threads, like)[: len(options.names)]
    parts = overview(images, options.folds)
    tests = len(parts.test)
    display.say(
        f"{len(images.classes)} classes, {len(parts.train):,} training, {len(parts.validation):,} validation and "
        f"{tests:,} test images of {images.size} x {images.size} pixels"
        + (f", tested in {options.folds} folds" if options.folds else "")
        + f"; {options.backbone} with {options.weights or 'random'} weights; results in {folder}"
    )
    if options.folds is None and tests < changes.FEW_TESTS:
        display.say(f"These are few test images: with --folds 5, each of {len(images.labels):,} images is tested.")
    _tell_what_is_wrong(images, options.folds, folder, display)
    starts = _start_accuracies(firsts, images, folder, display)
    seen = stats.detectable(options.seeds, tests, variants=len(options.variants), folds=options.folds)
    display.say(
        f"With {options.seeds} seeds and {tests:,} test images, this comparison can see gains of about "
        f"{seen:.1f} points or more."
        if seen is not None
        else "With a single seed this comparison can see no gain: it has no interval. Take at least 2, better 5."
    )
    if options.tune:
        options = _tuned(options, firsts, images, folder, display, max(1, threads // options.jobs))
    taken = _rounds(options, images, folder, display, max(1, threads // options.jobs), like)
    if not (folder / timing.COST).exists():
        display.say("Measuring what each variant costs ...")
    # the noise is the baseline's network
    costs = timing.measure(options, [spec for spec in firsts if spec.variant != NOISE], images, folder)
    results = assemble(options, images, folder, starts, costs, taken)
    write(folder / RESULTS, json.dumps(results, indent=1))
    report = reporting.write(results, folder)
    (folder / ARRAY).unlink(missing_ok=True)
    _conclude(results, report, display)
    return {**results, "folder": str(folder)}


def _tuned(
    options: Options, firsts: Sequence[RunSpec], images: Images, folder: Path, display: Display, threads: int
) -> Options:
    """The options with the learning rate that each network chose."""
    specs = tuning.trials(firsts, threads)
    display.say(f"Choosing a learning rate for each network on validation images, in {len(specs)} trainings:")
    already = sum(finished(folder / RUNS / spec.name) is not None for spec in specs)
    with display.watch(len(specs), already):
        run_all(specs, images, folder, options.jobs, display.update)
    found = tuning.chosen(options.names, options.learning_rate, folder)
    display.say(found["sentence"])
    for line in found["warnings"]:
        display.warn(line)
    return replace(options, rates=tuning.rates(found, options.names))


def _rounds(
    options: Options, images: Images, folder: Path, display: Display, threads: int, like: torch.nn.Module | None
) -> rounds.Looks:
    """Train all runs, and go on seed by seed until everything is decided where that was asked for; the looks taken.

    A variant that is decided gets no more seeds, and neither do its controls.
    """
    taken = rounds.looks(folder, options.max_seeds)
    ended = dict(taken.ended) if options.until else {}
    groups = tested_groups(images, options.folds)
    seeds = max(options.seeds, *taken.seeds, 1) if options.until else options.seeds
    while True:
        now = replace(options, seeds=seeds, ended=ended)
        specs = _specs(now, threads, like)
        already = sum(finished(folder / RUNS / spec.name) is not None for spec in specs)
        with display.watch(len(specs), already):
            run_all(specs, images, folder, options.jobs, display.update)
        taken = rounds.record(folder, taken, seeds, ended)
        if options.max_seeds is None:
            return taken
        right = rights(folder, (BASELINE, *options.variants), now, images)
        found = judged(right, options.smallest_gain, taken, groups, folds=options.folds)
        words = [f"{name} {one.word} ({signed(one.gain.points)})" for name, one in found.items() if name not in ended]
        display.say(f"Look {len(taken.seeds)}, with {seeds} seeds: {', '.join(words)}")
        over = rounds.over(found, taken, options.max_seeds, options.smallest_gain)
        if len(over) == len(found):
            return taken
        ended = {name: ended.get(name, seeds) for name in over}
        seeds += 1


def _tell_what_is_wrong(images: Images, folds: int | None, folder: Path, display: Display) -> None:
    parts = overview(images, folds)
    counts = leaks.counts(images, parts)
    for line in aligned(leaks.table(images.classes, counts["per_class"]), "<>>>"):
        display.say(f"  {line}")
    if not (folder / leaks.LEAKS).exists():
        display.say("Looking for test images among the others ...")
    for line in leaks.warnings(counts, leaks.search(images, folds, folder), len(parts.test)):
        display.warn(line)


def _start_accuracies(specs: Sequence[RunSpec], images: Images, folder: Path, display: Display) -> dict[str, float]:
    """The test accuracy of every variant before training, for the first seed, printed as they come."""
    path = folder / START
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    fold, folds = specs[0].fold, specs[0].folds
    tests = len(split(images, 0, fold=fold, folds=folds).test)
    which = "" if fold is None else " of the first fold"
    display.say(f"Accuracy on the {tests:,} test images{which} before any training:")
    for spec in specs:
        if spec.variant not in known:
            torch.set_num_threads(spec.threads)
            known[spec.variant] = start_accuracy(spec, images)
            write(path, json.dumps(known, indent=1))
        display.say(f"  {spec.variant:<20} {known[spec.variant]:6.2f} %")
    return known


def _specs(options: Options, threads: int, like: torch.nn.Module | None) -> list[RunSpec]:
    """All runs; networks that functions build are taken to want images `like` the backbone does."""
    return [
        _spec(options, name, seed, threads, fold=fold, like=like)
        for seed, fold in options.parts
        for name in options.names
        if seed < options.seeds_of(name)
    ]


def _built(build: functions.Build, like: Any) -> functions.Built:
    return functions.Built(build, like.input_mean, like.input_std, like.input_size)


def _spec(
    options: Options, variant: str, seed: int, threads: int, *, fold: int | None, like: torch.nn.Module | None
) -> RunSpec:
    build = options.builds.get(variant, options.builds.get(BASELINE))
    return RunSpec(
        variant=variant,
        seed=seed_of(variant, seed),
        backbone=options.backbone,
        weights=options.weights,
        start=options.start,
        recipe=options.recipe(variant),
        flip=options.flip,
        device=options.device,
        threads=threads,
        build=None if build is None else _built(build, like),
        whole=variant in options.builds or variant == NOISE,
        train=options.train,
        fold=fold,
        folds=options.folds,
        audit=options.audit_selection,
        own=_sent(options, variant),
    )


def _sent(options: Options, variant: str) -> tuple[registry.Entry, ...]:
    """The user's own modules of a network, but for those of a file, which every process loads by itself."""
    modules = checkpoint.modules_of(variant)
    return tuple(one for one in options.own if one.name in modules and not own_code.is_named(one.name))


def _conclude(results: dict[str, Any], report: Path, display: Display) -> None:
    display.say()
    display.say(results["headline"])
    for variant in results["variants"]:
        display.say(f"  {(variant['latency'] or variant)['sentence']}")
    for control in results["controls"]:
        display.say(f"  {control['sentence']}")
    display.say()
    display.say(f"The report: {report}")
