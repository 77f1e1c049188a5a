"""The folder of a comparison: one process at a time, damaged files, full disks, options that cannot apply."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import convattn.compare
from convattn import cli, files, reporting
from convattn.compare import folder as folders
from convattn.compare import limits, timing
from convattn.compare.continuing import measure_again
from convattn.compare.status import status
from convattn.data import images as data_images
from convattn.data.listing import LOCK
from convattn.errors import ComparisonError, InvalidOption, RunFailed
from convattn.train import Run, run
from small_runs import contents, write_images, write_network, write_parts

SETTINGS: dict[str, Any] = {"variants": "se", "seeds": 2, "epochs": 3, "batch_size": 8, "quiet": True, "threads": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_images(folder / "data", count=12)
    write_network(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 3)


@pytest.fixture
def compare(world: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def compare(data: Path | None = None, **options: Any) -> dict[str, Any]:
        backbone = f"{world / 'network.py'}:network"
        settings = {"backbone": backbone, "out": tmp_path / "out", **SETTINGS, **options}
        return convattn.compare.run(data or world / "data", **settings)

    return compare


def essence(folder: Path) -> dict[str, Any]:
    """All that a comparison has found, without times and memory, and the names of its files."""
    results = files.read_json(folder / "results.json") or {}
    for one in (results["baseline"], *results["variants"]):
        del one["latency"], one["peak_bytes"]
    del results["command"]
    found: dict[str, Any] = {"results": results}
    for path in sorted(folder.glob("runs/*/*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: array.tobytes() for key, array in arrays.items()}
        else:
            found[name] = path.read_bytes()
    found["files"] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return found


# damaged files


class Stop(BaseException):
    """What ends a comparison as a kill does."""


@pytest.fixture(scope="module")
def halves(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a comparison that is done, and of one that was killed in the middle of a run."""
    folder = tmp_path_factory.mktemp("halves")
    options = {"backbone": f"{world / 'network.py'}:network", **SETTINGS}
    tell = Run._tell

    def stopping(self: Run, *watch: Any) -> None:
        tell(self, *watch)
        if self.spec.variant == "se" and self.step > 2 * len(self.batches):
            raise Stop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timing, "ROUNDS", 3)
        convattn.compare.run(world / "data", **options, out=folder / "done")
        patched.setattr(run, "SECONDS_BETWEEN_CHECKPOINTS", 0)
        patched.setattr(Run, "_tell", stopping)
        with pytest.raises(Stop):
            convattn.compare.run(world / "data", **options, out=folder / "midway")
    return {name: folder / name for name in ("done", "midway")}


def damaged(content: bytes, kind: str, seed: int) -> bytes:
    random = np.random.default_rng(seed)
    place = int(random.integers(max(1, len(content))))
    kinds = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "random": random.bytes(len(content)),
        "flipped": content[:place] + bytes([content[place] ^ 16 if content else 1]) + content[place + 1 :],
    }
    return kinds[kind]


AT_THE_END = (
    *("cost.json", "images.json", "leaks.json", "looks.json", "report.html", "results.json", "start.json", "plan.json"),
    *(f"runs/se-seed1/{name}" for name in ("plan.json", "log.jsonl", "result.json")),
    *(f"runs/baseline-seed0/{name}" for name in ("weights.safetensors", "predictions.npz")),
)
MIDWAY = (
    *("images.json", "images.npy", "leaks.json", "start.json", "plan.json", "convattn.lock"),
    *(f"runs/se-seed0/{name}" for name in ("plan.json", "log.jsonl", "checkpoint.pt", "previous.pt")),
    *(f"runs/baseline-seed0/{name}" for name in ("result.json", "predictions.npz", "weights.safetensors")),
)
QUICK = ["plan.json", "looks.json", "leaks.json", "results.json", "images.npy", "runs/se-seed0/checkpoint.pt"]
QUICK += ["runs/se-seed1/result.json", "runs/baseline-seed0/predictions.npz"]
CASES = [("done", name) for name in AT_THE_END] + [("midway", name) for name in MIDWAY]


@pytest.mark.slow_unless(kind="random", name=QUICK)
@pytest.mark.parametrize("kind", ["random", "empty", "truncated", "flipped"])
@pytest.mark.parametrize(("state", "name"), CASES)
def test_the_same_command_mends_a_damaged_file(
    halves: dict[str, Path], tmp_path: Path, compare: Callable[..., Any], state: str, name: str, kind: str
) -> None:
    out = Path(shutil.copytree(halves[state], tmp_path / "out"))
    path = out / name
    path.write_bytes(damaged(path.read_bytes(), kind, CASES.index((state, name))))
    if name == "plan.json":
        with pytest.raises(ComparisonError, match=r"plan\.json is damaged .*put back a copy of it, or give another"):
            compare()
        return
    compare()
    assert essence(out) == essence(halves["done"])


def test_a_folder_in_the_place_of_the_plan(tmp_path: Path, compare: Callable[..., Any]) -> None:
    (tmp_path / "out" / "plan.json").mkdir(parents=True)
    with pytest.raises(ComparisonError, match=r"plan\.json is damaged \(.*directory.*put back a copy"):
        compare()


def test_damage_is_told(
    halves: dict[str, Path], tmp_path: Path, compare: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(halves["midway"], tmp_path / "out"))
    for name in ("images.npy", "runs/se-seed0/checkpoint.pt", "runs/baseline-seed0/result.json"):
        (out / name).write_bytes(b"damage")
    compare()
    said = capsys.readouterr().err
    assert "images.npy is damaged" in said and "The images are decoded again." in said
    assert "checkpoint.pt is damaged (its checksum is wrong). The run goes on from previous.pt." in said
    assert "result.json is damaged" in said and "The run is trained again." in said


def test_looks_come_back_from_the_results(halves: dict[str, Path], tmp_path: Path, compare: Callable[..., Any]) -> None:
    out = Path(shutil.copytree(halves["done"], tmp_path / "out"))
    compare(seeds=3)
    (out / "looks.json").write_bytes(b"")
    results = compare(seeds=3)
    assert results["looks"]["seeds"] == [2, 3]


# one process at a time


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[Path]:
    """A folder in which somebody works until the test ends."""
    with folders.locked(tmp_path / "out", wait=False, say=print):
        yield tmp_path / "out"


def test_a_second_command_is_refused(at_work: Path, compare: Callable[..., Any]) -> None:
    before = contents(at_work)
    message = rf"process {os.getpid()} on .*, begun 20.*, works there already\. Wait for it \(--wait\), or give another"
    with pytest.raises(ComparisonError, match=message):
        compare()
    assert contents(at_work) == before


def test_a_second_command_waits(
    tmp_path: Path, compare: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    begun, end = threading.Event(), threading.Event()

    def work() -> None:
        with folders.locked(tmp_path / "out", wait=False, say=print):
            begun.set()
            end.wait(60)

    other = threading.Thread(target=work)
    other.start()
    begun.wait(60)
    # longer than a look from `status` may take
    threading.Timer(2, end.set).start()
    started = time.monotonic()
    assert compare(wait=True)["baseline"]["scores"]
    assert time.monotonic() - started > 1.9
    other.join()
    assert f"Waiting: process {os.getpid()} on " in capsys.readouterr().err


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path, compare: Callable[..., Any]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).touch()
    files.write_json(tmp_path / "out" / folders.ACTIVITY, {"pid": 1, "host": "gone", "since": "2020"})
    assert compare()["baseline"]["scores"]
    assert not (tmp_path / "out" / folders.ACTIVITY).exists()


def test_a_refused_request_leaves_no_lock(tmp_path: Path, compare: Callable[..., Any]) -> None:
    with pytest.raises(InvalidOption):
        compare(image_size=10**6)
    assert not (tmp_path / "out").exists()


# where it lies, and what it needs


def test_a_folder_inside_of_the_data_is_refused(world: Path, compare: Callable[..., Any]) -> None:
    before = contents(world)
    for out in (world / "data" / "out", world / "data", world / "data" / "red" / "deep" / "out"):
        with pytest.raises(ComparisonError, match=r"lies inside of the data .*its files would be taken for images"):
            compare(out=out)
    assert contents(world) == before


def test_the_folder_that_the_data_are_in(
    tmp_path: Path, compare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cd photos; convattn compare .`: its own folder, which lies among the classes, is no class."""
    monkeypatch.chdir(write_images(tmp_path / "photos", count=12))
    first = compare(Path(), out=None)
    assert Path(first["folder"]).name.startswith("convattn-photos-")
    assert first["data"]["classes"] == ["blue", "green", "red"]
    again = compare(Path(), out=None)
    assert {**again, "folder": ""} == {**first, "folder": ""}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100_000}, r"36 images of 100000 pixels and 4 runs need 1\.4 TB of disk, and .* are free in"),
        ({"seeds": 10**9}, r"36 images .* and 2,000,000,000 runs need .* of disk, and .*lower --seeds\."),
        ({"seeds": 10**30, "until": "decided", "max_seeds": 10**30}, "of disk, and"),
        ({"epochs": 10**9}, r"4 runs of 1,000,000,000 epochs take about [\d,]+ hours on this machine: lower --seeds"),
        ({"epochs": 10**400}, r"4 runs of more than 1e\+15 epochs take about [\d,]+ hours"),
        ({"folds": 10**9}, r"4,000,000,000 runs need .* of disk, .*lower --folds"),
    ],
)
def test_what_no_machine_has_is_refused_with_the_figure(
    tmp_path: Path, compare: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    begun = time.monotonic()
    with pytest.raises((InvalidOption, ValueError), match=message):
        compare(**options)
    assert time.monotonic() - begun < 20
    assert not (tmp_path / "out").exists()


def test_memory_that_no_machine_has(compare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "total_memory", lambda: 10**6)
    with pytest.raises(InvalidOption, match=r"a training step of 8 images of 16 pixels needs about 7\d\d MB of memory"):
        compare()


def test_a_batch_is_no_larger_than_the_data(compare: Callable[..., Any]) -> None:
    assert compare(batch_size=10**12, epochs=1)["baseline"]["scores"]


def test_needs_are_said_before_the_start(compare: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    compare(quiet=False)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Needs ") and " are free, and roughly 2 min with 1 run at a time." in first


def test_a_full_disk_keeps_what_is_done(
    tmp_path: Path, compare: Callable[..., Any], halves: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write

    def full(path: Path, *rest: Any, **more: Any) -> None:
        if "se-seed1" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest, **more)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(
        RunFailed, match=r"^No room left in .*out \(.* free\): what is done is kept\. Make room, and the"
    ):
        compare()
    assert (tmp_path / "out" / "runs" / "baseline-seed1" / "result.json").exists()
    monkeypatch.setattr(files, "write", write)
    compare()
    assert essence(tmp_path / "out") == essence(halves["done"])


def test_no_room_for_the_images(tmp_path: Path, compare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, size: int) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(data_images.files, "reserve", full)
    with pytest.raises(RunFailed, match=r"^No room left in .*out"):
        compare()
    assert not (tmp_path / "out").exists()


def test_names_that_are_too_long(tmp_path: Path, compare: Callable[..., Any]) -> None:
    with pytest.raises(ComparisonError, match="cannot be written: the name is too long for the file system"):
        compare(out=tmp_path / ("x" * 300))
    assert contents(tmp_path) == {}


def test_variants_with_long_names(world: Path, compare: Callable[..., Any]) -> None:
    deep = world / "/".join(["a" * 60] * 4)
    deep.mkdir(parents=True, exist_ok=True)
    (deep / "mine.py").write_text("from convattn.nn import SqueezeExcite as Mine\n")
    results = compare(variants=f"{deep / 'mine.py'}:Mine", seeds=1, epochs=1)
    assert results["variants"][0]["name"] == f"{deep / 'mine.py'}:Mine"


# threads and jobs


def test_threads_are_those_of_the_first_start(
    tmp_path: Path, compare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "default_threads", lambda options: 2)
    results = compare(threads=None)
    monkeypatch.undo()
    assert folders.read_plan(tmp_path / "out")["threads"] == 2 == results["setting"]["threads"]
    assert compare(threads=2)["setting"]["threads"] == 2
    with pytest.raises(ComparisonError, match=r"was begun with 2 threads for each run, .*give --threads 2"):
        compare(threads=1)


def test_jobs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from convattn.compare.options import parse

    monkeypatch.setattr(limits.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(limits, "free_memory", lambda: 5_000)
    options = parse("digits", variants="se", seeds=3, threads=2)
    assert limits.default_jobs(options, memory=1_000) == 4
    assert limits.default_jobs(options, memory=2_000) == 2
    assert limits.default_jobs(options, memory=9_000) == 1
    one = parse("digits", variants="se", seeds=1, threads=2)
    assert limits.default_jobs(one, memory=1_000) == 2
    assert [limits.default_threads(parse("digits", variants="se", seeds=seeds)) for seeds in (1, 2, 9)] == [4, 2, 1]


# diverging


def test_a_run_that_diverges_ends_no_comparison(
    tmp_path: Path, compare: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    results = compare(variants="cbam,se", gate_learning_rate=1e30, start="identity", quiet=False)
    plain, *variants = (results["baseline"], *results["variants"])
    assert plain["diverged"] == []
    for one in variants:
        assert [run["seed"] for run in one["diverged"]] == [0, 1]
        assert f"2 of 2 runs of {one['name']} diverged and are scored as such, " in results["headline"]
    assert "lower --gate-learning-rate (it was 1e+30)" in results["headline"]
    assert results["headline"] in capsys.readouterr().out
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "2 of 2 runs of cbam diverged and are scored as such" in report


def test_a_baseline_that_diverges_names_its_own_rate(compare: Callable[..., Any]) -> None:
    results = compare(learning_rate=1e30)
    assert "runs of baseline diverged" in results["headline"]
    assert "lower --learning-rate (it was 1e+30)" in results["headline"]


# options that cannot apply


@pytest.mark.parametrize(
    "options",
    [
        *({"epochs": 99}, {"variants": "cbam"}, {"backbone": "resnet20"}, {"seeds": 3}, {"threads": 1}, {"folds": 2}),
        *({"out": "elsewhere"}, {"device": "cpu"}, {"weights": "none"}, {"audit_selection": True}, {"tune": "lr"}),
        *({"controls": "noise"}, {"batch_size": 128}, {"flip": False}, {"val_as_test": True}, {"until": "decided"}),
    ],
)
def test_add_seeds_goes_on_as_it_was_begun(halves: dict[str, Path], options: dict[str, Any]) -> None:
    before = contents(halves["done"])
    (name,) = options
    with pytest.raises(InvalidOption, match=f"compare: {name} cannot be given with add_seeds: .*goes on as it was"):
        convattn.compare.run(halves["done"], add_seeds=1, **options)
    assert contents(halves["done"]) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust": "a.py:f"}, "trust is for code that the folder of add_seeds names"),
        ({"val_as_test": True, "folds": 3}, "with folds every image is tested, val too"),
        ({"train": lambda *parts: None, "epochs": 3}, "epochs is for our training, which train takes the place of"),
        ({"train": lambda *parts: None, "epochs": None, "flip": False}, "flip is for our training"),
        ({"threads": 10**6}, "threads must be a number from 1 to"),
        ({"learning_rate": "fast"}, "learning_rate must be above 0 and finite, got 'fast'"),
        ({"batch_size": [1]}, "batch_size must be a whole number"),
        ({"flip": "yes"}, "flip must be one of"),
    ],
)
def test_options_that_cannot_apply(compare: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        compare(**options)


def test_val_as_test(tmp_path: Path, compare: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    data = write_parts(tmp_path / "parts", train=10, val=6)
    plain = compare(data, out=tmp_path / "plain")["data"]
    assert (plain["train"], plain["validation"], plain["test"]) == (24, 18, 6)
    assert "--val-as-test" in capsys.readouterr().err
    better = compare(data, val_as_test=True)["data"]
    assert (better["train"], better["validation"], better["test"]) == (24, 6, 18)


# status, and times that cannot be told


def test_status(halves: dict[str, Path], tmp_path: Path) -> None:
    done = status(halves["done"])
    results = files.read_json(halves["done"] / "results.json") or {}
    assert done == [
        "Done.",
        "4 runs are done: baseline 2, se 2.",
        "Looks so far: with 2 seeds.",
        results["headline"],
        f"The report: {halves['done'] / 'report.html'}",
    ]
    first, second, third = status(halves["midway"])
    assert first == "No process works here: the command that began it goes on where it was."
    assert second == "1 run is done: baseline 1, se 0."
    assert third.split()[:5] == ["se-seed0", "epoch", "2", "of", "3"] and third.endswith(" s ago")
    with pytest.raises(ComparisonError, match="is no folder"):
        status(tmp_path / "nowhere")
    with pytest.raises(ComparisonError, match="holds no comparison"):
        status(tmp_path)


def test_status_of_a_folder_in_which_somebody_works(at_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(at_work)])
    out = capsys.readouterr().out.splitlines()
    assert (ended.value.code or 0) == 0
    assert out[0].startswith(f"At work: process {os.getpid()} on ") and " since 20" in out[0]
    assert out[1] == "The images are being decoded; no run has begun."


def spread(low: float, middle: float, high: float) -> dict[str, float]:
    return {"low": low, "median": middle, "high": high}


def test_times_of_a_busy_machine_are_unclear(
    compare: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interleaved = timing.cost.interleaved
    ratios = iter([(0.4, 0.54, 1.9), (1.0, 1.05, 1.1), (0.7, 0.8, 0.85)])

    def busy(steps: Any, **options: Any) -> Any:
        times, found = interleaved(steps, **options)
        low, middle, high = next(ratios, (1.0, 1.0, 1.0))
        return times, {**found, "se": timing.cost.Spread(middle, low, high)}

    monkeypatch.setattr(timing.cost, "interleaved", busy)
    results = compare(quiet=False)
    latency = results["variants"][0]["latency"]
    # quartiles far apart; and a network that is faster with something added
    assert latency["unclear"] == ["train_step", "inference_batch"]
    assert "the training step unclear (0.40 to 1.90 times) and 1.05 times the inference" in latency["sentence"]
    note = results["baseline"]["latency"]["note"]
    assert note.startswith("The times of se cannot be told") and "`convattn report FOLDER --measure`" in note
    assert note in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"`convattn report {tmp_path / 'out'} --measure`" in capsys.readouterr().out

    before = essence(tmp_path / "out")
    path = measure_again(tmp_path / "out", trust=results["command"].split("--backbone ")[1].split()[0], quiet=True)
    assert path == tmp_path / "out" / "report.html"
    assert essence(tmp_path / "out") == before
    measured = files.read_json(tmp_path / "out" / "results.json") or {}
    assert measured["variants"][0]["latency"]["unclear"] == [] and measured["baseline"]["latency"]["note"] is None
    assert "training step unclear" not in path.read_text(encoding="utf-8")


def test_measuring_needs_no_images(
    halves: dict[str, Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(halves["done"], tmp_path / "copied"))
    before = essence(out)
    (world / "data").rename(world / "moved")
    try:
        measure_again(out, trust=f"{world / 'network.py'}:network", quiet=True)
    finally:
        (world / "moved").rename(world / "data")
    assert essence(out) == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ComparisonError, match="holds no comparison"):
        measure_again(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["images.json", "leaks.json", "runs/se-seed1/result.json", "runs/se-seed1/predictions.npz", "results.json"]
)
def test_measuring_in_a_damaged_folder(halves: dict[str, Path], world: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(halves["done"], tmp_path / "copied"))
    (out / name).write_bytes(b"damage")
    before = contents(out)
    with pytest.raises(ComparisonError, match=r"[Gg]ive the command that began"):
        measure_again(out, trust=f"{world / 'network.py'}:network", quiet=True)
    assert contents(out) == before
    with pytest.raises(ComparisonError, match="holds no comparison"):
        measure_again(world / "network.py")


def test_more_seeds_than_any_disk_holds(
    halves: dict[str, Path], world: Path, tmp_path: Path, compare: Callable[..., Any]
) -> None:
    out = Path(shutil.copytree(halves["done"], tmp_path / "out"))
    trust = f"{world / 'network.py'}:network"
    with pytest.raises(InvalidOption, match=r"1,999,999,996 more runs need .* of disk"):
        compare(seeds=10**9)
    with pytest.raises(InvalidOption, match=r"more runs need .* of disk, and .* are free in .*out: add fewer seeds"):
        convattn.compare.run(out, add_seeds=10**9, quiet=True, trust=trust)


def test_status_of_a_folder_whose_further_seeds_were_interrupted(halves: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(halves["done"], tmp_path / "out"))
    (out / "runs" / "se-seed1" / "result.json").unlink()
    assert status(out)[0].startswith("No process works here")
    shutil.rmtree(out / "runs")
    assert status(out)[0].startswith("No process works here")


def test_status_where_nothing_may_be_written(halves: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    package = SimpleNamespace(FileLock=refused, Timeout=TimeoutError)
    monkeypatch.setattr(folders.checks, "extra", lambda *args: package)
    assert status(halves["done"])[0] == "Done."


def test_a_report_that_cannot_be_written(
    halves: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(reporting.files, "write", refused)
    with pytest.raises(ComparisonError, match="cannot be written: its file system is read-only"):
        reporting.redraw(halves["done"])


@pytest.mark.parametrize("key", ["changes", "baseline", "data", "setting", "looks", "variants", "versions"])
def test_results_with_null_in_the_place_of_an_object(halves: dict[str, Path], tmp_path: Path, key: str) -> None:
    results = files.read_json(halves["done"] / "results.json") or {}
    (tmp_path / "results.json").write_text(json.dumps({**results, key: None}))
    with pytest.raises(ComparisonError, match=r"the results are of another form than docs/results\.md describes"):
        reporting.redraw(tmp_path)


def test_rates_beyond_single_precision(compare: Callable[..., Any]) -> None:
    with pytest.raises(InvalidOption, match=r"learning_rate must be at most 1e\+37, got 1e\+39"):
        compare(learning_rate=1e39)


def test_a_network_that_diverges_at_every_rate_ends_no_comparison(
    compare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Run._learn

    def diverging(self: Run, x: Any, *rest: Any) -> None:
        learn(self, x * float("nan") if self.spec.variant == "cbam" else x, *rest)

    monkeypatch.setattr(Run, "_learn", diverging)
    results = compare(variants="se,cbam", tune="lr", epochs=1)
    assert [len(one["diverged"]) for one in (results["baseline"], *results["variants"])] == [0, 0, 2]
    assert "cbam diverged at every learning rate" in " ".join(results["tuning"]["warnings"])


# code of the user


def test_code_that_ends_the_program(world: Path, tmp_path: Path, compare: Callable[..., Any]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import sys\nfrom torch import nn\n"
        "def ends(classes):\n    sys.exit(3)\n"
        "class Ending(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.linear = nn.Linear(3, 3)\n"
        "    def forward(self, x):\n"
        "        if len(x) > 2:\n            sys.exit('enough')\n"
        "        return self.linear(x.mean(dim=(2, 3)))\n"
        "def forward_ends(classes):\n    return Ending()\n"
    )
    with pytest.raises(
        InvalidOption, match=r"mine\.py:ends raised EndedProgram: it ended the program, as by sys\.exit"
    ):
        compare(backbone=f"{file}:ends")
    with pytest.raises(RunFailed, match=r"code of a network ended the program, as by sys\.exit\('enough'\)"):
        compare(backbone=f"{file}:forward_ends")


def test_code_that_prints_or_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convattn import networks, own_code

    monkeypatch.setattr(own_code, "LONG_SECONDS", 0.2)
    file = tmp_path / "mine.py"
    file.write_text(
        "import time\nfrom torch import nn\nprint('loading')\n"
        "import sys\n"
        "def slow(classes=3):\n    print('building\\nslowly', end='')\n    print()\n    time.sleep(1)\n"
        "    sys.stdout.buffer.write(b'\\xff\\n')\n    sys.stdout.reconfigure(line_buffering=True)\n"
        "    return nn.Linear(3, classes)\n"
    )
    networks.create(f"{file}:slow")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{file}: loading",
        f"{file}:slow: building",
        f"{file}:slow: slowly",
        f"convattn: {file}:slow has been running for 0 seconds and has not returned yet.",
        f"{file}:slow: \\xff",
    ]
