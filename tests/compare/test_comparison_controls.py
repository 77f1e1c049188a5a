"""Controls in a comparison: which runs they are, what is said of them, and one comparison with all."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convattn.compare
from convattn import networks
from convattn.compare import controls, stats, timing
from convattn.errors import ConvattnError, InvalidOption
from small_runs import contents, write_images, write_network

SAME = {"baseline": {"parameters": 1000}, "cbam": {"parameters": 1100}, "adapter:cbam": {"parameters": 1105}}


def right(share: float, seed: int = 0, images: int = 4000) -> np.ndarray:
    """Three seeds that get that share of the images right, each its own ones."""
    return np.random.default_rng(seed).random((3, images)) < share


def compared(variant: float, control: float, costs: dict[str, Any] = SAME) -> dict[str, Any]:
    arrays = {"baseline": right(0.5, 1), "cbam": right(variant, 2), "adapter:cbam": right(control, 3)}
    (found,) = controls.compared(["adapter:cbam"], arrays, costs, smallest=0.5, confidence=0.95)
    return found


# which there are


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("none", ()),
        ("", ()),
        (None, ()),
        ("placebo, adapter", ("placebo", "adapter")),
        (["noise"], ("noise",)),
    ],
)
def test_parse(asked: Any, expected: tuple[str, ...]) -> None:
    assert controls.parse(asked, None) == expected


@pytest.mark.parametrize(
    "asked, weights, message",
    [
        ("placebos", None, "each of controls must be one of 'placebo', 'adapter', 'wider', 'noise', got 'placebos'"),
        ("noise,noise", None, "controls names 'noise' twice"),
        ("adapter,wider", "pretrained", "wider is for random weights.*take adapter"),
    ],
)
def test_refused(asked: str, weights: str | None, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        controls.parse(asked, weights)


def test_one_for_each_variant_and_the_noise_once() -> None:
    assert controls.expanded(("noise", "placebo", "wider"), ("se", "cbam+dual")) == (
        "placebo:se",
        "wider:se",
        "placebo:cbam+dual",
        "wider:cbam+dual",
        "noise",
    )
    assert controls.expanded((), ("se",)) == ()


def test_no_seed_of_the_noise_is_that_of_another_run() -> None:
    seeds = range(10_000)
    assert {controls.seed_of("placebo:se", seed) for seed in seeds} == set(seeds)
    noise = {controls.seed_of("noise", seed) for seed in seeds}
    assert len(noise) == len(seeds) and not noise & set(seeds)


# what is said


def test_a_control_that_gains_more() -> None:
    found = compared(0.54, 0.58)
    assert found["exceeded"] is False and found["excess_points"] < 0
    low, high = found["interval95"]
    assert re.fullmatch(
        rf"CBAM gains \+4\.\d points, an adapter of its size gains \+8\.\d "
        rf"\(95 % interval \+{low:.1f} to \+{high:.1f}\)\.",
        found["sentence"],
    )
    assert controls.caution("cbam", [found]) == (
        f"CBAM does not exceed an adapter of its size (+{found['gain_points']:.1f} points). "
    )
    assert controls.caution("se", [found]) == ""


def test_a_control_that_gains_as_much() -> None:
    found = compared(0.545, 0.54)
    assert found["exceeded"] is None
    assert controls.caution("cbam", [found]).startswith("CBAM is not shown to exceed an adapter of its size (+")


def test_a_control_that_gains_less() -> None:
    found = compared(0.6, 0.5)
    assert found["exceeded"] is True and found["excess_interval95"][0] > 0
    assert controls.caution("cbam", [found]) == ""


def test_several_controls_are_one_sentence() -> None:
    each = {"of": "cbam", "exceeded": None, "gain_points": 0.4}
    three = [{**each, "thing": thing} for thing in ("one", "another", "a third")]
    assert controls.caution("cbam", three) == (
        "CBAM is not shown to exceed one (+0.4 points), another (+0.4 points) and a third (+0.4 points). "
    )


def test_a_control_of_another_size_is_no_equal() -> None:
    costs = {**SAME, "adapter:cbam": {"parameters": 1300}}
    found = compared(0.5, 0.5, costs)
    assert "an adapter (300 more parameters, where it has 100) gains" in found["sentence"]


def test_its_numbers_are_its_own() -> None:
    found = compared(0.54, 0.56)
    expected = stats.gain(right(0.5, 1), right(0.56, 3))
    assert (found["gain_points"], found["interval95"]) == (expected.points, [expected.low, expected.high])
    excess = stats.gain(right(0.56, 3), right(0.54, 2))
    assert found["excess_interval95"] == [excess.low, excess.high]
    assert found["added_parameters"] == 105
    assert found["mean_score"] == pytest.approx(100 * right(0.56, 3).mean())


@pytest.mark.parametrize(
    "share, word, beginning",
    [
        (0.5, "cannot tell", "Noise: the baseline with other seeds gains "),
        (0.6, "worth it", "Noise alone is called worth it here: the baseline with other seeds gains +10"),
        (0.4, "not worth it", "Noise: the baseline with other seeds gains −"),
    ],
)
def test_noise(share: float, word: str, beginning: str) -> None:
    arrays = {"baseline": right(0.5, 1), "noise": right(share, 2)}
    (found,) = controls.compared(["noise"], arrays, {}, smallest=0.5, confidence=0.95)
    assert (found["verdict"], found["alarming"]) == (word, word == "worth it")
    assert found["sentence"].startswith(beginning)
    assert found["of"] is None and controls.caution("cbam", [found]) == ""


def test_a_single_seed_has_no_interval() -> None:
    arrays = {name: right(share, 1)[:1] for name, share in (("baseline", 0.5), ("cbam", 0.7), ("adapter:cbam", 0.6))}
    (found,) = controls.compared(["adapter:cbam"], arrays, SAME, smallest=0.5, confidence=0.95)
    assert (found["interval95"], found["excess_interval95"], found["exceeded"]) == (None, None, None)
    assert "interval" not in found["sentence"]


# a comparison


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    chosen = {
        "backbone": "resnet20",
        "variants": "se,cbam+dual",
        "controls": "placebo,adapter,wider,noise",
        "seeds": 2,
        "epochs": 1,
        "batch_size": 16,
        "out": folder / "out",
        "quiet": True,
    }
    return {**chosen, **changes}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data")


@pytest.mark.slow
def test_a_comparison_with_every_control(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 3)
    results = convattn.compare.run(data, **settings(tmp_path))
    assert [one["name"] for one in results["variants"]] == ["se", "cbam+dual"]
    kinds = ["placebo", "adapter", "wider"]
    names = [f"{kind}:{name}" for name in ("se", "cbam+dual") for kind in kinds]
    assert [one["name"] for one in results["controls"]] == [*names, "noise"]
    folders = {path.name for path in (tmp_path / "out" / "runs").iterdir()}
    assert {"placebo-cbam+dual-seed1", "noise-seed1000000", "noise-seed1000001"} <= folders and len(folders) == 2 * 10
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["options"]["controls"] == [*kinds, "noise"]
    assert "--controls placebo,adapter,wider,noise" in results["command"]

    arrays = {}
    for name in ("baseline", "se", "adapter:se"):
        runs = [
            np.load(tmp_path / "out" / "runs" / f"{name.replace(':', '-')}-seed{seed}" / "predictions.npz")
            for seed in (0, 1)
        ]
        arrays[name] = np.stack([run["test_probabilities"].argmax(1) == run["test_labels"] for run in runs])
    adapter = results["controls"][1]
    assert adapter["gain_points"] == pytest.approx(
        stats.gain(arrays["baseline"], arrays["adapter:se"]).points, abs=1e-6
    )
    assert adapter["excess_points"] == pytest.approx(stats.gain(arrays["adapter:se"], arrays["se"]).points, abs=1e-6)
    added = {one["name"]: one["added_parameters"] for one in results["controls"]}
    own = {one["name"]: one["parameters"] - results["baseline"]["parameters"] for one in results["variants"]}
    for name, value in own.items():
        assert added[f"placebo:{name}"] == value and added[f"adapter:{name}"] == pytest.approx(value, rel=0.1)
        assert added[f"wider:{name}"] > 0
    for variant in results["variants"]:
        assert variant["sentence"].startswith(controls.caution(variant["name"], results["controls"]))
    page = (tmp_path / "out" / "report.html").read_text()
    assert results["controls"][-1]["sentence"] in page

    # gone on with, and nothing is left to do
    before = contents(tmp_path / "out")
    convattn.compare.run(data, **settings(tmp_path))
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConvattnError, match="holds another comparison \\(controls"):
        convattn.compare.run(data, **settings(tmp_path, controls="noise"))


WIDER = r"has no option for its width \(tried: width\)\. The control adapter has the variant's number of parameters"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"controls": "placebo", "variants": "se,avg"}, "'avg' has no parameters"),
        ({"controls": "adapter", "variants": "max"}, "'max' has no parameters"),
        ({"controls": "wider", "backbone": "network.py:network"}, WIDER),
        ({"controls": "wider", "weights": "weights.pt"}, "wider is for random weights"),
        ({"controls": "sugar"}, "each of controls must be one of"),
    ],
)
def test_refused_before_anything_is_trained(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    write_network(tmp_path)
    torch.save(networks.resnet20(classes=3).state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InvalidOption, match=message) as raised:
        convattn.compare.run(data, **settings(tmp_path, **changes))
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before
