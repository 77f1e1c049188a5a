"""docs/results.md describes every key of real results, and no other."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convattn.compare
from convattn import files
from convattn.compare import elsewhere, rounds, timing
from convattn.compare.results import SCHEMA
from convattn.train import Run
from small_runs import CLASSES, write_images, write_network

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
SPREAD = {"median", "low", "high"}


def documented() -> dict[str, str]:
    """The type of every key, by its path from the top: `variants[].gates[].site`."""
    found: dict[str, str] = {}
    prefixes = [""]
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        names = re.findall(r"`([^`]+)`", line.split("|")[1] if line.startswith("| `") else line)
        if line.startswith("## "):
            prefixes = [f"{name}." for name in names] or [""]
        elif line.startswith("| `"):
            kind = line.split("|")[2].strip()
            for path in (prefix + name for prefix in prefixes for name in names):
                assert path not in found, path
                found[path] = kind
    return found


def paths(value: Any, known: dict[str, str], path: str = "") -> Iterator[tuple[str, str]]:
    """The path and the type of everything in results; names that are free are told as `*`."""
    kind = kind_of(value)
    if path:
        yield path, kind
    if kind == "object":
        before = f"{path}." if path else ""
        for key, one in value.items():
            yield from paths(one, known, before + ("*" if f"{before}*" in known else key))
    elif kind == "list" and value and isinstance(value[0], dict):
        for one in value:
            for key, content in one.items():
                yield from paths(content, known, f"{path}[].{key}")


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, dict):
        return "spread" if set(value) == SPREAD else "object"
    return {str: "string", int: "integer", float: "number", list: "list"}[type(value)]


def fits(kind: str, said: str) -> bool:
    allowed = said.split(" or ")
    return kind in allowed or (kind == "integer" and "number" in allowed)


LEARN = Run._learn


def diverging(run: Run, x: torch.Tensor, *rest: Any) -> None:
    broken = run.spec.variant in ("baseline", "se") and run.spec.seed == 1 and run.step >= len(run.batches)
    LEARN(run, x * float("nan") if broken else x, *rest)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A comparison with all that can be asked for, on images with all that can be wrong; and one of predictions."""
    folder = tmp_path_factory.mktemp("schema")
    data = folder / "data"
    for part, count in (("train", 20), ("test", 20)):
        write_images(data / part, count=count, seed=len(part))
    # no red test image, one in both parts, and one that is none
    for path in (data / "test" / "red").iterdir():
        path.unlink()
    shutil.copy(next((data / "train" / "blue").iterdir()), data / "test" / "blue" / "again.png")
    shutil.copy(data / "test" / "green" / "001.png", data / "test" / "green" / "twice.png")
    (data / "train" / "blue" / "torn.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timing, "ROUNDS", 3)
        # one variant is decided before the other, and one run diverges
        patched.setattr(rounds, "over", lambda found, taken, *rest: {"se"} if taken.seeds == (2,) else {*found})
        patched.setattr(Run, "_learn", diverging)
        convattn.compare.run(
            data,
            backbone=f"{write_network(folder)}:network",
            variants="se,cbam",
            seeds=2,
            until="decided",
            max_seeds=3,
            epochs=2,
            batch_size=16,
            controls="adapter,noise",
            tune="lr",
            audit_selection=True,
            out=folder / "out",
            quiet=True,
        )
    compared = files.read_json(folder / "out" / "results.json")
    assert compared["variants"][0]["diverged"] and compared["looks"]["ended"] == {"se": 2}
    random = np.random.default_rng(0)
    for name in ("baseline", "mine"):
        np.savez(folder / f"{name}.npz", probabilities=random.dirichlet(np.ones(3), (2, 40)), labels=np.arange(40) % 3)
    judged = elsewhere.results(folder / "baseline.npz", [folder / "mine.npz"])
    return [compared, judged]


def test_every_key_is_documented_and_every_documented_key_is_there(real: list[dict[str, Any]]) -> None:
    known = documented()
    found = {path for path, _ in paths(real[0], known)}
    assert found - set(known) == set()
    assert set(known) - found == set()


def test_predictions_made_elsewhere_give_no_other_keys(real: list[dict[str, Any]]) -> None:
    known = documented()
    assert {path for path, _ in paths(real[1], known)} <= set(known)
    # nothing that the report reads is absent
    assert set(real[1]) == set(real[0])
    assert set(real[1]["setting"]) == set(real[0]["setting"])
    assert set(real[1]["data"]) == set(real[0]["data"])
    assert set(real[1]["variants"][0]) == set(real[0]["variants"][0])


def test_every_value_is_of_the_type_that_is_documented(real: list[dict[str, Any]]) -> None:
    known = documented()
    wrong = [(path, kind) for one in real for path, kind in paths(one, known) if not fits(kind, known[path])]
    assert wrong == []


def test_it_is_the_page_of_this_schema(real: list[dict[str, Any]]) -> None:
    assert f"schema {SCHEMA};" in PAGE.read_text(encoding="utf-8")
    assert {one["schema"] for one in real} == {SCHEMA}


def test_the_results_have_what_is_rare(real: list[dict[str, Any]]) -> None:
    """So that the comparison of keys is one of all keys."""
    data = real[0]["data"]
    assert data["left_out"] and data["missing_classes"] == {"test": [CLASSES[2]]} and data["duplicates"]["examples"]
    assert real[0]["leak"] and real[0]["tuning"] and real[0]["audit"]
