"""Checks of arguments."""

import re
from typing import Any

import pytest
import torch

from convattn import checks
from convattn.errors import InvalidOption, MissingExtra, ShapeMismatch


@pytest.mark.parametrize("value", [1, 2, 10**9])
def test_positive(value: int) -> None:
    checks.positive("Here", "size", value)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True, [1]])
def test_not_positive(value: Any) -> None:
    message = f"Here: size must be a whole number of at least 1, got {value!r}."
    with pytest.raises(InvalidOption, match=f"^{re.escape(message)}$"):
        checks.positive("Here", "size", value)


def test_choice() -> None:
    checks.choice("Here", "colour", "red", ("red", None))
    checks.choice("Here", "colour", None, ("red", None))
    # an iterator is used up by the first look at it
    with pytest.raises(InvalidOption, match=r"^Here: colour must be one of 'red', None, got 'blue'\.$"):
        checks.choice("Here", "colour", "blue", iter(["red", None]))
    with pytest.raises(InvalidOption, match=r"got \['red'\]"):
        checks.choice("Here", "colour", ["red"], ("red", None))


@pytest.mark.parametrize("value", [1, 2, 3])
def test_dimensions(value: int) -> None:
    checks.dimensions("Here", value)


@pytest.mark.parametrize("value", [0, 4, "2", None])
def test_wrong_dimensions(value: Any) -> None:
    with pytest.raises(InvalidOption, match=f"^Here: dimensions must be one of 1, 2, 3, got {value!r}.$"):
        checks.dimensions("Here", value)


def test_feature_map() -> None:
    checks.feature_map("Here", torch.ones(2, 3, 4, 5), 3, 2)
    checks.feature_map("Here", torch.ones(2, 7, 4), None, 1)
    checks.feature_map("Here", torch.ones(0, 3, 4, 5), 3, 2)


@pytest.mark.parametrize(
    "shape, channels, spatial, message",
    [
        (
            (2, 4, 5, 5),
            3,
            2,
            "expected a map of shape (B, 3, H, W), got (2, 4, 5, 5); "
            "the module was built with dimensions=2 and channels=3.",
        ),
        (
            (2, 4, 5),
            None,
            2,
            "expected a map of shape (B, C, H, W), got (2, 4, 5); the module was built with dimensions=2.",
        ),
        (
            (2, 3, 5, 5),
            3,
            1,
            "expected a map of shape (B, 3, L), got (2, 3, 5, 5); "
            "the module was built with dimensions=1 and channels=3.",
        ),
        (
            (3,),
            3,
            3,
            "expected a map of shape (B, 3, D, H, W), got (3,); the module was built with dimensions=3 and channels=3.",
        ),
        ((2, 3, 0, 5), 3, 2, "the map has no elements in one of its dimensions: (2, 3, 0, 5)."),
        ((2, 0, 5, 5), None, 2, "the map has no elements in one of its dimensions: (2, 0, 5, 5)."),
    ],
    ids=str,
)
def test_wrong_feature_map(shape: tuple[int, ...], channels: int | None, spatial: int, message: str) -> None:
    with pytest.raises(ShapeMismatch, match=f"^Here: {re.escape(message)}$"):
        checks.feature_map("Here", torch.ones(shape), channels, spatial)


def test_suggestion_of_few() -> None:
    assert checks.suggestion("rde", ["red", "blue"]) == "Did you mean 'red'? Known: blue, red."
    assert checks.suggestion("BLUE", ["red", "blue"]) == "Did you mean 'blue'? Known: blue, red."
    assert checks.suggestion("zzz", iter(["red", "blue"])) == "Known: blue, red."


def test_suggestion_of_many() -> None:
    known = [f"resnet{i}" for i in range(30)]
    nearest = checks.suggestion("resnet7x", known)
    assert "'resnet7'" in nearest and nearest.endswith("?") and nearest.count("'") <= 6
    assert checks.suggestion("zzz", known) == "30 names are known."
    assert checks.suggestion("zzz", known[:20]).count("resnet") == 20


def test_extra() -> None:
    import json.decoder

    assert checks.extra("json.decoder", "This") is json.decoder
    message = (
        r'^The report needs the package nosuch: pip install "convattn\[compare\]" \(No module named \'nosuch\'\)\.$'
    )
    with pytest.raises(MissingExtra, match=message) as caught:
        checks.extra("nosuch.part", "The report")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(MissingExtra, match=r"convattn\[export\]"):
        checks.extra("nosuch", "The export", "export")


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (3, "3"),
        ("se", "'se'"),
        ("a\nb", r"'a\nb'"),
        ("x" * 100, "a str"),
        (torch.nn.Sequential(torch.nn.ReLU()), "a Sequential"),
    ],
)
def test_what_a_message_shows_of_a_thing(thing: object, said: str) -> None:
    assert checks.said(thing) == said
