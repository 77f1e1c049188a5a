"""The table of results as CSV and Markdown, and the report drawn anew from results.json."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from reporting_results import results

from convattn import cli, reporting
from convattn.errors import ComparisonError
from convattn.reporting import rows


def adapter(name: str) -> dict[str, Any]:
    return {
        "name": f"adapter:{name}",
        "kind": "adapter",
        "of": name,
        "mean_score": 98.6,
        "gain_points": 0.5,
        "interval95": [-0.25, 1.25],
        "p_value": 0.2,
        "excess_points": -0.1,
        "excess_interval95": [-0.75, 0.5],
        "added_parameters": 3336,
        "exceeded": False,
        "alarming": False,
        "sentence": "CBAM gains +0.4 points, an adapter of its size gains +0.5.",
    }


def read(given: dict[str, Any]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(rows.as_csv(given))))


def test_a_row_for_each_network() -> None:
    given = results(["se", "cbam"])
    given["controls"] = [adapter("cbam")]
    found = read(given)
    assert [(row["name"], row["kind"], row["of"]) for row in found] == [
        ("baseline", "baseline", ""),
        ("se", "variant", ""),
        ("cbam", "variant", ""),
        ("adapter:cbam", "adapter", "cbam"),
    ]
    cbam = given["variants"][1]
    assert float(found[2]["gain_points"]) == cbam["gain_points"]
    assert [float(found[2][key]) for key in ("low_points", "high_points")] == cbam["interval95"]
    assert (found[2]["verdict"], found[2]["added_parameters"]) == ("worth it", str(274490 - 272474))
    assert float(found[2]["train_step_ratio"]) == cbam["latency"]["train_step_ratio"]["median"]
    assert (found[3]["added_parameters"], found[3]["parameters"], found[3]["verdict"]) == ("3336", "", "")


def test_what_is_not_known_is_empty() -> None:
    given = results(["se"], seeds=1, measured=False)
    baseline, se = read(given)
    assert (baseline["gain_points"], baseline["verdict"]) == ("", "")
    assert [se[key] for key in ("low_points", "high_points", "p_value", "train_step_ratio")] == [""] * 4


def test_names_of_all_kinds_come_back_from_the_table() -> None:
    given = results(["se"])
    for name in ("a,b", 'say "no"', "two\nlines", "猫"):
        given["variants"][0]["name"] = name
        assert read(given)[1]["name"] == name


def test_markdown_has_the_answer_first() -> None:
    given = results(["se", "cbam"])
    given["controls"] = [adapter("cbam")]
    lines = rows.as_markdown(given).splitlines()
    assert lines[0] == f"# {given['headline']}"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1
    assert table[4].startswith("| cbam | worth it | ") and "| +1.60 | +0.80 to +2.40 | < 0.001 | +2,016 |" in table[4]
    assert table[5].startswith("| adapter:cbam | – | ") and "| +3,336 | – | – |" in table[5]
    assert f"- {given['controls'][0]['sentence']}" in lines
    assert lines.index("## What would change the answer") < lines.index("## How to repeat it")
    assert lines[-1] == f"    {given['command']}"


def test_names_are_no_markup() -> None:
    given = results(["se"])
    given["variants"][0]["name"] = "a|b*c_d<e>"
    table = [line for line in rows.as_markdown(given).splitlines() if line.startswith("|")]
    assert table[3].startswith("| a\\|b\\*c\\_d\\<e\\> |")


# drawing it anew


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with results and nothing else."""
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text(json.dumps(results(["se"])), encoding="utf-8")
    return tmp_path / "done"


def test_the_same_results_are_drawn_the_same(folder: Path, tmp_path: Path) -> None:
    reporting.write(results(["se"]), tmp_path / "first")
    assert reporting.redraw(str(folder)) == folder / "report.html"
    for name in ("report.html", "results.csv", "results.md"):
        assert (folder / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_the_command_draws_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(folder)])
    said = capsys.readouterr()
    assert (ended.value.code or 0, said.out, said.err) == (0, f"The report: {folder / 'report.html'}\n", "")
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "results.json is damaged .*Give the command that made it once more"),
        ("[1]", "is damaged .it is a list, not an object."),
        ('{"schema": 1}', "expected results of schema 2, got schema 1; give the command that made them once more"),
        ('{"schema": 3}', "got schema 3; draw the report with the version of convattn that made them"),
        ('{"schema": 2, "variants": []}', "the results have no convattn, headline, .*, baseline, controls, "),
        ('{"schema": 2, "checksum": "12", "variants": []}', "is damaged .its checksum is wrong."),
    ],
)
def test_results_that_cannot_be_drawn(folder: Path, content: str, message: str) -> None:
    (folder / "results.json").write_text(content)
    with pytest.raises(ComparisonError, match=message):
        reporting.redraw(folder)
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_folders_without_results(folder: Path) -> None:
    (folder / "results.json").unlink()
    with pytest.raises(ComparisonError, match=r"has no results.json: give the folder of a comparison"):
        reporting.redraw(folder)
    (folder / "plan.json").touch()
    with pytest.raises(ComparisonError, match="is not done yet: give the command that began it once more"):
        reporting.redraw(folder)
    with pytest.raises(ComparisonError, match=r"plan.json is a file: give the folder"):
        reporting.redraw(folder / "plan.json")
    with pytest.raises(ComparisonError, match="nowhere does not exist: give the folder"):
        reporting.redraw(folder / "nowhere")


def test_a_mistake_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(folder / "nowhere")])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
