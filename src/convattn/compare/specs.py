"""The runs of a comparison, each as what it is."""

from typing import Any

import torch

from convattn import own_code, registry
from convattn.compare.controls import seed_of
from convattn.compare.options import Options
from convattn.train import RunSpec, checkpoint, functions
from convattn.train.checkpoint import BASELINE
from convattn.train.controls import NOISE


def specs(options: Options, like: torch.nn.Module | None) -> list[RunSpec]:
    """All runs; networks that functions build are taken to want images `like` the backbone does."""
    return [
        _spec(options, name, seed, fold=fold, like=like)
        for seed, fold in options.parts
        for name in options.names
        if seed < options.seeds_of(name)
    ]


def built(build: functions.Build, like: Any) -> functions.Built:
    return functions.Built(build, like.input_mean, like.input_std, like.input_size)


def _spec(options: Options, variant: str, seed: int, *, fold: int | None, like: torch.nn.Module | None) -> RunSpec:
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
        threads=options.threads or 1,
        build=None if build is None else built(build, like),
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
    return tuple(entry for entry in options.own if entry.name in modules and not own_code.is_named(entry.name))
