"""One run: what is trained how, and that a run that was broken off goes on as if nothing had happened."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import convattn
from convattn import files, networks
from convattn.attachment import attached
from convattn.data import Images, batches, evaluation_batches
from convattn.errors import WeightsError
from convattn.networks import resnet20
from convattn.train import Progress, Recipe, Run, RunSpec, checkpoint, execute, finished, run, start_accuracy, store
from convattn.train.gates import departures
from small_runs import decoded, spec, write_images, write_network
from tolerances import assert_close


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("images")
    return decoded(write_images(folder / "data"), folder / "decoded")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("network"))


def quiet(progress: Progress) -> None:
    pass


# recipe


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(epochs=1, batch_size=1, learning_rate=0.2, weight_decay=0.0)
    rates = [recipe.rate(step, 200) for step in range(200)]
    # a twentieth of the steps in equal steps up to the highest, then half a cosine
    assert rates[:10] == pytest.approx([0.02 * step for step in range(1, 11)])
    assert rates[10] == max(rates) == 0.2
    assert rates[105] == pytest.approx(0.1)
    assert rates[57] == pytest.approx(0.1 * (1 + math.cos(math.pi * 47 / 190)))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20])
def test_the_learning_rate_of_short_runs(steps: int) -> None:
    recipe = Recipe(epochs=1, batch_size=1, learning_rate=0.2, weight_decay=0.0)
    rates = [recipe.rate(step, steps) for step in range(steps)]
    assert max(rates) == rates[0] == 0.2
    assert min(rates) > 0


def test_no_weight_decay_on_vectors_and_strength() -> None:
    model = convattn.attach(resnet20(), "cbam+dual")
    optimizer = Recipe(1, 1, 0.1, 5e-4).optimizer(model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) == len(decay)
    expected = {
        name: 5e-4 if name.endswith("weight") and parameter.dim() in (2, 4) else 0.0
        for name, parameter in model.named_parameters()
    }
    assert {name: decay[id(parameter)] for name, parameter in model.named_parameters()} == expected
    strengths = [name for name in expected if name.endswith("strength")]
    assert len(strengths) == 10
    assert {expected[name] for name in strengths} == {0.0}
    assert expected["conv1.weight"] == expected["linear.weight"] == 5e-4
    assert expected["bn1.weight"] == expected["linear.bias"] == 0.0


def test_frozen_parameters_are_not_trained() -> None:
    model = resnet20()
    model.conv1.weight.requires_grad_(False)
    optimizer = Recipe(1, 1, 0.1, 5e-4).optimizer(model)
    assert all(p is not model.conv1.weight for group in optimizer.param_groups for p in group["params"])


def test_a_step_is_nesterov_momentum_with_decay() -> None:
    recipe = Recipe(1, 1, 0.1, 0.01)
    layer = nn.Linear(2, 2).double()
    weight, velocity = layer.weight.detach().clone(), torch.zeros(2, 2, dtype=torch.float64)
    optimizer = recipe.optimizer(layer)
    for _ in range(3):
        optimizer.zero_grad()
        layer.weight.pow(3).sum().backward()
        gradient = 3 * weight**2 + 0.01 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.9 * velocity)
        optimizer.step()
    assert_close(layer.weight.detach(), weight)


# what runs share


def test_variants_of_a_seed_share_what_the_baseline_has(images: Images, network: Path, tmp_path: Path) -> None:
    runs = {
        variant: Run(spec(network, variant=variant, seed=3), images, tmp_path)
        for variant in ("baseline", "se", "cbam", "dual", "cbam+dual")
    }
    plain = runs["baseline"]
    first = [x for x, _ in batches(plain.batches, 1)]
    for variant, other in runs.items():
        state = other.network.state_dict()
        assert len(attached(other.network)) == {"baseline": 0, "cbam+dual": 2}.get(variant, 1)
        for key, value in plain.network.state_dict().items():
            assert torch.equal(state[key], value), f"{variant}: {key}"
        assert np.array_equal(other.split.train, plain.split.train)
        assert np.array_equal(other.split.validation, plain.split.validation)
        assert all(torch.equal(x, y) for x, (y, _) in zip(first, batches(other.batches, 1), strict=True))


def test_seeds_differ(images: Images, network: Path, tmp_path: Path) -> None:
    one, other = (Run(spec(network, variant="baseline", seed=seed), images, tmp_path) for seed in (0, 1))
    assert not torch.equal(one.network.classifier.weight, other.network.classifier.weight)
    assert not np.array_equal(one.split.train, other.split.train)
    assert np.array_equal(one.split.test, other.split.test)


@pytest.mark.parametrize("variant", ["se", "cbam", "dual", "cbam+dual"])
def test_the_start_is_the_baselines_to_the_bit(images: Images, network: Path, tmp_path: Path, variant: str) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(networks.create(f"{network}:network", classes=3).state_dict(), weights)
    plain = spec(network, variant="baseline", weights=str(weights), start="identity")
    attended = replace(plain, variant=variant)
    one, other = (Run(which, images, tmp_path) for which in (plain, attended))
    assert np.array_equal(one.probabilities(one.split.test), other.probabilities(other.split.test))
    assert start_accuracy(plain, images) == start_accuracy(attended, images)


def test_start_accuracy_counts_right_answers(images: Images, network: Path, tmp_path: Path) -> None:
    given = spec(network, variant="baseline")
    model = Run(given, images, tmp_path).network.eval()
    there = Run(given, images, tmp_path)
    right = 0
    with torch.no_grad():
        for index in there.split.test:
            x = next(evaluation_batches(there.batches, np.array([index])))
            right += int(model(x).argmax()) == images.labels[index]
    assert start_accuracy(given, images) == pytest.approx(100 * right / len(there.split.test))


# a run and its folder


def test_what_a_run_leaves(images: Images, network: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    given = spec(network, seed=1)
    result = execute(given, images, tmp_path / given.name, told.append)
    folder = tmp_path / "se-seed1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "log.jsonl",
        "plan.json",
        "predictions.npz",
        "result.json",
        "weights.safetensors",
    ]
    assert finished(folder) == files.read_json(folder / "result.json") == result
    assert result["history"] == [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in result["history"]] == [1, 2, 3]
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["variant"], plan["seed"], plan["recipe"]["epochs"]) == ("se", 1, 3)
    assert result["chosen_epoch"] == run.best_epoch(result["history"])

    # a finished run is only read
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert execute(given, images, folder, told.append) == result
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_progress(images: Images, network: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    given = spec(network)
    history = execute(given, images, tmp_path / "run", told.append)["history"]
    # 60 training images in batches of 16
    assert len(told) == 3 * 3
    assert [one.done for one in told] == pytest.approx([step / 9 for step in range(1, 10)])
    assert [one.epoch for one in told] == [1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert {(one.run, one.epochs) for one in told} == {("se-seed0", 3)}
    assert told[0].loss is None and told[0].validation_accuracy is None
    assert told[-1].loss == history[-1]["loss"]
    assert told[-1].validation_accuracy == history[-1]["validation_accuracy"]
    assert told[-1].seconds_left == 0 < told[0].seconds_left


def test_predictions_are_keyed_by_path(images: Images, network: Path, tmp_path: Path) -> None:
    result = execute(spec(network), images, tmp_path / "run", quiet)
    parts = Run(spec(network), images, tmp_path).split
    with np.load(tmp_path / "run" / "predictions.npz") as arrays:
        found = dict(arrays)
    assert found["classes"].tolist() == ["blue", "green", "red"]
    for part, score in (("validation", "validation_accuracy"), ("test", "score")):
        indices = getattr(parts, part)
        assert found[f"{part}_paths"].tolist() == [images.paths[index] for index in indices]
        assert np.array_equal(found[f"{part}_labels"], images.labels[indices])
        probabilities = found[f"{part}_probabilities"]
        assert probabilities.shape == (len(indices), 3)
        assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-5
        right = probabilities.argmax(axis=1) == images.labels[indices]
        assert result[score] == pytest.approx(100 * right.mean())


def test_the_saved_weights_are_those_of_the_chosen_epoch(images: Images, network: Path, tmp_path: Path) -> None:
    given = spec(network, "dropping", recipe=Recipe(6, 16, 0.3, 5e-4))
    states: dict[int, dict[str, torch.Tensor]] = {}
    there = Run(given, images, tmp_path)

    def keep(progress: Progress) -> None:
        if there.step % len(there.batches) == 0:
            states[there.step // len(there.batches)] = {k: v.clone() for k, v in there.network.state_dict().items()}

    result = there.complete(keep)
    saved = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    # with the last epoch as the chosen one, this would show nothing
    assert result["chosen_epoch"] < 6
    assert saved.keys() == states[1].keys()
    equal = [epoch for epoch, state in states.items() if all(torch.equal(saved[key], state[key]) for key in saved)]
    assert equal == [result["chosen_epoch"]]


def line(epoch: int, accuracy: float, loss: float) -> dict[str, float]:
    return {"epoch": epoch, "loss": 1.0, "validation_accuracy": accuracy, "validation_loss": loss}


def test_the_best_epoch() -> None:
    assert run.best_epoch([line(1, 50, 1.0), line(2, 60, 2.0), line(3, 55, 0.1)]) == 2
    # of equal accuracy the lowest loss, of equal loss the first
    assert run.best_epoch([line(1, 60, 0.5), line(2, 60, 0.4), line(3, 60, 0.6)]) == 2
    assert run.best_epoch([line(1, 60, 0.4), line(2, 60, 0.4)]) == 1


def test_the_validation_loss_is_the_mean_surprise(images: Images, network: Path, tmp_path: Path) -> None:
    result = execute(spec(network, recipe=Recipe(1, 16, 0.05, 0.0)), images, tmp_path / "run", quiet)
    with np.load(tmp_path / "run" / "predictions.npz") as arrays:
        probabilities, labels = arrays["validation_probabilities"], arrays["validation_labels"]
    expected = -np.mean([math.log(row[label]) for row, label in zip(probabilities, labels, strict=True)])
    assert result["history"][0]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["history"][0]["validation_accuracy"] == result["validation_accuracy"]


def test_training_learns(images: Images, network: Path, tmp_path: Path) -> None:
    result = execute(spec(network, recipe=Recipe(12, 16, 0.05, 5e-4)), images, tmp_path / "run", quiet)
    losses = [line["loss"] for line in result["history"]]
    assert losses[-1] < 0.8 * losses[0]
    assert result["score"] > 50


def test_one_batch_holds_all_images_if_they_are_few(images: Images, network: Path, tmp_path: Path) -> None:
    there = Run(spec(network, recipe=Recipe(1, 500, 0.05, 0.0)), images, tmp_path)
    assert len(there.batches) == 1
    assert len(next(batches(there.batches, 0))[1]) == 60


# broken off


class Interrupted(Exception):
    """What a test raises in the middle of a run."""


def stop_after(steps: int) -> Callable[[Progress], None]:
    left = iter(range(steps - 1))

    def watch(progress: Progress) -> None:
        if next(left, None) is None:
            raise Interrupted

    return watch


def outcome(folder: Path) -> dict[str, object]:
    """What a run has found out, to the bit."""
    with np.load(folder / "predictions.npz") as arrays:
        predictions = {name: array.tobytes() for name, array in arrays.items()}
    return {
        "predictions": predictions,
        "weights": (folder / "weights.safetensors").read_bytes(),
        "result": (folder / "result.json").read_text(),
        "log": (folder / "log.jsonl").read_text(),
        "files": sorted(path.name for path in folder.iterdir()),
    }


@pytest.mark.slow_unless(id=["stops4-network", "stops7-dropping"])
@pytest.mark.parametrize("function", ["network", "dropping"])
@pytest.mark.parametrize("stops", [[1], [2], [3], [4], [5], [8], [9], [1, 1, 1], [4, 2, 1]])
def test_a_run_goes_on_as_if_undisturbed(
    images: Images, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, stops: list[int]
) -> None:
    monkeypatch.setattr(run, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    given = spec(network, function, variant="cbam+dual")
    execute(given, images, tmp_path / "whole", quiet)
    for number, steps in enumerate(stops):
        # whatever else happens between two processes
        torch.manual_seed(number)
        with pytest.raises(Interrupted):
            execute(given, images, tmp_path / "broken", stop_after(steps))
        assert finished(tmp_path / "broken") is None
    execute(given, images, tmp_path / "broken", quiet)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_dropout_drops(images: Images, network: Path, tmp_path: Path) -> None:
    # else the test above would show nothing about it
    for function in ("network", "dropping"):
        execute(spec(network, function), images, tmp_path / function, quiet)
    assert outcome(tmp_path / "network")["log"] != outcome(tmp_path / "dropping")["log"]


def test_going_on_starts_from_the_checkpoint(
    images: Images, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    with pytest.raises(Interrupted):
        execute(spec(network), images, tmp_path / "run", stop_after(5))
    told: list[Progress] = []
    execute(spec(network), images, tmp_path / "run", told.append)
    assert [one.done for one in told] == pytest.approx([step / 9 for step in range(6, 10)])


@pytest.mark.slow_unless(id=["1-0", "3-1000"])
@pytest.mark.parametrize("seconds", [0, 1000])
@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_broken_off_while_an_epoch_is_evaluated(
    images: Images, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int, seconds: int
) -> None:
    monkeypatch.setattr(run, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
    execute(spec(network), images, tmp_path / "whole", quiet)
    left = iter(range(evaluation - 1))
    evaluate = Run.probabilities

    def broken(self: Run, indices: np.ndarray) -> np.ndarray:
        if next(left, None) is None:
            raise Interrupted
        return evaluate(self, indices)

    with monkeypatch.context() as context:
        context.setattr(Run, "probabilities", broken)
        with pytest.raises(Interrupted):
            execute(spec(network), images, tmp_path / "broken", quiet)
    execute(spec(network), images, tmp_path / "broken", quiet)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.slow_unless(where="write_json")
@pytest.mark.parametrize("where", ["_write_predictions", "write_json", "save"])
def test_broken_off_while_results_are_written(
    images: Images, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    execute(spec(network), images, tmp_path / "whole", quiet)

    def broken(*args: object) -> None:
        raise Interrupted

    with monkeypatch.context() as context:
        if where == "write_json":
            plain = files.write_json
            context.setattr(
                files, where, lambda path, body: broken() if path.name == "result.json" else plain(path, body)
            )
        else:
            context.setattr(checkpoint if where == "save" else Run, where, broken)
        with pytest.raises(Interrupted):
            execute(spec(network), images, tmp_path / "broken", quiet)
    execute(spec(network), images, tmp_path / "broken", quiet)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_no_checkpoint_more_often_than_asked_for(images: Images, network: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        execute(spec(network), images, tmp_path / "run", stop_after(2))
    # the first epoch has not ended, and no minute has passed
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["plan.json"]


def test_a_training_that_diverges_at_once(images: Images, network: Path, tmp_path: Path) -> None:
    """It is scored by chance, as a network that guesses, and what is kept is the network as it began."""
    told: list[Progress] = []
    given = spec(network, "collapsing")
    result = execute(given, images, tmp_path / "run", told.append)
    assert result["diverged"] == {"epoch": 1, "reason": "the training loss is nan"}
    assert result["chosen_epoch"] is None and result["history"] == []
    assert told[-1].diverged and told[-1].done == 1
    with np.load(tmp_path / "run" / "predictions.npz") as arrays:
        guesses = arrays["test_probabilities"]
    assert np.abs(guesses - 1 / 3).max() < 0.001 and np.allclose(guesses.sum(axis=1), 1)
    right = guesses.argmax(axis=1) == images.labels[Run(given, images, tmp_path).split.test]
    assert result["score"] == 100 * right.mean()
    begun = Run(given, images, tmp_path).network.state_dict()
    kept = safetensors.torch.load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in begun.items())
    assert finished(tmp_path / "run") == result


def test_guesses_are_right_by_chance(images: Images, network: Path, tmp_path: Path) -> None:
    guesses = Run(spec(network), images, tmp_path)._chance(np.zeros(30_000, dtype=np.int64)).argmax(axis=1)
    shares = np.bincount(guesses) / 30_000
    # four standard deviations
    assert len(shares) == 3 and np.abs(shares - 1 / 3).max() < 4 * (2 / 9 / 30_000) ** 0.5


def test_a_training_that_diverges_later(
    images: Images, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is scored by its best epoch before that, as if it had been trained that long on the same schedule."""
    execute(spec(network), images, tmp_path / "whole", quiet)
    whole = finished(tmp_path / "whole")
    learn = Run._learn

    def diverging(self: Run, x: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
        if self.step >= 2 * len(self.batches):
            x = x * float("nan")
        learn(self, x, labels, steps)

    monkeypatch.setattr(Run, "_learn", diverging)
    result = execute(spec(network), images, tmp_path / "run", quiet)
    assert result["diverged"] == {"epoch": 3, "reason": "the training loss is nan"}
    assert result["history"] == whole["history"][:2]
    assert result["chosen_epoch"] == run.best_epoch(whole["history"][:2])
    assert result["validation_accuracy"] == whole["history"][result["chosen_epoch"] - 1]["validation_accuracy"]


def test_outputs_that_are_no_numbers(
    images: Images, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of a training may be the one that breaks the weights, which no loss tells any more."""
    probabilities = Run.probabilities

    def broken(self: Run, indices: np.ndarray) -> np.ndarray:
        return probabilities(self, indices) * (float("nan") if len(self.history) == 2 else 1)

    monkeypatch.setattr(Run, "probabilities", broken)
    history = []
    monkeypatch.setattr(Run, "_conclude", lambda self, test, validation, diverged: history.append(diverged) or {})
    execute(spec(network), images, tmp_path / "run", quiet)
    assert history == [{"epoch": 3, "reason": "the outputs of the network are no numbers"}]


# damaged


def damage_of(kind: str) -> Callable[[bytes], bytes]:
    def flipped(content: bytes) -> bytes:
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]

    kinds: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda content: b"",
        "truncated": lambda content: content[: len(content) // 2],
        "random": lambda content: np.random.default_rng(0).bytes(len(content)),
        "flipped": flipped,
    }
    return kinds[kind]


DAMAGES = ["empty", "truncated", "random", "flipped"]


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["plan.json", "log.jsonl", "checkpoint.pt", "previous.pt"])
def test_an_unfinished_run_with_a_damaged_file(
    images: Images, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.setattr(run, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    execute(spec(network), images, tmp_path / "whole", quiet)
    with pytest.raises(Interrupted):
        execute(spec(network), images, tmp_path / "broken", stop_after(6))
    path = tmp_path / "broken" / name
    path.write_bytes(damage_of(kind)(path.read_bytes()))
    lines = store.repair(tmp_path / "broken")
    ends = {"checkpoint.pt": "The run goes on from previous.pt.", "previous.pt": "The run goes on from checkpoint.pt."}
    assert len(lines) == (name in ends)
    assert all(f"{name} is damaged (" in line and line.endswith(ends[name]) for line in lines)
    told: list[Progress] = []
    execute(spec(network), images, tmp_path / "broken", told.append)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    # of nine steps; the checkpoint is of the sixth, the one before of the fifth
    assert told[0].done == pytest.approx((6 if name == "checkpoint.pt" else 7) / 9)


def test_an_unfinished_run_without_any_checkpoint_left(images: Images, network: Path, tmp_path: Path) -> None:
    execute(spec(network), images, tmp_path / "whole", quiet)
    with pytest.raises(Interrupted):
        execute(spec(network), images, tmp_path / "broken", stop_after(6))
    for name in ("checkpoint.pt", "previous.pt"):
        (tmp_path / "broken" / name).write_bytes(b"damage")
    assert [line.endswith("The run begins anew.") for line in store.repair(tmp_path / "broken")] == [True, True]
    execute(spec(network), images, tmp_path / "broken", quiet)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["plan.json", "log.jsonl", "weights.safetensors", "predictions.npz", "result.json"])
def test_a_finished_run_with_a_damaged_file(
    images: Images, network: Path, tmp_path: Path, name: str, kind: str
) -> None:
    execute(spec(network), images, tmp_path / "whole", quiet)
    execute(spec(network), images, tmp_path / "broken", quiet)
    path = tmp_path / "broken" / name
    path.write_bytes(damage_of(kind)(path.read_bytes()))
    lines = store.repair(tmp_path / "broken")
    assert len(lines) == (0 if name in ("plan.json", "log.jsonl") else 1)
    assert all(name in line and "The run is trained again" in line for line in lines)
    execute(spec(network), images, tmp_path / "broken", quiet)
    store.describe(tmp_path / "broken", spec(network).plan())
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert files.read_json(tmp_path / "broken" / "plan.json") == files.read_json(tmp_path / "whole" / "plan.json")


def test_weights_that_were_removed_are_not_trained_again(images: Images, network: Path, tmp_path: Path) -> None:
    execute(spec(network), images, tmp_path / "run", quiet)
    (tmp_path / "run" / "weights.safetensors").unlink()
    assert store.repair(tmp_path / "run") == [] and finished(tmp_path / "run")


def test_what_a_killed_process_left_is_removed(images: Images, network: Path, tmp_path: Path) -> None:
    execute(spec(network), images, tmp_path / "run", quiet)
    for name in ("checkpoint.pt", "previous.pt", "error.txt", ".convattn-1-2.partial"):
        (tmp_path / "run" / name).write_bytes(b"left")
    assert store.repair(tmp_path / "run") == []
    assert "files" in outcome(tmp_path / "run")
    assert len(list((tmp_path / "run").iterdir())) == 5


# checkpoints


ABOUT = {
    "backbone": "resnet20",
    "variant": "cbam+dual",
    "start": "identity",
    "classes": ["cat", "dog"],
    "image_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
}


@pytest.mark.slow_unless(start="identity")
@pytest.mark.parametrize("variant", ["baseline", "se", "cbam+dual"])
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_a_checkpoint_comes_back(tmp_path: Path, variant: str, start: str) -> None:
    about = {**ABOUT, "variant": variant, "start": start}
    model = checkpoint.build(about)
    with torch.no_grad():
        for value in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            value.copy_(torch.rand_like(value) * 0.2 + 0.1)
    checkpoint.save(tmp_path / "weights.safetensors", model, about)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    again, said = checkpoint.load(tmp_path / "weights.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert said == about
    assert not again.training
    assert torch.equal(again(x), model.eval()(x))
    assert not torch.equal(again(x)[0], again(x)[1])


def test_the_plain_part_of_a_checkpoint_is_the_plain_network(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "weights.safetensors", checkpoint.build(ABOUT), ABOUT)
    keys = safetensors.torch.load_file(tmp_path / "weights.safetensors").keys()
    assert set(resnet20(classes=2).state_dict()) == {key for key in keys if ".attention." not in key}


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"No checkpoint at .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("text")
    with pytest.raises(WeightsError, match="text is not a"):
        checkpoint.load(tmp_path / "text")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match=r"plain\.safetensors holds weights but not what they belong to"):
        checkpoint.load(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("content", ["no json", "[]", json.dumps({"backbone": "resnet20"})])
def test_checkpoints_of_others(tmp_path: Path, content: str) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"convattn": content})
    with pytest.raises(WeightsError, match=r"other\.safetensors"):
        checkpoint.load(tmp_path / "other.safetensors")


def test_a_checkpoint_whose_weights_do_not_fit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "weights.safetensors", resnet20(classes=3), {**ABOUT, "variant": "baseline"})
    with pytest.raises(WeightsError, match=r"weights\.safetensors"):
        checkpoint.load(tmp_path / "weights.safetensors")


# gates


def trained(given: RunSpec, images: Images, folder: Path) -> tuple[nn.Module, torch.Tensor]:
    """A network whose gates do something, and some images."""
    there = Run(given, images, folder)
    with torch.no_grad():
        for name, parameter in there.network.named_parameters():
            parameter.copy_(torch.full_like(parameter, 0.7) if "strength" in name else torch.randn_like(parameter))
    return there.network.eval(), next(evaluation_batches(there.batches, there.split.validation))


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_departures_of_a_gate(images: Images, network: Path, tmp_path: Path, start: str) -> None:
    model, x = trained(spec(network, variant="se", start=start), images, tmp_path)
    found = departures(model, x)
    block = model.block
    with torch.no_grad():
        stem = model.stem(x)
        plain = block.bn2.inner(block.conv2(torch.relu(block.bn1(block.conv1(stem)))))
        gate = block.bn2.attention.gate(plain)
    strength = 1.0 if start == "paper" else 0.7
    assert found == [
        {
            "site": "block.bn2",
            "place": "residual",
            "departure": pytest.approx(float(strength * (gate - 1).abs().mean()), rel=1e-5),
            "strength": None if start == "paper" else pytest.approx(0.7),
        }
    ]
    assert found[0]["departure"] > 0.01


def test_departures_of_two_factors(images: Images, network: Path, tmp_path: Path) -> None:
    model, x = trained(spec(network, variant="cbam", start="identity"), images, tmp_path)
    block = model.block
    with torch.no_grad():
        plain = block.bn2.inner(block.conv2(torch.relu(block.bn1(block.conv1(model.stem(x))))))
        gates = block.bn2.attention.gates(plain)
    expected = np.mean([float((gate - 1).abs().mean()) for gate in gates.values()])
    assert len(gates) == 2
    assert departures(model, x)[0]["departure"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert torch.allclose(block.bn2.attention(plain), plain * gates["channel"] * gates["spatial"], atol=1e-4)


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_departures_of_a_head(images: Images, network: Path, tmp_path: Path, start: str) -> None:
    model, x = trained(spec(network, variant="dual", start=start), images, tmp_path)
    with torch.no_grad():
        before = model.block(model.stem(x))
        plain = before.mean(dim=(2, 3))
        head = model.pool.attention.head(before)
    strength = 1.0 if start == "paper" else 0.7
    (found,) = departures(model, x)
    assert (found["site"], found["place"]) == ("pool", "pool")
    assert found["departure"] == pytest.approx(float(strength * (head - plain).norm() / plain.norm()), rel=1e-4)
    assert found["strength"] == (None if start == "paper" else pytest.approx(0.7))


def test_departures_at_the_start_are_none(images: Images, network: Path, tmp_path: Path) -> None:
    there = Run(spec(network, variant="cbam+dual", start="identity"), images, tmp_path)
    x = next(evaluation_batches(there.batches, there.split.validation))
    found = departures(there.network, x)
    assert [(one["site"], one["departure"], one["strength"]) for one in found] == [
        ("block.bn2", 0.0, 0.0),
        ("pool", 0.0, 0.0),
    ]
    # and nothing stays behind in the network
    assert not any(module._forward_hooks for module in there.network.modules())


def test_a_baseline_has_no_departures(images: Images, network: Path, tmp_path: Path) -> None:
    there = Run(spec(network, variant="baseline"), images, tmp_path)
    assert departures(there.network, torch.zeros(1, 3, 16, 16)) == []
