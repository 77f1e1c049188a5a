"""The classes and image files of a folder: what is used, what is left out and why."""

import os
import stat
from pathlib import Path
from typing import NamedTuple

from convattn import checks
from convattn.data.listing import PARTS, PREFIX, Found, LeftOut, Listing, is_comparison, is_image, why_no_image
from convattn.errors import DataError

# left by file managers, never meant
CLUTTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}
LAYOUT = "one folder for each class, with its images in it, directly or below train/ and test/"
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class Content(NamedTuple):
    """The folders and regular files directly in a folder that can be used, sorted by name."""

    folders: list[Path]
    files: list[Path]


class Tree:
    """Folders below a root, each read once. Only folders are opened; what cannot be used is in `left_out`."""

    def __init__(self, root: Path, name: Path) -> None:
        self.root = root
        self.left_out: dict[Path, str] = {}
        self._name = name
        self._contents: dict[Path, Content] = {}

    def shown(self, path: Path) -> str:
        """A path as a message shows it."""
        return checks.printable(self._name / path.relative_to(self.root))

    def content(self, folder: Path) -> Content:
        """What is directly in a folder, without clutter, comparisons and what cannot be read.

        Raises:
            DataError: the folder itself cannot be read.
        """
        if folder not in self._contents:
            self._contents[folder] = self._read(folder)
        return self._contents[folder]

    def files(self, folder: Path) -> list[Path]:
        """All files below a folder, through links as well, sorted."""
        files: list[Path] = []
        # a folder that links to one above it would be entered for ever, and take the images of other classes with it
        entered = {os.path.realpath(path) for path in folder.parents}
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            entered.add(os.path.realpath(current))
            content = self.content(current)
            files += content.files
            again = [path for path in content.folders if os.path.realpath(path) in entered]
            self.left_out.update(dict.fromkeys(again, "a link to a folder that is read already"))
            waiting += [path for path in reversed(content.folders) if path not in again]
        return sorted(files)

    def images(self, folder: Path) -> list[Path]:
        """All images below a folder; other files are left out."""
        files = self.files(folder)
        self.left_out.update({file: why_no_image(file) for file in files if not is_image(file)})
        return [file for file in files if is_image(file)]

    def loose_images(self, folder: Path) -> list[Path]:
        """The images directly in a folder."""
        return [file for file in self.content(folder).files if is_image(file)]

    def leave_out_loose_images(self, folder: Path) -> None:
        """Leave out the images beside the folders of a folder."""
        self.left_out.update(dict.fromkeys(self.loose_images(folder), "an image beside the class folders"))

    def hint(self) -> str:
        """The ending of a message: what was left out, if anything."""
        first = [f"{self.shown(path)}: {reason}" for path, reason in sorted(self.left_out.items())[:3]]
        return f" Left out: {'; '.join(first)}{'; ...' if len(self.left_out) > 3 else ''}." if first else ""

    def _read(self, folder: Path) -> Content:
        content = Content([], [])
        try:
            with os.scandir(folder) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{self.shown(folder)} cannot be read ({checks.reason(error)}).") from error
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name in CLUTTER:
                continue
            reason = _why_unusable(entry)
            if reason:
                self.left_out[path] = reason
            elif not entry.is_dir():
                content.files.append(path)
            elif not is_comparison(path):
                content.folders.append(path)
            # the customary name: everybody knows what it is
            elif not entry.name.startswith(PREFIX):
                self.left_out[path] = "a comparison of convattn"
        return content


def scan(root: Path, name: Path | None = None) -> Listing:
    """The classes and image files below a folder; messages call the folder `name`.

    Raises:
        DataError: fewer than two classes, a class without an image, or a part with a class that training lacks.
    """
    tree = Tree(root, name or root)
    if is_comparison(root):
        raise DataError(f"{tree.shown(root)} is a comparison of convattn, expected data: {LAYOUT}.")
    top = _top(tree)
    folders = tree.content(top).folders
    parts = {folder.name.lower(): folder for folder in folders if folder.name.lower() in PARTS}
    if parts:
        _check_parts(tree, top, folders)
    parent = parts["train"] if parts else top
    classes = [folder.name for folder in tree.content(parent).folders]
    if len(classes) < 2:
        raise _too_few_classes(tree, parent)
    notes = [
        f"{path.name} is not used: {reason}."
        for path, reason in tree.left_out.items()
        if path.parent == top and path.name.lower() in PARTS
    ]
    tree.leave_out_loose_images(top)
    images: list[Found] = []
    for key, folder in (parts or {"": top}).items():
        count = 0 if folder == parent else _count_unlabelled(tree, folder, classes)
        if count:
            notes.append(_note_on_unlabelled(folder.relative_to(top).as_posix(), count))
        else:
            _check_classes(tree, folder, parent, classes)
            tree.leave_out_loose_images(folder)
            images += _images(tree, top, folder, classes, PARTS.get(key, ""))
    _check_every_class(tree, parent, classes, images)
    left_out = tuple(
        LeftOut(checks.printable(_relative(path, top)), why) for path, why in sorted(tree.left_out.items())
    )
    return Listing(tuple(classes), tuple(images), top, left_out=left_out, notes=tuple(notes))


def _top(tree: Tree) -> Path:
    """The folder of the classes or parts: the root, or below it where folders hold nothing but one other folder.

    Raises:
        DataError: all images are in one folder.
    """
    top, entered = tree.root, set[str]()
    while True:
        entered.add(os.path.realpath(top))
        folders = [path for path in tree.content(top).folders if os.path.realpath(path) not in entered]
        if len(folders) != 1 or folders[0].name.lower() in PARTS:
            return top
        inner = tree.content(folders[0])
        if not inner.folders or (len(inner.folders) == 1 and tree.loose_images(folders[0])):
            raise _too_few_classes(tree, top)
        tree.leave_out_loose_images(top)
        top = folders[0]


def _too_few_classes(tree: Tree, parent: Path) -> DataError:
    folders, loose = tree.content(parent).folders, tree.loose_images(parent)
    expected = f"expected at least 2: {LAYOUT}."
    if folders:
        inside = _counted(len(tree.images(folders[0])), "image")
        text = f"has only the class folder {checks.printable(folders[0].name)!r} ({inside}), {expected}"
    elif loose:
        text = f"has {_counted(len(loose), 'image')} directly in it and 0 class folders, {expected}"
    else:
        text = f"has 0 class folders, {expected}"
    table = " A table (.csv) with the columns path,label can name the class of each image instead." if loose else ""
    return DataError(f"{tree.shown(parent)} {text}{table}{tree.hint()}")


def _check_parts(tree: Tree, top: Path, folders: list[Path]) -> None:
    named = [folder.name for folder in folders if folder.name.lower() in PARTS]
    other = [folder.name for folder in folders if folder.name.lower() not in PARTS]
    name, listed = tree.shown(top), ", ".join(named)
    if other:
        raise DataError(
            f"{name} has the folder {checks.printable(other[0])!r} beside {listed}: is it a class, or another part?"
        )
    if "train" not in map(str.lower, named):
        raise DataError(f"{name} has {listed} but no train folder.{tree.hint()}")
    if len({PARTS[name.lower()] for name in named}) < len(named):
        raise DataError(f"{name} has two folders for one part: {listed}.")


def _count_unlabelled(tree: Tree, folder: Path, classes: list[str]) -> int:
    """How many images a part has that is without class folders, as Kaggle publishes test images; 0 if it has some."""
    folders = tree.content(folder).folders
    # a class in other letters is more likely misspelt
    class_names = {name.casefold() for name in classes}
    if len(folders) > 1 or any(inner.name.casefold() in class_names for inner in folders):
        return 0
    return sum(map(is_image, tree.files(folder)))


def _note_on_unlabelled(part: str, count: int) -> str:
    are = "it has no label, and is not used" if count == 1 else "they have no labels, and are not used"
    return f"{part}/ has {_counted(count, 'image')} without class folders: {are}."


def _check_classes(tree: Tree, folder: Path, train: Path, classes: list[str]) -> None:
    own = {inner.name for inner in tree.content(folder).folders}
    # a class that only training has can be learned; one that it lacks cannot, and is often the other one misspelt
    if own - set(classes):
        odd = sorted(own ^ set(classes))
        raise DataError(
            f"{tree.shown(folder)} and {tree.shown(train)} differ in the class folders "
            f"{', '.join(map(checks.printable, odd[:5]))}.{tree.hint()}"
        )


def _images(tree: Tree, top: Path, folder: Path, classes: list[str], part: str) -> list[Found]:
    present = {inner.name for inner in tree.content(folder).folders}
    images = [
        Found(file.relative_to(top).as_posix(), label, part)
        for label, name in enumerate(classes)
        if name in present
        for file in tree.images(folder / name)
    ]
    if not images and part in ("validation", "test"):
        what = "class folders but no images in them" if present else "no images"
        raise DataError(f"{tree.shown(folder)} has {what}.{tree.hint()}")
    return images


def _check_every_class(tree: Tree, parent: Path, classes: list[str], images: list[Found]) -> None:
    learned = {image.label for image in images if image.part in ("", "train")}
    for label, name in enumerate(classes):
        if label not in learned:
            folder = parent / name
            reasons = [f"{tree.shown(path)}: {why}" for path, why in tree.left_out.items() if folder in path.parents]
            left_out = f" Left out: {'; '.join(reasons[:3])}{'; ...' if len(reasons) > 3 else ''}." if reasons else ""
            raise DataError(
                f"The class {checks.printable(name)!r} has no image in {tree.shown(folder)}: add images, or remove the "
                f"folder.{left_out}"
            )


def _why_unusable(entry: "os.DirEntry[str]") -> str | None:
    """Why a file or folder cannot be used, found out without opening a file; None if it can."""
    try:
        os.fsencode(entry.name).decode("utf-8")
        if entry.is_dir():
            # refuses what `os.access` allows on some network drives
            with os.scandir(entry.path):
                return None if os.access(entry.path, os.R_OK | os.X_OK) else "cannot be read (no permission)"
        if entry.is_file():
            return None if os.access(entry.path, os.R_OK) else "cannot be read (no permission)"
        return KINDS.get(stat.S_IFMT(entry.stat().st_mode), "no regular file")
    except UnicodeError:
        return "its name is not UTF-8"
    except FileNotFoundError:
        return "a link to nothing" if entry.is_symlink() else "cannot be read (removed meanwhile)"
    except PermissionError:
        return "cannot be read (no permission)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _relative(path: Path, top: Path) -> str:
    # beside a folder around the classes, it is above them
    return Path(os.path.relpath(path, top)).as_posix()


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
