"""Verdicts on files of predictions that were made elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convattn import cli
from convattn.compare import verdict
from convattn.compare.predictions import judge
from convattn.errors import DataError, InvalidOption

SEEDS, IMAGES, CLASSES = 4, 500, 3


def probabilities(seed: int, share: float, labels: np.ndarray) -> np.ndarray:
    """Class probabilities of which about a share is right."""
    random = np.random.default_rng(seed)
    found = random.random((SEEDS, len(labels), CLASSES))
    found[:, np.arange(len(labels)), labels] += np.where(random.random((SEEDS, len(labels))) < share, 1.0, 0.0)
    return found / found.sum(axis=2, keepdims=True)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """Files of a baseline and two others, in the current folder."""
    monkeypatch.chdir(tmp_path)
    labels = np.random.default_rng(0).integers(0, CLASSES, IMAGES)
    contents = {
        name: {"probabilities": probabilities(seed, share, labels), "labels": labels}
        for seed, (name, share) in enumerate({"baseline": 0.5, "better": 0.8, "same": 0.5}.items())
    }
    for name, arrays in contents.items():
        np.savez(f"{name}.npz", **arrays)
    return contents


def right(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return arrays["probabilities"].argmax(axis=2) == arrays["labels"]


def test_they_are_the_verdicts_on_the_arrays(files: dict[str, dict[str, np.ndarray]]) -> None:
    found = judge("baseline.npz", ["better.npz", "same.npz"])
    expected = verdict(right(files["baseline"]), {name: right(files[name]) for name in ("better", "same")})
    assert found == expected
    assert (found["better"].word, found["same"].word != "worth it") == ("worth it", True)


def test_right_and_wrong_will_do(files: dict[str, dict[str, np.ndarray]]) -> None:
    np.savez("better-right.npz", right=right(files["better"]).astype(int))
    found = judge("baseline.npz", ["better.npz", "better-right.npz"])
    assert found["better"].gain == found["better-right"].gain


def test_groups_of_the_baseline_count(files: dict[str, dict[str, np.ndarray]]) -> None:
    groups = np.arange(IMAGES) // 10
    np.savez("grouped.npz", **files["baseline"], groups=groups)
    expected = verdict(right(files["baseline"]), {"same": right(files["same"])}, groups=groups)
    assert judge("grouped.npz", ["same.npz"]) == expected != judge("baseline.npz", ["same.npz"])


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no array": (lambda arrays: {"logits": arrays["probabilities"]}, "needs an array `right`.* it has logits"),
    "no labels": (lambda arrays: {"probabilities": arrays["probabilities"]}, "needs an array `right`"),
    "fewer seeds": (lambda arrays: {**arrays, "probabilities": arrays["probabilities"][1:]}, "3 seeds and 500 images"),
    "other labels": (lambda arrays: {**arrays, "labels": arrays["labels"][::-1]}, "other labels than"),
    "fewer labels": (lambda arrays: {**arrays, "labels": arrays["labels"][1:]}, "expected finite probabilities"),
    "not finite": (lambda arrays: {**arrays, "probabilities": arrays["probabilities"] * np.nan}, "finite"),
    "counts": (lambda arrays: {"right": np.full((SEEDS, IMAGES), 2)}, "expected `right` as true or false"),
    "one seed flat": (lambda arrays: {"right": np.ones(IMAGES, dtype=bool)}, "expected `right` as true or false"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_files(files: dict[str, dict[str, np.ndarray]], wrong: str) -> None:
    change, message = WRONG[wrong]
    np.savez("wrong.npz", **change(files["same"]))
    with pytest.raises(DataError, match=message):
        judge("baseline.npz", ["wrong.npz"])


def test_what_is_no_archive(files: dict[str, dict[str, np.ndarray]]) -> None:
    Path("text.npz").write_text("right")
    np.save("array.npy", np.ones((2, 3)))
    for name in ("text.npz", "nowhere.npz", "array.npy"):
        with pytest.raises(DataError, match="cannot be read as an archive"):
            judge("baseline.npz", [name])


def test_two_files_of_one_name(files: dict[str, dict[str, np.ndarray]]) -> None:
    with pytest.raises(InvalidOption, match="two files are called 'same'"):
        judge("baseline.npz", ["same.npz", "same.npz"])


def test_the_command(files: dict[str, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verdict", "baseline.npz", "better.npz", "same.npz"])
    said = capsys.readouterr()
    assert (ended.value.code or 0, said.err) == (0, "")
    first, *others = said.out.splitlines()
    assert first.startswith("Worth it here: better.")
    assert [line.strip() for line in others[:2]] == [
        one.sentence for one in judge("baseline.npz", ["better.npz", "same.npz"]).values()
    ]
    # the other scores of both, below a heading
    assert " ".join(others[3].split()) == "variant score better if baseline variant gain 95 % interval variant is"
    assert [line.split()[0] for line in others[4:]] == ["better"] * 5 + ["same"] * 5


def test_a_mistake_is_one_line(files: dict[str, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verdict", "baseline.npz", "nowhere.npz"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
