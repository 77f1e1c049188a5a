"""Who calls: what a call of another library is for is often told by the names of its functions alone."""

import dis
import sys

# reads an attribute by its name in the source, unlike `hasattr` and `getattr`
READS = ("LOAD_ATTR", "LOAD_METHOD")
# makes a text of something
FORMATS = ("BINARY", "FORMAT", "CONVERT")


def names(count: int) -> list[str]:
    """The names of the functions on the stack above the function that asks, its caller first."""
    functions: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(functions) < count:
        functions.append(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return functions


def module() -> str:
    """The name of the module whose function called the one that asks."""
    return str(sys._getframe(2).f_globals.get("__name__"))


def does(instructions: tuple[str, ...]) -> bool:
    """Whether the function that called the one that asks is at one of these instructions of the interpreter."""
    frame = sys._getframe(2)
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(instructions)
