"""The folder of a comparison: whether it may be used, who works in it, and how it comes to be."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from convattn import checks, files
from convattn.compare.leaks import LEAKS
from convattn.compare.options import NOT_HASHED, Options
from convattn.data import ARRAY, INDEX
from convattn.data.listing import LOCK, PLAN, PREPARING
from convattn.errors import ComparisonError, DamagedFile
from convattn.train.store import RUNS

# of the files in a folder; earlier ones had no checksums, and their runs were of other thread counts
SCHEMA = 2
UNPACKED = "unpacked"
# the files that are made before the plan is written
MADE = (ARRAY, INDEX, LEAKS)
# what a process that works in the folder says of itself
ACTIVITY = "activity.json"


def check(folder: Path, options: Options, fingerprints: dict[str, str | None]) -> bool:
    """Whether the folder holds this very comparison already.

    Raises:
        ComparisonError: it holds another one, or something else, or what the runs depend on has changed since.
    """
    check_free(folder)
    if not (folder / PLAN).exists():
        return False
    plan, options_now = read_plan(folder), options.hashed()
    differing = [key for key in options_now if plan["options"].get(key) != options_now[key]]
    if differing:
        key = differing[0]
        raise ComparisonError(
            f"{folder} holds another comparison ({key}: {plan['options'].get(key)}, here {options_now[key]}): give "
            f"another --out. Nothing was changed."
        )
    for name, value in fingerprints.items():
        if plan["fingerprints"].get(name) != value:
            raise ComparisonError(
                f"The {name} changed since {folder} was begun, so that its runs cannot be continued: give another "
                f"--out. Nothing was changed."
            )
    return True


def check_free(folder: Path) -> None:
    """Raise `ComparisonError` where a folder cannot be that of a comparison, or holds something else."""
    try:
        blocking = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
        if blocking is not None:
            raise ComparisonError(f"{folder} cannot be a folder, since {blocking} is a file: give another --out.")
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        names = {name for name in names if not fnmatch(name, files.PARTIAL)}
    except OSError as error:
        raise files.explained(error, folder) from error
    if PLAN in names:
        read_plan(folder)
    elif names and PREPARING not in names and not names <= {LOCK, ACTIVITY}:
        raise ComparisonError(f"{folder} exists and holds no comparison: give another --out. Nothing was changed.")


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a comparison's folder: its options, its fingerprints, and the threads of each of its runs.

    Raises:
        ComparisonError: the folder holds no comparison, or one of another version, or its plan is damaged.
    """
    path = folder / PLAN
    try:
        plan = files.read_json(path)
    except DamagedFile as error:
        _refuse_other_schema(folder, path)
        raise ComparisonError(
            f"{error} It says what the runs in {folder} are, so that they cannot be continued: put back a copy of it, "
            f"or give another --out."
        ) from error
    except OSError as error:
        raise files.explained(error, folder) from error
    if plan is None:
        raise ComparisonError(f"{folder} holds no comparison: give the folder of one. Nothing was changed.")
    if plan.get("schema") != SCHEMA:
        _refuse_other_schema(folder, path)
    if not _are_options(plan.get("options")) or not isinstance(plan.get("fingerprints"), dict):
        raise ComparisonError(f"{folder} has a {PLAN} of something else: give another --out. Nothing was changed.")
    return plan


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Work in a folder as the only process; a folder that is made for it and stays empty is removed again.

    The system releases the lock when the process ends, in whatever way.

    Args:
        folder: need not be there yet.
        wait: wait until another process has ended.
        say: told once if it is waited.

    Raises:
        ComparisonError: another process works in the folder, or it cannot be written.
    """
    check_free(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    locked_before = (folder / LOCK).exists()
    try:
        lock = _acquired(folder, wait, say)
    except OSError as error:
        _remove_empty(made)
        raise files.explained(error, folder) from error
    try:
        # what a process that was killed had begun to write
        files.remove_partial(folder)
        files.write_json(folder / ACTIVITY, _activity())
        yield
    except BaseException as error:
        if not locked_before and not (folder / RUNS).exists():
            # a request that was refused leaves nothing; others that wait for the lock notice that its file is gone
            (folder / LOCK).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise files.explained(error, folder) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            (folder / ACTIVITY).unlink(missing_ok=True)
        _remove_empty(made)
        lock.release()


def activity(folder: Path) -> dict[str, Any] | None:
    """What the process that works in a folder says of itself; None where none does, or says nothing.

    Gives `pid`, `host`, `since` (local time) and `command`, and once it trains what `tell_runs` wrote.
    """
    filelock = checks.extra("filelock", "Comparing")
    lock = folder / LOCK
    if not lock.exists():
        return None
    try:
        with filelock.FileLock(lock, timeout=0):
            return None
    except filelock.Timeout:
        pass
    except OSError:
        # a folder that may only be read: what it says, which a killed process may have left
        return files.read_intact(folder / ACTIVITY)
    try:
        return files.read_json(folder / ACTIVITY) or {}
    except DamagedFile:
        return {}


def tell_runs(folder: Path, runs: int, already: int) -> None:
    """Write down how many runs the process that works in a folder carries out, of which `already` were done before."""
    about = files.read_intact(folder / ACTIVITY) or _activity()
    files.write_json(folder / ACTIVITY, {**about, "runs": runs, "already": already, "training_since": time.time()})


@contextlib.contextmanager
def preparing(folder: Path, options: Options, fingerprints: dict[str, str | None]) -> Iterator[None]:
    """Make a new comparison of what is put into its folder; on any error nothing of it is left.

    `PREPARING` is there from the first file to the plan: a folder that has it was left in between and is begun anew.
    """
    (folder / PREPARING).touch()
    # what a killed process left may be of other data
    for name in MADE:
        (folder / name).unlink(missing_ok=True)
    try:
        yield
        content = {"schema": SCHEMA, "options": options.hashed(), "fingerprints": fingerprints}
        files.write_json(folder / PLAN, {**content, "threads": options.threads})
        (folder / PREPARING).unlink()
    except BaseException:
        clear(folder)
        for name in (*MADE, PLAN, PREPARING):
            (folder / name).unlink(missing_ok=True)
        files.remove_partial(folder)
        raise


def clear(folder: Path) -> None:
    """Remove what was unpacked from an archive."""
    shutil.rmtree(folder / UNPACKED, ignore_errors=True)


def _acquired(folder: Path, wait: bool, say: Callable[[str], None]) -> Any:
    filelock = checks.extra("filelock", "Comparing")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK)
        try:
            # `activity` may hold it for a moment
            lock.acquire(timeout=1)
            return lock
        except FileNotFoundError:
            # another process has just removed the folder, which it had made for a request that was wrong
            continue
        except filelock.Timeout:
            about = activity(folder) or {}
        if not wait:
            raise ComparisonError(
                f"{folder}: {_who(about)} works there already. Wait for it (--wait), or give another --out; "
                f"`convattn status {shlex.quote(str(folder))}` tells how far it is."
            )
        say(f"Waiting: {_who(about)} works in {folder} ...")
        with contextlib.suppress(FileNotFoundError):
            lock.acquire()
            return lock


def _activity() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": since, "command": shlex.join(sys.argv)}


def _who(about: dict[str, Any]) -> str:
    """The process that works in a folder, in words."""
    if not {"pid", "host", "since"} <= about.keys():
        return "another process"
    return f"process {about['pid']} on {about['host']}, begun {about['since']},"


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _refuse_other_schema(folder: Path, path: Path) -> None:
    """Raise `ComparisonError` for a plan of another version of convattn, which has another schema or none."""
    try:
        plan = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return
    if isinstance(plan, dict) and {"options", "fingerprints"} <= plan.keys() and plan.get("schema", 1) != SCHEMA:
        raise ComparisonError(
            f"{folder} was begun by another version of convattn (schema {plan.get('schema', 1)}, here {SCHEMA}): go on "
            f"with that version, or give another --out. Nothing was changed."
        )


def _are_options(options: Any) -> bool:
    """Whether these can be the options of a comparison: what it calls with them is code of ours, or named in them."""
    if not isinstance(options, dict) or not options.keys() <= {one.name for one in fields(Options)} - {*NOT_HASHED}:
        return False
    if not {"data", "backbone", "variants", "device"} <= options.keys():
        return False
    variants, functions = options["variants"], [options.get(key, {}) for key in ("builds", "own")]
    return (
        all(isinstance(options[key], str) for key in ("data", "backbone", "device"))
        and isinstance(variants, list)
        and all(isinstance(name, str) for name in variants)
        and all(isinstance(one, dict) for one in functions)
    )
