"""Which files are found in which class and part, in folders and in archives."""

import hashlib
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from convattn.data import LeftOut, Listing, decode, open_source
from convattn.errors import DataError
from small_runs import CLASSES, contents, decoded, write_images, write_parts

NO_ENDING = "no image ending that Pillow reads"


def listing(data: Path) -> Listing:
    return open_source(data).listing(data.parent / "unpacked")


def pack(folder: Path, archive: Path) -> Path:
    """An archive of a folder, with the folder itself in it, as people pack them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for file in files:
                zipped.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(archive, "w:" + archive.suffix[1:]) as tar:
            tar.add(folder, folder.name)
    return archive


def test_class_folders(tmp_path: Path) -> None:
    found = listing(write_images(tmp_path / "data", count=2))
    assert found.classes == CLASSES
    assert [(one.path, one.label, one.part) for one in found.found] == [
        ("blue/000.png", 0, ""),
        ("blue/001.png", 0, ""),
        ("green/000.png", 1, ""),
        ("green/001.png", 1, ""),
        ("red/000.png", 2, ""),
        ("red/001.png", 2, ""),
    ]


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_parts(tmp_path: Path, validation: str) -> None:
    found = listing(write_parts(tmp_path / "data", train=3, test=2, **{validation: 1}))
    assert found.classes == CLASSES
    assert {(one.path.split("/")[0], one.part) for one in found.found} == {
        ("train", "train"),
        (validation, "validation"),
        ("test", "test"),
    }
    assert [sum(one.part == part for one in found.found) for part in ("train", "validation", "test")] == [9, 3, 6]
    assert all(one.path.split("/")[1] == CLASSES[one.label] for one in found.found)


def test_train_alone(tmp_path: Path) -> None:
    found = listing(write_parts(tmp_path / "data", train=3))
    assert found.classes == CLASSES
    assert {one.part for one in found.found} == {"train"}


@pytest.mark.parametrize("parts", [{}, {"train": 3, "test": 1}])
def test_single_folders_around(tmp_path: Path, parts: dict[str, int]) -> None:
    inner = tmp_path / "outer" / "photos" / "version 2"
    if parts:
        write_parts(inner, **parts)
    else:
        write_images(inner, count=3)
    assert listing(tmp_path / "outer").found == listing(inner).found


def test_images_below_subfolders_of_a_class(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=1)
    (data / "red" / "b" / "c").mkdir(parents=True)
    shutil.copy(data / "red" / "000.png", data / "red" / "b" / "c" / "x.PNG")
    assert [one.path for one in listing(data).found if one.label == 2] == ["red/000.png", "red/b/c/x.PNG"]


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=3, test=1)
    before, fingerprint = listing(data), open_source(data).fingerprint()
    for name in (".DS_Store", "train/red/.DS_Store", "train/red/._000.png", "test/red/Thumbs.db", "train/desktop.ini"):
        (data / name).write_bytes(b"clutter")
    (data / "__MACOSX" / "red").mkdir(parents=True)
    (data / "train" / ".cache").mkdir()
    assert listing(data) == before
    assert open_source(data).fingerprint() == fingerprint


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "__MACOSX"])
def test_files_below_hidden_folders_are_ignored(tmp_path: Path, folder: str) -> None:
    data = write_images(tmp_path / "data", count=2)
    before, fingerprint = listing(data), open_source(data).fingerprint()
    (data / "red" / folder).mkdir()
    shutil.copy(data / "red" / "000.png", data / "red" / folder / "000-checkpoint.png")
    (data / "red" / folder / "notes.txt").write_text("not mine")
    assert listing(data) == before
    assert open_source(data).fingerprint() == fingerprint


@pytest.mark.parametrize("suffix", [".zip", ".tar.xz", ".tar.gz"])
@pytest.mark.parametrize("parts", [{}, {"train": 4, "test": 2}])
def test_archives_equal_their_folder(tmp_path: Path, suffix: str, parts: dict[str, int]) -> None:
    data = write_parts(tmp_path / "data", **parts) if parts else write_images(tmp_path / "data", count=4)
    (data / next(iter(data.iterdir())).name / ".DS_Store").write_bytes(b"clutter")
    archive = pack(data, tmp_path / f"packed{suffix}")
    assert open_source(archive).name == "packed"
    plain, packed = decoded(data, tmp_path / "a"), decoded(archive, tmp_path / "b")
    assert np.array_equal(plain.pixels, packed.pixels)
    assert np.array_equal(plain.labels, packed.labels)
    assert (plain.paths, plain.parts, plain.classes, plain.size) == (
        packed.paths,
        packed.parts,
        packed.classes,
        packed.size,
    )


def test_broken_images_in_an_archive_are_named_by_their_path_in_it(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=3)
    (data / "red" / "noise.jpg").write_text("no image")
    images = decoded(pack(data, tmp_path / "packed.zip"), tmp_path / "out")
    assert images.left_out == (LeftOut("red/noise.jpg", "cannot identify image file"),)


def test_digits(tmp_path: Path) -> None:
    source = open_source("digits")
    found = source.listing(tmp_path / "unpacked")
    images = decode(found, tmp_path, image_size=None, wanted_size=32)
    original = load_digits()
    assert source.name == "digits"
    assert images.classes == tuple("0123456789")
    assert images.size == 8
    assert images.pixels.shape == (1797, 8, 8, 3)
    assert np.array_equal(images.labels, original.target)
    assert np.array_equal(images.pixels, np.rint(original.images * 255 / 16)[..., None].repeat(3, axis=3))
    assert len(set(images.paths)) == 1797
    assert all(path.startswith(f"{label}/") for path, label in zip(images.paths, images.labels, strict=True))


def test_a_folder_called_digits_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "digits", count=1)
    monkeypatch.chdir(tmp_path)
    assert open_source("digits").listing(tmp_path / "unpacked").classes == CLASSES


@pytest.mark.parametrize("place", ["red", "train/red"])
def test_a_text_file_among_images_is_left_out(tmp_path: Path, place: str) -> None:
    data = tmp_path / "data"
    if place == "red":
        write_images(data, count=2)
    else:
        write_parts(data, train=2, test=2)
    before = listing(data)
    (data / place / "notes.txt").write_text("remember")
    assert listing(data) == replace(before, left_out=(LeftOut(f"{place}/notes.txt", NO_ENDING),))


def test_a_text_file_above_the_class_folders_is_no_matter(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=2)
    before = listing(data)
    (data / "README.md").write_text("about")
    assert listing(data) == before


def test_a_text_file_in_an_archive_is_left_out_by_its_path_in_it(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=2)
    (data / "red" / "labels.csv").write_text("a,b")
    listed = listing(pack(data, tmp_path / "packed.tar.xz"))
    assert listed.left_out == (LeftOut("red/labels.csv", NO_ENDING),)
    assert len(listed.found) == 6


def test_a_class_that_training_lacks(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2, test=2)
    (data / "test" / "red").rename(data / "test" / "Red")
    with pytest.raises(DataError, match=r"test and .*train differ in the class folders Red, red"):
        listing(data)


def test_a_class_that_only_training_has(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2, test=2)
    shutil.rmtree(data / "test" / "red")
    found = listing(data)
    assert found.classes == CLASSES
    assert {one.label for one in found.found if one.part == "test"} == {0, 1}


def test_a_folder_beside_the_parts(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=2, test=2)
    (data / "unlabelled").mkdir()
    with pytest.raises(DataError, match="has the folder 'unlabelled' beside test, train"):
        listing(data)


def test_parts_without_train(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has test, val but no train folder"):
        listing(write_parts(tmp_path / "data", val=1, test=1))


def test_two_folders_for_one_part(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two folders for one part: train, val, valid"):
        listing(write_parts(tmp_path / "data", train=1, val=1, valid=1))


def test_parts_in_capitals_are_not_taken_for_classes(tmp_path: Path) -> None:
    listed = listing(write_parts(tmp_path / "data", Train=3, Test=2))
    assert listed.classes == CLASSES
    assert {image.part for image in listed.found} == {"train", "test"}


def test_a_part_in_two_spellings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two folders for one part: Train, train"):
        listing(write_parts(tmp_path / "data", Train=1, train=1))


def test_too_few_classes(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=1)
    shutil.rmtree(data / "red")
    shutil.rmtree(data / "blue")
    with pytest.raises(DataError, match="expected at least 2: one folder for each class"):
        listing(data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has 0 class folders, expected at least 2"):
        listing(tmp_path / "empty")


def test_no_such_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No data at .*nowhere: give a folder of class folders, an archive of one, a"):
        open_source(tmp_path / "nowhere")


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "photos.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match=r"photos\.rar is a file, expected a folder of class folders or an archive"):
        open_source(tmp_path / "photos.rar")


@pytest.mark.parametrize("suffix", [".zip", ".tar.xz", ".tar.gz"])
@pytest.mark.parametrize("harm", ["text", "cut", "flipped"])
def test_damaged_archives(tmp_path: Path, suffix: str, harm: str) -> None:
    data = write_images(tmp_path / "data", count=1)
    # compressible, so that a flipped byte breaks the decompression
    (data / "red" / "large.bmp").write_bytes(b"".join(b"%d," % number for number in range(50_000)))
    archive = pack(data, tmp_path / f"packed{suffix}")
    content = archive.read_bytes()
    middle = len(content) // 2
    archive.write_bytes(
        {
            "text": b"this is no archive",
            "cut": content[:middle],
            "flipped": content[:middle] + bytes(255 - byte for byte in content[middle:-200]) + content[-200:],
        }[harm]
    )
    with pytest.raises(DataError, match=rf"packed{suffix} cannot be unpacked"):
        listing(archive)


def test_an_archive_with_a_password(tmp_path: Path) -> None:
    archive = pack(write_images(tmp_path / "data", count=1), tmp_path / "packed.zip")
    content = bytearray(archive.read_bytes())
    # the lowest bit of the flags of every entry, in its local header and in the directory
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(mark)
        while place >= 0:
            content[place + offset] |= 1
            place = content.find(mark, place + 1)
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"packed\.zip cannot be unpacked: .*(encrypted|password)"):
        listing(archive)


def test_an_archive_does_not_write_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    archive = tmp_path / "in" / "deep" / "evil.tar"
    (tmp_path / "payload.png").write_bytes(b"payload")
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "payload.png", "../../escaped.png")
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"evil\.tar cannot be unpacked"):
        open_source(archive).listing(tmp_path / "in" / "deep" / "unpacked")
    assert {**before, "in/deep/unpacked": None} == contents(tmp_path)


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=2)
    first = open_source(data).fingerprint()
    assert open_source(data).fingerprint() == first
    shutil.copytree(data, tmp_path / "copy")
    assert open_source(tmp_path / "copy").fingerprint() == first

    # still the first of its folder
    (data / "red" / "000.png").rename(data / "red" / "000a.png")
    renamed = open_source(data).fingerprint()
    (data / "red" / "000a.png").rename(data / "red" / "000.png")
    assert open_source(data).fingerprint() == first

    content = bytearray((data / "red" / "000.png").read_bytes())
    content[-1] ^= 1
    (data / "red" / "000.png").write_bytes(content)
    changed = open_source(data).fingerprint()
    shutil.copy(data / "red" / "001.png", data / "red" / "003.png")
    added = open_source(data).fingerprint()
    assert len({first, renamed, changed, added}) == 4


def test_the_fingerprint_is_the_hash_of_the_files_that_are_used(tmp_path: Path) -> None:
    data = write_images(tmp_path / "outer" / "data", count=2)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(data.rglob("*.png")):
        digest.update(file.relative_to(tmp_path / "outer").as_posix().encode() + b"\0" + file.read_bytes())
    (data / "red" / "notes.txt").write_text("not used")
    (data / "loose.png").write_bytes(b"not used")
    source = open_source(tmp_path / "outer")
    assert source.fingerprint() == digest.hexdigest()
    assert source.fingerprint(source.listing(tmp_path / "unpacked")) == digest.hexdigest()


def test_a_file_that_cannot_be_read_any_more(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=2)
    listed = listing(data)
    (data / "red" / "001.png").unlink()
    with pytest.raises(DataError, match=r"data/red/001\.png cannot be read \(.*No such file"):
        open_source(data).fingerprint(listed)


def test_the_fingerprint_of_an_archive(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=2)
    archive = pack(data, tmp_path / "packed.zip")
    first = open_source(archive).fingerprint()
    assert open_source(archive).fingerprint() == first
    shutil.copy(data / "red" / "001.png", data / "red" / "002.png")
    pack(data, archive)
    assert open_source(archive).fingerprint() != first


def test_linked_folders(tmp_path: Path) -> None:
    plain = write_parts(tmp_path / "plain", train=4, test=3)
    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    for name in CLASSES:
        (linked / "train" / name).symlink_to(plain / "train" / name, target_is_directory=True)
    (linked / "test").symlink_to(plain / "test", target_is_directory=True)
    assert listing(linked).found == listing(plain).found
    assert open_source(linked).fingerprint() == open_source(plain).fingerprint()
    # other images behind a link are other data
    (linked / "train" / CLASSES[0]).unlink()
    (linked / "train" / CLASSES[0]).symlink_to(plain / "test" / CLASSES[0], target_is_directory=True)
    assert open_source(linked).fingerprint() != open_source(plain).fingerprint()


def test_a_folder_linked_into_itself(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=4, test=3)
    before = open_source(data).fingerprint()
    (data / "train" / CLASSES[0] / "again").symlink_to(data / "train" / CLASSES[0], target_is_directory=True)
    assert open_source(data).fingerprint() == before
    assert len(listing(data).found) == 3 * (4 + 3)


def test_an_archive_with_a_name_in_capitals(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=4, test=3)
    shutil.make_archive(str(tmp_path / "photos"), "zip", data)
    (tmp_path / "photos.zip").rename(tmp_path / "PHOTOS.ZIP")
    source = open_source(tmp_path / "PHOTOS.ZIP")
    assert source.name == "PHOTOS"
    assert source.listing(tmp_path / "unpacked").found == listing(data).found
