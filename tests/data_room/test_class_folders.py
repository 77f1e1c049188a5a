"""Folders as they come: which files are left out and why, what the user is told, and what is refused."""

import os
import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

from convattn.data import Listing, open_source
from convattn.data.class_folders import scan
from convattn.data.listing import LeftOut, image_formats, image_suffixes, is_comparison
from convattn.errors import DataError
from small_runs import CLASSES, write_images, write_parts

NO_ENDING = "no image ending that Pillow reads"
BESIDE = "an image beside the class folders"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", count=2)


def image(data: Path) -> Path:
    return next(data.rglob("*.png"))


def write_flat(folder: Path, data: Path, count: int) -> None:
    """Images without class folders."""
    source = image(data)
    folder.mkdir(parents=True)
    for index in range(count):
        shutil.copy(source, folder / f"{index:03d}.png")


def left_out(data: Path) -> dict[str, str]:
    return {file.path: file.reason for file in scan(data).left_out}


def listing(data: Path, **options: bool) -> Listing:
    return open_source(data).listing(data.parent / "unpacked", **options)


def counts(listed: Listing) -> dict[str, int]:
    parts = [file.part for file in listed.found]
    return {part: parts.count(part) for part in sorted(set(parts))}


@pytest.fixture
def fresh_suffixes() -> None:
    image_suffixes.cache_clear()
    yield
    image_suffixes.cache_clear()


def test_the_endings_of_images() -> None:
    read = {".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
    never = {".eps", ".ps", ".wmf", ".emf", ".bufr", ".grib", ".h5", ".hdf", ".mpg", ".mpeg", ".pdf", ".txt", ""}
    assert read <= image_suffixes()
    assert not never & image_suffixes()


def test_heif_with_and_without_its_package(data: Path, fresh_suffixes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (data / "blue" / "phone.HEIC").write_bytes(b"")
    assert left_out(data) == {"blue/phone.HEIC": "needs the package pillow-heif"}

    heif = ModuleType("pillow_heif")
    heif.register_heif_opener = lambda: Image.register_extension("PNG", ".heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.registered_extensions()))
    image_suffixes.cache_clear()
    image_formats.cache_clear()
    assert left_out(data) == {}
    assert len(scan(data).found) == 7


def test_files_that_are_no_images_are_left_out_and_named(data: Path) -> None:
    before = scan(data).found
    (data / "red" / "deep").mkdir()
    for name in ("notes.txt", "deep/film.mpg", "noending"):
        (data / "red" / name).write_bytes(b"")
    assert left_out(data) == {f"red/{name}": NO_ENDING for name in ("deep/film.mpg", "noending", "notes.txt")}
    assert scan(data).found == before


def test_a_class_without_images(data: Path) -> None:
    for file in (data / "red").iterdir():
        file.rename(file.with_suffix(".raw"))
    with pytest.raises(DataError, match=r"The class 'red' has no image in .*/data/red: .*/red/000\.raw: no image end"):
        scan(data)


def test_a_class_of_train_without_images(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2, test=2)
    for file in (data / "train" / "green").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"The class 'green' has no image in .*/data/train/green: add images"):
        scan(data)


def test_images_beside_class_folders(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2, test=2)
    for place in ("a.png", "train/b.PNG", "test/c.jpg"):
        (data / place).write_bytes(b"")
    (data / "train" / "README.md").write_text("no matter")
    assert left_out(data) == {"a.png": BESIDE, "train/b.PNG": BESIDE, "test/c.jpg": BESIDE}
    assert counts(scan(data)) == {"test": 6, "train": 6}


def test_images_beside_a_folder_around_the_classes(data: Path) -> None:
    (data.parent / "cover.png").write_bytes(b"")
    assert scan(data.parent).found == scan(data).found
    assert left_out(data.parent) == {"../cover.png": BESIDE}


@pytest.mark.parametrize("place", ["test", "test/unknown", "test/test"])
def test_test_images_without_labels(tmp_path: Path, place: str) -> None:
    data = write_parts(tmp_path / "data", train=2)
    write_flat(data / place, data, 4)
    (data / "test" / "sample.csv").write_text("id")
    listed = scan(data)
    assert listed.notes == ("test/ has 4 images without class folders: they have no labels, and are not used.",)
    assert (counts(listed), listed.left_out) == ({"train": 6}, ())


def test_one_test_image_without_a_label_beside_validation(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2, val=1)
    write_flat(data / "test", data, 1)
    assert listing(data).notes == (
        "test/ has 1 image without class folders: it has no label, and is not used.",
        "There is no test part: test images are cut from train (20 % of each class), while the 3 images of val choose "
        "the epoch only; --val-as-test (from Python val_as_test=True) scores on val instead.",
    )


def test_a_single_test_folder_that_is_a_class_in_other_letters(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2)
    write_flat(data / "test" / "Red", data, 4)
    with pytest.raises(DataError, match="differ in the class folders Red, blue, green, red"):
        scan(data)


def test_an_empty_test_folder(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2)
    (data / "test").mkdir()
    with pytest.raises(DataError, match="data/test has no images"):
        scan(data)


def test_validation_as_test(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2, valid=1)
    listed = listing(data, val_as_test=True)
    assert (counts(listed), listed.notes) == ({"test": 3, "train": 6}, ())
    assert counts(listing(data)) == {"train": 6, "validation": 3}
    source = open_source(data)
    assert source.fingerprint(listed) == source.fingerprint()


def test_validation_as_test_of_a_table(data: Path) -> None:
    lines = [f"{name}/00{index}.png,{name},{part}" for name in CLASSES for index, part in enumerate(("train", "val"))]
    (data / "photos.csv").write_text("\n".join(["path,label,split", *lines]))
    assert counts(listing(data / "photos.csv", val_as_test=True)) == {"test": 3, "train": 3}
    assert listing(data / "photos.csv").notes[0].startswith("There is no test part: test images are cut from train")


@pytest.mark.parametrize(
    ("parts", "message"),
    [({"train": 2}, "have no val part"), ({"train": 2, "val": 1, "test": 1}, "have a test part already")],
)
def test_validation_cannot_be_test(tmp_path: Path, parts: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        listing(write_parts(tmp_path / "data", **parts), val_as_test=True)


def test_a_single_class_is_named(data: Path) -> None:
    shutil.rmtree(data / "red")
    shutil.rmtree(data / "blue")
    with pytest.raises(DataError, match=r"/data has only the class folder 'green' \(2 images\), expected at least 2"):
        scan(data)
    (data / "green" / "more").mkdir()
    shutil.copy(image(data), data / "green" / "more" / "x.png")
    with pytest.raises(DataError, match=r"/data has only the class folder 'green' \(3 images\), expected at least 2"):
        scan(data)


def test_a_single_class_of_train_is_named(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2)
    shutil.rmtree(data / "train" / "red")
    shutil.rmtree(data / "train" / "blue")
    with pytest.raises(DataError, match=r"/data/train has only the class folder 'green' \(2 images\), expected at"):
        scan(data)


@pytest.mark.parametrize("place", ["flat", "flat/train"])
def test_images_without_class_folders(data: Path, place: str) -> None:
    write_flat(data.parent / place, data, 3)
    with pytest.raises(DataError, match=rf"/{place} has 3 images directly in it and 0 class folders, expected at.*csv"):
        scan(data.parent / "flat")


def test_links_to_nothing(data: Path) -> None:
    before = scan(data).found
    (data / "red" / "gone.png").symlink_to(data / "nowhere.png")
    (data / "yellow").symlink_to(data / "nowhere")
    (data / "red" / "self.png").symlink_to(data / "red" / "self.png")
    assert left_out(data) == {
        "red/gone.png": "a link to nothing",
        "red/self.png": "cannot be read (Too many levels of symbolic links)",
        "yellow": "a link to nothing",
    }
    assert scan(data).found == before


def test_pipes_and_sockets_are_never_opened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scan(data).found
    os.mkfifo(data / "red" / "pipe.png")
    (data / "red" / "linked.png").symlink_to(data / "red" / "pipe.png")
    (data / "red" / "device.png").symlink_to("/dev/zero")
    # the path of a socket is limited to about 100 letters
    monkeypatch.chdir(data / "red")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    assert left_out(data) == {
        "red/device.png": "a device",
        "red/linked.png": "a pipe",
        "red/pipe.png": "a pipe",
        "red/socket.png": "a socket",
    }
    assert scan(data).found == before


def forbid(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """No permission for these, also for the user root."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in paths and access(path, mode))


def test_files_and_folders_without_permission(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(data / "red", data / "yellow")
    (data / "blue" / "deep").mkdir()
    forbid(monkeypatch, data / "red" / "000.png", data / "yellow", data / "blue" / "deep")
    why = "cannot be read (no permission)"
    assert left_out(data) == {"red/000.png": why, "yellow": why, "blue/deep": why}
    assert scan(data).classes == CLASSES


def test_a_folder_that_cannot_be_opened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(data / "red", data / "yellow")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path) == data / "yellow":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert left_out(data) == {"yellow": "cannot be read (no permission)"}


def test_data_that_cannot_be_opened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str | Path) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"/data cannot be read \(.*Permission denied\)"):
        scan(data)


def test_a_part_that_cannot_be_read_is_in_the_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_parts(tmp_path / "data", train=2, test=2)
    forbid(monkeypatch, data / "test")
    assert scan(data).notes == ("test is not used: cannot be read (no permission).",)
    monkeypatch.undo()
    forbid(monkeypatch, data / "train")
    with pytest.raises(DataError, match=r"data has test but no train folder\. Left out: .*/train: cannot be read"):
        scan(data)


def test_names_that_are_not_utf8(data: Path) -> None:
    before = scan(data).found
    folder = os.fsencode(data)
    with open(folder + b"/red/gr\xfcn.png", "wb"):  # noqa: PTH123
        pass
    os.mkdir(folder + b"/gr\xfcn")  # noqa: PTH102
    assert left_out(data) == {"gr\\udcfcn": "its name is not UTF-8", "red/gr\\udcfcn.png": "its name is not UTF-8"}
    assert scan(data).found == before


def test_control_characters_in_names_are_escaped(data: Path) -> None:
    (data / "red" / "a\n\x1b[31m.txt").write_bytes(b"")
    assert left_out(data) == {"red/a\\n\\x1b[31m.txt": NO_ENDING}


def test_a_single_folder_that_links_to_the_root(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    with pytest.raises(DataError, match="expected at least 2"):
        scan(tmp_path / "data")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["plan.json", "runs/"], True),
        (["plan.json", "images.json"], True),
        (["preparing"], True),
        (["convattn.lock"], True),
        (["plan.json"], False),
        (["runs/", "images.json"], False),
        (["preparing/"], False),
    ],
)
def test_what_a_comparison_is(tmp_path: Path, names: list[str], expected: bool) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert is_comparison(tmp_path) is expected


@pytest.mark.parametrize("place", ["", "red", "red/deep"])
@pytest.mark.parametrize("name", ["convattn-photos", "results"])
def test_comparisons_inside_of_the_data(data: Path, place: str, name: str) -> None:
    before = scan(data).found
    folder = data / place / name
    (folder / "runs").mkdir(parents=True)
    (folder / "plan.json").touch()
    shutil.copy(image(data), folder / "chart.png")
    path = (Path(place) / name).as_posix()
    assert left_out(data) == ({path: "a comparison of convattn"} if name == "results" else {})
    assert scan(data).found == before


def test_a_comparison_as_data(data: Path) -> None:
    (data / "plan.json").touch()
    (data / "runs").mkdir()
    with pytest.raises(DataError, match=r"/data is a comparison of convattn, expected data: one folder for each class"):
        scan(data)


def test_a_link_to_a_folder_above_takes_no_images_of_other_classes(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=3)
    whole = open_source(data).listing(tmp_path / "unpacked")
    (data / "red" / "loop").symlink_to(data)
    (data / "red" / "itself").symlink_to(data / "red")
    listing = open_source(data).listing(tmp_path / "unpacked")
    assert listing.found == whole.found
    reason = "a link to a folder that is read already"
    assert listing.left_out == (LeftOut("red/itself", reason), LeftOut("red/loop", reason))
