"""The command line: what it prints, and where and with which code it ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import convattn
import convattn.compare
from convattn import cli, files, networks, reporting
from convattn.compare.folder import SCHEMA
from convattn.compare.options import parse
from convattn.errors import RunFailed
from small_runs import contents, write_images, write_network


@pytest.fixture(autouse=True)
def warnings_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # the command shows them in its own way
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with images, networks and weights for one."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data")
    write_network(tmp_path)
    torch.save(networks.create("network.py:network", classes=3).state_dict(), "weights.pt")
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: its exit code, and what it wrote to stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


Call = Callable[..., tuple[int, str, str]]


def one_line(text: str) -> str:
    """The text of a message, which is one line."""
    assert text.count("\n") == 1 and text.endswith("\n"), text
    assert text.startswith("convattn: ")
    return text.removeprefix("convattn: ").rstrip("\n")


# help


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"convattn {convattn.__version__}\n", "")


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(call: Call, word: str) -> None:
    code, out, err = call(word)
    assert (code, err) == (0, "")
    for text in ("Usage: ", "compare", "show", "Is attention worth it", "--version"):
        assert text in out


def test_help_of_compare(call: Call) -> None:
    code, out, err = call("compare", "--help")
    assert (code, err) == (0, "")
    options = "backbone weights variants start seeds epochs image-size batch-size learning-rate jobs smallest-gain out"
    for option in options.split():
        assert f"--{option} " in out
    assert "Examples:" in out
    # each on a line of its own
    assert "\n    convattn compare digits\n" in out
    assert "se,cbam,dual,cbam+dual" in out


def test_help_of_show(call: Call) -> None:
    code, out, err = call("show", "--help")
    assert (code, err) == (0, "")
    assert "Examples:" in out and "\n    convattn show " in out
    assert "--out" in out and "--layer" in out


def test_no_command_is_a_question_for_help(call: Call) -> None:
    code, out, err = call()
    assert "[OPTIONS] COMMAND" in out + err
    assert "Commands:\n" in out + err
    assert "See convattn --help" not in err
    assert code in (0, 2)


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("word", ["--help", "--version", "compare --help"])
def test_help_imports_nothing_heavy(word: str) -> None:
    code = f"""
import sys
from convattn.cli import main
try:
    main({word.split()!r})
except SystemExit:
    pass
heavy = {{"torch", "numpy", "scipy", "sklearn", "timm", "torchvision", "matplotlib", "PIL", "jinja2", "rich"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command() -> None:
    done = python("-m", "convattn", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"convattn {convattn.__version__}\n", "")


# mistakes


def only_text_in_a_class(world: Path) -> None:
    for path in (world / "data" / "red").iterdir():
        path.rename(path.with_suffix(".txt"))


def too_few_images(world: Path) -> None:
    for path in sorted((world / "data" / "red").iterdir())[2:]:
        path.unlink()


def another_comparison(world: Path) -> None:
    (world / "out").mkdir()
    options = {"data": "elsewhere", "backbone": "resnet20", "variants": [], "device": "cpu"}
    plan = {"schema": SCHEMA, "options": options, "fingerprints": {"images": "", "weights": None}, "threads": 1}
    files.write_json(world / "out" / "plan.json", plan)


def an_older_comparison(world: Path) -> None:
    (world / "out").mkdir()
    plan = {"options": {"data": "elsewhere"}, "fingerprints": {"images": "", "weights": None}}
    (world / "out" / "plan.json").write_text(json.dumps(plan))


def other_files(world: Path) -> None:
    (world / "out").mkdir()
    (world / "out" / "thesis.txt").write_text("do not lose")


def weights_of_another_network(world: Path) -> None:
    torch.save(networks.resnet20().state_dict(), world / "weights.pt")


def nothing(world: Path) -> None:
    pass


GOOD = "compare data --backbone network.py:network --weights weights.pt --variants se --seeds 1 --epochs 1 --out out"
MISTAKES = {
    "unknown command": (nothing, "frobnicate", "No such command 'frobnicate'"),
    "unknown option": (nothing, "compare data --sedes 3", "No such option"),
    "no data named": (nothing, "compare", "Missing argument"),
    "two data named": (nothing, "compare data more", "unexpected extra argument"),
    "an option without value": (nothing, "compare data --seeds", "requires an argument"),
    "seeds a word": (nothing, "compare data --seeds five", "'--seeds'"),
    "seeds 0": (nothing, f"{GOOD} --seeds 0", "seeds must be a whole number of at least 1, got 0"),
    "jobs 0": (nothing, f"{GOOD} --jobs 0", "jobs must be a whole number of at least 1, got 0"),
    "epochs 0": (nothing, f"{GOOD} --epochs 0", "epochs must be"),
    "smallest gain": (nothing, f"{GOOD} --smallest-gain -1", "smallest_gain must be"),
    "start": (nothing, f"{GOOD} --start zero", "start must be one of"),
    "wrong control": (nothing, f"{GOOD} --controls placebos", "each of controls must be one of"),
    "wider with weights": (nothing, f"{GOOD} --controls wider", "wider is for random weights"),
    "wrong variant": (nothing, f"{GOOD} --variants se,cbma", "'cbma'. Did you mean 'cbam'"),
    "wrong backbone": (nothing, f"{GOOD} --backbone resnet2O", "Did you mean"),
    "wrong function": (nothing, f"{GOOD} --backbone network.py:netwrok", "has no function 'netwrok'"),
    "missing folder": (nothing, GOOD.replace("data", "dta", 1), "No data at dta"),
    "a file as data": (nothing, GOOD.replace("data", "network.py", 1), "expected a folder of class folders"),
    "only text in a class": (only_text_in_a_class, GOOD, "The class 'red' has no image"),
    "too few images": (too_few_images, GOOD, "'red' has too few usable images"),
    "no such weights": (nothing, f"{GOOD} --weights nowhere.pt", "No file of weights at nowhere.pt"),
    "weights of another network": (weights_of_another_network, GOOD, "weights of another network than"),
    "an older comparison": (
        an_older_comparison,
        GOOD,
        "out was begun by another version of convattn (schema 1, here 2)",
    ),
    "another comparison": (another_comparison, GOOD, "out holds another comparison"),
    "other files": (other_files, GOOD, "out exists and holds no comparison"),
    "no residual blocks": (nothing, f"{GOOD} --backbone network.py:plain --weights none", "no place at 'residual'"),
    "a network for more classes": (nothing, f"{GOOD} --backbone network.py:five --weights none", "expected (2, 3)"),
    "show without images": (nothing, "show weights.pt", "Missing"),
    "show nowhere": (nothing, "show nowhere.safetensors data/red/000.png --out out", "No checkpoint at nowhere"),
    "show other weights": (nothing, "show weights.pt data/red/000.png --out out", "weights.pt is not a"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(world: Path, call: Call, case: str) -> None:
    spoil, command, message = MISTAKES[case]
    spoil(world)
    before = contents(world)
    code, out, err = call(*command.split())
    assert code == 2
    assert message in one_line(err)
    # what was being done may be said, results may not
    assert "worth it" not in out
    assert contents(world) == before


def test_a_mistake_in_a_process_of_its_own(world: Path) -> None:
    before = contents(world)
    done = python("-m", "convattn", *f"{GOOD} --seeds 0".split())
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr) == "compare: seeds must be a whole number of at least 1, got 0."
    assert contents(world) == before


def test_a_truncated_image_is_named_and_left_out(world: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "write", lambda results, folder: folder / "report.html")
    path = world / "data" / "red" / "cut.jpg"
    Image.effect_noise((40, 40), 50).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    code, out, err = call(*GOOD.split())
    assert code == 0
    assert one_line(err).startswith("left out red/cut.jpg: ")
    results = json.loads((world / "out" / "results.json").read_text())
    assert [one["path"] for one in results["data"]["left_out"]] == ["red/cut.jpg"]
    assert results["headline"] in out


def test_a_broken_run_is_no_mistake(world: Path, call: Call) -> None:
    (world / "broken").touch()
    code, _, err = call(*f"{GOOD} --backbone network.py:breaking --weights none".split())
    assert code == 1
    assert "The run se-seed0 broke: RuntimeError: no memory" in one_line(err)


def test_messages_of_several_lines_become_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RunFailed("first\n  second")

    monkeypatch.setattr(convattn.compare, "run", broken, raising=False)
    assert call("compare", "digits")[::2] == (1, "convattn: first second\n")


def test_a_defect_shows_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(convattn.compare, "run", broken, raising=False)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        cli.main(["compare", "digits"])


def test_warnings_are_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(*args: object, **options: object) -> None:
        warnings.warn("the classifier\nis fresh", stacklevel=2)

    monkeypatch.setattr(convattn.compare, "run", warning, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = call("compare", "digits")
    assert (code, err) == (0, "convattn: the classifier is fresh\n")


# what options mean


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, call: Call) -> Callable[..., dict[str, Any]]:
    """What `compare` is called with for a command."""
    found: dict[str, Any] = {}

    def keep(data: str, **options: Any) -> None:
        found.clear()
        found.update(options, data=data)

    monkeypatch.setattr(convattn.compare, "run", keep, raising=False)

    def take(*words: str) -> dict[str, Any]:
        code, _, err = call(*words)
        assert (code, err) == (0, "")
        return dict(found)

    return take


def test_the_defaults_are_those_of_the_function(taken: Callable[..., dict[str, Any]]) -> None:
    import inspect

    from convattn.compare.engine import run

    given = taken("compare", "photos")
    assert given.pop("data") == "photos"
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(run).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert given.keys() == defaults.keys() - {"train"}
    # a script may lack its guard, without which it cannot start processes
    assert (given.pop("jobs"), defaults.pop("jobs")) == (None, 1)
    # a function, which no command line can give
    assert defaults.pop("train") is None
    assert given == defaults


def test_options_arrive(taken: Callable[..., dict[str, Any]]) -> None:
    words = (
        "compare photos --backbone timm:resnet18 --weights pretrained --variants se,cbam+dual --start paper --seeds 3 "
        "--controls adapter,noise "
        "--epochs 7 --image-size 96 --batch-size 32 --learning-rate 0.02 --weight-decay 0.001 --no-flip --device cpu "
        "--jobs 2 --threads 3 --wait --val-as-test "
        "--smallest-gain 0.3 --out there --quiet --until decided --max-seeds 9 --add-seeds 2 "
        "--folds 4 --gate-learning-rate 0.2 --tune lr --audit-selection --trust a.py:f --trust b.py:G"
    )
    assert taken(*words.split()) == {
        "data": "photos",
        "backbone": "timm:resnet18",
        "weights": "pretrained",
        "variants": "se,cbam+dual",
        "controls": "adapter,noise",
        "start": "paper",
        "seeds": 3,
        "until": "decided",
        "max_seeds": 9,
        "add_seeds": 2,
        "folds": 4,
        "gate_learning_rate": 0.2,
        "tune": "lr",
        "audit_selection": True,
        "trust": ("a.py:f", "b.py:G"),
        "epochs": 7,
        "image_size": 96,
        "batch_size": 32,
        "learning_rate": 0.02,
        "weight_decay": 0.001,
        "flip": False,
        "device": "cpu",
        "jobs": 2,
        "threads": 3,
        "wait": True,
        "val_as_test": True,
        "smallest_gain": 0.3,
        "out": Path("there"),
        "quiet": True,
    }


NOT_PARSED = ("out", "quiet", "add_seeds", "trust", "wait")


@pytest.mark.parametrize(
    "words",
    [
        "compare digits",
        "compare digits --threads 1 --val-as-test",
        "compare photos --weights weights.pt",
        "compare photos --batch-size 131",
        "compare photos --learning-rate 0.0123456789 --weight-decay 0.000123456789 --smallest-gain 0.123456789",
        "compare 'my photos' --backbone 'my net.py:f' --image-size 40 --flip --start identity --seeds 2 --epochs 1",
        "compare photos --no-flip --variants se,cbam+dual --device cpu",
        "compare photos --until decided --max-seeds 7 --seeds 4",
        "compare photos --until decided",
        "compare photos --controls noise,placebo",
    ],
)
def test_the_command_in_the_results_repeats_the_comparison(taken: Callable[..., dict[str, Any]], words: str) -> None:
    def parsed(command: str) -> tuple[Any, str]:
        options = taken(*shlex.split(command))
        options = {key: value for key, value in options.items() if key not in NOT_PARSED}
        chosen = parse(**options)
        return (chosen.hashed(), chosen.seeds, chosen.until, chosen.max_seeds, chosen.smallest_gain), chosen.command()

    first, command = parsed(words)
    assert command.startswith("convattn compare ")
    again, _ = parsed(command.removeprefix("convattn "))
    assert again == first


# interrupted


def test_an_interrupt_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convattn.compare, "run", interrupted, raising=False)
    code, _, err = call("compare", "digits")
    assert code == 130
    assert "the same command goes on" in one_line(err)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def interrupted(world: Path, when: Callable[[], object], *, jobs: int) -> tuple[int, str, str]:
    """Start a long comparison and press Ctrl-C, which reaches all of its processes, at a certain point."""
    words = f"{GOOD} --epochs 80 --jobs {jobs}".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # what runs in the background of a shell ignores interrupts, and so would its children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "convattn", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    try:
        wait_for(when, process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.skipif(sys.platform == "win32", reason="an interrupt is sent differently there")
def test_interrupted_in_the_middle(world: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    log = world / "out" / "runs" / "baseline-seed0" / "log.jsonl"
    code, out, err = interrupted(world, log.exists, jobs=1)
    assert code == 130
    assert "the same command goes on" in one_line(err)
    assert "Accuracy on the 18 test images before any training" in out
    before = log.read_text()
    assert 0 < before.count("\n") < 80

    monkeypatch.setattr(reporting, "write", lambda results, folder: folder / "report.html")
    code, out, err = call(*f"{GOOD} --epochs 80".split())
    assert (code, err) == (0, "")
    assert log.read_text().startswith(before)
    assert "[2 of 2 runs" in out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="an interrupt is sent differently there")
@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.2, 1.0, 2.0, None])
def test_interrupted_with_several_at_a_time(world: Path, seconds: float | None) -> None:
    def training() -> bool:
        return (world / "out" / "runs" / "baseline-seed0" / "log.jsonl").exists()

    def importing() -> bool:
        # the starting accuracies are known, and the processes that train have just been started
        file = world / "out" / "start.json"
        if not file.exists() or len(json.loads(file.read_text())) < 2:
            return False
        time.sleep(seconds or 0.0)
        return True

    code, _, err = interrupted(world, training if seconds is None else importing, jobs=2)
    assert code == 130
    assert "the same command goes on" in one_line(err)


# sites


def test_sites(call: Call) -> None:
    code, out, err = call("sites", "resnet20", "--attention", "se+dual")
    assert (code, err) == (0, "")
    columns = ["site", "place", "stage", "attention", "channels", "map", "parameters", "multiply-adds"]
    assert out.splitlines()[0].split() == columns
    assert len(out.splitlines()) == 1 + 9 + 1 + 1


def test_sites_of_some_stages(call: Call) -> None:
    code, out, err = call(
        "sites", "resnet20", "--at", "stage", "--stages", "2,3", "--where", "layer3", "--image-size", "64"
    )
    assert (code, err) == (0, "")
    site, total = out.splitlines()[1:]
    assert site.split()[:8] == ["layer3.2", "stage", "3", "cbam", "64", "16", "x", "16"] and total.startswith(
        "total added"
    )


def test_stages_that_are_no_numbers(call: Call) -> None:
    code, out, err = call("sites", "resnet20", "--stages", "two")
    assert (code, out) == (2, "") and "stages must be numbers separated by commas, got 'two'" in one_line(err)


def test_sites_of_a_network_without_residual_sums(call: Call) -> None:
    code, out, err = call("sites", "torchvision:vgg11")
    assert (code, out) == (2, "")
    assert "no place at 'residual'. It has these" in one_line(err)
