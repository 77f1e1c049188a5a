"""Comparisons of networks that functions of the user build, and train."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import convattn.compare
from convattn import reporting
from convattn.compare import timing
from convattn.data import Parts
from convattn.errors import ComparisonError, InvalidOption, WeightsError
from convattn.train import checkpoint
from small_runs import write_images


class Net(nn.Module):
    """A network of a convolution and a classifier; a blind one sees nothing."""

    def __init__(self, *, blind: bool = False) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 3)
        self.blind = blind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.features(x)).amax(dim=(2, 3))
        return self.classifier(features * (not self.blind))  # type: ignore[no-any-return]


def plain(seed: int) -> nn.Module:
    return Net()


def blind(seed: int) -> nn.Module:
    return Net(blind=True)


def five(seed: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))


def nothing(seed: int) -> Any:
    return "a network"


def train(model: nn.Module, split: Parts, seed: int) -> torch.Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(6):
        for x, labels in DataLoader(split.train, batch_size=16, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
    with torch.no_grad():
        return torch.cat([model(x).softmax(1) for x, _ in DataLoader(split.test, batch_size=16)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(reporting, "write", lambda results, folder: folder / "report.html")


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def started(**given: Any) -> dict[str, Any]:
        options = {"backbone": plain, "variants": {"blind": blind}, "seeds": 2, "batch_size": 16}
        options |= {} if "train" in given else {"epochs": 2}
        return convattn.compare.run(data, **{**options, "out": tmp_path / "out", "quiet": True, **given})

    return started


def test_networks_that_functions_build(run: Callable[..., dict[str, Any]], data: Path) -> None:
    results = run(epochs=6, learning_rate=0.1)
    assert results["variants"][0]["name"] == "blind"
    # one of three classes by chance, and a network that sees colours is better
    assert results["variants"][0]["mean_score"] < 50 < results["baseline"]["mean_score"]
    assert results["setting"]["backbone"] == f"{__name__}:plain"
    assert results["command"].startswith(f"convattn.compare.run({str(data)!r}, backbone={__name__}.plain, variants=")
    assert f"variants={{'blind': {__name__}.blind}}" in results["command"]
    weights = Path(results["folder"]) / "runs" / "blind-seed0" / "weights.safetensors"
    with pytest.raises(WeightsError, match=rf"the function {__name__}:blind built: call that function"):
        checkpoint.load(weights)


def test_a_function_that_trains(run: Callable[..., dict[str, Any]]) -> None:
    seen: list[tuple[int, int]] = []

    def told(model: nn.Module, split: Parts, seed: int) -> torch.Tensor:
        seen.append((seed, sum(parameter.numel() for parameter in model.parameters())))
        assert set(split.train.labels) == {0, 1, 2} and set(split.test.labels) == {-1}
        assert not set(split.train.paths) & {*split.test.paths, *split.validation.paths}
        return train(model, split, seed)

    results = run(train=told)
    assert sorted(seed for seed, _ in seen) == [0, 0, 1, 1]
    assert results["variants"][0]["mean_score"] < 50 < results["baseline"]["mean_score"]
    assert results["baseline"]["curves"] is None
    assert "told" in results["setting"]["train"]
    first = json.loads((Path(results["folder"]) / "runs" / "baseline-seed0" / "result.json").read_text())
    with np.load(Path(results["folder"]) / "runs" / "baseline-seed0" / "predictions.npz") as arrays:
        right = arrays["test_probabilities"].argmax(axis=1) == arrays["test_labels"]
    assert first["score"] == pytest.approx(100 * right.mean())
    # what is done is not done again
    seen.clear()
    run(train=told)
    assert not seen


def test_the_same_network_gains_nothing(run: Callable[..., dict[str, Any]]) -> None:
    results = run(variants={"same": plain}, train=train, seeds=3)
    assert results["variants"][0]["gain_points"] == 0
    assert results["variants"][0]["verdict"] != "worth it"


def test_attention_on_a_network_that_a_function_builds(run: Callable[..., dict[str, Any]]) -> None:
    def resnet(seed: int) -> nn.Module:
        return convattn.networks.resnet20(classes=3)

    results = run(backbone=resnet, variants="se", controls="adapter,noise", epochs=1)
    plain_size = sum(parameter.numel() for parameter in resnet(0).parameters())
    assert results["baseline"]["parameters"] == plain_size < results["variants"][0]["parameters"]
    assert [control["name"] for control in results["controls"]] == ["adapter:se", "noise"]


@pytest.mark.parametrize("images", ["network", "baseline"])
def test_images_are_normalised_as_the_network_or_the_baseline_wants_it(
    run: Callable[..., dict[str, Any]], images: str
) -> None:
    means = []

    def wanting(seed: int) -> nn.Module:
        network = Net()
        if images == "network":
            network.input_mean, network.input_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # type: ignore[assignment]
        return network

    def looking(model: nn.Module, split: Parts, seed: int) -> np.ndarray:
        means.append(float(torch.stack([split.test[place][0] for place in range(len(split.test))]).mean()))
        return np.full((len(split.test), 3), 1 / 3)

    run(backbone="resnet20", variants={"mine": wanting}, train=looking, seeds=1)
    assert (means[0] == pytest.approx(means[1])) == (images == "baseline")


@pytest.mark.slow
def test_several_at_a_time(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    one = run(train=train)
    two = run(train=train, jobs=2, out=tmp_path / "two")
    assert one["variants"][0]["scores"] == two["variants"][0]["scores"]


def test_functions_that_no_other_process_can_be_given(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"cannot be given to other processes .* or take jobs=1"):
        run(variants={"mine": lambda seed: Net()}, jobs=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_functions_that_no_other_process_finds(data: Path, tmp_path: Path) -> None:
    # as in a notebook: a function of a main program that is no file
    program = f"""
import sys, torch, convattn.compare
def mine(seed):
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
convattn.compare.run({str(data)!r}, variants={{"mine": mine}}, seeds=2, epochs=1, jobs=2, out={str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "InvalidOption: compare: no other process finds a function" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variants": {"../mine": plain}}, "expected a name of letters, digits"),
        ({"variants": {"baseline": plain}}, "expected a name of letters, digits"),
        ({"variants": {"mine": "se"}}, "expected a function that builds the variant 'mine'"),
        ({"variants": {}}, "names nothing to compare"),
        ({"controls": "placebo"}, "placebo is a control for attention that has a name"),
        ({"variants": "se", "controls": "wider"}, "wider is for networks that have a name"),
        ({"weights": "some.pt"}, "weights are to be loaded in it"),
        ({"backbone": 5}, "expected a network's name or a function"),
        ({"variants": {"mine": nothing}}, "nothing returned str, expected a torch.nn.Module"),
        ({"variants": {"mine": five}}, r"mine gives an output of shape \(2, 5\) for 2 images, expected \(2, 3\)"),
    ],
)
def test_mistakes_leave_nothing_behind(
    run: Callable[..., dict[str, Any]], tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidOption, match=said):
        run(**given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda count: np.zeros((count, 2)), "returned an array of shape"),
        (lambda count: None, "returned an array of shape"),
        (lambda count: np.full((count, 3), 2.0), "returned numbers that are no probabilities"),
        (lambda count: np.full((count, 3), np.nan), "returned numbers that are no probabilities"),
    ],
)
def test_a_function_has_to_return_probabilities(
    run: Callable[..., dict[str, Any]], returned: Callable[[int], Any], said: str
) -> None:
    with pytest.raises(InvalidOption, match=said):
        run(train=lambda model, split, seed: returned(len(split.test)))


def test_other_functions_are_another_comparison(run: Callable[..., dict[str, Any]]) -> None:
    run(train=train)
    with pytest.raises(ComparisonError, match="holds another comparison"):
        run()
    with pytest.raises(ComparisonError, match="holds another comparison"):
        run(variants={"blind": plain}, train=train)


def test_seeds_are_added_with_the_same_functions(run: Callable[..., dict[str, Any]]) -> None:
    folder = run(train=train)["folder"]
    with pytest.raises(ComparisonError, match="begun from Python with functions of its own, or classes"):
        convattn.compare.run(folder, add_seeds=1, quiet=True)
    functions = {"backbone": plain, "variants": {"blind": blind}, "train": train}
    results = convattn.compare.run(folder, add_seeds=1, quiet=True, **functions)
    assert len(results["baseline"]["scores"]) == 3
    assert results["command"].splitlines()[1].startswith(f"convattn.compare.run({str(folder)!r}, add_seeds=1, ")


def test_the_report_has_no_curves_of_a_training_of_the_users_own(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(timing, "ROUNDS", 3)
    results = run(train=train)
    page = (Path(results["folder"]) / "report.html").read_text(encoding="utf-8")
    assert "Learning curves" not in page and "cannot tell" in page
