"""Code of the user in a file, named `FILE.py:NAME`: how it is loaded, and whether a file may name it.

What the user types is run. What another file says, such as the metadata of weights, is run only where the user names
the same code too: `check` says so before anything is loaded.
"""

import contextlib
import importlib.util
import io
import shlex
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from convattn import checks
from convattn.errors import InvalidOption, UnknownName, UntrustedCode

Trust = str | Sequence[str]
# code that builds a network and takes longer may hang, or fetch weights
LONG_SECONDS = 30.0


def is_named(name: object) -> bool:
    """Whether a name is `FILE.py:NAME`; nothing else ever makes `load` run a file."""
    return isinstance(name, str) and ".py:" in name


def load(name: str) -> Any:
    """Run the file of `FILE.py:NAME`, and return what has that name in it.

    Raises:
        UnknownName: no such file, none that can be run, or nothing callable of that name in it.
    """
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UnknownName(f"No file {file}, named by {name!r}.")
    spec = importlib.util.spec_from_file_location(f"convattn_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnknownName(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickles look their module up
    sys.modules[spec.name] = module
    try:
        with running(str(path)):
            spec.loader.exec_module(module)
    except Exception as error:
        raise UnknownName(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, attribute, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownName(f"{path} has no function {attribute!r}. {checks.suggestion(attribute, known)}")
    return getattr(module, attribute)


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Run code of the user: what it prints goes to the standard error with its name, and a long run is told of.

    Raises:
        EndedProgram: it called `sys.exit`.
    """
    timer = threading.Timer(LONG_SECONDS, _tell_long, [name])
    timer.daemon = True
    timer.start()
    try:
        # with what files have that are written to: bytes, an encoding, a number
        raw: Any = _Prefixed(name)
        writer = io.TextIOWrapper(raw, "utf-8", errors="backslashreplace", write_through=True)
        with contextlib.redirect_stdout(writer):
            yield
    except SystemExit as error:
        raise EndedProgram(f"it ended the program, as by sys.exit({error.code!r})") from error
    finally:
        timer.cancel()


class EndedProgram(RuntimeError):
    """Code of the user that ended the program in place of returning."""


class _Prefixed(io.RawIOBase):
    """Writes lines to the standard error, each with the name of the code that wrote it."""

    def __init__(self, name: str) -> None:
        self._name, self._begun = name, b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return sys.stderr.fileno()

    def write(self, content: Any) -> int:
        *lines, self._begun = (self._begun + bytes(content)).split(b"\n")
        for line in lines:
            sys.stderr.write(f"{self._name}: {line.decode(errors='backslashreplace')}\n")
        return len(content)


def _tell_long(name: str) -> None:
    sys.stderr.write(f"convattn: {name} has been running for {LONG_SECONDS:.0f} seconds and has not returned yet.\n")


def check(names: Iterable[object], where: Path | str, trust: Trust) -> None:
    """Refuse code that a file names unless it is trusted: the same file, links followed, and the same name in it.

    Args:
        names: what the file says; names of other things than code are passed over.
        where: the file.
        trust: `FILE.py:NAME`, or several.

    Raises:
        UntrustedCode: code that is not trusted; the message names it.
        InvalidOption: `trust` is none.
    """
    trusted = {_location(name) for name in _listed(trust)}
    named = dict.fromkeys(str(name) for name in names if is_named(name))
    unknown = [name for name in named if _location(name) not in trusted]
    if unknown:
        shown = [_shown(name) for name in unknown]
        trust_all = unknown[0] if len(unknown) == 1 else unknown
        raise UntrustedCode(
            f"{where} names code to run, {', '.join(shown)}: if you trust that code, give "
            f"{' '.join(f'--trust {name}' for name in shown)} (from Python trust={trust_all!r}). Nothing was run."
        )


def _listed(trust: Trust) -> list[str]:
    names = [trust] if isinstance(trust, str) else list(trust)
    for name in names:
        if not is_named(name) or not name.rpartition(":")[2]:
            raise InvalidOption(f"trust: expected code named as FILE.py:NAME, got {name!r}.")
    return names


def _location(name: str) -> tuple[Path, str]:
    file, _, attribute = name.rpartition(":")
    try:
        return Path(file).resolve(), attribute
    except (OSError, RuntimeError, ValueError) as error:
        # a loop of links, or a path with a null byte, which is nobody's file
        raise UnknownName(f"No file {file!r}, named by {name!r} ({checks.reason(error)}).") from error


def _shown(name: str) -> str:
    """A name as a shell takes it; one with control characters, which would write on a terminal, as Python does."""
    return shlex.quote(name) if name.isprintable() else repr(name)
