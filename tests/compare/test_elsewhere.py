"""Results and a report of predictions that were made elsewhere, in which much is not known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from convattn import cli, reporting
from convattn.compare import elsewhere
from convattn.compare.predictions import judge
from convattn.errors import ComparisonError, InvalidOption

SEEDS, IMAGES, CLASSES = 4, 300, 3


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of every kind in the current folder: probabilities, with groups, and only right or wrong."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, IMAGES)
    for name, share in (("baseline", 0.5), ("better", 0.8)):
        probabilities = random.random((SEEDS, IMAGES, CLASSES))
        probabilities[:, np.arange(IMAGES), labels] += random.random((SEEDS, IMAGES)) < share
        probabilities /= probabilities.sum(axis=2, keepdims=True)
        right = probabilities.argmax(axis=2) == labels
        np.savez(f"{name}.npz", probabilities=probabilities, labels=labels)
        np.savez(f"grouped-{name}.npz", probabilities=probabilities, labels=labels, groups=np.arange(IMAGES) // 5)
        np.savez(f"right-{name}.npz", right=right)
        np.savez(f"single-{name}.npz", right=right[:1])
    return tmp_path


KINDS = ("", "grouped-", "right-", "single-")


@pytest.mark.parametrize("kind", KINDS)
def test_the_results_have_the_verdicts(files: Path, kind: str) -> None:
    found = elsewhere.results(f"{kind}baseline.npz", [f"{kind}better.npz"])
    expected = judge(f"{kind}baseline.npz", [f"{kind}better.npz"])[f"{kind}better"]
    (variant,) = found["variants"]
    assert (variant["verdict"], variant["sentence"]) == (expected.word, expected.sentence)
    assert variant["gain_points"] == pytest.approx(expected.gain.points, abs=1e-6)
    if kind != "single-":
        assert variant["interval95"] == pytest.approx([expected.gain.low, expected.gain.high], abs=1e-6)
    scored = kind in ("", "grouped-")
    assert bool(variant["other_scores"]) == scored == (variant["per_class_gain_points"] is not None)
    assert variant["parameters"] is variant["latency"] is found["setting"]["backbone"] is None


@pytest.mark.slow_unless(kind="grouped-")
@pytest.mark.parametrize("kind", KINDS)
def test_the_report_has_no_dead_link_and_no_none(files: Path, kind: str) -> None:
    found = elsewhere.results(f"{kind}baseline.npz", [f"{kind}better.npz"])
    path = elsewhere.write(found, "judged")
    html = path.read_text(encoding="utf-8")
    identifiers = set(re.findall(r' id="([^"]+)"', html))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= identifiers
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)
    assert not re.search(r"\b(None|nan|null|undefined)\b", text)
    assert found["variants"][0]["sentence"] in " ".join(text.split())
    assert ("scores" in identifiers) == ("classes" in identifiers) == (kind in ("", "grouped-"))
    assert not {"cost", "curves", "gates", "images", "left-out"} & identifiers
    # what lies beside it is drawn from the same
    written = json.loads(Path("judged/results.json").read_text(encoding="utf-8"))
    assert {key: value for key, value in written.items() if key != "checksum"} == found
    assert reporting.redraw("judged").read_text(encoding="utf-8") == html


def test_the_command_writes_it_and_can_be_repeated(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        said = capsys.readouterr()
        assert (ended.value.code or 0, said.err) == (0, "")
        return said.out

    first = call("verdict", "baseline.npz", "better.npz", "--smallest-gain", "2.5", "--out", "judged")
    assert first.splitlines()[-1] == "The report: judged/report.html"
    content = json.loads(Path("judged/results.json").read_text(encoding="utf-8"))
    assert content["setting"]["smallest_gain_points"] == 2.5
    program, *words = content["command"].split()
    assert program == "convattn"
    again = call(*words, "--out", "again")
    assert again.replace("again/", "judged/") == first
    assert sorted(path.name for path in Path("again").iterdir()) == [
        "report.html",
        "results.csv",
        "results.json",
        "results.md",
    ]


def test_folders_that_hold_something_else_are_left_alone(files: Path) -> None:
    found = elsewhere.results("baseline.npz", ["better.npz"])
    Path("comparison").mkdir()
    Path("comparison/plan.json").write_text("{}")
    with pytest.raises(ComparisonError, match="holds a comparison, which has results of its own"):
        elsewhere.write(found, "comparison")
    assert [path.name for path in Path("comparison").iterdir()] == ["plan.json"]
    with pytest.raises(ComparisonError, match=r"cannot be a folder, since baseline.npz is a file"):
        elsewhere.write(found, "baseline.npz/judged")


@pytest.mark.parametrize("smallest", [-1.0, 101.0, float("nan")])
def test_a_smallest_gain_that_is_none(files: Path, smallest: float) -> None:
    with pytest.raises(InvalidOption, match="smallest_gain"):
        elsewhere.results("baseline.npz", ["better.npz"], smallest_gain=smallest)
