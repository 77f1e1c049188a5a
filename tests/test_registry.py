"""The names of modules, and what is said about wrong ones."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convattn
from convattn import nn, registry
from convattn.errors import InvalidOption, UnknownName
from own_modules import Elementwise, GlobalContext


def test_names() -> None:
    assert {"se", "channel", "spatial", "cbam"} <= set(convattn.names("gate"))
    assert {"avg", "max", "avgmax", "concat", "dual"} <= set(convattn.names("head"))
    assert convattn.names() == sorted(name for kind in registry.KINDS for name in convattn.names(kind))
    assert len(set(convattn.names())) == len(convattn.names())
    assert all(name.isidentifier() and name == name.lower() for name in convattn.names())


def test_every_public_module_has_one_name() -> None:
    modules = [registry.entry(name).module for name in convattn.names()]
    public = [getattr(nn, name) for name in nn.__all__ if name not in ("Gate", "Head", "Update")]
    assert sorted(module.__name__ for module in modules) == sorted(module.__name__ for module in public)


def test_every_file_is_imported_by_the_package() -> None:
    # a file that the package does not import cannot register anything
    files = Path(inspect.getfile(nn)).parent.glob("*.py")
    defined = {registry.entry(name).module.__module__ for name in convattn.names()}
    assert {f"convattn.nn.{file.stem}" for file in files} - {"convattn.nn.__init__", "convattn.nn.base"} == defined


@pytest.mark.parametrize("name", convattn.names())
def test_entry(name: str) -> None:
    entry = registry.entry(name)
    assert entry.name == name
    assert name in convattn.names(entry.kind)
    module = entry.build(8, dimensions=1)
    assert type(module) is entry.module
    assert module.dimensions == 1
    assert len(module.eval()(torch.randn(2, 8, 5))) == 2
    with pytest.raises(TypeError, match="colour"):
        entry.build(8, colour="red")


@pytest.mark.parametrize(
    "wrong, nearest", [("cbma", "cbam"), ("CBAM", "cbam"), ("sse", "se"), ("chanel", "channel"), ("avg_max", "avgmax")]
)
def test_wrong_name_suggests_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(UnknownName) as caught:
        registry.entry(wrong)
    message = str(caught.value)
    assert message.startswith(f"No attention or pooling head is called {wrong!r}. Did you mean {nearest!r}? Known: ")
    assert message.endswith(f"Known: {', '.join(convattn.names())}.") or len(convattn.names()) > 20
    assert "\n" not in message


def test_wrong_name_without_a_near_one_lists_what_is_known() -> None:
    with pytest.raises(UnknownName, match=r"^No attention or pooling head is called 'zzzz'\. ") as caught:
        registry.entry("zzzz")
    assert "Did you mean" not in str(caught.value)
    assert "known" in str(caught.value).lower()


def test_registering_is_all_that_a_new_module_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @registry.register("half", "gate", takes_channels=False)
    class Half(nn.Gate):
        """Half of everything."""

        def __init__(self, *, dimensions: int = 2, start: str = "paper") -> None:
            super().__init__(channels=None, dimensions=dimensions, start=start)

        def gate(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x[:, :1], 0.5)

    # the decorator hands the class back
    assert Half.__doc__ == "Half of everything."
    assert "half" in convattn.names() and "half" in convattn.names("gate") and "half" not in convattn.names("head")
    # modules without channels are built like the others
    built = registry.entry("half").build(16, dimensions=1, start="identity")
    assert isinstance(built, Half) and built.dimensions == 1 and built.strength is not None
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(Half()(x), x / 2)
    assert torch.equal(Half(start="identity")(x), x)


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        registry.entry("se").name = "other"  # type: ignore[misc]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(InvalidOption, match="'se' is the name of SqueezeExcite already"):
        registry.register("se", "gate")(int)


@pytest.mark.parametrize("name", [3, None, ["se"]])
def test_a_name_that_is_no_text(name: object) -> None:
    with pytest.raises(UnknownName, match="is called"):
        registry.entry(name)  # type: ignore[arg-type]


def test_an_unknown_kind() -> None:
    with pytest.raises(InvalidOption, match="kind must be one of"):
        registry.names("gates")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gates", "Gate", "", None, 3, ["gate"]])
def test_an_unknown_kind_is_refused(kind: object) -> None:
    before = convattn.names()
    with pytest.raises(InvalidOption, match=r"^register: kind must be one of 'gate', 'update', 'head', got ") as caught:
        convattn.register("mine", kind)(nn.CBAM)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and convattn.names() == before


@pytest.mark.parametrize(
    "name",
    ["a+b", "", " ", "a,b", "a b", "a\n", "a/b", "a:b", "mine.py:Gate", "baseline", "noise", 3, None, ["a"], b"a"],
)
def test_a_bad_name_is_refused(name: object) -> None:
    before = convattn.names()
    with pytest.raises(
        InvalidOption, match=r"^register: expected a name of letters, digits and \. _ - .* got "
    ) as caught:
        convattn.register(name, "gate")(nn.CBAM)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and convattn.names() == before


@pytest.mark.parametrize("thing", [3, None, "nn.Gate", nn.CBAM(8), lambda channels: nn.CBAM(channels)])
def test_what_is_no_class_is_refused(thing: object) -> None:
    with pytest.raises(InvalidOption, match=r"^register: expected a class under the name 'mine', got ") as caught:
        convattn.register("mine", "gate")(thing)  # type: ignore[type-var]
    assert "\n" not in str(caught.value) and "mine" not in convattn.names()


@pytest.mark.parametrize("kind", ["gate", "head"])
def test_a_class_of_another_kind_is_refused(kind: str) -> None:
    with pytest.raises(InvalidOption, match=f"GlobalContext is of the kind 'update', got '{kind}'"):
        convattn.register("mine", kind)(GlobalContext)  # type: ignore[arg-type]


def test_an_update_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    assert convattn.names("update") == []
    assert convattn.register("global-context", "update")(GlobalContext) is GlobalContext
    assert convattn.names("update") == ["global-context"] and "global-context" in convattn.names()
    # the same again, as in a notebook, whose cell makes another class of it
    again = type("GlobalContext", (GlobalContext,), {"__module__": GlobalContext.__module__})
    convattn.register("global-context", "update")(again)
    assert registry.entry("global-context").module is again
    with pytest.raises(InvalidOption, match="'global-context' is the name of GlobalContext already"):
        convattn.register("global-context", "gate")(Elementwise)


def test_the_name_of_ours_is_nobody_elses() -> None:
    code = """
import convattn
try:
    @convattn.register("se", "gate")
    class Mine: pass
except convattn.ConvattnError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "register: 'se' is the name of SqueezeExcite already.\n", done.stderr


def test_others_are_known_for_as_long_as_they_are_given() -> None:
    one = registry.Entry("mine", "update", GlobalContext, GlobalContext, registered=False)
    with registry.also([one]):
        assert registry.entry("mine") is one and "mine" not in convattn.names()
    with pytest.raises(UnknownName):
        registry.entry("mine")


def test_the_example_of_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    test = doctest.DocTestFinder().find(convattn.register, "register", globs=dict(vars(registry)))[0]
    result = doctest.DocTestRunner().run(test, clear_globs=False)
    assert result.attempted > 3 and result.failed == 0
    model = convattn.attach(convattn.networks.resnet20(), "channel-mean")
    assert len(convattn.attachment.attached(model)) == 9
