"""A comparison from beginning to end, broken off, gone on with, and refused."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convattn.compare
from convattn import files, networks, reporting
from convattn.compare import rounds, timing, verdict
from convattn.errors import (
    AttachError,
    ComparisonError,
    ConvattnError,
    DataError,
    InvalidOption,
    RunFailed,
    UnknownName,
    WeightsError,
)
from small_runs import contents, write_images, write_network

NAMES = ("baseline", "se", "cbam+dual")
RUNS = [f"{name}-seed{seed}" for name in NAMES for seed in (0, 1)]


@dataclass(frozen=True)
class World:
    """Images, a network, and weights for it."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def weights(self) -> Path:
        return self.folder / "weights.pt"

    def options(self, function: str = "network", **changes: Any) -> dict[str, Any]:
        """What `run` and, with dashes, the command line take."""
        settings = {
            "data": self.data,
            "backbone": f"{self.folder / 'network.py'}:{function}",
            "weights": self.weights,
            "variants": "se,cbam+dual",
            "seeds": 2,
            "epochs": 4,
            "batch_size": 16,
            "learning_rate": 0.2,
        }
        return {**settings, **changes}

    def run(self, function: str = "network", **changes: Any) -> dict[str, Any]:
        return convattn.compare.run(**self.options(function, **changes), quiet=True)

    def command(self, function: str = "network", **changes: Any) -> list[str]:
        options = self.options(function, **changes)
        words = [sys.executable, "-m", "convattn", "compare", str(options.pop("data"))]
        for key, value in options.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        return words


def make_world(folder: Path) -> World:
    world = World(folder)
    write_images(world.data)
    write_network(folder)
    torch.manual_seed(5)
    torch.save(networks.create(f"{folder / 'network.py'}:network", classes=3).state_dict(), world.weights)
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(tmp_path: Path) -> World:
    """One whose files a test may change."""
    return make_world(tmp_path)


@pytest.fixture(scope="module")
def first(world: World) -> Path:
    """The folder of a comparison that is done; tests that change it take a copy."""
    world.run(out=world.folder / "first")
    return world.folder / "first"


@pytest.fixture
def done(first: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a comparison that is done."""
    return Path(shutil.copytree(first, tmp_path / "done"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, and few measurements: for tests of something else, after the first comparison made both."""
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(reporting, "write", lambda results, folder: folder / "report.html")


def read(folder: Path, name: str = "results.json") -> Any:
    return files.read_json(folder / name)


def stamps(folder: Path) -> dict[str, int]:
    """When each file of the runs was last written."""
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}


def predictions(folder: Path, run: str) -> dict[str, np.ndarray]:
    with np.load(folder / "runs" / run / "predictions.npz") as arrays:
        return dict(arrays)


def right(folder: Path, name: str, seeds: int = 2) -> np.ndarray:
    """Which test images a variant got right: (seeds, images)."""
    runs = [predictions(folder, f"{name}-seed{seed}") for seed in range(seeds)]
    return np.stack([run["test_probabilities"].argmax(axis=1) == run["test_labels"] for run in runs])


def lasting(results: dict[str, Any]) -> dict[str, Any]:
    """Results without the times that were measured."""
    kept = json.loads(json.dumps({key: value for key, value in results.items() if key != "folder"}))
    for one in (kept["baseline"], *kept["variants"]):
        del one["latency"]
    return kept


def outcomes(folder: Path) -> dict[str, Any]:
    """What all runs have found out, to the bit."""
    found = {}
    for run in sorted((folder / "runs").iterdir()):
        arrays = predictions(folder, run.name)
        found[run.name, "predictions"] = {name: array.tobytes() for name, array in arrays.items()}
        for name in ("weights.safetensors", "log.jsonl", "result.json"):
            found[run.name, name] = (run / name).read_bytes()
    return found


# what is there in the end


def test_the_folder(first: Path) -> None:
    assert sorted(path.name for path in first.iterdir()) == [
        "convattn.lock",
        "cost.json",
        "images.json",
        "leaks.json",
        "looks.json",
        "plan.json",
        "report.html",
        "results.csv",
        "results.json",
        "results.md",
        "runs",
        "start.json",
    ]
    assert sorted(path.name for path in (first / "runs").iterdir()) == sorted(RUNS)
    for run in (first / "runs").iterdir():
        assert sorted(path.name for path in run.iterdir()) == [
            "log.jsonl",
            "plan.json",
            "predictions.npz",
            "result.json",
            "weights.safetensors",
        ]
    assert not list(first.parent.glob("*.partial"))


def test_the_results(world: World, first: Path, quick: None) -> None:
    results = read(first)
    assert world.run(out=first) == {**results, "folder": str(first)}
    assert set(results) >= {"schema", "headline", "data", "setting", "command", "versions", "baseline", "variants"}
    assert [variant["name"] for variant in results["variants"]] == ["se", "cbam+dual"]
    assert set(results["variants"][0]) >= {
        "gain_points",
        "interval95",
        "p_value",
        "verdict",
        "sentence",
        "parameters",
        "multiply_adds",
        "latency",
        "scores",
        "start_accuracy",
        "curves",
        "gates",
        "per_class_gain_points",
    }
    assert results["data"]["classes"] == ["blue", "green", "red"]
    # a fifth of 30 images of each class, and 15 % of the 24 left
    assert [results["data"][part] for part in ("train", "validation", "test")] == [60, 12, 18]
    assert results["data"]["test_per_class"] == [6, 6, 6]
    assert results["data"]["left_out"] == []
    setting = results["setting"]
    assert (setting["start"], setting["seeds"], setting["epochs"], setting["threads"]) == ("identity", [0, 1], 4, 1)
    assert (setting["image_size"], setting["batch_size"], setting["flip"]) == (16, 16, True)
    assert results["versions"]["torch"] == metadata.version("torch")


def test_gains_are_those_of_the_predictions(first: Path) -> None:
    results = read(first)
    baseline = right(first, "baseline")
    every = {variant["name"]: right(first, variant["name"]) for variant in results["variants"]}
    verdicts = verdict(baseline, every, smallest_gain=0.5, looks=[2])
    for variant in results["variants"]:
        own = every[variant["name"]]
        difference = 100 * (own.astype(float) - baseline)
        assert variant["gain_points"] == pytest.approx(difference.mean(), abs=1e-6)
        assert variant["gain_points"] == pytest.approx(
            variant["mean_score"] - results["baseline"]["mean_score"], abs=2e-6
        )
        assert variant["scores"] == pytest.approx(100 * own.mean(axis=1), abs=1e-6)
        expected = verdicts[variant["name"]].gain
        assert variant["interval95"] == pytest.approx([expected.low, expected.high], abs=1e-6)
        assert variant["p_value"] == pytest.approx(expected.p_value, abs=1e-6)
        labels = predictions(first, "se-seed0")["test_labels"]
        by_class = [difference[:, labels == label].mean() for label in range(3)]
        assert variant["per_class_gain_points"] == pytest.approx(by_class, abs=1e-6)
        assert variant["verdict"] == verdicts[variant["name"]].word
    assert results["baseline"]["scores"] == pytest.approx(100 * baseline.mean(axis=1), abs=1e-6)
    # a comparison whose runs all agree would show nothing
    assert len({tuple(variant["scores"]) for variant in (results["baseline"], *results["variants"])}) > 1


def test_runs_are_of_the_same_images(first: Path) -> None:
    runs = {run: predictions(first, run) for run in RUNS}
    for run, found in runs.items():
        assert np.array_equal(found["test_paths"], runs["baseline-seed0"]["test_paths"])
        peer = runs[f"baseline-seed{run[-1]}"]
        assert np.array_equal(found["validation_paths"], peer["validation_paths"])
    one, other = (set(runs[f"baseline-seed{seed}"]["validation_paths"]) for seed in (0, 1))
    assert one != other
    assert not one & set(runs["baseline-seed0"]["test_paths"])


def test_the_start_is_the_accuracy_of_the_given_weights(world: World, first: Path) -> None:
    network = networks.create(f"{world.folder / 'network.py'}:network", classes=3, weights=world.weights).eval()
    found = predictions(first, "baseline-seed0")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    hits = 0
    for path, label in zip(found["test_paths"], found["test_labels"], strict=True):
        with Image.open(world.data / str(path)) as image:
            x = (np.asarray(image) / 255 - mean) / std
        with torch.no_grad():
            hits += int(network(torch.from_numpy(x).float().permute(2, 0, 1)[None]).argmax()) == label
    results = read(first)
    starts = [one["start_accuracy"] for one in (results["baseline"], *results["variants"])]
    assert starts == pytest.approx([100 * hits / 18] * 3, abs=1e-6)
    assert set(read(first, "start.json")["accuracies"]) == set(NAMES)


def test_costs(first: Path) -> None:
    results = read(first)
    baseline = results["baseline"]
    # stem 224, block 2 * (576 + 16), classifier 27
    assert baseline["parameters"] == 224 + 2 * (576 + 16) + 27
    # squeeze to one of 8 channels and back, and the strength
    assert results["variants"][0]["parameters"] == baseline["parameters"] + 16 + 1
    assert all(one["multiply_adds"] > 0 for one in (baseline, *results["variants"]))
    kinds = {f"{kind}_{unit}" for kind in ("train_step", "inference", "inference_batch") for unit in ("ms", "ratio")}
    throughput = {"throughput_images_per_second", "throughput_ratio"}
    for one in (baseline, *results["variants"]):
        latency = one["latency"]
        assert set(latency) - {"sentence", "note"} == kinds | throughput | {"threads", "unclear"}
        assert latency["threads"] == 1
        spreads = [latency[kind] for kind in kinds | throughput]
        assert all(0 < spread["low"] <= spread["median"] <= spread["high"] for spread in spreads)
        seconds = latency["inference_batch_ms"]["median"] / 1000
        assert latency["throughput_images_per_second"]["median"] == pytest.approx(16 / seconds, rel=1e-4)
        weights = first / "runs" / f"{one['name']}-seed0" / "weights.safetensors"
        # what the file says of the run comes on top
        assert 0 < weights.stat().st_size - one["file_bytes"] < 1000
        assert one["file_bytes"] > 4 * one["parameters"]
        # at least a batch of the maps of 8 x 8 x 8 that every layer of the block keeps, and a gradient for each weight
        assert one["peak_bytes"] > 4 * (16 * 8 * 8 * 8 * 4 + one["parameters"])
    assert [one["peak_bytes"] > baseline["peak_bytes"] for one in results["variants"]] == [True, True]
    assert baseline["latency"]["train_step_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_curves_and_gates(first: Path) -> None:
    results = read(first)
    for one in (results["baseline"], *results["variants"]):
        for seed, curve in enumerate(one["curves"]):
            history = read(first / "runs" / f"{one['name']}-seed{seed}", "result.json")["history"]
            assert curve["loss"] == pytest.approx([line["loss"] for line in history], abs=1e-6)
            assert curve["validation_accuracy"] == pytest.approx([x["validation_accuracy"] for x in history], abs=1e-6)
            assert curve["chosen_epoch"] in (1, 2, 3, 4)
    gates = results["variants"][1]["gates"]
    assert [(gate["site"], gate["place"]) for gate in gates] == [("block.bn2", "residual"), ("pool", "pool")]
    runs = [read(first / "runs" / f"cbam+dual-seed{seed}", "result.json")["gates"] for seed in (0, 1)]
    for index, gate in enumerate(gates):
        for key in ("departure", "strength"):
            assert gate[key] == pytest.approx(np.mean([run[index][key] for run in runs]), abs=1e-6)
    assert any(gate["strength"] != 0 for gate in gates)


def test_the_report_is_of_these_results(first: Path) -> None:
    page = (first / "report.html").read_text(encoding="utf-8")
    assert read(first)["headline"] in page


# called again


def test_the_same_call_trains_nothing(world: World, done: Path, quick: None) -> None:
    before, times = contents(done), stamps(done)
    world.run(out=done)
    assert stamps(done) == times
    assert contents(done) == before


def test_the_default_folder_is_found_again(own_world: World, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_world.folder)
    options = {"variants": "se", "weights": None, "epochs": 1}
    folder = own_world.run(**options, seeds=1)["folder"]
    assert re.fullmatch(r"convattn-data-[0-9a-f]{8}", folder)
    times = stamps(Path(folder))
    assert own_world.run(**options, seeds=1, jobs=2, smallest_gain=1.0, data="data")["folder"] == folder
    assert own_world.run(**options, seeds=2)["folder"] == folder
    assert times.items() <= stamps(Path(folder)).items()
    assert own_world.run(**{**options, "epochs": 2}, seeds=1)["folder"] != folder


def test_one_seed_more_trains_that_seed_only(world: World, done: Path, quick: None) -> None:
    before, times = read(done), stamps(done)
    results = world.run(out=done, seeds=3)
    after = stamps(done)
    assert {name: after[name] for name in times} == times
    assert {name.split("/")[1] for name in after.keys() - times.keys()} == {f"{name}-seed2" for name in NAMES}
    old_and_new = [(found["baseline"], *found["variants"]) for found in (before, results)]
    for old, new in zip(*old_and_new, strict=True):
        assert new["scores"][:2] == old["scores"]
        assert len(new["scores"]) == 3
        assert new["start_accuracy"] == old["start_accuracy"]
        # the times are those of before, and the sentence around them is about three seeds
        for one in (old, new):
            one["latency"].pop("sentence", None)
        assert new["latency"] == old["latency"]
    assert not (done / "images.npy").exists()


def test_a_single_seed(world: World, tmp_path: Path, quick: None) -> None:
    results = world.run(seeds=1, epochs=1, variants="se", out=tmp_path)
    assert [len(one["scores"]) for one in (results["baseline"], *results["variants"])] == [1, 1]
    assert results["variants"][0]["interval95"] is None
    assert results["variants"][0]["verdict"] == "cannot tell"
    assert "cannot tell from a single seed" in results["variants"][0]["sentence"]


# looking again


def test_fewer_seeds_than_were_looked_at_are_refused(world: World, done: Path, quick: None) -> None:
    times = stamps(done)
    with pytest.raises(ComparisonError, match="looked at with 2 seeds already: give --seeds 2 or more"):
        world.run(out=done, seeds=1)
    assert stamps(done) == times


def test_more_seeds_are_another_look(world: World, done: Path, quick: None) -> None:
    before, times = read(done), stamps(done)
    assert before["looks"]["seeds"] == [2]
    network = f"{world.folder / 'network.py'}:network"
    results = convattn.compare.run(done, add_seeds=1, quiet=True, trust=network)
    assert stamps(done).items() > times.items()
    assert results["looks"]["seeds"] == [2, 3] and results["looks"]["most_seeds"] is None
    assert "look 2 at this comparison, with 3 seeds" in results["looks"]["sentence"]
    assert results["setting"]["smallest_gain_points"] == before["setting"]["smallest_gain_points"]
    names = [variant["name"] for variant in results["variants"]]
    every = {name: right(done, name, 3) for name in names}
    expected = verdict(right(done, "baseline", 3), every, smallest_gain=0.5, looks=[2, 3])
    for variant in results["variants"]:
        gain = expected[variant["name"]].gain
        assert variant["interval95"] == pytest.approx([gain.low, gain.high], abs=1e-6)
        assert variant["level"] == pytest.approx(gain.level, abs=1e-6)
    # the same again is the same look
    again = world.run(out=done, seeds=3)
    assert again["looks"] == results["looks"]
    commands = results["command"].split(" && ")
    assert "--seeds 2 " in commands[0] and commands[1] == f"convattn compare --add-seeds 1 --trust {network} {done}"


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_seeds_are_added_to_a_comparison_only(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ComparisonError, match="holds no comparison"):
        convattn.compare.run(tmp_path / folder, add_seeds=1)


def test_until_decided(world: World, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    # on so few images nothing but the last look decides: every look is one of the plan
    asked = {"until": "decided", "max_seeds": 4, "epochs": 1, "variants": "se", "out": tmp_path / "until"}
    results = convattn.compare.run(**world.options(**asked))
    looks = results["looks"]
    assert looks["most_seeds"] == 4 and looks["seeds"] == list(range(2, looks["seeds"][-1] + 1))
    assert looks["saved_runs"] == 2 * (4 - looks["seeds"][-1])
    assert results["setting"]["seeds"] == list(range(looks["seeds"][-1]))
    said = capsys.readouterr().out
    assert all(f"Look {number + 1}, with {seeds} seeds: se " in said for number, seeds in enumerate(looks["seeds"]))
    assert "--until decided --max-seeds 4" in results["command"] and "--seeds 2 " in results["command"]
    # the same command again goes on from the last look
    assert world.run(**asked)["looks"] == looks
    with pytest.raises(ComparisonError, match="planned to end at 4 seeds"):
        world.run(**{**asked, "max_seeds": 6})
    with pytest.raises(ComparisonError, match="planned to end at 4 seeds"):
        world.run(**{**asked, "until": None, "max_seeds": None, "seeds": 5})


def test_until_decided_ends_where_more_seeds_would_hardly_decide(world: World, tmp_path: Path, quick: None) -> None:
    results = world.run(until="decided", max_seeds=12, epochs=1, variants="se", smallest_gain=100, out=tmp_path)
    assert results["looks"]["seeds"][-1] < 12
    assert results["looks"]["saved_runs"] > 0


@pytest.mark.slow
def test_a_variant_that_is_over_gets_no_more_seeds(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(found: dict[str, Any], taken: rounds.Looks, most: int, smallest: float) -> set[str]:
        # as if the first look decided on one of two, and the third on the other
        return {"se"} if taken.seeds[-1] < 4 else set(found)

    monkeypatch.setattr(rounds, "over", over)
    monkeypatch.setattr(timing, "ROUNDS", 3)
    asked = {"until": "decided", "max_seeds": 5, "epochs": 1, "variants": "se,spatial", "out": tmp_path / "until"}
    asked |= {"controls": "adapter,noise", "audit_selection": True}
    results = world.run(**asked)
    se, spatial = results["variants"]
    assert (se["seeds"], spatial["seeds"], results["baseline"]["seeds"]) == (2, 4, 4)
    names = {path.name for path in (tmp_path / "until" / "runs").iterdir()}
    seeds = {"baseline": 4, "se": 2, "adapter-se": 2, "spatial": 4, "adapter-spatial": 4, "noise": 4}
    assert {name: sum(one.startswith(f"{name}-seed") for one in names) for name in seeds} == seeds
    assert results["looks"]["seeds"] == [2, 3, 4]
    assert results["looks"]["saved_runs"] == 6 * 5 - sum(seeds.values())
    assert "Before that ended se with 2, since more seeds would hardly" in results["looks"]["sentence"]
    # its looks ended, the other's went on
    plain, every = right(tmp_path / "until", "baseline", 4), {"se": 2, "spatial": 4}
    given = {name: right(tmp_path / "until", name, count) for name, count in every.items()}
    expected = verdict(plain, given, smallest_gain=0.5, looks=[2, 3, 4], most_seeds=5)
    for variant in (se, spatial):
        gain = expected[variant["name"]].gain
        assert (variant["gain_points"], variant["level"]) == pytest.approx((gain.points, gain.level), abs=1e-6)
        assert variant["interval95"] == pytest.approx([gain.low, gain.high], abs=1e-6)
    assert se["level"] < spatial["level"]
    assert se["gain_points"] == pytest.approx(100 * (given["se"].mean() - plain[:2].mean()), abs=1e-6)
    adapter = next(one for one in results["controls"] if one["name"] == "adapter:se")
    assert len(adapter["scores"]) == 2
    page = (tmp_path / "until" / "report.html").read_text(encoding="utf-8")
    assert "A variant that ended before others has fewer seeds" in page
    # the same command goes on where it was, trains nothing and says the same
    times = stamps(tmp_path / "until")
    again = world.run(**asked)
    assert stamps(tmp_path / "until") == times
    assert {**again, "folder": None} == {**results, "folder": None}
    # seeds that are asked for are for all
    network = f"{world.folder / 'network.py'}:network"
    more = convattn.compare.run(tmp_path / "until", add_seeds=1, quiet=True, trust=network)
    assert {one["seeds"] for one in (more["baseline"], *more["variants"])} == {5}
    assert more["looks"]["seeds"] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "asked",
    [
        {"until": "sure"},
        {"max_seeds": 4},
        {"until": "decided", "seeds": 1},
        {"until": "decided", "seeds": 5, "max_seeds": 4},
        {"until": "decided", "max_seeds": 0},
    ],
)
def test_wrong_ends(world: World, asked: dict[str, Any], quick: None) -> None:
    with pytest.raises(InvalidOption, match=r"compare: (until|max_seeds)"):
        world.run(**asked)


def test_another_smallest_gain_judges_anew(world: World, done: Path, quick: None) -> None:
    before, times = read(done), stamps(done)
    high = before["variants"][0]["interval95"][1]
    assert before["variants"][0]["verdict"] == "cannot tell"
    results = world.run(out=done, smallest_gain=min(high + 0.01, 100))
    assert stamps(done) == times
    assert results["variants"][0]["interval95"] == before["variants"][0]["interval95"]
    assert results["variants"][0]["verdict"] == ("not worth it" if high < 100 else "cannot tell")
    assert results["setting"]["smallest_gain_points"] == min(high + 0.01, 100)
    assert read(done)["setting"]["smallest_gain_points"] == results["setting"]["smallest_gain_points"]


def test_threads_are_given_back(world: World, done: Path, quick: None) -> None:
    before = torch.get_num_threads()
    world.run(out=done)
    with pytest.raises(DataError):
        world.run(data=world.folder / "nowhere")
    assert torch.get_num_threads() == before


def test_from_random_weights_the_start_is_the_papers(world: World, tmp_path: Path, quick: None) -> None:
    results = world.run(weights=None, epochs=1, seeds=1, variants=["se"], out=tmp_path / "out")
    assert (results["setting"]["start"], results["setting"]["weights"]) == ("paper", "none")
    assert results["variants"][0]["gates"][0]["strength"] is None
    chosen = world.run(weights=None, epochs=1, seeds=1, variants=["se"], start="identity", out=tmp_path / "other")
    assert chosen["variants"][0]["start_accuracy"] == chosen["baseline"]["start_accuracy"]


def test_an_archive_gives_what_its_folder_gives(world: World, tmp_path: Path, quick: None) -> None:
    archive = shutil.make_archive(str(tmp_path / "packed"), "xztar", world.folder, "data")
    options = {"seeds": 1, "epochs": 1, "variants": "se"}
    plain = world.run(out=tmp_path / "plain", **options)
    packed = world.run(out=tmp_path / "packed", data=archive, **options)
    assert (packed["data"]["name"], plain["data"]["name"]) == ("packed.tar.xz", "data")
    assert outcomes(tmp_path / "packed") == outcomes(tmp_path / "plain")
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("plain", "packed")]
    assert names[0] == names[1]


def test_broken_images_are_reported(own_world: World, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    (own_world.data / "red" / "broken.jpg").write_text("no image")
    results = own_world.run(seeds=1, epochs=1, variants="se", out=own_world.folder / "out")
    assert [one["path"] for one in results["data"]["left_out"]] == ["red/broken.jpg"]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("convattn: left out red/broken.jpg: cannot identify image file")
    assert said.err.count("\n") == 1
    assert sum(results["data"][part] for part in ("train", "validation", "test")) == 90


def test_what_is_printed(world: World, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    results = convattn.compare.run(**world.options(out=tmp_path / "out", epochs=1))
    said = capsys.readouterr()
    assert said.err == ""
    before, after = said.out.split("baseline-seed0 ", 1)
    start = results["baseline"]["start_accuracy"]
    for name in NAMES:
        assert re.search(rf"^ +{re.escape(name)} +{start:.2f} %$", before, re.MULTILINE)
    assert "60 training, 12 validation and 18 test images" in before
    assert re.search(r"With 2 seeds and 18 test images, this comparison can see gains of about [\d.]+ points", before)
    assert results["headline"] in after
    assert all(variant["latency"]["sentence"] in after for variant in results["variants"])
    assert str(tmp_path / "out" / "report.html") in after
    assert "[6 of 6 runs" in after


# refused


def test_changed_images_are_refused(own_world: World, quick: None) -> None:
    out = own_world.folder / "out"
    own_world.run(seeds=1, epochs=1, variants="se", out=out)
    shutil.copy(own_world.data / "red" / "000.png", own_world.data / "red" / "001.png")
    before = contents(own_world.folder)
    with pytest.raises(ComparisonError, match=r"images.* changed since .*out was begun.*: give another --out"):
        own_world.run(seeds=1, epochs=1, variants="se", out=out)
    assert contents(own_world.folder) == before


def test_changed_weights_are_refused(own_world: World, quick: None) -> None:
    out = own_world.folder / "out"
    own_world.run(seeds=1, epochs=1, variants="se", out=out)
    state = torch.load(own_world.weights, weights_only=True)
    state["classifier.bias"] += 1
    torch.save(state, own_world.weights)
    before = contents(own_world.folder)
    with pytest.raises(ComparisonError, match=r"weights.* changed since .*out was begun.*: give another --out"):
        own_world.run(seeds=1, epochs=1, variants="se", out=out)
    assert contents(own_world.folder) == before


def test_a_changed_network_is_refused(own_world: World, quick: None) -> None:
    out = own_world.folder / "out"
    own_world.run(seeds=1, epochs=1, variants="se", out=out)
    file = own_world.folder / "network.py"
    file.write_text(file.read_text() + "\n\nnetwork = dropping\n")
    before = contents(own_world.folder)
    with pytest.raises(ComparisonError, match="changed since"):
        own_world.run(seeds=2, epochs=1, variants="se", out=out)
    assert contents(own_world.folder) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 3),
        ("variants", "se"),
        ("batch_size", 8),
        ("learning_rate", 0.1),
        ("weights", None),
        ("start", "paper"),
        ("image_size", 12),
        ("flip", False),
        ("weight_decay", 0.0),
    ],
)
def test_a_folder_with_another_comparison_is_refused(world: World, done: Path, key: str, value: object) -> None:
    before = contents(done.parent)
    # without weights the start changes as well, and comes first or second
    named = key if key != "weights" else "weights|start"
    with pytest.raises(ComparisonError, match=rf"done holds another comparison \(({named}): .*: give another --out"):
        world.run(out=done, **{key: value})
    assert contents(done.parent) == before


def test_a_folder_with_other_files_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("do not lose")
    before = contents(tmp_path)
    with pytest.raises(ComparisonError, match="out exists and holds no comparison: give another --out"):
        world.run(out=tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", ["[]", "{}", "no json", '{"options": {}}', '{"variant": "se", "seed": 0}'])
def test_a_folder_with_another_plan_is_refused(world: World, tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(content)
    before = contents(tmp_path)
    with pytest.raises(ComparisonError, match=r"out .*give another --out"):
        world.run(out=tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_file_is_no_folder(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("do not lose")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(ComparisonError, match="out"):
            world.run(out=out)
    assert contents(tmp_path) == {"out": b"do not lose"}


def test_a_neighbour_called_partial_is_left_alone(world: World, tmp_path: Path, quick: None) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("do not lose")
    try:
        world.run(seeds=1, epochs=1, variants="se", out=tmp_path / "out")
    except ComparisonError:
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "do not lose"


def test_an_empty_folder_is_taken(world: World, tmp_path: Path, quick: None) -> None:
    (tmp_path / "out").mkdir()
    world.run(seeds=1, epochs=1, variants="se", out=tmp_path / "out")
    assert read(tmp_path / "out")["schema"] >= 1


def test_an_empty_folder_stays_after_a_mistake(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError):
        world.run(weights="nowhere.pt", out=tmp_path / "out")
    assert contents(tmp_path) == {"out": None}


def test_the_folder_that_one_is_in(world: World, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    world.run(seeds=1, epochs=1, variants="se", out=".")
    assert read(tmp_path / "here")["schema"] >= 1


def only_text_in_a_class(world: World) -> dict[str, Any]:
    for path in (world.data / "red").iterdir():
        path.rename(path.with_suffix(".txt"))
    return {}


def too_few_images(world: World) -> dict[str, Any]:
    for path in sorted((world.data / "red").iterdir())[2:]:
        path.unlink()
    return {}


def a_class_of_broken_images(world: World) -> dict[str, Any]:
    for path in (world.data / "red").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    return {}


def a_damaged_archive(world: World) -> dict[str, Any]:
    (world.folder / "data.zip").write_bytes(b"PK")
    return {"data": world.folder / "data.zip"}


def weights_of_another_network(world: World) -> dict[str, Any]:
    torch.save(networks.resnet20().state_dict(), world.weights)
    return {}


def weights_that_are_text(world: World) -> dict[str, Any]:
    world.weights.write_text("no weights")
    return {}


def only(**changes: Any) -> Callable[[World], dict[str, Any]]:
    return lambda world: changes


def network(function: str) -> Callable[[World], dict[str, Any]]:
    return lambda world: {"backbone": f"{world.folder / 'network.py'}:{function}", "weights": None}


BAD = {
    "only text in a class": (only_text_in_a_class, DataError, "The class 'red' has no image"),
    "too few images": (too_few_images, DataError, r"'red' has too few usable images.*: 2, expected at least 3"),
    "broken images": (a_class_of_broken_images, DataError, r"'red' has too few usable images.*: 0"),
    "damaged archive": (a_damaged_archive, DataError, r"data\.zip cannot be unpacked"),
    "no data": (only(data="nowhere"), DataError, "No data at nowhere"),
    "another network's weights": (weights_of_another_network, WeightsError, "holds weights of another network than"),
    "text as weights": (weights_that_are_text, WeightsError, r"weights\.pt"),
    "no weights": (only(weights="nowhere.pt"), WeightsError, r"No file of weights at nowhere\.pt"),
    "no pretrained weights": (only(weights="pretrained"), WeightsError, "give a file of weights"),
    "unknown backbone": (only(backbone="resnet21", weights=None), UnknownName, "'resnet21'.*Did you mean"),
    "no network file": (only(backbone="nowhere.py:network"), UnknownName, r"No file nowhere\.py"),
    "no function": (network("netwrok"), UnknownName, "no function 'netwrok'.*Did you mean 'network'"),
    "no residual blocks": (network("plain"), AttachError, "no place at 'residual'"),
    "images too small": (network("large"), InvalidOption, "does not take images of 16 x 16 pixels"),
    "another number of classes": (network("five"), InvalidOption, r"shape \(2, 5\).*expected \(2, 3\)"),
    "unknown variant": (only(variants="se,cbma"), UnknownName, "'cbma'. Did you mean 'cbam'"),
    "two gates": (only(variants="se+cbam"), AttachError, "'se\\+cbam' names two modules"),
    "no variants": (only(variants=" , "), InvalidOption, "variants names nothing"),
    "the baseline alone": (only(variants="baseline"), InvalidOption, "variants names nothing"),
    "a variant twice": (only(variants="se,cbam,se"), InvalidOption, "variants names 'se' twice"),
    "seeds": (only(seeds=0), InvalidOption, "seeds must be a whole number of at least 1, got 0"),
    "jobs": (only(jobs=0), InvalidOption, "jobs must be"),
    "epochs": (only(epochs=0), InvalidOption, "epochs must be"),
    "image size": (only(image_size=-1), InvalidOption, "image_size must be"),
    "batch size": (only(batch_size=0), InvalidOption, "batch_size must be"),
    "learning rate": (only(learning_rate=0.0), InvalidOption, "learning_rate must be above 0"),
    "learning rate nan": (only(learning_rate=float("nan")), InvalidOption, "learning_rate must be"),
    "learning rate inf": (only(learning_rate=float("inf")), InvalidOption, "learning_rate must be"),
    "weight decay": (only(weight_decay=-1.0), InvalidOption, "weight_decay must be"),
    "smallest gain": (only(smallest_gain=-1.0), InvalidOption, "smallest_gain must be"),
    "smallest gain nan": (only(smallest_gain=float("nan")), InvalidOption, "smallest_gain must be"),
    "start": (only(start="zero"), InvalidOption, "start must be one of 'paper', 'identity', got 'zero'"),
    "device": (only(device="tpu"), InvalidOption, "device must be one of"),
}


@pytest.mark.slow_unless(out=None)
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("out", [None, "some/deep/folder"])
def test_a_bad_request_leaves_nothing_behind(
    own_world: World, case: str, out: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_world.folder)
    spoil, error, message = BAD[case]
    changes = spoil(own_world)
    before = contents(own_world.folder)
    with pytest.raises(error, match=message) as raised:
        own_world.run(**changes, out=out)
    assert "\n" not in str(raised.value)
    assert contents(own_world.folder) == before


def test_a_network_that_cannot_be_built_is_a_users_mistake(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file = own_world.folder / "network.py"
    file.write_text(file.read_text() + "\n\ndef failing(classes):\n    return [][classes]\n")
    before = contents(own_world.folder)
    with pytest.raises(ConvattnError, match="list index out of range"):
        own_world.run("failing", out=own_world.folder / "out")
    assert contents(own_world.folder) == before


# a run that breaks


def test_a_run_that_breaks_keeps_the_others(own_world: World, quick: None) -> None:
    options = {"function": "breaking", "weights": None, "variants": "se", "epochs": 1, "out": own_world.folder / "out"}
    runs = own_world.folder / "out" / "runs"
    (own_world.folder / "broken").touch()
    with pytest.raises(RunFailed, match=r"^The run se-seed0 broke: RuntimeError: no memory \(.*error\.txt\)\.$"):
        own_world.run(**options)
    assert "for more than one line" in (runs / "se-seed0" / "error.txt").read_text()
    assert (runs / "baseline-seed0" / "result.json").exists()
    assert not (own_world.folder / "out" / "results.json").exists()
    times = stamps(own_world.folder / "out")

    (own_world.folder / "broken").unlink()
    own_world.run(**options)
    after = stamps(own_world.folder / "out")
    kept = {name: stamp for name, stamp in times.items() if name.startswith("runs/baseline-seed0/")}
    assert len(kept) == 5
    assert kept.items() <= after.items()
    # what is mended is not told any more
    assert not list(runs.rglob("error.txt"))


# several at a time


def test_several_at_a_time_find_the_same(world: World, first: Path, tmp_path: Path, quick: None) -> None:
    results = world.run(out=tmp_path / "out", jobs=2)
    assert lasting(results) == lasting(read(first))
    assert outcomes(tmp_path / "out") == outcomes(first)


@pytest.mark.slow
def test_a_run_that_breaks_beside_another(own_world: World, quick: None) -> None:
    (own_world.folder / "broken").touch()
    with pytest.raises(RunFailed, match=r"^The run se-seed[01] broke: RuntimeError: no memory \(.*error\.txt\)\.$"):
        own_world.run("breaking", weights=None, variants="se", epochs=1, out=own_world.folder / "out", jobs=2)
    assert not (own_world.folder / "out" / "results.json").exists()


# killed

# long enough to be killed in the middle: about a second for each run
LONG = {"function": "traced", "epochs": 60, "variants": "se"}


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    """The folder of a long comparison that nothing happened to."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(reporting, "write", lambda results, folder: folder / "report.html")
        world.run(out=world.folder / "undisturbed", **LONG)
    return world.folder / "undisturbed"


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def start_command(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start a command in a process of its own; neither it nor what it starts outlives the test."""
    started = []

    def start(words: list[str]) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # to a file: a pipe would stay open as long as any process that has it
        with (tmp_path / "said").open("w") as said:
            options = {"stdout": said, "stderr": said, "start_new_session": True}
            started.append(subprocess.Popen(words, env=environment, text=True, **options))
        return started[-1]

    yield start
    for process in started:
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


@pytest.mark.slow
def test_killed_in_the_middle(
    world: World,
    undisturbed: Path,
    tmp_path: Path,
    quick: None,
    start_command: Callable[[list[str]], subprocess.Popen[str]],
) -> None:
    out = tmp_path / "out"
    process = start_command(world.command(out=out, **LONG))
    runs = out / "runs"
    # in the middle of the first run with attention
    wait_for((runs / "se-seed0" / "log.jsonl").exists, process)
    process.kill()
    process.wait()
    assert not (out / "results.json").exists()
    assert (runs / "baseline-seed0" / "result.json").exists()
    assert not (runs / "se-seed0" / "result.json").exists()
    killed = (runs / "se-seed0" / "log.jsonl").read_text()
    assert 0 < killed.count("\n") < 60
    times = stamps(out)

    resumed = world.run(out=out, **LONG)
    assert lasting(resumed) == lasting(read(undisturbed))
    assert outcomes(out) == outcomes(undisturbed)
    after = stamps(out)
    kept = {name: stamp for name, stamp in times.items() if name.startswith("runs/baseline-seed0/")}
    assert len(kept) == 5
    assert kept.items() <= after.items()
    assert (runs / "se-seed0" / "log.jsonl").read_text().startswith(killed)
    assert not list(tmp_path.rglob("*.partial*"))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be asked for its exit code does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="asking whether a process runs is different there")
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_with_several_at_a_time(
    world: World,
    undisturbed: Path,
    tmp_path: Path,
    quick: None,
    start_command: Callable[[list[str]], subprocess.Popen[str]],
    jobs: int,
) -> None:
    out = tmp_path / "out"

    def processes() -> list[int]:
        return [int(path.name.removeprefix("process-")) for path in world.folder.glob("process-*")]

    for path in world.folder.glob("process-*"):
        path.unlink()
    process = start_command(world.command(out=out, jobs=2, **LONG))
    # the parent, which measured the start, and two that train, one of them for an epoch at least
    wait_for(lambda: len(processes()) == 3 and list(out.glob("runs/*/log.jsonl")), process)
    process.kill()
    process.wait()
    assert not (out / "results.json").exists()
    end = time.monotonic() + 5
    while any(alive(pid) for pid in processes()):
        assert time.monotonic() < end
        time.sleep(0.05)
    left = contents(out)
    time.sleep(0.3)
    assert contents(out) == left

    resumed = world.run(out=out, jobs=jobs, **LONG)
    assert lasting(resumed) == lasting(read(undisturbed))
    assert outcomes(out) == outcomes(undisturbed)


def test_broken_off_before_the_first_run(own_world: World, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"out": own_world.folder / "out", "seeds": 1, "epochs": 1, "variants": "se"}

    def broken(*args: object) -> None:
        raise KeyboardInterrupt

    for module, name in (
        ("data.images", "_fitted"),
        ("compare.engine", "_check_forward"),
        ("compare.engine", "run_all"),
    ):
        with monkeypatch.context() as context:
            context.setattr(f"convattn.{module}.{name}", broken)
            with pytest.raises(KeyboardInterrupt):
                own_world.run(**options)
    assert own_world.run(**options)["baseline"]["scores"]


@pytest.mark.slow_unless(step=3)
@pytest.mark.parametrize("step", range(1, 6))
def test_broken_off_while_the_folder_is_made(
    own_world: World, quick: None, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Every file that is put in place may be the last one before the power fails."""
    options = {"out": own_world.folder / "out", "seeds": 1, "epochs": 1, "variants": "se"}
    replace, left = Path.replace, iter(range(step - 1))

    class PowerFailed(BaseException):
        pass

    def failing(self: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise PowerFailed
        return replace(self, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", failing)
        # what a killed process does not do
        context.setattr(shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(PowerFailed):
            own_world.run(**options)
    assert own_world.run(**options)["baseline"]["scores"]
    here = {name.split("/")[0] for name in contents(own_world.folder)}
    assert here == {"data", "network.py", "out", "weights.pt"}
