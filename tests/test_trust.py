"""Code that a file names runs only where the user names it too, by the same file and the same name in it."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

import convattn.compare
from convattn import attach, cli, files, load, networks, own_code, reporting, save, showing
from convattn.compare import timing
from convattn.errors import ComparisonError, ConvattnError, InvalidOption, UnknownName, UntrustedCode, WeightsError
from convattn.train import checkpoint
from small_runs import NETWORK, write_images

# whoever runs it leaves a file
MINE = f"""
from pathlib import Path
Path("it-was-run").touch()
from convattn.nn import Gate
{NETWORK}

class Mine(Gate):
    def __init__(self, channels, *, dimensions=2, start="paper"):
        super().__init__(channels=channels, dimensions=dimensions, start=start)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def gate(self, x):
        return torch.sigmoid(self.weight * x.mean(1, keepdim=True))
"""
ABOUT: dict[str, Any] = {
    "backbone": "mine.py:network",
    "variant": "se",
    "start": "paper",
    "classes": ["a", "b", "c"],
    "image_size": 16,
    "mean": [0, 0, 0],
    "std": [1, 1, 1],
}
GOOD = "compare data --seeds 1 --epochs 1 --batch-size 16 -q --out out"


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with images, a file of code, and a second one that only looks like it."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text(MINE)
    Image.new("RGB", (16, 16), "red").save("a.png")
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command in this process: its exit code, and what it wrote to stderr."""

    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


Call = Callable[..., tuple[int, str]]


def ran() -> bool:
    """Whether the code was run since this was last asked."""
    there = Path("it-was-run").exists()
    Path("it-was-run").unlink(missing_ok=True)
    return there


def innocent(**changes: Any) -> Path:
    """A checkpoint whose metadata say what they like."""
    path = Path("innocent.safetensors")
    metadata = {"convattn": json.dumps({**ABOUT, **changes})}
    safetensors.torch.save_file({"x": torch.ones(1)}, path, metadata=metadata)
    return path


def trained(**changes: Any) -> Path:
    """A checkpoint that is what it says."""
    about = {**ABOUT, **changes}
    checkpoint.save(Path("weights.safetensors"), checkpoint.build(about), about)
    ran()
    return Path("weights.safetensors")


def check_refused(error: str, file: Path | str, *codes: str) -> None:
    """One line that says which file names which code, all of it, and the options to give."""
    assert error.startswith(f"convattn: {file} names code to run, {', '.join(codes)}: ")
    options, given = " ".join(f"--trust {code}" for code in codes), codes[0] if len(codes) == 1 else list(codes)
    assert f"give {options} (from Python trust={given!r})" in error
    assert error.count("\n") == 1
    assert not ran()


# show


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, "mine.py:network"),
        ({"backbone": "other/../mine.py:network"}, "other/../mine.py:network"),
        ({"variant": "baseline"}, "mine.py:network"),
        ({"variant": "noise"}, "mine.py:network"),
        ({"variant": "wider:se"}, "mine.py:network"),
        ({"variant": "placebo:se"}, "mine.py:network"),
        ({"backbone": "resnet20", "variant": "mine.py:Mine"}, "mine.py:Mine"),
        ({"backbone": "resnet20", "variant": "se+mine.py:Mine"}, "mine.py:Mine"),
        ({"backbone": "resnet20", "variant": "mine.py:Mine+dual"}, "mine.py:Mine"),
        ({"backbone": "resnet20", "variant": "adapter:mine.py:Mine"}, "mine.py:Mine"),
        ({"backbone": "resnet20", "variant": "wider:mine.py:Mine"}, "mine.py:Mine"),
        ({"backbone": "resnet20", "variant": "mine.py:network"}, "mine.py:network"),
    ],
    ids=str,
)
def test_show_runs_no_code_that_the_checkpoint_names(changes: dict[str, str], code: str, call: Call) -> None:
    path = innocent(**changes)
    status, error = call("show", str(path), "a.png", "--out", "shown")
    assert status == 2 and not Path("shown").exists()
    check_refused(error, path, code)
    for function in (checkpoint.load, lambda file: showing.show(file, "a.png", "shown")):
        with pytest.raises(UntrustedCode, match="names code to run") as caught:
            function(path)
        assert "\n" not in str(caught.value) and not ran()


def test_show_runs_the_code_that_is_trusted(call: Call, world: Path) -> None:
    trained(variant="mine.py:Mine", backbone="mine.py:network", start="identity")
    words = ["show", "weights.safetensors", "a.png", "--out", "shown"]
    # each by itself is not enough
    for code, other in (("mine.py:network", "mine.py:Mine"), ("mine.py:Mine", "mine.py:network")):
        status, error = call(*words, "--trust", other)
        assert status == 2
        check_refused(error, "weights.safetensors", code)
    assert call(*words, "--trust", "mine.py:network", "--trust", "mine.py:Mine") == (0, "")
    assert ran() and {row.kind for row in showing.table("shown")} == {"spatial"}
    both = ["mine.py:network", f"{world}/mine.py:Mine"]
    assert checkpoint.load("weights.safetensors", trust=both)[1]["variant"] == "mine.py:Mine"
    assert showing.show("weights.safetensors", "a.png", "again", trust=both) == Path("again")


@pytest.mark.parametrize(
    ("named", "trusted", "same"),
    [
        ("mine.py:network", "mine.py:network", True),
        ("./mine.py:network", "mine.py:network", True),
        ("other/../mine.py:network", "mine.py:network", True),
        ("mine.py:network", "{here}/mine.py:network", True),
        ("{here}/mine.py:network", "mine.py:network", True),
        ("link.py:network", "mine.py:network", True),
        ("mine.py:network", "link.py:network", True),
        ("folder/mine.py:network", "other/mine.py:network", True),
        # links are followed before `..` is
        ("folder/../mine.py:network", "mine.py:network", True),
        ("other/mine.py:network", "mine.py:network", False),
        ("folder/mine.py:network", "mine.py:network", False),
        ("away/../mine.py:network", "mine.py:network", False),
        ("mine.py:dropping", "mine.py:network", False),
        ("mine.py:network", "mine.py:networks", False),
        ("mine.py:network", "mine.py:Network", False),
        ("mine.py:other/mine.py:network", "mine.py:network", False),
    ],
)
def test_the_same_file_and_the_same_name(named: str, trusted: str, same: bool, world: Path) -> None:
    if not hasattr(os, "symlink"):
        pytest.skip("no links on this system")
    (world / "link.py").symlink_to("mine.py")
    (world / "folder").symlink_to("other")
    (world / "deep" / "down").mkdir(parents=True)
    (world / "deep" / "mine.py").write_text(MINE)
    (world / "away").symlink_to(world / "deep" / "down")
    named, trusted = (one.format(here=world) for one in (named, trusted))
    path = trained(backbone="mine.py:network")
    about = {"convattn": json.dumps({**ABOUT, "backbone": named})}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata=about)
    if same:
        checkpoint.load(path, trust=trusted)
        assert ran()
        return
    with pytest.raises(UntrustedCode):
        checkpoint.load(path, trust=trusted)
    assert not ran()


@pytest.mark.parametrize("trust", ["mine.py", "network", "mine.py:", ["mine.py:network", "all"], [3], "*"])
def test_trust_names_code(trust: Any) -> None:
    with pytest.raises(InvalidOption, match=r"trust: expected code named as FILE\.py:NAME, got"):
        checkpoint.load(innocent(), trust=trust)
    assert not ran()


@pytest.mark.parametrize("name", ["evil.py:f\nmore", "evil\x1b[2J.py:f", "evil.py:f\x00", "\x00.py:f"])
def test_names_that_would_write_on_a_terminal(name: str, call: Call) -> None:
    status, error = call("show", str(innocent(backbone=name)), "a.png", "--out", "shown")
    assert status == 2 and error.count("\n") == 1 and error.rstrip("\n").isprintable()


def test_a_loop_of_links_is_nobodys_file(world: Path) -> None:
    (world / "loop.py").symlink_to("loop.py")
    with pytest.raises((UntrustedCode, UnknownName)):
        checkpoint.load(innocent(backbone="loop.py:f"))


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": ["mine.py:network"]},
        {"backbone": {"mine.py:network": 1}},
        {"variant": 3},
        {"classes": "abc"},
        {"image_size": -1},
        {"image_size": "16"},
        {"image_size": 10**30},
        {"mean": None},
        {"mean": [0.5]},
        {"mean": ["0.5"] * 3},
        {"mean": [10**400] * 3},
        {"mean": [float("nan")] * 3},
        {"std": [0.2, 0.2, 0.0]},
        {"std": [None] * 3},
        {"start": None},
        {"classes": [1, None]},
    ],
    ids=str,
)
def test_metadata_that_are_something_else(changes: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="holds weights but not what they belong to"):
        checkpoint.load(innocent(**changes))
    assert not ran()


@pytest.mark.parametrize("name", ["built", "own"])
def test_names_in_metadata_are_one_line(name: str) -> None:
    about = {"built": "\x1b[2J\n"} if name == "built" else {"own": {"q": "\x1b[2J\n"}, "variant": "q"}
    with pytest.raises(WeightsError, match=r"the function|a module of the user's own") as caught:
        checkpoint.load(innocent(**about), trust="mine.py:network")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000])
def test_metadata_without_end(text: str) -> None:
    path = Path("deep.safetensors")
    safetensors.torch.save_file({"x": torch.ones(1)}, path, metadata={"convattn": text})
    with pytest.raises(WeightsError, match="is not a checkpoint of convattn"):
        checkpoint.load(path)


# comparisons


@pytest.fixture
def done(world: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A comparison whose plan names code, begun by a command that names it itself."""
    monkeypatch.setattr(reporting, "write", lambda results, folder: folder / "report.html")
    write_images(world / "data", count=20)
    words = f"{GOOD} --backbone mine.py:network --variants mine.py:Mine".split()
    # without any --trust, and again when it goes on
    assert call(*words) == (0, "") and ran()
    assert call(*words) == (0, "")
    ran()
    return world / "out"


def test_seeds_are_added_to_a_plan_that_names_code(done: Path, call: Call) -> None:
    plan = Path("out") / "plan.json"
    words = ["compare", "out", "--add-seeds", "1", "-q"]
    status, error = call(*words)
    assert status == 2
    check_refused(error, plan, "mine.py:network", "mine.py:Mine")
    status, error = call(*words, "--trust", "mine.py:network")
    assert status == 2
    check_refused(error, plan, "mine.py:Mine")
    with pytest.raises(UntrustedCode, match="names code to run"):
        convattn.compare.run("out", add_seeds=1, quiet=True, trust="other/mine.py:network")
    assert not ran() and not (done / "runs" / "baseline-seed1").exists()

    assert call(*words, "--trust", "mine.py:network", "--trust", "mine.py:Mine") == (0, "")
    assert ran() and (done / "runs" / "mine.py-Mine-seed1" / "result.json").exists()
    results = json.loads((done / "results.json").read_text())
    assert len(results["baseline"]["scores"]) == 2
    # the command that repeats it names the code itself
    again = results["command"].split(" && ")[1]
    assert again == "convattn compare --add-seeds 1 --trust mine.py:network --trust mine.py:Mine out"
    assert convattn.compare.run("out", add_seeds=1, quiet=True, trust=["mine.py:network", "mine.py:Mine"])["folder"]


def test_a_plan_cannot_bring_its_trust_with_it(done: Path) -> None:
    content = files.read_json(done / "plan.json") or {}
    for changes in ({"trust": ["mine.py:network", "mine.py:Mine"]}, {"out": "elsewhere"}, {"backbone": ["x"]}):
        files.write_json(done / "plan.json", {**content, "options": {**content["options"], **changes}})
        with pytest.raises(ComparisonError, match="of something else"):
            convattn.compare.run(done, add_seeds=1, quiet=True)
        assert not ran()


def test_a_report_runs_no_code(done: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(done.parent)
    for words in (["report", "out"], ["report", "out", "--trust", "mine.py:network"]):
        (done / "report.html").unlink(missing_ok=True)
        assert call(*words) == (0, "")
        assert not ran() and (done / "report.html").exists()
    # nor for results that name another file
    results = json.loads((done / "results.json").read_text())
    results["setting"]["backbone"] = "other/mine.py:network"
    files.write_json(done / "results.json", {key: value for key, value in results.items() if key != "checksum"})
    assert call("report", "out") == (0, "") and not ran()


def test_checkpoints_of_a_comparison(done: Path, call: Call) -> None:
    weights = "out/runs/mine.py-Mine-seed0/weights.safetensors"
    words = ["show", weights, "a.png", "--out", "shown"]
    status, error = call(*words)
    assert status == 2
    check_refused(error, weights, "mine.py:network", "mine.py:Mine")
    assert call(*words, "--trust", "mine.py:network", "--trust", "mine.py:Mine") == (0, "")


# attention in a folder


def test_attention_in_a_folder_runs_no_code() -> None:
    plain = networks.create("mine.py:network")
    save(attach(networks.create("mine.py:network"), "mine.py:Mine"), "saved")
    ran()
    about = json.loads(Path("saved/attention.json").read_text())
    assert {site["attention"] for site in about["sites"]} == {"mine.py:Mine"}
    for registered in (False, True):
        for site in about["sites"]:
            site["registered"] = registered
        Path("saved/attention.json").write_text(json.dumps(about))
        with pytest.raises(ConvattnError, match=r"mine\.py:Mine"):
            load(plain, "saved", weights="any")
        assert not ran()


# names


@pytest.mark.parametrize("name", ["resnet20", "timm:resnet18", "mine.py", "x:mine.py", "", None, 3, ["a.py:f"]])
def test_what_names_no_code_is_passed_over(name: object) -> None:
    assert not own_code.is_named(name)
    own_code.check([name], "file", ())


def test_the_message_is_as_a_shell_takes_it(world: Path) -> None:
    (world / "my own").mkdir()
    shutil.copy("mine.py", "my own/mine.py")
    with pytest.raises(UntrustedCode, match=r"give --trust 'my own/mine\.py:network' \(from Python"):
        checkpoint.load(innocent(backbone="my own/mine.py:network"))
