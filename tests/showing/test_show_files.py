"""What `show` writes, and that it writes nothing where it cannot do what it was asked."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trusting import show

from convattn.errors import (
    AttachError,
    ConvattnError,
    DataError,
    InvalidOption,
    MissingExtra,
    UnknownName,
    WeightsError,
)


def test_files_of_gates_maps_and_head(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert show(save("cbam+dual"), images, str(out), layer="block") == out
    per_image = [f"{kind}-{name}.png" for kind in ("spatial", "layer-block") for name in ("one", "one-2", "two")]
    assert {path.name for path in out.iterdir()} == {"gates.npz", "channel.png", "pool.png", *per_image}
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 100


def test_only_figures_of_what_there_is(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    expected = {
        "se": {"channel.png"},
        "spatial": {"spatial-one.png"},
        "dual": {"pool.png"},
        "baseline": {"layer-stem-one.png"},
    }
    for variant, figures in expected.items():
        out = show(save(variant), images[:1], tmp_path / variant, layer="stem" if variant == "baseline" else None)
        assert {path.name for path in out.iterdir()} == {"gates.npz", *figures}


def test_two_images_of_one_name_have_figures_of_their_own(
    save: Callable[..., Path], images: list[Path], tmp_path: Path
) -> None:
    out = show(save("spatial"), images, tmp_path / "out")
    assert (out / "spatial-one.png").read_bytes() != (out / "spatial-one-2.png").read_bytes()


def test_other_files_in_the_folder_stay(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "channel.png").write_text("old")
    show(save("se"), images, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with Image.open(tmp_path / "channel.png") as image:
        assert image.format == "PNG"


def truncated(folder: Path) -> Path:
    path = folder / "truncated.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    return path


def text(folder: Path) -> Path:
    path = folder / "text.jpg"
    path.write_text("no image")
    return path


def missing(folder: Path) -> Path:
    return folder / "missing.jpg"


def a_folder(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize("bad", [truncated, text, missing, a_folder])
def test_a_bad_image_is_named_and_nothing_written(
    bad: Callable[[Path], Path], save: Callable[..., Path], images: list[Path], tmp_path: Path
) -> None:
    path = bad(tmp_path)
    with pytest.raises(DataError) as error:
        show(save("se"), [*images, path], tmp_path / "out")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variant", "layer", "error", "says"),
    [
        ("se", "block.conv3", UnknownName, "Did you mean 'block.conv2'"),
        ("se", "", UnknownName, "No layer"),
        ("se", "fc", AttachError, r"shape \(3, 3\)"),
        ("se", "block.act", AttachError, "called 2 times"),
        ("se", "unused", AttachError, "not called"),
        ("baseline", None, InvalidOption, "no gates.*stem, block"),
    ],
)
def test_a_bad_request_is_explained_and_nothing_written(
    variant: str,
    layer: str | None,
    error: type[ConvattnError],
    says: str,
    save: Callable[..., Path],
    images: list[Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says) as raised:
        show(save(variant), images, tmp_path / "out", layer=layer)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_no_images_and_no_checkpoint(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one"):
        show(save("se"), [], tmp_path / "out")
    with pytest.raises(WeightsError, match=r"none\.safetensors"):
        show(tmp_path / "none.safetensors", images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(InvalidOption, match="is no folder"):
            show(save("se"), images, out)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("package", ["matplotlib", "PIL.Image"])
def test_a_missing_package_is_one_line(
    package: str, save: Callable[..., Path], images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match="pip install"):
        show(save("se"), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_import_loads_no_plotting() -> None:
    code = "import sys, convattn.showing; print([name for name in ('matplotlib', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
