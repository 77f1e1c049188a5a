"""Learning rates chosen on validation, the audit of the choice of the epoch, and gates that hardly moved."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convattn.compare
from convattn import files, networks, reporting
from convattn.attachment import attach
from convattn.compare import audit, identity, timing, tuning
from convattn.errors import InvalidOption
from convattn.train import Recipe, Run
from small_runs import write_images, write_network


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(reporting, "write", lambda results, folder: folder / "report.html")
    write_images(tmp_path / "data")
    backbone = f"{write_network(tmp_path)}:network"
    settings = {"backbone": backbone, "variants": "se", "seeds": 2, "epochs": 2, "batch_size": 16}
    return {"data": tmp_path / "data", **settings, "learning_rate": 0.1, "out": tmp_path / "out", "quiet": True}


def plans(folder: Path) -> dict[str, dict[str, Any]]:
    return {run.name: json.loads((run / "plan.json").read_text()) for run in (folder / "runs").iterdir()}


# learning rates


def test_each_network_chooses_its_learning_rate(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[str] = []
    probabilities = Run.probabilities

    def spied(run: Run, indices: np.ndarray) -> np.ndarray:
        if run.spec.trial and not set(indices) <= {*run.split.train, *run.split.validation}:
            tested.append(run.spec.name)
        return probabilities(run, indices)

    monkeypatch.setattr(Run, "probabilities", spied)
    results = convattn.compare.run(**options, tune="lr", controls="noise")
    assert not tested
    found = {one["name"]: one for one in results["tuning"]["networks"]}
    assert results["tuning"]["grid"] == [0.01, 0.03, 0.1, 0.3, 1.0]
    assert set(found) == {"baseline", "se"}
    done = plans(options["out"])
    for name, one in found.items():
        best = max(one["validation_accuracy"])
        assert one["validation_accuracy"][results["tuning"]["grid"].index(one["learning_rate"])] == best
        for seed in (0, 1):
            assert done[f"{name}-seed{seed}"]["recipe"]["learning_rate"] == one["learning_rate"]
    assert done["noise-seed1000000"]["recipe"]["learning_rate"] == found["baseline"]["learning_rate"]
    trials = [name for name in done if name.startswith("trial-")]
    assert len(trials) == 2 * 5 * len(tuning.SEEDS)
    compared = {plan["seed"] for name, plan in done.items() if name not in trials}
    assert not compared & {done[name]["seed"] for name in trials}
    for name in trials:
        assert {path.name for path in (options["out"] / "runs" / name).iterdir()} == {
            "plan.json", "log.jsonl", "result.json",
        }  # fmt: skip
    assert "--tune lr" in results["command"]


@pytest.mark.slow
def test_the_same_call_tries_nothing_again(options: dict[str, Any]) -> None:
    first = convattn.compare.run(**options, tune="lr")
    before = {path: path.stat().st_mtime_ns for path in (options["out"] / "runs").rglob("*")}
    again = convattn.compare.run(**options, tune="lr")
    assert before == {path: path.stat().st_mtime_ns for path in (options["out"] / "runs").rglob("*")}
    assert first["tuning"] == again["tuning"]


def result(folder: Path, name: str, rate: float, seed: int, accuracy: float | None, loss: float | None = 1.0) -> None:
    path = folder / "runs" / tuning.trial_name(name, seed, rate)
    content = {"validation_accuracy": accuracy, "validation_loss": None if accuracy is None else loss}
    path.mkdir(parents=True)
    files.write_json(path / "result.json", content)


def written(folder: Path, accuracies: list[float | None], losses: list[float] | None = None) -> dict[str, Any]:
    """What is chosen where the two seeds of each rate of the grid have these accuracies."""
    for place, rate in enumerate(tuning.grid(0.1)):
        for seed in tuning.SEEDS:
            result(folder, "baseline", rate, seed, accuracies[place], (losses or [1.0] * 5)[place])
    return tuning.chosen(["baseline", "noise"], 0.1, folder)


@pytest.mark.parametrize(
    ("accuracies", "losses", "rate"),
    [
        ([50, 60, 70, 60, 50], None, 0.1),
        ([50, 70, 70, 60, 50], [1, 0.5, 0.6, 1, 1], 0.03),
        ([50, 60, 70, 80, None], None, 0.3),
        ([None, None, None, None, 20], None, 1.0),
    ],
)
def test_the_best_on_validation_is_chosen(
    tmp_path: Path, accuracies: list[float | None], losses: list[float] | None, rate: float
) -> None:
    found = written(tmp_path, accuracies, losses)
    assert found["networks"][0]["learning_rate"] == rate
    assert tuning.rates(found, ["baseline", "noise"]) == {"baseline": rate, "noise": rate}


def test_a_rate_at_the_edge_is_warned_of(tmp_path: Path) -> None:
    (said,) = written(tmp_path, [50, 60, 70, 80, 90])["warnings"]
    assert "The best learning rate of baseline, 1, is at the edge" in said and "a higher one may be better" in said
    assert written(tmp_path / "other", [50, 60, 70, 60, 50])["warnings"] == []


def test_a_training_that_diverges_everywhere(tmp_path: Path) -> None:
    found = written(tmp_path, [None] * 5)
    (warning,) = found["warnings"]
    assert "The training of baseline diverged at every learning rate from 0.01 to 1, and the lowest is taken" in warning
    assert found["networks"][0]["learning_rate"] == 0.01


def test_a_rate_that_diverges_ends_no_comparison(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    learn = Run._learn

    def diverging(run: Run, *given: Any) -> None:
        x, *rest = given
        learn(run, x * math.nan if run.spec.recipe.learning_rate > 0.2 else x, *rest)

    monkeypatch.setattr(Run, "_learn", diverging)
    results = convattn.compare.run(**options, tune="lr")
    for one in results["tuning"]["networks"]:
        assert one["validation_accuracy"][3:] == [None, None]
        assert one["learning_rate"] <= 0.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tune": "momentum"}, "tune must be one of"),
        ({"tune": "lr", "folds": 3}, "with folds every image is tested"),
        ({"gate_learning_rate": 0.0}, "gate_learning_rate must be above 0"),
        ({"audit_selection": True, "train": lambda model, split, seed: None}, "audit_selection is for our training"),
    ],
)
def test_wrong_requests(options: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        convattn.compare.run(**options, **given)
    assert not options["out"].exists()


# the choice of the epoch


def test_the_audit_changes_nothing_else(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tested: dict[str, int] = {}
    probabilities = Run.probabilities

    def spied(run: Run, indices: np.ndarray) -> np.ndarray:
        if np.array_equal(indices, run.split.test) and str(run.folder) != ".":
            tested[run.spec.name] = tested.get(run.spec.name, 0) + 1
        return probabilities(run, indices)

    monkeypatch.setattr(Run, "probabilities", spied)
    plain = convattn.compare.run(**options)
    assert plain["audit"] is None
    # the test images are used once
    assert set(tested.values()) == {1} and len(tested) == 4
    audited = convattn.compare.run(**{**options, "out": options["out"].with_name("audited")}, audit_selection=True)
    for name in ("baseline", "variants"):
        one, other = (json.loads(json.dumps(results[name])) for results in (plain, audited))
        for each in (one, other) if name == "baseline" else (one[0], other[0]):
            del each["latency"]
        assert one == other
    found = {one["name"]: one for one in audited["audit"]["networks"]}
    assert found["se"]["mean_scores"]["validation"] == pytest.approx(audited["variants"][0]["mean_score"])
    assert found["se"]["gain_points"]["validation"] == pytest.approx(audited["variants"][0]["gain_points"], abs=1e-5)
    assert found["se"]["mean_scores"]["test"] >= found["se"]["mean_scores"]["validation"]


def test_what_others_would_have_reported() -> None:
    def run(chosen: int, *tested: float) -> dict[str, Any]:
        return {"chosen_epoch": chosen, "history": [{"test_accuracy": one} for one in tested]}

    results = {"baseline": [run(2, 70, 80, 79), run(1, 70, 75, 72)], "cbam": [run(1, 80, 82, 83), run(3, 60, 90, 70)]}
    found = audit.audited(results, [1, 1])
    assert found[0]["mean_scores"] == {"validation": 75.0, "test": 77.5, "last": 75.5}
    assert found[1]["gain_points"] == {"validation": 0.0, "test": 9.0, "last": 1.0}
    assert found[1]["sentence"] == (
        "Chosen on test, CBAM would have been reported with +9.0 points; chosen on validation it is 0.0, after the "
        "last epoch +1.0."
    )
    assert "7.0 points higher" in audit.summary(found)


# gates that hardly moved


def site(departure: float, *, strength: float | None = 0.01, place: str = "residual") -> dict[str, Any]:
    return {"site": "layer1", "place": place, "departure": departure, "strength": strength}


def test_gates_that_hardly_moved_are_told() -> None:
    said = identity.hardly_moved("cbam", [site(0.004), site(0.005)], 0.01)
    assert said == (
        "Its gates hardly moved (mean |gate − 1| 0.0045), so this comparison says nothing about CBAM itself: try "
        "--gate-learning-rate 0.1, 10 times the present rate."
    )
    assert identity.hardly_moved("cbam", [site(0.004), site(0.05)], 0.01) is None
    # nothing is said of a start that is not identity, nor of heads
    assert identity.hardly_moved("cbam", [site(0.004, strength=None)], 0.01) is None
    assert identity.hardly_moved("dual", [site(0.004, place="pool")], 0.01) is None
    assert identity.hardly_moved("cbam", [site(math.nan)], 0.01) is None
    assert "so this comparison has no such control" in identity.hardly_moved("adapter:cbam", [site(0.001)], 0.01)


def test_the_sentence_of_a_variant_says_it(options: dict[str, Any]) -> None:
    slow = convattn.compare.run(**options, start="identity", gate_learning_rate=1e-5)
    variant = slow["variants"][0]
    assert variant["hardly_moved"] in variant["sentence"]
    assert "try --gate-learning-rate 0.0001" in variant["sentence"]
    assert "Nothing is said about se, which hardly moved." in slow["headline"]
    assert "--gate-learning-rate 1e-05" in slow["command"]
    fast = convattn.compare.run(
        **{**options, "out": options["out"].with_name("fast")}, start="identity", gate_learning_rate=1.0
    )
    assert fast["variants"][0]["hardly_moved"] is None and "hardly" not in fast["headline"]


def test_what_was_attached_has_a_learning_rate_of_its_own() -> None:
    network = attach(networks.resnet20(), "cbam", start="identity")
    recipe = Recipe(epochs=1, batch_size=1, learning_rate=0.1, weight_decay=0.01, gate_learning_rate=0.5)
    optimizer = recipe.optimizer(network)
    added = {parameter for name, parameter in network.named_parameters() if ".attention." in name}
    for step in (0, 7, 50, 99):
        recipe.set_rates(optimizer, step, 100)
        for group in optimizer.param_groups:
            factor = 0.5 if set(group["params"]) <= added else 0.1
            assert not set(group["params"]) & added or factor == 0.5
            assert group["lr"] == pytest.approx(recipe.rate(step, 100) * factor / 0.1)
