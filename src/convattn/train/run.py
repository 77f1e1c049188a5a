"""One run in a folder of its own (`store`): it is the state, and killing the process loses at most a minute.

A training that diverges is no error: its run ends there, and is scored by its best epoch before, or by chance.
"""

import io
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from convattn import files, registry
from convattn.data import Batches, Images, Parts, batches, evaluation_batches, split
from convattn.errors import DamagedFile
from convattn.train import checkpoint, functions
from convattn.train.gates import departures
from convattn.train.recipe import LONGEST_GRADIENT, Recipe
from convattn.train.store import (
    CHECKPOINT,
    LOG,
    PREDICTIONS,
    PREVIOUS,
    RESULT,
    WEIGHTS,
    clean_up,
    describe,
    finished,
    log_lines,
    run_name,
    trial_name,
)

# how much more probable the class is that a guess takes: enough to be the highest in single precision
CHANCE_MARGIN = 1e-3
SECONDS_BETWEEN_CHECKPOINTS = 60


@dataclass(frozen=True)
class RunSpec:
    """What one run is: a variant (`"baseline"`, a name for `attach`, or a control), a seed, and what all runs share.

    `own` are modules of the user that the variant names. `build` makes the network, or the backbone where attention is
    still to be attached to it, in place of `backbone` and `weights`; `whole` tells that nothing is. `train` takes the
    place of our training. `fold` of `folds` is tested. With `audit`, the test images are scored at every epoch as well,
    which changes nothing else. A `trial` is of a learning rate: it is scored on validation images, and has no test
    images.
    """

    variant: str
    seed: int
    backbone: str
    weights: str | None
    start: str
    recipe: Recipe
    flip: bool
    device: str
    threads: int
    build: functions.Built | None = None
    whole: bool = False
    train: functions.Train | None = None
    fold: int | None = None
    folds: int | None = None
    audit: bool = False
    trial: bool = False
    own: tuple[registry.Entry, ...] = ()

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        if self.trial:
            return trial_name(self.variant, self.seed, self.recipe.learning_rate)
        return run_name(self.variant, self.seed, self.fold)

    def plan(self) -> dict[str, Any]:
        """All of it as it is written down, functions by their names."""
        named = {"build": None if self.build is None else functions.label(self.build.function)}
        named["train"] = None if self.train is None else functions.label(self.train)
        return {**vars(self), "recipe": asdict(self.recipe), "own": self.labels, **named}

    @property
    def labels(self) -> dict[str, str]:
        """Where the user's own modules are from."""
        return {one.name: functions.label(one.source) for one in self.own}


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever watches."""

    run: str
    epoch: int
    epochs: int
    done: float
    seconds_left: float
    loss: float | None = None
    validation_accuracy: float | None = None
    diverged: bool = False


class _Diverged(Exception):
    """A training that gives no numbers any more: the epoch, and what came instead."""

    def __init__(self, epoch: int, what: str) -> None:
        super().__init__(what)
        self.epoch, self.what = epoch, what


class Run:
    """One run on its way: network, optimizer, and the step it stands at."""

    def __init__(self, spec: RunSpec, images: Images, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.device = torch.device(spec.device)
        self.about = {
            "backbone": spec.backbone,
            "variant": spec.variant,
            "start": spec.start,
            "classes": list(images.classes),
            "image_size": images.size,
            "built": None if spec.build is None else functions.label(spec.build.function),
        }
        if spec.own:
            self.about["own"] = spec.labels
        if images.findings.scale is not None:
            self.about["scale"] = asdict(images.findings.scale)
        # the backbone is built first, so that all variants of a seed share its initial weights
        torch.manual_seed(spec.seed)
        base = None if spec.build is None else spec.build(spec.seed)
        if base is None or not spec.whole:
            with registry.also(spec.own):
                base = checkpoint.build(self.about, weights=spec.weights, base=base)
        self.network = base.to(self.device)
        mean, std = self.network.input_mean, self.network.input_std
        self.about |= {"mean": list(mean), "std": list(std)}  # type: ignore[arg-type]
        self.split = split(images, spec.seed, fold=spec.fold, folds=spec.folds)
        if spec.trial:
            # whatever is done with a trial, no test image can have a part in it
            self.split = replace(self.split, test=self.split.test[:0])
        self.images = images
        size = min(spec.recipe.batch_size, len(self.split.train))
        self.batches = Batches(images, self.split.train, size, mean, std, spec.seed, spec.flip)  # type: ignore[arg-type]
        self.optimizer = spec.recipe.optimizer(self.network)
        self.step = 0
        self.loss_sum = 0.0
        self.history: list[dict[str, float]] = []
        # the weights of the best epoch so far
        self.best: dict[str, torch.Tensor] | None = None

    def probabilities(self, indices: np.ndarray) -> np.ndarray:
        """The class probabilities of images (N, classes), in eval mode."""
        self.network.eval()
        with torch.no_grad():
            parts = [
                F.softmax(self.network(x.to(self.device)).float(), dim=1).cpu()
                for x in evaluation_batches(self.batches, indices)
            ]
        return torch.cat(parts).numpy()

    def train(self, watch: Callable[[Progress], None]) -> None:
        """Train from where the run stands to the end."""
        recipe, per_epoch = self.spec.recipe, len(self.batches)
        saved = started = time.monotonic()
        begun = self.step
        while self.step < recipe.epochs * per_epoch:
            epoch, first = divmod(self.step, per_epoch)
            self.network.train()
            for x, labels in batches(self.batches, epoch, first=first):
                self._learn(x.to(self.device), labels.to(self.device), recipe.epochs * per_epoch)
                # after the last step of an epoch, the epoch has to be evaluated before anything is saved or told
                if self.step % per_epoch:
                    if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                        self.save()
                        saved = time.monotonic()
                    self._tell(watch, started, begun)
            self._end_epoch(epoch)
            self._tell(watch, started, begun)

    def _learn(self, x: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
        # whatever a layer draws (dropout, drop path) is a function of seed and step, so that a run can go on
        torch.manual_seed(self.spec.seed * 1_000_003 + self.step)
        self.spec.recipe.set_rates(self.optimizer, self.step, steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.network(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), LONGEST_GRADIENT)
        self.optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise _Diverged(self.step // len(self.batches) + 1, f"the training loss is {value}")
        self.step += 1
        self.loss_sum += value

    def _end_epoch(self, epoch: int) -> None:
        labels = self.images.labels[self.split.validation]
        guesses = self.probabilities(self.split.validation)
        if not np.isfinite(guesses).all():
            raise _Diverged(epoch + 1, "the outputs of the network are no numbers")
        likelihood = np.maximum(guesses[np.arange(len(labels)), labels], 1e-12)
        loss = self.loss_sum / len(self.batches)
        self.history.append(
            {
                "epoch": epoch + 1,
                "loss": loss,
                "validation_accuracy": accuracy(guesses, labels),
                "validation_loss": float(-np.log(likelihood).mean()),
            }
        )
        if self.spec.audit:
            tested = self.split.test
            self.history[-1]["test_accuracy"] = accuracy(self.probabilities(tested), self.images.labels[tested])
        self.loss_sum = 0.0
        if best_epoch(self.history) == epoch + 1:
            self.best = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        self.save()
        # the log says what the checkpoint holds, so that a killed run does not repeat itself there
        files.write(self.folder / LOG, log_lines(self.history))

    def save(self) -> None:
        """Write where the run stands; what was written before is kept as the previous checkpoint."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "history": self.history,
        }
        content = io.BytesIO()
        torch.save(state, content)
        files.write_sealed(self.folder / CHECKPOINT, content.getvalue(), previous=self.folder / PREVIOUS)

    def restore(self) -> None:
        """Go back to where the run stood, if it did: to the checkpoint, or where that is damaged to the previous one.

        What is done since is done again, and gives the same.
        """
        for name in (CHECKPOINT, PREVIOUS):
            try:
                content = files.read_sealed(self.folder / name)
            except DamagedFile:
                continue
            if content is not None:
                state = torch.load(io.BytesIO(content), map_location=self.device, weights_only=True)
                self.network.load_state_dict(state["network"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.step, self.loss_sum, self.history = state["step"], state["loss_sum"], state["history"]
                self.best = state["best"]
                return

    def train_by_function(self, function: functions.Train, watch: Callable[[Progress], None]) -> dict[str, Any]:
        """Train by a function of the user, and write down what came out."""
        torch.manual_seed(self.spec.seed)
        test = functions.trained(function, self.network, Parts.of(self.batches, self.split), self.spec.seed)
        result = self._conclude(test, None, None)
        watch(Progress(self.spec.name, epoch=1, epochs=1, done=1.0, seconds_left=0.0))
        return result

    def complete(self, watch: Callable[[Progress], None]) -> dict[str, Any]:
        """Train to the end, score the epoch that validation chose, and write everything down."""
        diverged = None
        try:
            self.train(watch)
        except _Diverged as error:
            diverged = self._diverged(error, watch)
        if self.best is None:
            # nothing was learned: what is kept is the network as it began
            self.network = Run(self.spec, self.images, self.folder).network
            test, validation = self._chance(self.split.test), self._chance(self.split.validation)
        else:
            self.network.load_state_dict(self.best)
            test, validation = self.probabilities(self.split.test), self.probabilities(self.split.validation)
        return self._conclude(test, validation, diverged)

    def try_out(self, watch: Callable[[Progress], None]) -> dict[str, Any]:
        """Train, and write down what validation says of the learning rate; None where it made the training diverge."""
        result = {"variant": self.spec.variant, "seed": self.spec.seed, "threads": torch.get_num_threads()}
        best: dict[str, float] = {}
        try:
            self.train(watch)
            best = self.history[best_epoch(self.history) - 1]
        except _Diverged as error:
            result["diverged"] = self._diverged(error, watch)
        result |= {key: best.get(key) for key in ("validation_accuracy", "validation_loss")}
        return self._leave(result | {"history": self.history})

    def _diverged(self, error: _Diverged, watch: Callable[[Progress], None]) -> dict[str, Any]:
        watch(Progress(self.spec.name, error.epoch, self.spec.recipe.epochs, done=1.0, seconds_left=0.0, diverged=True))
        return {"epoch": error.epoch, "reason": error.what}

    def _chance(self, indices: np.ndarray) -> np.ndarray:
        """The class probabilities (N, classes) of a network that guesses: of a random class the highest."""
        classes = len(self.images.classes)
        guesses = np.random.default_rng([self.spec.seed, len(indices)]).integers(0, classes, len(indices))
        probabilities = np.full((len(indices), classes), (1 - CHANCE_MARGIN) / classes, dtype=np.float32)
        probabilities[np.arange(len(indices)), guesses] += CHANCE_MARGIN
        return probabilities

    def _conclude(
        self, test: np.ndarray, validation: np.ndarray | None, diverged: dict[str, Any] | None
    ) -> dict[str, Any]:
        self._write_predictions(test, validation)
        checkpoint.save(self.folder / WEIGHTS, self.network, self.about)
        labels = self.images.labels
        result = {
            "variant": self.spec.variant,
            "seed": self.spec.seed,
            "score": accuracy(test, labels[self.split.test]),
            "validation_accuracy": None if validation is None else accuracy(validation, labels[self.split.validation]),
            "chosen_epoch": best_epoch(self.history) if self.history else None,
            "history": self.history,
            "diverged": diverged,
            "files": {name: files.digest(self.folder / name) for name in (WEIGHTS, PREDICTIONS)},
            "gates": departures(self.network, next(evaluation_batches(self.batches, self.split.validation))),
            "threads": torch.get_num_threads(),
        }
        return self._leave(result)

    def _leave(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result, which makes the run a finished one, and remove what only an unfinished one needs."""
        files.write_json(self.folder / RESULT, result)
        clean_up(self.folder)
        # as it comes back from the file
        return finished(self.folder) or {}

    def _write_predictions(self, test: np.ndarray, validation: np.ndarray | None) -> None:
        paths = np.array(self.images.paths)
        chosen: dict[str, Any] = {} if validation is None else {"validation_probabilities": validation}
        content = io.BytesIO()
        np.savez_compressed(
            content,
            validation_paths=paths[self.split.validation],
            validation_labels=self.images.labels[self.split.validation],
            **chosen,
            test_paths=paths[self.split.test],
            test_labels=self.images.labels[self.split.test],
            test_probabilities=test,
            classes=np.array(self.images.classes),
        )
        files.write(self.folder / PREDICTIONS, content.getvalue())

    def _tell(self, watch: Callable[[Progress], None], started: float, begun: int) -> None:
        steps = self.spec.recipe.epochs * len(self.batches)
        pace = (time.monotonic() - started) / max(1, self.step - begun)
        last = self.history[-1] if self.history else {}
        watch(
            Progress(
                run=self.spec.name,
                epoch=min(self.step // len(self.batches) + 1, self.spec.recipe.epochs),
                epochs=self.spec.recipe.epochs,
                done=self.step / steps,
                seconds_left=pace * (steps - self.step),
                loss=last.get("loss"),
                validation_accuracy=last.get("validation_accuracy"),
            )
        )


def execute(spec: RunSpec, images: Images, folder: Path, watch: Callable[[Progress], None]) -> dict[str, Any]:
    """Train one run to its end, from where its folder says that it stands, and return its result."""
    result = finished(folder)
    if result is not None:
        return result
    torch.set_num_threads(spec.threads)
    folder.mkdir(parents=True, exist_ok=True)
    describe(folder, spec.plan())
    run = Run(spec, images, folder)
    if spec.train is not None:
        return run.train_by_function(spec.train, watch)
    run.restore()
    return run.try_out(watch) if spec.trial else run.complete(watch)


def start_accuracy(spec: RunSpec, images: Images) -> float:
    """The test accuracy in percent before any training."""
    run = Run(spec, images, Path())
    return accuracy(run.probabilities(run.split.test), images.labels[run.split.test])


def evaluation_shape(network: nn.Module, images: Images) -> tuple[int, ...]:
    """The shape of the network's output for two images."""
    plan = Batches(images, np.arange(2), 2, network.input_mean, network.input_std, 0, False)  # type: ignore[arg-type]
    network.eval()
    with torch.no_grad():
        return tuple(network(next(evaluation_batches(plan, plan.indices))).shape)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Percent of images whose most probable class is the right one."""
    return float(100 * np.mean(probabilities.argmax(axis=1) == labels))


def best_epoch(history: list[dict[str, float]]) -> int:
    """The epoch of the highest validation accuracy; of several, that of the lowest validation loss."""
    return int(max(history, key=lambda line: (line["validation_accuracy"], -line["validation_loss"]))["epoch"])
