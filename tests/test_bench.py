"""The benchmark: what it measures is the same computation, and what it says is what it measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convattn import bench, cli
from convattn.errors import InvalidOption

SHAPE = (2, 16, 6, 5)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SMALL", (1, 8, 3, 3))


@pytest.mark.slow_unless(op="se")
@pytest.mark.parametrize(("op", "against"), [("cbam", ["timm", "plain"]), ("se", ["timm", "torchvision", "plain"])])
def test_every_map_in_both_orders_and_modes(small: None, op: str, against: list[str]) -> None:
    lines: list[str] = []
    result = bench.run(op, against=against, shapes=[SHAPE], repeats=3, said=lines.append)
    assert [(row.where, row.memory_format, row.what) for row in result.maps] == [
        (where, memory_format, what)
        for where in ("(2, 16, 6, 5)", "(1, 8, 3, 3)")
        for memory_format in ("first", "last")
        for what in ("forward+backward", "inference")
    ]
    assert len(lines) == len(result.maps) and not result.networks
    for row in result.maps:
        assert set(row.ratios) == {*against, "floor"}
        assert set(row.milliseconds) == {"ours", *against, "floor"}
        assert all(spread.low <= spread.median <= spread.high for spread in row.ratios.values())
        assert bool(row.kept_bytes) == (row.what == "forward+backward")
    assert "over timm" in bench.text(result, against) and "| (2, 16, 6, 5) |" in bench.markdown(result, against)


def test_a_candidate_that_computes_something_else_is_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = bench._modules

    def changed(*given: Any) -> dict[str, nn.Module]:
        found = original(*given)
        with torch.no_grad():
            found["timm"].channel.fc1.weight.add_(1)
        return found

    monkeypatch.setattr(bench, "_modules", changed)
    with pytest.raises(RuntimeError, match="timm computes something else than ours"):
        bench.run(against=["timm"], shapes=[SHAPE], repeats=3)


@pytest.mark.slow
def test_a_network(small: None, tmp_path: Path) -> None:
    result = bench.run("se", network="resnet18", against=["timm", "plain"], shapes=[], repeats=3, batch=2, side=32)
    assert [row.memory_format for row in result.networks] == ["first", "last"]
    for row in result.networks:
        assert set(row.ratios) == {"ours", "timm", "plain"}
        assert set(row.kept_bytes) == {"network alone", "ours", "timm", "plain"} and all(row.kept_bytes.values())
    folder = bench.save(result, ["timm", "plain"], tmp_path / "new")
    assert json.loads((folder / "results.json").read_text())["op"] == "se"
    assert "resnet18, (2, 3, 32, 32)" in (folder / "table.md").read_text()
    assert (folder / "figure.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_half_precision(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()

    def watching(*given: Any) -> None:
        for one in given[0].values():
            one.register_forward_hook(lambda module, inputs, y: seen.add(y.dtype))
        original(*given)

    original = bench._agree
    monkeypatch.setattr(bench, "_agree", watching)
    given: dict[str, Any] = {"network": "resnet20", "repeats": 3, "batch": 2, "side": 32, "dtype": "bfloat16"}
    result = bench.run("cbam", against=["timm"], shapes=[SHAPE], **given)
    assert "dtype bfloat16" in bench.markdown(result, ["timm"]) and len(result.maps) == 8 and len(result.networks) == 2
    # compared in the one, timed in the other
    assert seen == {torch.float32, torch.bfloat16}


def test_a_network_that_timm_builds_without_it(small: None) -> None:
    result = bench.run("cbam", network="resnet20", against=["timm"], shapes=[], repeats=3, batch=2, side=32)
    assert set(result.networks[0].ratios) == {"ours"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": "eca"},
        {"device": "gpu"},
        {"dtype": "int8"},
        {"against": ["mine"]},
        {"repeats": 0},
        {"batch": 0},
        {"shapes": [(1, 2, 3)]},
        {"shapes": [(0, 2, 3, 3)]},
    ],
)
def test_mistakes(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="bench: "):
        bench.run(**wrong)


def test_the_command(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "--shapes", "2x16x6x5", "--repeats", "3", "--out", str(tmp_path / "out")])
    assert not done.value.code
    out = capsys.readouterr().out
    assert "cbam on maps" in out and "(2, 16, 6, 5)" in out and (tmp_path / "out" / "figure.svg").exists()


def test_an_interrupt_keeps_what_is_measured(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = bench._on_map

    def interrupted(*given: Any) -> Any:
        yield next(iter(original(*given)))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_on_map", interrupted)
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "--shapes", "2x16x6x5", "--repeats", "3", "--out", str(tmp_path)])
    assert done.value.code == 130
    assert len(json.loads((tmp_path / "results.json").read_text())["maps"]) == 1


def test_shapes_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "--shapes", "16,64", "--out", str(tmp_path)])
    assert done.value.code == 2 and "shapes" in capsys.readouterr().err
