"""The folder of a comparison: whether it may be used, and how it comes to be."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from convattn.compare.options import NOT_HASHED, Options
from convattn.data import ARRAY, INDEX
from convattn.errors import ComparisonError
from convattn.train import write

PLAN = "plan.json"
# there from the first file to the plan: a folder that has it was left in between and is begun anew
PREPARING = "preparing"
UNPACKED = "unpacked"


def check(folder: Path, options: Options, fingerprints: dict[str, str | None]) -> bool:
    """Whether the folder holds this very comparison already.

    Raises:
        ComparisonError: it holds another one, or something else, or what the runs depend on has changed since.
    """
    blocking = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if blocking is not None:
        raise ComparisonError(f"{folder} cannot be a folder, since {blocking} is a file: give another --out.")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / PLAN).is_file():
        if (folder / PREPARING).exists():
            return False
        raise ComparisonError(f"{folder} exists and holds no comparison: give another --out. Nothing was changed.")
    there, here = _plan_of_comparison(folder), options.hashed()
    differing = [key for key in here if there["options"].get(key) != here[key]]
    if differing:
        key = differing[0]
        raise ComparisonError(
            f"{folder} holds another comparison ({key}: {there['options'].get(key)}, here {here[key]}): give another "
            f"--out. Nothing was changed."
        )
    for name, value in fingerprints.items():
        if there["fingerprints"].get(name) != value:
            raise ComparisonError(
                f"The {name} changed since {folder} was begun, so that its runs cannot be continued: give another "
                f"--out. Nothing was changed."
            )
    return True


def plan(folder: Path) -> dict[str, Any]:
    """The plan that was written to a comparison's folder: its options and fingerprints."""
    return json.loads((folder / PLAN).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def options_of(folder: Path) -> dict[str, Any]:
    """The options of a comparison's folder that its runs depend on.

    Raises:
        ComparisonError: the folder holds no comparison.
    """
    if not (folder / PLAN).is_file():
        raise ComparisonError(f"{folder} holds no comparison: give the folder of one. Nothing was changed.")
    return dict(_plan_of_comparison(folder)["options"])


@contextlib.contextmanager
def preparing(folder: Path, options: Options, fingerprints: dict[str, str | None]) -> Iterator[None]:
    """Make a new comparison's folder around what is put into it; on any error nothing of it is left."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PREPARING).touch()
    try:
        yield
        content = {"options": options.hashed(), "fingerprints": fingerprints}
        write(folder / PLAN, json.dumps(content, indent=1))
        (folder / PREPARING).unlink()
    except BaseException:
        clear(folder)
        for name in (ARRAY, INDEX, PLAN, PREPARING):
            for path in (folder / name, folder / f"{name}.partial"):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def clear(folder: Path) -> None:
    """Remove what was unpacked from an archive."""
    shutil.rmtree(folder / UNPACKED, ignore_errors=True)


def _are_options(options: Any) -> bool:
    """Whether these can be the options of a comparison: what it calls with them is code of ours, or named in them."""
    if not isinstance(options, dict) or not options.keys() <= {one.name for one in fields(Options)} - {*NOT_HASHED}:
        return False
    variants, functions = options.get("variants", []), [options.get(key, {}) for key in ("builds", "own")]
    return (
        isinstance(options.get("backbone", ""), str)
        and isinstance(variants, list)
        and all(isinstance(name, str) for name in variants)
        and all(isinstance(one, dict) for one in functions)
    )


def _plan_of_comparison(folder: Path) -> dict[str, Any]:
    try:
        there = plan(folder)
        if _are_options(there["options"]) and isinstance(there["fingerprints"], dict):
            return there
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise ComparisonError(f"{folder} has a {PLAN} of something else: give another --out. Nothing was changed.")
