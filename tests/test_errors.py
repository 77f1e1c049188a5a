"""The tree of errors: what the docstring draws is what there is."""

import builtins
import inspect
import pickle
import re

import pytest

from convattn import errors
from convattn.errors import ConvattnError

TREE = re.findall(r"^ *[├└]── (\w+) +\((\w+)\) +(\S.*)$", errors.__doc__ or "", flags=re.MULTILINE)
CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = {name: builtin for name, builtin, _ in TREE}
    assert len(drawn) == len(TREE)
    assert set(drawn) == {cls.__name__ for cls in CLASSES} - {"ConvattnError"}
    assert issubclass(ConvattnError, Exception)
    for name, builtin in drawn.items():
        assert getattr(errors, name).__bases__ == (ConvattnError, getattr(builtins, builtin))


def test_the_drawing_is_whole() -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if "──" in line]
    assert len(lines) == len(TREE)
    assert [line.strip()[0] for line in lines] == ["├"] * (len(lines) - 1) + ["└"]


@pytest.mark.parametrize("cls", CLASSES)
def test_messages_survive(cls: type[ConvattnError]) -> None:
    message = "SqueezeExcite: hidden must be a whole number of at least 1, got 'x'."
    # as it is written, which `KeyError` would put in quotes
    assert str(cls(message)) == message
    # errors cross the border between processes
    copied = pickle.loads(pickle.dumps(cls(message)))
    assert type(copied) is cls and str(copied) == message
    with pytest.raises(ConvattnError, match="hidden"):
        raise cls(message)


def test_docstrings() -> None:
    docs = [cls.__doc__ or "" for cls in CLASSES]
    assert all(doc.endswith(".") for doc in docs)
    assert len(set(docs)) == len(docs), "a class without its own docstring shows that of its base"
