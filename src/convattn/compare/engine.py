"""A comparison from beginning to end; its folder is the state, and the same call goes on where it was.

convattn.lock held by the process that works here, which says of itself in activity.json since when
plan.json     what was asked for, with fingerprints of data and weights; written first
images.npy    all images decoded, with images.json; the array is gone when everything is done
leaks.json    the test images that are among the others as well
start.json    test accuracy of every variant before training
runs/         a folder for every run
cost.json     time, throughput, memory and sizes of every variant, measured after the last run
results.json  everything that the report says, see docs/results.md
report.html   the report, with results.csv and results.md beside it

Every file is known to be what was written: what is damaged is computed again, but for the plan.
"""

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convattn import checks, files, own_code, registry, reporting
from convattn.compare import changes, leaks, limits, rounds, stats, timing, tuning
from convattn.compare import folder as folders
from convattn.compare.continuing import continued, refuse_other_options
from convattn.compare.display import Display
from convattn.compare.options import (
    Options,
    Variants,
    backbone_of,
    check_networks,
    fingerprint_of,
    parse,
)
from convattn.compare.results import assemble, judged, rights, runs_of
from convattn.compare.specs import built, specs
from convattn.compare.verdicts import signed
from convattn.compare.workers import run_all
from convattn.data import (
    ARRAY,
    Images,
    Listing,
    Source,
    check_counts,
    decode,
    default_size,
    open_source,
    overview,
    split,
)
from convattn.data.listing import PREFIX, PREPARING
from convattn.errors import ComparisonError, DamagedFile, DataError, InvalidOption, RunFailed
from convattn.tables import aligned
from convattn.train import RunSpec, evaluation_shape, finished, functions, repair, start_accuracy
from convattn.train.checkpoint import BASELINE
from convattn.train.controls import NOISE
from convattn.train.store import RESULT, RUNS

START, RESULTS = "start.json", reporting.RESULTS
LOOKING = "Looking for images that show the same ..."
# files left out that are named before the start
MOST_NAMED = 20


def run(
    data: str | Path,
    *,
    backbone: str | functions.Build | None = None,
    weights: str | Path | None = None,
    variants: Variants | None = None,
    train: functions.Train | None = None,
    controls: str | Sequence[str] | None = None,
    start: str | None = None,
    seeds: int | None = None,
    until: str | None = None,
    max_seeds: int | None = None,
    add_seeds: int | None = None,
    folds: int | None = None,
    epochs: int | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    flip: bool | None = None,
    device: str | None = None,
    jobs: int | None = 1,
    threads: int | None = None,
    smallest_gain: float | None = None,
    out: str | Path | None = None,
    wait: bool = False,
    quiet: bool = False,
    gate_learning_rate: float | None = None,
    tune: str | None = None,
    audit_selection: bool = False,
    val_as_test: bool = False,
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
        backbone: `"resnet20"` by default, see `convattn.networks.create`; or a function of a seed that returns any
            module.
        weights: `"pretrained"`, None for random ones, or a file.
        variants: what stands in the network, by default se, cbam, dual and cbam+dual: names (registered, or
            `FILE.py:NAME`), joined with `+`, as a sequence or separated by commas; classes or factories of modules
            (from a number of channels), one or among the names of a sequence; or a dictionary from names of your own
            to classes, to factories whose first argument is called `channels`, `dim` or the like, or to functions of a
            seed that return any whole network, of as many classes as the data have. PyTorch's random numbers have that
            seed when such a function is called.
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
            and cannot be given, but for functions and classes, which have to be given again, and code of a file, see
            `trust`.
        folds: test every image once for each seed, by one of so many networks that did not see it; for data of few
            images. Parts that the data are given in then do not count.
        epochs: by default 30 from random weights and 10 from loaded ones.
        image_size: side in pixels; by default what the network was made for, or the images' own if that is less.
        batch_size: images in a training step, 128 by default.
        learning_rate: the highest; by default 0.05, with loaded weights 0.01, for batches of 128, else in proportion.
        weight_decay: for weights of two and more dimensions, 5e-4 by default.
        flip: mirror training images at random; by default yes, but not the digits.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`; auto by default.
        jobs: runs at a time, which changes no result; above 1 they are processes of their own, so that a script has to
            call this below `if __name__ == "__main__"`. None for as many as processor and memory allow.
        threads: of the processor for each run, written down in the folder at the first start, since results are equal
            to the bit for the same number only; by default what is left to each if all runs are at work at once.
        smallest_gain: the smallest gain in percentage points that is worth it, 0.5 by default.
        out: the folder, outside of the data; by default named after the data and a hash of the plan.
        wait: where another process works in the folder, wait until it has ended.
        quiet: print nothing.
        gate_learning_rate: that of what is attached, in variants and controls alike; by default that of the rest.
        tune: `"lr"` lets the baseline, every variant and every control choose a learning rate on validation images,
            from the same five around `learning_rate` and with trainings of seeds that are not compared.
        audit_selection: score the test images at every epoch as well, to show what others would have reported who
            choose the epoch on them; nothing else changes.
        val_as_test: test on the images that the data give for validation, and cut validation images from those for
            training; for data without test images of their own.
        trust: with `add_seeds`, code of the form `FILE.py:NAME` that may be run where the folder names it; no other is.

    Returns:
        The content of `results.json`, and `"folder"`, where it and `report.html` are.

    Raises:
        UntrustedCode: the folder `data` names code that is not trusted; nothing was run.
        ConvattnError: any other request that cannot be carried out; nothing was written.
        RunFailed: a run broke.
    """
    options: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights,
        "variants": variants,
        "train": train,
        "controls": controls,
        "start": start,
        "seeds": seeds,
        "until": until,
        "max_seeds": max_seeds,
        "folds": folds,
        "epochs": epochs,
        "image_size": image_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "flip": flip,
        "device": device,
        "threads": threads,
        "gate_learning_rate": gate_learning_rate,
        "tune": tune,
        "audit_selection": audit_selection,
        "val_as_test": val_as_test,
    }
    folder = None if out is None else Path(out)
    if add_seeds is not None:
        folder = Path(data)
        refuse_other_options(folder, {**options, "out": out})
        data, options, smallest_gain = continued(folder, add_seeds, options, trust, smallest_gain)
    elif trust:
        raise InvalidOption("compare: trust is for code that the folder of add_seeds names; what you give here is run.")
    parsed = parse(data, **options, jobs=jobs, smallest_gain=smallest_gain)
    with registry.also(parsed.own):
        return _run(parsed, folder, Display(quiet=quiet), wait=wait)


def _run(options: Options, folder: Path | None, display: Display, *, wait: bool) -> dict[str, Any]:
    for variant in options.variants:
        for name in variant.split("+") if variant not in options.builds else ():
            registry.entry(name)
    source = open_source(options.data)
    folder = folder or options.folder(source.name)
    _check_outside(folder, source)
    threads = torch.get_num_threads()
    try:
        with folders.locked(folder, wait=wait, say=display.warn):
            options, images = _prepared(options, source, folder, display)
            return _carried_out(options, images, folder, display)
    except SystemExit as error:
        raise RunFailed(
            f"compare: code of a network ended the program, as by sys.exit({error.code!r}); what is done is kept."
        ) from error
    finally:
        torch.set_num_threads(threads)


def _check_outside(folder: Path, source: Source) -> None:
    """Refuse a folder inside of the data, where its files would be taken for images; its own kind is known there."""
    if source.path is None or not source.path.is_dir() or folder.name.startswith(PREFIX):
        return
    data = source.path.resolve()
    if data in (folder.resolve(), *folder.resolve().parents):
        raise ComparisonError(
            f"{folder} lies inside of the data {source.path}, and its files would be taken for images: give an --out "
            f"outside of them, or none. Nothing was changed."
        )


def _prepared(options: Options, source: Source, folder: Path, display: Display) -> tuple[Options, Images]:
    """The images of a comparison, in its folder, and its options with the threads and jobs of its runs.

    The folder is there only if everything in the request is right.
    """
    # an archive is unpacked only where it is needed
    listing = None if source.is_archive else _listing(options, source, folder)
    fingerprints = {
        "images": source.fingerprint(listing),
        "weights": fingerprint_of(options.weights),
        "network": fingerprint_of(options.backbone.rpartition(":")[0]),
        "functions": functions.fingerprint(options.callables),
    }
    modules = [entry.name.rpartition(":")[0] for entry in options.own if own_code.is_named(entry.name)]
    if modules:
        fingerprints["modules"] = fingerprint_of(*modules)
    begun = folders.check(folder, options, fingerprints)
    options = _with_threads(options, folders.read_plan(folder)["threads"] if begun else None, folder)
    rounds.check(folder, options.seeds, options.max_seeds)
    if begun:
        # a process that was killed between its last steps leaves both
        (folder / PREPARING).unlink(missing_ok=True)
        folders.clear(folder)
        for run_folder in sorted((folder / RUNS).glob("*/")):
            for line in repair(run_folder):
                display.warn(line)
        done = len(list((folder / RUNS).glob(f"*/{RESULT}")))
        limits.check_more(options, done, backbone_of(options, None), folder)
        images = _intact_images(folder, display)
        if images is not None and (len(images.pixels) or _is_complete(options, folder)):
            return options, images
    with contextlib.nullcontext() if begun else folders.preparing(folder, options, fingerprints):
        images = _decoded(options, source, listing, folder, display)
    for file in images.left_out[:MOST_NAMED]:
        display.warn(f"left out {file.path}: {file.reason}")
    if len(images.left_out) > MOST_NAMED:
        display.warn(f"left out {len(images.left_out) - MOST_NAMED:,} more files, which the report names.")
    return options, images


def _listing(options: Options, source: Source, folder: Path) -> Listing:
    return source.listing(folder / folders.UNPACKED, val_as_test=options.val_as_test, folds=options.folds is not None)


def _with_threads(options: Options, recorded: int | None, folder: Path) -> Options:
    """The options with the threads of each run: those that the folder was begun with, or what is asked for."""
    if recorded is not None and options.threads not in (None, recorded):
        raise ComparisonError(
            f"{folder} was begun with {recorded} threads for each run, and its results are equal to the bit for these "
            f"only: give --threads {recorded}, or another --out. Nothing was changed."
        )
    return replace(options, threads=recorded or options.threads or limits.default_threads(options))


def _intact_images(folder: Path, display: Display) -> Images | None:
    """The images of a folder; None where they are missing or damaged, and have to be decoded again."""
    try:
        return Images.load(folder, verify=True)
    except DamagedFile as error:
        display.warn(f"{error} The images are decoded again.")
        return None


def _decoded(options: Options, source: Source, listing: Listing | None, folder: Path, display: Display) -> Images:
    folders.clear(folder)
    try:
        listing = listing or _listing(options, source, folder)
        network = backbone_of(options, len(listing.classes))
        wanted = getattr(network, "input_size", None)
        size = options.image_size or default_size(listing, wanted)
        needs = limits.needs(options, len(listing.found), size, network, folder)
        display.say(needs.sentence(folder))
        check_networks(options, network, len(listing.classes))
        display.say(f"Decoding {len(listing.found):,} images ...")
        images = decode(listing, folder, image_size=size, wanted_size=wanted, progress=display.count("images"))
    finally:
        folders.clear(folder)
    for line in images.findings.sentences(len(images.labels)):
        display.warn(line)
    if not len(images.labels):
        first = images.left_out[0]
        raise DataError(f"No image of {source.name} can be decoded: {first.path}: {first.reason}.")
    if options.folds is None:
        check_counts(images)
    for seed, fold in [*options.parts, *((seed, None) for seed in tuning.SEEDS if options.tune)]:
        # groups may not fit, which should be known before the first run
        split(images, seed, fold=fold, folds=options.folds)
    display.say(LOOKING)
    leaks.check_units(images, options.folds, leaks.search(images, options.folds, folder))
    _check_forward(network, images, options.backbone)
    for name, build in options.builds.items():
        if name != BASELINE:
            _check_forward(built(build, network)(0), images, name)
    return images


def _is_complete(options: Options, folder: Path) -> bool:
    """Whether nothing is left to train or to measure, so that the images are not needed."""
    if options.until:
        # what is left shows only when it has been looked at
        return False
    runs = [run for name in options.names for run in runs_of(folder, name, options)]
    if options.tune and not tuning.are_done(options.names, options.learning_rate, folder):
        return False
    contents = [files.read_intact(folder / name) for name in (START, timing.COST, leaks.LEAKS)]
    return all(finished(run) is not None for run in runs) and all(content is not None for content in contents)


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


def _carried_out(options: Options, images: Images, folder: Path, display: Display) -> dict[str, Any]:
    cores = torch.get_num_threads()
    network = backbone_of(options, len(images.classes))
    like = network if options.builds else None
    if options.jobs is None:
        memory = limits.memory_of_run(options, len(images.labels), images.size, network)
        options = replace(options, jobs=limits.default_jobs(options, memory))
    firsts = specs(replace(options, seeds=1), like)[: len(options.names)]
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
    groups = leaks.units(images, options.folds, leaks.search(images, options.folds, folder))
    count = tests if groups is None else len(set(groups.tolist()))
    seen = stats.detectable(options.seeds, count, variants=len(options.variants), folds=options.folds)
    grouped = "" if groups is None else f" in {count:,} groups"
    display.say(
        f"With {options.seeds} seeds and {tests:,} test images{grouped}, this comparison can see gains of about "
        f"{seen:.1f} points or more."
        if seen is not None
        else "With a single seed this comparison can see no gain: it has no interval. Take at least 2, better 5."
    )
    if options.tune:
        options = _tuned(options, firsts, images, folder, display)
    taken = _rounds(options, images, folder, display, like, groups)
    torch.set_num_threads(cores)
    if files.read_intact(folder / timing.COST) is None:
        display.say("Measuring what each variant costs ...")
    # the noise is the baseline's network
    costs = timing.measure(options, [spec for spec in firsts if spec.variant != NOISE], images, folder)
    results = assemble(options, images, folder, starts, costs, taken)
    files.write_json(folder / RESULTS, results)
    report = reporting.write(results, folder)
    (folder / ARRAY).unlink(missing_ok=True)
    _conclude(results, report, display)
    return {**results, "folder": str(folder)}


def _tuned(options: Options, firsts: Sequence[RunSpec], images: Images, folder: Path, display: Display) -> Options:
    """The options with the learning rate that each network chose."""
    trials = tuning.trials(firsts)
    display.say(f"Choosing a learning rate for each network on validation images, in {len(trials)} trainings:")
    already = sum(finished(folder / RUNS / spec.name) is not None for spec in trials)
    folders.tell_runs(folder, len(trials), already)
    with display.watch(len(trials), already):
        run_all(trials, images, folder, options.jobs or 1, display.update)
    found = tuning.chosen(options.names, options.learning_rate, folder)
    display.say(found["sentence"])
    for line in found["warnings"]:
        display.warn(line)
    return replace(options, rates=tuning.rates(found, options.names))


def _rounds(
    options: Options,
    images: Images,
    folder: Path,
    display: Display,
    like: torch.nn.Module | None,
    groups: np.ndarray | None,
) -> rounds.Looks:
    """Train all runs, and go on seed by seed until everything is decided where that was asked for; the looks taken.

    A variant that is decided gets no more seeds, and neither do its controls.
    """
    taken = rounds.looks(folder, options.max_seeds)
    ended = dict(taken.ended) if options.until else {}
    seeds = max(options.seeds, *taken.seeds, 1) if options.until else options.seeds
    while True:
        now = replace(options, seeds=seeds, ended=ended)
        planned = specs(now, like)
        already = sum(finished(folder / RUNS / spec.name) is not None for spec in planned)
        folders.tell_runs(folder, len(planned), already)
        with display.watch(len(planned), already):
            run_all(planned, images, folder, options.jobs or 1, display.update)
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
    if files.read_intact(folder / leaks.LEAKS) is None:
        display.say(LOOKING)
    for line in leaks.warnings(counts, leaks.search(images, folds, folder), len(parts.test)):
        display.warn(line)


def _start_accuracies(firsts: Sequence[RunSpec], images: Images, folder: Path, display: Display) -> dict[str, float]:
    """The test accuracy of every variant before training, for the first seed, printed as they come."""
    path = folder / START
    known: dict[str, float] = (files.read_intact(path) or {}).get("accuracies", {})
    fold, folds = firsts[0].fold, firsts[0].folds
    tests = len(split(images, 0, fold=fold, folds=folds).test)
    which = "" if fold is None else " of the first fold"
    display.say(f"Accuracy on the {tests:,} test images{which} before any training:")
    for spec in firsts:
        if spec.variant not in known:
            torch.set_num_threads(spec.threads)
            known[spec.variant] = start_accuracy(spec, images)
            files.write_json(path, {"accuracies": known})
        display.say(f"  {spec.variant:<20} {known[spec.variant]:6.2f} %")
    return known


def _conclude(results: dict[str, Any], report: Path, display: Display) -> None:
    display.say()
    display.say(results["headline"])
    for variant in results["variants"]:
        display.say(f"  {(variant['latency'] or variant)['sentence']}")
    if results["baseline"]["latency"]["note"]:
        display.say(results["baseline"]["latency"]["note"].replace("FOLDER", shlex.quote(str(report.parent))))
    for control in results["controls"]:
        display.say(f"  {control['sentence']}")
    display.say()
    display.say(f"The report: {report}")
