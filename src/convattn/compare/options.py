"""What was asked for, checked before anything is done, and the folder that it belongs to."""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convattn import checks, networks, own_code, registry
from convattn.attachment import plan
from convattn.attachment.plans import own_entry
from convattn.compare import controls as control
from convattn.compare import tuning
from convattn.compare.rounds import UNTIL
from convattn.data.listing import PREFIX
from convattn.errors import InvalidOption
from convattn.networks import IMAGENET_MEAN, IMAGENET_STD
from convattn.nn.base import STARTS
from convattn.train import Recipe, functions
from convattn.train.checkpoint import BASELINE, build
from convattn.train.controls import NOISE, WIDER, parts

BACKBONE = "resnet20"
DEFAULT_VARIANTS = ("se", "cbam", "dual", "cbam+dual")
# for batches of 128; half of the customary 0.1 (He et al., 2016, section 4.2), at which heads without a norm diverged
RATE, FINE_TUNING_RATE, RATE_BATCH = 0.05, 0.01, 128
BATCH_SIZE = 128
# ten times as much, which the choice of a rate tries, is still a number in single precision
LARGEST_RATE = 1e37
WEIGHT_DECAY = 5e-4
EPOCHS, FINE_TUNING_EPOCHS = 30, 10
# these change how many runs there are, where they run or how they are judged, not what any run is
NOT_HASHED = ("seeds", "jobs", "threads", "smallest_gain", "until", "max_seeds", "rates", "ended")
SEEDS, FIRST_SEEDS, MAX_SEEDS = 5, 3, 12
SMALLEST_GAIN = 0.5
# a name, a class or factory of a module, several of them, or by name functions that build whole networks as well
Variants = str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | Mapping[str, Callable[..., Any]]
# what a training function of the user has no use for
OF_OUR_TRAINING = ("tune", "audit_selection", "gate_learning_rate", "epochs", "learning_rate", "weight_decay", "flip")
# of letters of the name of the data in that of a folder: file systems take about 255 bytes
LONGEST_NAME = 60
# it becomes the name of a folder
NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Options:
    """A comparison as asked for, defaults filled in."""

    data: str
    backbone: str
    weights: str | None
    variants: tuple[str, ...]
    controls: tuple[str, ...]
    start: str
    epochs: int
    image_size: int | None
    batch_size: int
    learning_rate: float
    weight_decay: float
    flip: bool
    device: str
    seeds: int
    # None until it is known what the machine has
    jobs: int | None
    smallest_gain: float
    threads: int | None = None
    until: str | None = None
    max_seeds: int | None = None
    folds: int | None = None
    gate_learning_rate: float | None = None
    tune: str | None = None
    audit_selection: bool = False
    val_as_test: bool = False
    # by the name of a network the learning rate that it chose, once that is known
    rates: Mapping[str, float] = field(default_factory=dict)
    # by the name of a variant the number of its seeds, where it was decided before the others
    ended: Mapping[str, int] = field(default_factory=dict)
    # functions of the user: what builds a network, by its name, and what trains it
    builds: Mapping[str, functions.Build] = field(default_factory=dict)
    train: functions.Train | None = None
    # modules of the user's own, by the names that they have among the variants
    own: tuple[registry.Entry, ...] = ()

    def recipe(self, name: str) -> Recipe:
        """How a network is trained: each like all others, but for a learning rate that it chose."""
        rate = self.rates.get(name, self.learning_rate)
        return Recipe(self.epochs, self.batch_size, rate, self.weight_decay, self.gate_learning_rate)

    @property
    def names(self) -> tuple[str, ...]:
        """The networks that are trained: the baseline, the variants, and their controls."""
        return (BASELINE, *self.variants, *control.expanded(self.controls, self.variants))

    @property
    def callables(self) -> list[Callable[..., Any]]:
        """All functions and classes of the user that no command line can name."""
        return [*self.builds.values(), *([] if self.train is None else [self.train]), *self._own.values()]

    @property
    def _own(self) -> dict[str, Callable[..., Any]]:
        return {one.name: one.source for one in self.own if not own_code.is_named(one.name)}

    @property
    def parts(self) -> Iterator[tuple[int, int | None]]:
        """Every seed, with every fold if there are any."""
        return self.parts_of(BASELINE)

    def parts_of(self, name: str) -> Iterator[tuple[int, int | None]]:
        """Every seed that a network is trained with, with every fold if there are any."""
        return itertools.product(range(self.seeds_of(name)), [None] if self.folds is None else range(self.folds))

    def seeds_of(self, name: str) -> int:
        """The number of seeds of a network; a control has as many as its variant."""
        return self.ended.get(parts(name)[1], self.seeds)

    def hashed(self) -> dict[str, Any]:
        """What the runs depend on, with paths made absolute and functions by their names."""
        content = {key: value for key, value in vars(self).items() if key not in NOT_HASHED}
        content["builds"] = {name: functions.label(one) for name, one in self.builds.items()}
        content["train"] = None if self.train is None else functions.label(self.train)
        del content["own"]
        if self._own:
            content["own"] = {name: functions.label(one) for name, one in self._own.items()}
        for key in ("data", "weights"):
            if content[key] and Path(content[key]).exists():
                content[key] = Path(content[key]).resolve().as_posix()
        # as it comes back from a file
        return json.loads(json.dumps(content))  # type: ignore[no-any-return]

    def folder(self, data_name: str) -> Path:
        """The default folder: named after the data and a hash of the plan."""
        digest = hashlib.sha256(json.dumps(self.hashed(), sort_keys=True).encode()).hexdigest()[:8]
        return Path(f"{PREFIX}{data_name[:LONGEST_NAME]}-{digest}")

    def command(self, looks: Sequence[int] = (), folder: Path | None = None) -> str:
        """The command lines that repeat this comparison, with the looks that were taken at it."""
        if self.until or not looks:
            return self._call(self.data, self._given(self.seeds)) if self.callables else self._command(self.seeds)
        more = [b - a for a, b in itertools.pairwise(looks)]
        if self.callables:
            trust = {"trust": self.named_code} if self.named_code else {}
            added = [self._call(str(folder), {"add_seeds": count} | trust) for count in more]
            out = {"out": str(folder)} if added else {}
            return "\n".join([self._call(self.data, self._given(looks[0]) | out), *added])
        trusted = "".join(f" --trust {_quoted(name)}" for name in self.named_code)
        added = [f"convattn compare --add-seeds {count}{trusted} {_quoted(str(folder))}" for count in more]
        return " && ".join([self._command(looks[0]) + (f" --out {_quoted(str(folder))}" if added else ""), *added])

    @property
    def named_code(self) -> list[str]:
        """Code of the form FILE.py:NAME, which the folder of this comparison names from then on."""
        named = [] if BASELINE in self.builds else [self.backbone]
        named += [one.name for one in self.own]
        return list(filter(own_code.is_named, named))

    def _given(self, seeds: int) -> dict[str, Any]:
        """Every option that makes a difference, as `run` takes it."""
        names = ["backbone", "weights", "variants", "controls", "start", "seeds", "until", "max_seeds", "folds"]
        names += ["epochs", "image_size", "batch_size", "learning_rate", "weight_decay", "flip", "smallest_gain"]
        names += ["gate_learning_rate", "tune"]
        values = {name: getattr(self, name) for name in names} | {"seeds": seeds}
        values |= {name: getattr(self, name) or None for name in ("audit_selection", "val_as_test", "threads")}
        values |= {name: ",".join(values[name]) for name in ("variants", "controls")}
        values |= dict.fromkeys(() if self.train is None else OF_OUR_TRAINING)
        return {name: value for name, value in values.items() if value not in (None, "")}

    def _command(self, seeds: int) -> str:
        words = ["convattn compare", _quoted(self.data)]
        for name, value in self._given(seeds).items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words.append(f"--{option} {_quoted(value if isinstance(value, str) else repr(value))}")
        return " ".join(words)

    def _call(self, data: str, options: Mapping[str, Any]) -> str:
        """The call from Python, with the functions of the user by their names."""
        said = {name: repr(value) for name, value in options.items()}
        named = {name: functions.label(one).replace(":", ".") for name, one in self.builds.items()}
        if BASELINE in named:
            said["backbone"] = named.pop(BASELINE)
        given_here = {one.name for one in self.own if not one.registered}
        named |= {name: functions.label(one).replace(":", ".") for name, one in self._own.items() if name in given_here}
        if named and set(self.variants) <= set(named):
            said["variants"] = "{" + ", ".join(f"{name!r}: {one}" for name, one in named.items()) + "}"
        elif named:
            # in a list each has the name of its function
            said["variants"] = "[" + ", ".join(named.get(name, repr(name)) for name in self.variants) + "]"
        if self.train is not None:
            said["train"] = functions.label(self.train).replace(":", ".")
        given = "".join(f", {name}={value}" for name, value in said.items())
        return f"convattn.compare.run({data!r}{given})"


def parse(
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
    folds: int | None = None,
    epochs: int | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    flip: bool | None = None,
    device: str | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    smallest_gain: float | None = None,
    gate_learning_rate: float | None = None,
    tune: str | None = None,
    audit_selection: bool = False,
    val_as_test: bool = False,
) -> Options:
    """Check every option that can be checked without looking at data or networks, and fill in the defaults."""
    where = "compare"
    if until is not None:
        checks.choice(where, "until", until, UNTIL)
    if max_seeds is not None and until is None:
        raise InvalidOption("compare: max_seeds is the end of --until decided, and that was not asked for.")
    seeds = seeds if seeds is not None else FIRST_SEEDS if until else SEEDS
    most = (max_seeds if max_seeds is not None else MAX_SEEDS) if until else None
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    for name, value in (("seeds", seeds), ("batch_size", batch_size)):
        checks.positive(where, name, value)
    if most is not None:
        checks.positive(where, "max_seeds", most)
        if not 2 <= seeds <= most:
            raise InvalidOption(
                f"compare: until={until!r} goes from seeds, 2 or more, to max_seeds; got {seeds}, {most}."
            )
    for name, switch in (("flip", flip), ("audit_selection", audit_selection), ("val_as_test", val_as_test)):
        checks.choice(where, name, switch, (True, False, *([None] if name == "flip" else [])))
    if threads is not None:
        checks.between(where, "threads", threads, 1, os.cpu_count() or 1)
    for name, optional in (("epochs", epochs), ("image_size", image_size), ("jobs", jobs), ("threads", threads)):
        if optional is not None:
            checks.positive(where, name, optional)
    for name, rate in (("learning_rate", learning_rate), ("gate_learning_rate", gate_learning_rate)):
        numeric = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (numeric and 0 < rate < math.inf):
            raise InvalidOption(f"compare: {name} must be above 0 and finite, got {rate!r}.")
        if rate is not None and rate > LARGEST_RATE:
            raise InvalidOption(f"compare: {name} must be at most {LARGEST_RATE:g}, got {rate!r}.")
    ours = (tune, audit_selection or None, gate_learning_rate, epochs, learning_rate, weight_decay, flip)
    _check_training(tune, folds, train, dict(zip(OF_OUR_TRAINING, ours, strict=True)))
    weight_decay = WEIGHT_DECAY if weight_decay is None else weight_decay
    checks.between(where, "weight_decay", weight_decay, 0, 1)
    smallest_gain = SMALLEST_GAIN if smallest_gain is None else smallest_gain
    checks.between(where, "smallest_gain", smallest_gain, 0, 100)
    chosen = None if weights in (None, "none") else str(weights)
    start = start or ("identity" if chosen else "paper")
    checks.choice(where, "start", start, STARTS)
    if val_as_test and folds is not None:
        raise InvalidOption("compare: with folds every image is tested, val too; leave out val_as_test or folds.")
    if folds is not None and not (isinstance(folds, int) and folds >= 2):
        raise InvalidOption(f"compare: folds must be 2 or more, got {folds!r}.")
    backbone = BACKBONE if backbone is None else backbone
    names, built, own = _named(DEFAULT_VARIANTS if variants is None else variants)
    builds = _builds(backbone, built, controls, chosen)
    if jobs is None or jobs > 1:
        sent = [one.source for one in own if not own_code.is_named(one.name)]
        functions.check_sendable([*builds.values(), *([train] if train else []), *sent])
    usual = (FINE_TUNING_RATE if chosen else RATE) * batch_size / RATE_BATCH
    return Options(
        data=str(data),
        backbone=backbone if isinstance(backbone, str) else functions.label(backbone),
        weights=chosen,
        variants=_variants(names),
        controls=control.parse(controls, chosen),
        start=start,
        epochs=epochs or (FINE_TUNING_EPOCHS if chosen else EPOCHS),
        image_size=image_size,
        batch_size=batch_size,
        learning_rate=usual if learning_rate is None else learning_rate,
        weight_decay=weight_decay,
        # digits are read from left to right
        flip=str(data) != "digits" if flip is None else flip,
        device=_device("auto" if device is None else device),
        seeds=seeds,
        jobs=jobs,
        threads=threads,
        smallest_gain=smallest_gain,
        until=until,
        max_seeds=most,
        folds=folds,
        gate_learning_rate=gate_learning_rate,
        tune=tune,
        audit_selection=audit_selection,
        val_as_test=val_as_test,
        builds=builds,
        train=train,
        own=own,
    )


def backbone_of(options: Options, classes: int | None) -> torch.nn.Module:
    """The backbone, by its name or by a function of the user."""
    if BASELINE in options.builds:
        return functions.Built(options.builds[BASELINE], IMAGENET_MEAN, IMAGENET_STD, None)(0)
    return networks.create(options.backbone, classes=classes, weights=options.weights)


def check_networks(options: Options, network: torch.nn.Module, classes: int) -> None:
    """Plan every variant on the backbone, and build every control.

    Raises:
        ConvattnError: whatever any run would fail with at its start.
    """
    for variant in options.variants:
        if variant not in options.builds:
            plan(network, variant, start=options.start)
    side = options.image_size or getattr(network, "input_size", None) or 64
    about = {"backbone": options.backbone, "start": options.start, "classes": range(classes), "image_size": side}
    for name in control.expanded(options.controls, options.variants):
        if name != NOISE:
            # the weights would change nothing, and may have to be fetched
            base = backbone_of(options, classes) if BASELINE in options.builds else None
            build({**about, "variant": name}, base=base)


def _check_training(
    tune: str | None, folds: int | None, train: functions.Train | None, ours: Mapping[str, Any]
) -> None:
    """Raise `InvalidOption` for options of our training that there is no such, or that others exclude."""
    checks.choice("compare", "tune", tune, (None, *tuning.TUNE))
    asked = [name for name, value in ours.items() if value is not None]
    if train is not None and asked:
        raise InvalidOption(f"compare: {asked[0]} is for our training, which train takes the place of; leave out one.")
    if tune is not None and folds is not None:
        raise InvalidOption(
            "compare: tune chooses a learning rate on images that are never tested, and with folds every image is "
            "tested; leave out one."
        )


def _named(variants: Variants) -> tuple[list[str], dict[str, functions.Build], tuple[registry.Entry, ...]]:
    """The names of the variants, the functions that build whole networks, and the modules of the user's own."""
    builds: dict[str, functions.Build] = {}
    own: dict[str, registry.Entry] = {}
    names = []
    for name, one in _pairs(variants):
        names.append(name)
        if not callable(one):
            own |= {entry.name: entry for entry in _own_modules(name)}
        elif functions.builds_network(one, otherwise=isinstance(variants, Mapping)):
            builds[name] = one
        else:
            entry = _own_module(name, one)
            names[-1] = entry.name
            if not entry.is_ours:
                own[entry.name] = entry
    return names, builds, tuple(own.values())


def _pairs(variants: Any) -> list[tuple[str, Any]]:
    """Each variant with its name: the callable, or the name itself."""
    if isinstance(variants, Mapping):
        for name, one in variants.items():
            if not isinstance(name, str) or not NAME.fullmatch(name) or name in (BASELINE, NOISE):
                raise InvalidOption(
                    f"compare: expected a name of letters, digits and . _ - + for a variant, got {name!r}."
                )
            if not callable(one) or isinstance(one, torch.nn.Module):
                raise InvalidOption(
                    f"compare: expected a function that builds the variant {name!r}, or the class or a factory of a "
                    f"module, got {checks.said(one)}."
                )
        return list(variants.items())
    if isinstance(variants, str):
        return [(name.strip(), None) for name in variants.split(",")]
    listed = [variants] if callable(variants) else list(variants) if isinstance(variants, Iterable) else [variants]
    for one in listed:
        if not isinstance(one, str) and (not callable(one) or isinstance(one, torch.nn.Module)):
            raise InvalidOption(
                f"compare: expected names, classes or factories of modules as variants, or a dictionary from names to "
                f"them or to functions that build networks, got {checks.said(one)}."
            )
    pairs = [(one.strip(), None) if isinstance(one, str) else (_name_of(one), one) for one in listed]
    for name, one in pairs:
        if callable(one) and not NAME.fullmatch(name):
            raise InvalidOption(
                f"compare: {name!r} is no name for a variant: give a dictionary, as in variants={{'mine': ...}}."
            )
    return pairs


def _name_of(function: Any) -> str:
    made = getattr(function, "func", function)
    return str(getattr(made, "__name__", type(made).__name__))


def _own_modules(variant: str) -> Iterator[registry.Entry]:
    """The modules of the user's own that a variant names: of a file, or registered."""
    for name in variant.split("+"):
        if own_code.is_named(name):
            yield own_entry(own_code.load(name), name=name)
        elif registry.is_known(name) and not registry.entry(name).is_ours:
            yield registry.entry(name)


def _own_module(name: str, one: Callable[..., Any]) -> registry.Entry:
    """The entry of a class or of a factory, under a name that is nothing else's."""
    entry = own_entry(one)
    if entry.registered and name in (entry.name, _name_of(one)):
        return entry
    registry.check_name("compare", name)
    if registry.is_known(name):
        raise InvalidOption(
            f"compare: {name!r} is the name of {registry.entry(name).module.__name__} already: give another one in a "
            f"dictionary, as in variants={{'mine': ...}}."
        )
    return own_entry(one, name=name)


def _builds(
    backbone: str | functions.Build,
    own: Mapping[str, functions.Build],
    controls: str | Sequence[str] | None,
    weights: str | None,
) -> dict[str, functions.Build]:
    """The functions that build networks, by the names of these."""
    kinds = control.parse(controls, weights)
    if own and set(kinds) - {NOISE}:
        raise InvalidOption(
            f"compare: {next(kind for kind in kinds if kind != NOISE)} is a control for attention that has a name, and "
            f"{next(iter(own))!r} is built by a function; take noise, or build the control as another variant."
        )
    if isinstance(backbone, str):
        return dict(own)
    if not callable(backbone):
        raise InvalidOption(f"compare: expected a network's name or a function that builds it, got {backbone!r}.")
    if weights is not None:
        raise InvalidOption("compare: where a function builds the backbone, weights are to be loaded in it.")
    if WIDER in kinds:
        raise InvalidOption("compare: wider is for networks that have a name, and the backbone is built by a function.")
    return {BASELINE: backbone, **own}


def fingerprint_of(*files: str | None) -> str | None:
    """A hash of the content of files; None where there is none."""
    contents = [Path(file).read_bytes() for file in files if file is not None and Path(file).is_file()]
    return hashlib.blake2b(b"".join(contents), digest_size=16).hexdigest() if contents else None


def _variants(names: Sequence[str]) -> tuple[str, ...]:
    names = [name for name in names if name and name != BASELINE]
    if not names:
        raise InvalidOption("compare: variants names nothing to compare with the baseline.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidOption(f"compare: variants names {twice[0]!r} twice.")
    return tuple(names)


def _device(device: str) -> str:
    checks.choice("compare", "device", device.partition(":")[0], ("auto", "cpu", "cuda", "mps"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidOption(f"compare: device {device!r} was asked for, and PyTorch sees no CUDA device here.")
    return device


def _quoted(word: str | None) -> str:
    return shlex.quote(word or "")
