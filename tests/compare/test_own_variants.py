"""Comparisons of modules of the user's own: classes and factories wherever names are taken."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convattn.compare
from convattn import registry, reporting, showing
from convattn.compare import timing
from convattn.compare.options import parse
from convattn.errors import ComparisonError, InvalidOption, WeightsError
from convattn.train import checkpoint
from own_modules import Elementwise, GlobalContext, Means
from small_runs import write_images, write_network

Run = Callable[..., dict[str, Any]]


def doubled(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 1)


def network(seed: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def unnamed(number: int) -> nn.Module:
    return network(number)


class Plain(nn.Module):
    """A module that knows nothing of convattn."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_network(folder)
    return write_images(folder / "data", count=20)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(reporting, "write", lambda results, folder: folder / "report.html")


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Run:
    def started(variants: Any, **given: Any) -> dict[str, Any]:
        options = {"backbone": f"{data.parent / 'network.py'}:network", "seeds": 1, "epochs": 1, "batch_size": 16}
        options |= {"out": tmp_path / "out", "quiet": True}
        return convattn.compare.run(data, variants=variants, **{**options, **given})

    return started


def options(variants: Any, **given: Any) -> Any:
    required = {"backbone": "resnet20", "weights": None, "controls": None, "start": None, "epochs": None, "jobs": 1}
    required |= {"image_size": None, "batch_size": 128, "learning_rate": None, "weight_decay": 0.0, "flip": None}
    return parse(
        "photos", variants=variants, **{**required, "device": "cpu", "seeds": 1, "smallest_gain": 0.5, **given}
    )


@pytest.mark.parametrize(
    ("variants", "names", "modules", "builds"),
    [
        (Means, ["Means"], ["Means"], []),
        ([Means], ["Means"], ["Means"], []),
        (doubled, ["doubled"], ["doubled"], []),
        (["se", Means, "cbam+dual", doubled], ["se", "Means", "cbam+dual", "doubled"], ["Means", "doubled"], []),
        ((functools.partial(Means, over=(2,)),), ["Means"], ["Means"], []),
        ({"mine": Means, "my-own": doubled}, ["mine", "my-own"], ["mine", "my-own"], []),
        ({"mine": Plain, "lambda": lambda c: doubled(c)}, ["mine", "lambda"], ["mine", "lambda"], []),
        ({"part": functools.partial(Means, over=(2,))}, ["part"], ["part"], []),
        # whole networks, as ever: those of a seed, and in a dictionary all that says nothing else
        ({"net": network, "mine": Means, "other": unnamed}, ["net", "mine", "other"], ["mine"], ["net", "other"]),
        ({"net": lambda seed: network(seed)}, ["net"], [], ["net"]),
        ([network, "se"], ["network", "se"], [], ["network"]),
        # those that have a name have it here too
        ([convattn.nn.SqueezeExcite, "cbam"], ["se", "cbam"], [], []),
        ({"mine": convattn.nn.SqueezeExcite}, ["mine"], ["mine"], []),
    ],
    ids=lambda one: re.sub(r" at 0x\w+", "", str(one)),
)
def test_what_variants_may_be(variants: Any, names: list[str], modules: list[str], builds: list[str]) -> None:
    found = options(variants)
    assert list(found.variants) == names
    assert [entry.name for entry in found.own] == modules
    assert list(found.builds) == builds


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        (lambda c: doubled(c), r"'<lambda>' is no name for a variant: give a dictionary, as in variants=\{'mine'"),
        ([Means, Means], "variants names 'Means' twice"),
        ([Means, functools.partial(Means, over=(2,))], "variants names 'Means' twice"),
        ([3], "expected names, classes or factories of modules as variants.* got 3"),
        (3, "expected names, classes or factories of modules as variants.* got 3"),
        (Means(8), r"got Means\(\)\."),
        ({"mine": Means(8)}, r"got Means\(\)\."),
        ({"se": Means}, "'se' is the name of SqueezeExcite already"),
        ({"a+b": Means}, r"expected a name of letters, digits and \. _ - for a module"),
        ([], "names nothing to compare"),
    ],
)
def test_what_variants_may_not_be(run: Run, tmp_path: Path, variants: Any, said: str) -> None:
    with pytest.raises(InvalidOption, match=said) as caught:
        run(variants)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_classes_factories_and_networks_together(run: Run, data: Path) -> None:
    results = run([GlobalContext, "se", Elementwise, doubled], start="identity")
    names = [variant["name"] for variant in results["variants"]]
    assert names == ["GlobalContext", "se", "Elementwise", "doubled"]
    plain = results["baseline"]["parameters"]
    added = {variant["name"]: variant["parameters"] - plain for variant in results["variants"]}
    # of eight channels: attention, one hidden unit, biases and strength; a weight for each pair; and biases too
    assert (added["GlobalContext"], added["Elementwise"], added["doubled"]) == (8 + 16 + 9 + 1, 64 + 1, 64 + 8 + 1)
    assert all(gate["departure"] > 0 for variant in results["variants"] for gate in variant["gates"])
    said = results["command"]
    assert said.startswith("convattn.compare.run(")
    assert "variants=[own_modules.GlobalContext, 'se', own_modules.Elementwise, " in said


@pytest.mark.slow
def test_from_several_processes(run: Run, tmp_path: Path) -> None:
    one = run({"mine": Means, "net": network})
    two = run({"mine": Means, "net": network}, jobs=2, out=tmp_path / "two")
    assert [variant["scores"] for variant in one["variants"]] == [variant["scores"] for variant in two["variants"]]


@pytest.mark.slow
def test_a_registered_module_in_several_processes(run: Run) -> None:
    # which import nothing but this class
    convattn.register("mean-gate", "gate")(Means)
    results = run("mean-gate+dual", jobs=2)
    assert {gate["place"] for gate in results["variants"][0]["gates"]} == {"residual", "pool"}


def test_controls_of_a_class(run: Run) -> None:
    results = run(GlobalContext, controls="placebo,adapter,noise")
    names = [control["name"] for control in results["controls"]]
    assert names == ["placebo:GlobalContext", "adapter:GlobalContext", "noise"]


def test_what_runs_depend_on(run: Run, tmp_path: Path) -> None:
    run({"mine": Means})
    # the same goes on, another class under this name is another comparison
    run({"mine": Means})
    for other in (Elementwise, doubled):
        with pytest.raises(ComparisonError, match=r"holds another comparison \(own"):
            run({"mine": other})
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["options"]["own"] == {"mine": "own_modules:Means"}
    # comparisons without any are written as before
    assert "own" not in options("se").hashed()


def test_seeds_are_added_with_the_same_classes(run: Run, data: Path) -> None:
    folder = run([Means, "se"])["folder"]
    more = {"add_seeds": 1, "quiet": True, "trust": f"{data.parent / 'network.py'}:network"}
    for variants in ({}, {"variants": "se"}):
        with pytest.raises(ComparisonError, match=r"with functions of its own, or classes: .* the same variants"):
            convattn.compare.run(folder, **more, **variants)
    results = convattn.compare.run(folder, **more, variants=[Means, "se"])
    assert [len(variant["scores"]) for variant in results["variants"]] == [2, 2]
    assert results["command"].splitlines()[1].endswith("variants=[own_modules.Means, 'se'])")


def test_seeds_are_added_where_the_name_is_registered(run: Run, data: Path) -> None:
    convattn.register("mean-gate", "gate")(Means)
    folder = run("mean-gate")["folder"]
    trust = f"{data.parent / 'network.py'}:network"
    results = convattn.compare.run(folder, add_seeds=1, quiet=True, trust=trust)
    assert len(results["variants"][0]["scores"]) == 2


def test_its_checkpoints_are_shown_again(run: Run, data: Path, tmp_path: Path) -> None:
    folder = Path(run({"mine": GlobalContext})["folder"])
    weights, image = folder / "runs" / "mine-seed0" / "weights.safetensors", data / "red" / "000.png"
    trust = f"{data.parent / 'network.py'}:network"
    with pytest.raises(
        WeightsError, match=r"'mine', a module of the user's own \(own_modules:GlobalContext\)"
    ) as error:
        checkpoint.load(weights, trust=trust)
    assert "\n" not in str(error.value)
    shown = showing.show(weights, image, tmp_path / "shown", trust=trust, factories={"mine": GlobalContext})
    assert [row.kind for row in showing.table(shown)] == ["update (channel)"]
    convattn.register("mine", "update")(GlobalContext)
    assert showing.table(showing.show(weights, image, tmp_path / "again", trust=trust)).rows
